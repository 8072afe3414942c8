"""Hugging Face directories: the same numbers as transformers in, out and back, and bad input."""

import json
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hub_reference import (
    FIXTURES,
    check_logits_and_gradients,
    check_reference_opens,
    check_round_trip,
    needs_reference,
)
from safetensors.numpy import load_file, save_file

from research import hub
from research.hub import CheckpointError, huggingface, replace
from research.hub.replace import replacing

CASES = ["gqa", "tied_biased", "llama3"]


@pytest.fixture(params=CASES)
def case(request):
    return FIXTURES / "tiny_llama" / request.param


@pytest.fixture
def copy(tmp_path):
    """A copy of one tiny model directory to spoil."""
    return shutil.copytree(FIXTURES / "tiny_llama" / "gqa", tmp_path / "model")


def test_logits_and_gradients_equal_transformers(case):
    check_logits_and_gradients(case)


def test_save_gives_back_every_tensor_and_field(case, tmp_path):
    check_round_trip(case, tmp_path / "out")


def test_sharded_save_and_load(case, tmp_path):
    loaded = hub.load(case)
    hub.save(tmp_path / "out", loaded, max_shard_bytes=6000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3 and not (tmp_path / "out/model.safetensors").exists()
    assert all(len(load_file(tmp_path / "out" / file)) for file in files)
    again = hub.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


@pytest.mark.parametrize("case", ["gqa"], indirect=True)
def test_bfloat16_round_trip(case, tmp_path):
    loaded = hub.load(case, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.bfloat16)}
    hub.save(tmp_path / "out", loaded)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    table = load_file(tmp_path / "out/model.safetensors")["model.embed_tokens.weight"]
    assert table.dtype == ml_dtypes.bfloat16
    again = hub.load(tmp_path / "out", dtype=jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_files_open_in_any_precision(copy, dtype):
    whole = hub.load(copy)
    rewrite(copy, lambda t: t.update({n: a.astype(np.dtype(dtype)) for n, a in t.items()}))
    loaded = hub.load(copy)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.float32)}
    rounded = jax.tree.map(lambda a: a.astype(dtype).astype(jnp.float32), whole.params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, rounded)


def test_a_directory_as_modelscope_lays_it_out_opens(copy):
    """The same files beside its own configuration.json and bookkeeping."""
    whole = hub.load(copy)
    more = {"framework": "pytorch", "task": "text-generation"}
    (copy / "configuration.json").write_text(json.dumps(more))
    for name in (".msc", ".mdl", ".mv"):
        (copy / name).write_bytes(b"\x80\x04")
    jax.tree.map(np.testing.assert_array_equal, hub.load(copy).params, whole.params)


@pytest.mark.reference
@needs_reference
def test_transformers_opens_what_we_save(tmp_path):
    check_reference_opens([FIXTURES / "tiny_llama" / name for name in CASES], tmp_path, 6000)


def rewrite(copy, change):
    """Change the dictionary of tensors in a model directory."""
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors")


def test_a_head_that_is_a_copy_of_the_tied_table_is_accepted(tmp_path):
    copy = shutil.copytree(FIXTURES / "tiny_llama" / "tied_biased", tmp_path / "model")
    rewrite(copy, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    hub.load(copy)
    rewrite(copy, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"1 weights with no place: lm_head.weight"):
        hub.load(copy)


def test_missing_and_surplus_weights_are_both_named(copy):
    def change(tensors):
        tensors["model.layers.0.self_attn.z_proj.weight"] = tensors.pop(
            "model.layers.1.mlp.up_proj.weight"
        )

    rewrite(copy, change)
    with pytest.raises(CheckpointError) as error:
        hub.load(copy)
    message = str(error.value)
    assert str(copy) in message
    assert "lacks 1 weights that its config asks for: model.layers.1.mlp.up_proj.weight" in message
    assert "no place: model.layers.0.self_attn.z_proj.weight" in message


def test_shape_mismatch_names_tensor_and_shapes(copy):
    name = "model.layers.1.self_attn.k_proj.weight"
    rewrite(copy, lambda tensors: tensors.update({name: tensors[name][:-1].copy()}))
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[7, 16\], expected \[8, 16\]"):
        hub.load(copy)


def test_config_of_another_size_is_a_shape_mismatch(copy):
    config = json.loads((copy / "config.json").read_text()) | {"intermediate_size": 32}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"gate_proj.weight has shape \[24, 16\].*\[32, 16\]"):
        hub.load(copy)


def test_unsupported_architecture(copy):
    config = json.loads((copy / "config.json").read_text()) | {"architectures": ["RwkvForCausalLM"]}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model: .*RwkvForCausalLM.*LlamaForCausalLM"):
        hub.load(copy)


