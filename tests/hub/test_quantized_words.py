"""GPTQ and AWQ directories, against the matrices that their slow writer says they mean."""

import json

import jax
import numpy as np
import pytest
from quantized_writers import words_of, write
from safetensors.numpy import load_file, save_file

from research import hub
from research.hub import CheckpointError
from research.hub.assemble import disassemble
from research.hub.quantized_tensors import bits_in_words
from research.models import families
from research.paths import named_leaves
from research.weights.base import is_weight
from research.weights.formats import Integer
from research.weights.quantized import is_quantized

Q = "model.layers.1.self_attn.q_proj"


def quantized_leaves(params):
    leaves = named_leaves(params, is_leaf=is_weight)
    return {name: w for name, w in leaves if is_quantized(w)}


def check(folder, matrices):
    """Every matrix of the opened directory is the one meant, bit for bit."""
    loaded = hub.load(folder)
    names = families.find(loaded.config).name_map(loaded.model.config)
    found = dict(disassemble(names, loaded.params)[1])
    assert found.keys() == matrices.keys()
    for name, matrix in matrices.items():
        np.testing.assert_array_equal(found[name], matrix, err_msg=name)
    return loaded


def test_words_by_hand():
    assert words_of(range(8), 4) == [0x76543210]
    stream = sum(code << 3 * i for i, code in enumerate([5, 3, 6, 1] * 8))
    assert words_of([5, 3, 6, 1] * 8, 3) == [stream >> 32 * i & 0xFFFFFFFF for i in range(3)]
    words = np.array([[0x76543210, -1]], np.int32)
    assert bits_in_words(words, 4).tolist() == [[*range(8), *[15] * 8]]
    assert bits_in_words(words, 8).tolist() == [[0x10, 0x32, 0x54, 0x76, *[255] * 4]]


@pytest.mark.parametrize(
    "bits, group, more",
    [
        (4, 32, {}),
        (2, 16, {}),
        (3, 32, {"version": 2, "checkpoint_format": "gptq_v2"}),
        (8, -1, {}),
    ],
)
def test_gptq(tmp_path, bits, group, more):
    loaded = check(tmp_path / "model", write(tmp_path / "model", "gptq", bits, group, **more))
    kept = quantized_leaves(loaded.params)
    assert len(kept) == 7
    down = kept["stack_0/block_0/ffn/down/kernel"]
    assert down.format == Integer(bits, 96 if group == -1 else group, "integer")
    assert down.scale.dtype == np.float16 and down.codes.shape == (2, 64, 96 * bits // 8)
    assert np.isfinite(loaded.logits(np.arange(8))).all()


def test_awq_with_dense_modules(tmp_path):
    skip = ("self_attn.o_proj",)
    matrices = write(
        tmp_path / "model", "awq", 4, 32, skip=skip, version="gemm", zero_point=True,
        modules_to_not_convert=["o_proj"],
    )  # fmt: skip
    loaded = check(tmp_path / "model", matrices)
    assert len(quantized_leaves(loaded.params)) == 6
    hub.save_quantized(tmp_path / "ours", loaded)
    again = hub.load(tmp_path / "ours")
    assert jax.tree.structure(again.params) == jax.tree.structure(loaded.params)
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


def test_act_order_is_dense_and_said_so(tmp_path, capsys):
    matrices = write(tmp_path / "model", "gptq", 4, 32, act_order=True, desc_act=True)
    loaded = check(tmp_path / "model", matrices)
    assert not quantized_leaves(loaded.params)
    said = capsys.readouterr().out
    assert said.count("is loaded dense: ") == 7
    assert "layers.0.mlp.up_proj.g_idx puts neighbouring inputs into different groups" in said


def test_groups_that_happen_to_be_in_order_stay(tmp_path):
    """desc_act with groups of whole rows, or groups that were made before the order."""
    matrices = write(tmp_path / "model", "gptq", 4, -1, act_order=True, desc_act=True)
    assert len(quantized_leaves(check(tmp_path / "model", matrices).params)) == 7


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gptq") / "model"
    write(folder, "gptq", 4, 32)
    return folder


def broken(directory, folder, tensor=None, change=None, **fields):
    folder.mkdir()
    tensors = load_file(directory / "model.safetensors")
    if tensor is not None:
        array = tensors.pop(tensor)
        if (array := change(array)) is not None:
            tensors[tensor] = np.ascontiguousarray(array)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "tensor, change, said",
    [
        ("scales", lambda a: None, "model: lacks the tensor {}.scales"),
        ("g_idx", lambda a: None, "model: lacks the tensor {}.g_idx"),
        (
            "scales",
            lambda a: a[:1],
            r"{}.scales has shape \[1, 64\], expected \[2, 64\] for groups",
        ),
        ("qzeros", lambda a: a[:, :3], r"{}.qzeros has shape \[2, 3\], expected \[2, 8\]"),
        ("qweight", lambda a: a[:4], r"{}.g_idx has shape \[64\], expected \[32\]"),
        ("qweight", lambda a: a.astype(np.int8), r"{}.qweight is of dtype I8; expected int32"),
        ("g_idx", lambda a: a + 1, r"{}.g_idx goes past the 2 groups"),
        ("scales", lambda a: a * np.inf, r"{}.scales holds nan or inf"),
    ],
)
def test_broken_tensors_are_named(directory, tmp_path, tensor, change, said):
    folder = broken(directory, tmp_path / "model", f"{Q}.{tensor}", change)
    with pytest.raises(CheckpointError, match=said.format(Q)):
        hub.load(folder)


@pytest.mark.parametrize(
    "fields, said",
    [
        (
            dict(group_size=16),
            r"down_proj.scales has shape \[3, 64\], expected \[6, 64\] for groups of",
        ),
        (dict(group_size=40), r"down_proj.qweight: groups of 40 do not fill 96 inputs"),
        (dict(group_size=0), r"group_size = 0; expected a whole number"),
        (dict(bits=8), r"down_proj.g_idx has shape \[96\], expected \[48\] for codes of 8 b"),
        (dict(bits=5), r"bits = 5 is not supported, only 2 or 3 or 4 or 8"),
        (dict(checkpoint_format="marlin"), r"checkpoint_format = 'marlin' is not supported"),
        (dict(dynamic={"+:.*": {"bits": 8}}), r"dynamic = .* is not supported"),
        (dict(quant_method="awq", bits=4, version="gemv"), r"version = 'gemv' is not supported"),
        (dict(quant_method="awq", bits=8), r"bits = 8 is not supported, only 4"),
        (
            dict(quant_method="eetq"),
            r"quant_method = 'eetq' is not supported; supported: packed_rows",
        ),
    ],
)
def test_broken_descriptions_are_named(directory, tmp_path, fields, said):
    with pytest.raises(CheckpointError, match=said):
        hub.load(broken(directory, tmp_path / "model", **fields))
