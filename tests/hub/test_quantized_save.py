"""Directories of few bits: rebuilt from their own description by NumPy, opened to the same Weights."""

import json
import shutil

import jax
import numpy as np
import pytest
from hub_reference import FIXTURES
from safetensors.numpy import load_file, save_file

from research import hub
from research.hub import CheckpointError
from research.hub.assemble import disassemble
from research.models import families
from research.weights import lora
from research.weights.formats import Codebook, Float8, Integer
from research.weights.quantized import quantize

FORMATS = {
    r".*/attention/q/kernel": Codebook(group=8, double=True),
    r".*/attention/k/kernel": Codebook("FP4", 8),
    r".*/attention/v/kernel": Integer(3, 8, "integer"),
    r".*/attention/o/kernel": Integer(2, 8, "minimum", double=True),
    r".*/ffn/gate/kernel": Integer(8, "matrix"),
    r".*/ffn/up/kernel": Float8(),
    r".*/ffn/down/kernel": Float8("e5m2", "matrix"),
    r"embed/table": Integer(4, "row"),
    r"head/kernel": Integer(8, 8, "integer"),
}
Q = "model.layers.1.self_attn.q_proj.weight"


def small(case, formats):
    loaded = hub.load(FIXTURES / case)
    params = loaded.params
    for rule, format in formats.items():
        params = quantize(params, rule, format)
    return hub.Pretrained(loaded.model, params, None, loaded.config, loaded.generation)


@pytest.fixture(scope="module")
def model():
    return small("tiny_llama/gqa", FORMATS)


@pytest.fixture
def saved(model, tmp_path):
    hub.save_quantized(tmp_path / "model", model)
    return tmp_path / "model"


def codes_of(octets, bits, packing):
    """[rows, bytes] -> [rows, columns], word by word as the description says it."""
    words = octets.reshape(len(octets), -1, packing["bytes"]).astype(np.int64)
    numbers = sum(words[..., i] << 8 * (packing["bytes"] - 1 - i) for i in range(packing["bytes"]))
    places = [bits * (packing["codes"] - 1 - i) for i in range(packing["codes"])]
    return np.stack([numbers >> p & 2**bits - 1 for p in places], -1).reshape(len(octets), -1)


def scales_of(tensors, name, said):
    if said == "tensor":
        return tensors[f"{name}.scale"].astype(np.float32)
    assert said["value"] == "table[code] * absmax + offset"
    codes = tensors[f"{name}.scale.codes"]
    absmax = np.repeat(tensors[f"{name}.scale.absmax"], said["block"])[: codes.size]
    values = np.array(said["table"], np.float32)[codes.reshape(-1)] * absmax
    return (values + tensors[f"{name}.scale.offset"]).reshape(codes.shape)


def rebuilt(folder):
    """The matrices of a directory from its files and config.json alone."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    matrices = {}
    for name, used in config["tensors"].items():
        said = config["formats"][used]
        codes = codes_of(tensors[f"{name}.codes"], said["bits"], said["packing"])
        rows, columns = codes.shape
        scale = scales_of(tensors, name, said["scale"])
        group = {"row": columns, "matrix": columns}.get(said["group"], said["group"])
        assert scale.shape == ((1, 1) if said["group"] == "matrix" else (rows, columns // group))
        scale = np.repeat(scale, group, axis=1)
        if said["value"] == "table[code] * scale":
            table = np.array([np.nan if x is None else x for x in said["table"]], np.float32)
            values = table[codes] * scale
        else:
            zero = said["zero"]
            if zero == "tensor":
                zero = np.repeat(tensors[f"{name}.zero"], group, axis=1).astype(np.float32)
            codes = codes.astype(np.float32)
            forms = {
                "(code - zero) * scale": (codes - zero) * scale,
                "code * scale + zero": codes * scale + zero,
            }
            values = forms[said["value"]]
        matrices[name] = values.T if said["transposed"] else values
    return matrices


def dense_tensors(pretrained):
    names = families.find(pretrained.config).name_map(pretrained.model.config)
    return dict(disassemble(names, pretrained.params)[1])


def test_rebuilt_by_the_description_with_numpy_alone(model, saved):
    found, expected = rebuilt(saved), dense_tensors(model)
    assert len(found) == 2 * 7 + 2 and found.keys() < expected.keys()
    for name, matrix in found.items():
        np.testing.assert_array_equal(matrix, expected[name], err_msg=name)


def test_opened_to_the_same_weights(model, saved):
    again = hub.load(saved)
    assert jax.tree.structure(again.params) == jax.tree.structure(model.params)
    for found, expected in zip(
        jax.tree.leaves(again.params), jax.tree.leaves(model.params), strict=True
    ):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    assert "quantization_config" not in again.config


def test_matrices_that_the_checkpoint_holds_the_other_way(tmp_path):
    """GPT-2's are [in, out]; those of its attention are columns of one tensor."""
    gpt = small("tiny_gpt/gpt2", {r".*/ffn/.*kernel": Codebook(group=4)})
    hub.save_quantized(tmp_path / "model", gpt, max_shard_bytes=2000)
    assert (tmp_path / "model/model.safetensors.index.json").exists()
    again = hub.load(tmp_path / "model")
    assert jax.tree.structure(again.params) == jax.tree.structure(gpt.params)
    jax.tree.map(np.testing.assert_array_equal, again.params, gpt.params)
    hub.save_quantized(tmp_path / "one", again)
    found, expected = rebuilt(tmp_path / "one"), dense_tensors(gpt)
    assert found and all(np.array_equal(m, expected[name]) for name, m in found.items())
    packed = small("tiny_gpt/gpt2", {r".*/attention/q/kernel": Codebook(group=4)})
    with pytest.raises(CheckpointError, match=r"attention/q/kernel is quantized, .* as columns of"):
        hub.save_quantized(tmp_path / "packed", packed)