def test_config_that_is_missing_or_not_json(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: not JSON"):
        hub.load(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config.json: expected a JSON object, found list"):
        hub.load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: there is no such file"):
        hub.load(copy)


def test_no_weights_and_pickled_weights(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds neither .*pickled weights are not opened"):
        hub.load(copy)


def test_no_such_path(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: there is no such file or directory"):
        hub.load(tmp_path / "nowhere")


@pytest.mark.parametrize("left", [0, 5, 500, 20_000])
def test_truncated_safetensors(copy, left):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=r"model.safetensors: truncated or not a safetensors"):
        hub.load(copy)


def test_index_names_a_file_that_is_not_there(copy):
    hub.save(copy, hub.load(copy), max_shard_bytes=6000)
    victim = sorted(copy.glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=rf"index.json: names the file '{victim.name}'"):
        hub.load(copy)


def test_index_that_disagrees_with_its_files(copy):
    hub.save(copy, hub.load(copy), max_shard_bytes=6000)
    index = copy / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    del value["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=r"disagrees with model-.*'model.norm.weight' first"):
        hub.load(copy)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"names the file '../elsewhere.safetensors'"):
        hub.load(copy)


@pytest.fixture
def full_disk():
    """Files may grow to 10 kB and no further, as on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("before", ["nothing", "a model"])
def test_full_disk_while_saving_changes_nothing(copy, tmp_path, full_disk, before):
    loaded = hub.load(copy)
    target = copy if before == "a model" else tmp_path / "new"
    found = sorted((p.name, p.stat().st_size) for p in copy.iterdir())
    with pytest.raises(CheckpointError, match="could not be written"):
        hub.save(target, loaded)
    assert sorted((p.name, p.stat().st_size) for p in copy.iterdir()) == found
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_save_refuses_to_replace_what_is_no_model(copy, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"home: exists and holds no config.json; refusing"):
        hub.save(tmp_path / "home", hub.load(copy))
    with pytest.raises(CheckpointError, match=r"thesis.tex: is a file; expected a directory"):
        hub.save(tmp_path / "home/thesis.tex", hub.load(copy))
    assert (tmp_path / "home/thesis.tex").read_text() == "years of work"


def test_replacing_takes_the_place_of_the_old_directory(copy):
    (copy / "stale.txt").write_text("old")
    with replacing(copy, "config.json") as partial:
        (partial / "config.json").write_text("{}")
        assert (copy / "stale.txt").exists()
    assert [p.name for p in copy.iterdir()] == ["config.json"]
    assert [p.name for p in copy.parent.iterdir()] == ["model"]


def test_save_refuses_parameters_without_a_name(copy):
    loaded = hub.load(copy)
    loaded.params["value_head"] = {"kernel": jnp.zeros((16, 1))}
    with pytest.raises(CheckpointError, match="no checkpoint name for value_head/kernel"):
        hub.save(copy, loaded)


def test_shards_are_cut_in_order():
    assert huggingface.shards({"a": 3, "b": 3, "c": 9, "d": 1}, 6) == [["a", "b"], ["c"], ["d"]]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_size": "16"}, r"hidden_size = '16'; expected a whole number"),
        ({"vocab_size": None}, r"vocab_size = None; expected a whole number"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers = 0; expected a whole number above 0"),
        ({"num_attention_heads": True}, r"num_attention_heads = True; expected"),
        ({"head_dim": 3}, r"head_dim = 3; RoPE needs an even number"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads = 3 does not divide .* = 8"),
        ({"head_dim": None, "hidden_size": 20}, r"num_attention_heads = 8 does not divide"),
        ({"rms_norm_eps": "small"}, r"rms_norm_eps = 'small'; expected a number"),
        ({"tie_word_embeddings": "no"}, r"tie_word_embeddings = 'no'; expected true or false"),
        ({"architectures": 5}, r"architectures = 5; expected a list of names"),
        ({"rope_parameters": []}, r"rope_parameters = \[\]; expected an object"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"lacks the field 'factor'"),
        ({"rope_parameters": {"rope_theta": "big"}}, r"describes no model: .*'big'"),
    ],
)
def test_a_config_that_is_ill_typed_or_contradicts_itself(copy, fields, message):
    config = json.loads((copy / "config.json").read_text()) | fields
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"model: config\.json:? {message}"):
        hub.load(copy)


def test_index_that_maps_to_no_name(copy):
    index = copy / "model.safetensors.index.json"
    for value in (3, ["model.safetensors"], None):
        index.write_text(json.dumps({"weight_map": {"a": value, "b": "model.safetensors"}}))
        with pytest.raises(CheckpointError, match=r"index.json: weight_map says .* for a, not a"):
            hub.load(copy)


@pytest.mark.parametrize("dtype, called", [(np.int8, "I8"), (np.uint8, "U8"), (np.int64, "I64")])
def test_integers_are_no_weights(copy, dtype, called):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(copy, lambda tensors: tensors.update({name: tensors[name].astype(dtype)}))
    with pytest.raises(CheckpointError, match=rf"safetensors: {name} is of dtype {called}"):
        hub.load(copy)


def test_what_killed_saves_left_is_swept_and_put_back(copy):
    loaded, parent = hub.load(copy), copy.parent
    old, young = parent / ".model.partial-old", parent / ".model.partial-young"
    for path in (old, young, parent / ".other.partial-old"):
        path.mkdir()
    os.utime(old, (0, 0))
    os.utime(parent / ".other.partial-old", (0, 0))
    copy.rename(parent / ".model.previous-x")  # killed between the two renames
    with pytest.raises(CheckpointError, match=r"no such file.*model.previous-x.*puts back"):
        hub.load(copy)
    with pytest.raises(RuntimeError), replace.replacing(copy, "config.json"):
        raise RuntimeError
    assert sorted(path.name for path in parent.iterdir()) == [
        ".model.partial-young",
        ".other.partial-old",
        "model",
    ]
    jax.tree.map(np.testing.assert_array_equal, hub.load(copy).params, loaded.params)
