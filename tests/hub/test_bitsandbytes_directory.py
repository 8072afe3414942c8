"""Directories that transformers saved with bitsandbytes: the matrices that bitsandbytes makes of them."""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest
from hub_reference import FIXTURES, PYTHON, ROOT, needs_reference
from safetensors.numpy import load_file, save_file

from research import hub
from research.hub import CheckpointError
from research.hub.assemble import disassemble
from research.models import families
from research.paths import named_leaves
from research.weights.base import is_weight
from research.weights.double import DoubleQuantized
from research.weights.formats import Codebook, Integer
from research.weights.quantized import bits_per_parameter, is_quantized

BNB = FIXTURES / "bitsandbytes"
PROMPT = [1, 5, 9, 3, 40, 22, 47, 8, 11, 2, 35, 7]
K = "stack_0/block_0/attention/k/kernel"
DOWN = "model.layers.0.mlp.down_proj.weight"


def leaves_of(loaded):
    return dict(named_leaves(loaded.params, is_leaf=is_weight))


def check(folder, rtol=0.0):
    expected = load_file(folder / "expected.safetensors")
    loaded = hub.load(folder)
    names = families.find(loaded.config).name_map(loaded.model.config)
    found = dict(disassemble(names, loaded.params)[1])
    for name, matrix in expected.items():
        if name != "logits":
            np.testing.assert_allclose(found[name], matrix, rtol=rtol, atol=0, err_msg=name)
    assert len(expected) >= 3
    return loaded, expected["logits"]


def check_four_bits(folder):
    loaded, logits = check(folder)
    np.testing.assert_allclose(loaded.logits(PROMPT)[0], logits, rtol=0, atol=1e-4)
    return loaded


def check_eight_bits(folder):
    """bitsandbytes rounds the inputs to 8 bits too, when it multiplies: logits are near."""
    loaded, logits = check(folder, rtol=2e-7)
    assert np.abs(loaded.logits(PROMPT)[0] - logits).max() < 0.1 * np.abs(logits).max()
    return loaded


def test_nf4_with_double_quantization(capsys):
    leaves = leaves_of(check_four_bits(BNB / "nf4_double"))
    assert leaves[K].format == Codebook("NF4", 64, double=True)
    assert isinstance(leaves[K].scale, DoubleQuantized) and leaves[K].codes.shape == (2, 16, 32)
    assert sum(map(is_quantized, leaves.values())) == 6
    assert bits_per_parameter(leaves) < 4.2
    assert capsys.readouterr().out == (
        f"stack_0/block_0/ffn/down/kernel is loaded dense: {DOWN}: its blocks of 64 do not end "
        "with rows of 96\n"
    )


def test_fp4_with_modules_left_dense():
    leaves = leaves_of(check_four_bits(BNB / "fp4"))
    assert leaves[K].format == Codebook("FP4", 64)
    assert not is_weight(leaves["stack_0/block_0/attention/v/kernel"])
    assert sum(map(is_quantized, leaves.values())) == 5


def test_int8():
    leaves = leaves_of(check_eight_bits(BNB / "int8"))
    assert leaves[K].format == Integer(8, "row")
    assert sum(map(is_quantized, leaves.values())) == 7


@pytest.mark.reference
@needs_reference
def test_directories_written_now(tmp_path):
    done = subprocess.run(
        [PYTHON, ROOT / "scripts/references/bnb_directories.py", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    check_four_bits(tmp_path / "nf4_double")
    check_four_bits(tmp_path / "fp4")
    check_eight_bits(tmp_path / "int8")


def broken(case, folder, tensor=None, change=None, **fields):
    shutil.copytree(BNB / case, folder)
    if tensor is not None:
        tensors = load_file(folder / "model.safetensors")
        array = tensors.pop(tensor)
        if (array := change(array)) is not None:
            tensors[tensor] = np.ascontiguousarray(array)
        save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def stated(**fields):
    def change(array):
        text = json.dumps(json.loads(array.tobytes()) | fields)
        return np.frombuffer(text.encode(), np.uint8)

    return change


STATE = ".quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    "case, tensor, change, said",
    [
        ("nf4_double", ".absmax", lambda a: None, "lacks the tensor {}.absmax"),
        ("nf4_double", STATE, lambda a: None, "{} is of dtype U8 and lacks {}.quant_state"),
        (
            "nf4_double",
            STATE,
            stated(blocksize=32),
            r"{}.absmax has shape \[96\], expected \[192\]",
        ),
        (
            "nf4_double",
            STATE,
            stated(shape=[64, 64]),
            r"{} has shape \[3072, 1\], expected \[2048, ",
        ),
        ("nf4_double", STATE, stated(nested_blocksize=64), "nested_blocksize = 64"),
        (
            "nf4_double",
            STATE,
            stated(nested_offset=float("nan")),
            "nested_offset = nan; expected 256",
        ),
        ("nf4_double", STATE, stated(quant_type="nf3"), "no description of a matrix in nf4 or fp4"),
        ("nf4_double", ".quant_map", lambda a: a[::-1], "{}.quant_map is not the table NF4"),
        ("nf4_double", ".nested_absmax", lambda a: a * np.nan, "{}.nested_absmax holds nan or inf"),
        ("fp4", ".absmax", lambda a: a[:-1], r"{}.absmax has shape \[95\], expected \[96\]"),
    ],
)
def test_broken_tensors_are_named(tmp_path, case, tensor, change, said):
    folder = broken(case, tmp_path / "model", f"{DOWN}{tensor}", change)
    with pytest.raises(CheckpointError, match=said.format(DOWN, DOWN)):
        hub.load(folder)


def test_int8_without_its_scales(tmp_path):
    name = DOWN.replace("weight", "SCB")
    with pytest.raises(CheckpointError, match=f"a: lacks the tensor {name}"):
        hub.load(broken("int8", tmp_path / "a", name, lambda a: None))
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[31\], expected \[32\]"):
        hub.load(broken("int8", tmp_path / "b", name, lambda a: a[:-1]))


def test_what_is_not_supported(tmp_path):
    with pytest.raises(
        CheckpointError, match="bnb_4bit_quant_storage = 'bfloat16' is not supported"
    ):
        hub.load(broken("fp4", tmp_path / "a", bnb_4bit_quant_storage="bfloat16"))
    with pytest.raises(CheckpointError, match="load_in_4bit or load_in_8bit = true, one of them"):
        hub.load(broken("fp4", tmp_path / "b", load_in_8bit=True))