def test_what_has_no_form_in_files(model, tmp_path):
    adapted = lora.add(model.params, r".*/q/kernel", jax.random.key(0), rank=2)
    adapted = hub.Pretrained(model.model, adapted, None, model.config)
    with pytest.raises(CheckpointError, match=r"attention/q/kernel is a LoRA, which has no form"):
        hub.save_quantized(tmp_path / "model", adapted)
    with pytest.raises(CheckpointError, match="no matrix is quantized: `save` writes dense ones"):
        hub.save_quantized(tmp_path / "model", small("tiny_llama/gqa", {}))
    assert not (tmp_path / "model").exists()


def with_tensor(folder, name, change):
    tensors = load_file(folder / "model.safetensors")
    array = tensors.pop(name)
    if (array := change(array)) is not None:
        tensors[name] = np.asarray(array)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("scale.absmax", lambda a: None, r"model: lacks the tensor {}.scale.absmax"),
        ("scale.codes", lambda a: a[:, :1].copy(), r".safetensors: {}.scale.codes has shape \[32, 1"),
        ("codes", lambda a: a[:-1].copy(), r"{}.scale.codes has shape \[32, 2\], expected \[31, 2\]"),
        ("codes", lambda a: a.astype(np.float32), r"{}.codes is of dtype F32; expected uint8"),
        ("scale.offset", lambda a: a * np.nan, r"{}.scale.offset holds nan or inf"),
    ],
)  # fmt: skip
def test_broken_tensors_are_named(saved, name, change, said):
    with_tensor(saved, f"{Q}.{name}", change)
    with pytest.raises(CheckpointError, match=said.format(Q)):
        hub.load(saved)


def test_scales_that_are_missing_and_floats_that_are_none(saved, tmp_path):
    for number, (name, part, change, said) in enumerate(
        [
            ("self_attn.k_proj", "scale", lambda a: None, "lacks the tensor {}.scale"),
            ("self_attn.v_proj", "zero", lambda a: None, "lacks the tensor {}.zero"),
            ("mlp.up_proj", "codes", lambda a: a | 0x7F, "{}.codes holds codes of nan or inf"),
        ]
    ):
        folder, name = tmp_path / str(number), f"model.layers.0.{name}.weight"
        shutil.copytree(saved, folder)
        with_tensor(folder, f"{name}.{part}", change)
        with pytest.raises(CheckpointError, match=said.format(name)):
            hub.load(folder)


def with_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def used_by_q(config):
    return config["formats"][config["tensors"][Q]]


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda c: used_by_q(c).update(group=4), r"q_proj.weight.scale.codes has shape \[32, 2\], "
         r"expected \[32, 4\] for groups of 4"),
        (lambda c: used_by_q(c).update(group=3), r"q_proj.weight.codes: groups of 3 do not fill"),
        (lambda c: used_by_q(c).update(kind="ternary"), r"format .*kind = 'ternary' is not support"),
        (lambda c: used_by_q(c).update(bits=5), r"bits = 5 is not supported in a codebook NF4, only"),
        (lambda c: used_by_q(c)["table"].reverse(), r"table = .* is not supported in a codebook NF4"),
        (lambda c: used_by_q(c).pop("group"), r"lacks or mistypes a field \('group'\)"),
        (lambda c: c["tensors"].update({Q: "other"}), r"q_proj.weight has the unknown format 'oth"),
        (lambda c: c["tensors"].pop(Q), r"q_proj.weight.codes is of dtype U8"),
        (lambda c: used_by_q(c).update(group="rows"), r"q_proj.weight.codes: a group is a number of"),
        (lambda c: c.pop("formats"), r"model: quantization_config lacks the objects 'formats' and"),
        (lambda c: c.update(quant_method="hqq"), r"config.json: .*quant_method = 'hqq' is not supp"),
    ],
)  # fmt: skip
def test_broken_descriptions_are_named(saved, change, said):
    with_config(saved, change)
    with pytest.raises(CheckpointError, match=said):
        hub.load(saved)
