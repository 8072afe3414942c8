"""LoRA adapters: what peft wrote gives peft's logits, and peft reads what we write."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import original_layouts
import pytest
from hub_reference import FIXTURES, ask, loss, needs_reference
from safetensors.numpy import load_file, save_file

from research import hub
from research.adapters import bottleneck
from research.hub import CheckpointError, peft_lora, peft_modules
from research.hub.peft_modules import short_name
from research.paths import named_leaves
from research.weights import dora, lora
from research.weights.base import is_weight, merge

BASE = FIXTURES / "tiny_llama" / "gqa"
ADAPTERS = ["attention", "ragged", "patterns", "embeddings"]
PROMPTS = json.loads((BASE / "prompts.json").read_text())


@pytest.fixture(scope="module")
def base():
    return hub.load(BASE)


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(FIXTURES / "adapters" / "attention", tmp_path / "adapter")


def adapted(base, key, rule=r".*/(q|down)/kernel", **how):
    """The base with LoRAs whose second factor is not zero."""
    params = lora.add(base.params, rule, key, **how)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.1 if jax.tree_util.keystr(path[-1:]).endswith("b") else x, params
    )
    return dataclasses.replace(base, params=params)


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_equal_peft(base, name):
    expected = load_file(FIXTURES / "adapters" / name / "expected.safetensors")
    loaded = hub.load_adapter(base, FIXTURES / "adapters" / name)
    for number, ids in enumerate(PROMPTS):
        ours = loaded.logits(ids)[0]
        np.testing.assert_allclose(ours, expected[f"logits.{number}"], rtol=0, atol=1e-4)
        assert np.abs(ours - base.logits(ids)[0]).max() > 0.1


def gradients(model, grads):
    """{PEFT's name of a factor: its gradient}."""
    found = {}
    nodes = dict(named_leaves(grads, is_leaf=is_weight))
    for site in peft_modules.adaptable(model):
        node = nodes[site.path]
        if isinstance(node, lora.LoRA):
            for layer in site.layers:
                pair = (node.a, node.b) if layer is None else (node.a[layer], node.b[layer])
                for suffix, factor in zip(peft_lora.factor_names(site), pair, strict=True):
                    found[f"{peft_modules.PREFIX}{site.module(layer)}.{suffix}"] = factor.T
    return found


@pytest.mark.parametrize("name", ["attention", "embeddings"])
def test_gradients_of_the_factors_equal_peft(base, name):
    expected = load_file(FIXTURES / "adapters" / name / "expected.safetensors")
    loaded = hub.load_adapter(base, FIXTURES / "adapters" / name)
    grads = jax.jit(jax.grad(lambda params: loss(loaded.model, params, PROMPTS)))(loaded.params)
    theirs = {
        name.removeprefix("grad.").replace(".default", ""): array
        for name, array in expected.items()
        if name.startswith("grad.")
    }
    ours = gradients(loaded, grads)
    assert ours.keys() == theirs.keys() and len(ours) == 8
    for name, array in theirs.items():
        assert np.abs(array).max() > 0.01, name
        np.testing.assert_allclose(ours[name], array, rtol=0, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("name", ADAPTERS)
def test_saved_and_loaded_again_is_the_same_function(base, name, tmp_path):
    loaded = hub.load_adapter(base, FIXTURES / "adapters" / name)
    hub.save_adapter(tmp_path / "out", loaded)
    again = hub.load_adapter(base, tmp_path / "out")
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6),
        merge(again.params),
        merge(loaded.params),
    )


def test_what_peft_wrote_evenly_comes_back_to_the_byte(base, tmp_path):
    hub.save_adapter(tmp_path / "out", hub.load_adapter(base, FIXTURES / "adapters/attention"))
    before = load_file(FIXTURES / "adapters/attention/adapter_model.safetensors")
    after = load_file(tmp_path / "out/adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)


@pytest.mark.reference
@needs_reference
def test_peft_opens_what_we_save(base, key, tmp_path):
    attention = {"rule": r".*/(q|v|down)/kernel", "rank": 4, "alpha": 16}
    embeddings = {
        "rule": r".*/o/kernel|embed/table|head/kernel",
        "rank": 2,
        "rank_stabilized": True,
    }
    requests, ours = [], []
    for name, how in {"attention": attention, "embeddings": embeddings}.items():
        model = adapted(base, key, **how)
        hub.save_adapter(tmp_path / name, model)
        requests.append({"model": BASE, "adapter": str(tmp_path / name), "prompts": PROMPTS})
        ours.append([model.logits(ids)[0] for ids in PROMPTS])
    for theirs, logits in zip(ask(tmp_path, *requests), ours, strict=True):
        for number, expected in enumerate(logits):
            np.testing.assert_allclose(theirs[f"logits.{number}"], expected, rtol=0, atol=1e-4)


def test_saving_the_whole_model_merges(base, key, tmp_path):
    model = adapted(base, key)
    hub.save(tmp_path / "merged", model)
    again = hub.load(tmp_path / "merged")
    np.testing.assert_allclose(
        again.logits(PROMPTS[0]), model.logits(PROMPTS[0]), rtol=0, atol=1e-5
    )


def test_config_has_the_commonest_numbers_and_patterns(base, key, tmp_path):
    model = adapted(base, key, r".*/(q|k|v)/kernel", rank=8, alpha=16)
    params = lora.add(model.params, r".*/down/kernel", key, rank=2, alpha=3)
    hub.save_adapter(tmp_path / "out", dataclasses.replace(model, params=params))
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert config["target_modules"] == ["down_proj", "k_proj", "q_proj", "v_proj"]
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"down_proj": 2}, {"down_proj": 3})


def test_short_names_are_as_long_as_they_must_be():
    modules = ["h.0.attn.proj", "h.0.mlp.proj", "h.0.mlp.up", "head"]
    short = [short_name(module, modules) for module in modules]
    assert short == ["attn.proj", "mlp.proj", "up", "head"]


def change_config(copy, **fields):
    file = copy / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"peft_type": "VERA"},
            r"adapter_config.json: peft_type 'VERA'; expected one of \('LORA',",
        ),
        ({"use_dora": True}, r"holds .*q_proj.lora_A.weight but not .*lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] is not supported"),
        ({"bias": "all"}, r"bias = 'all'; expected one of \('none'"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights = 'pissa'; expected one of"),
        ({"r": None}, r"r = None; expected a whole number > 0"),
    ],
)
def test_adapters_of_other_kinds(base, copy, fields, message):
    change_config(copy, **fields)
    with pytest.raises(CheckpointError, match=message):
        hub.load_adapter(base, copy)


def change_tensors(copy, change):
    file = copy / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def test_missing_factor_surplus_name_and_wrong_shape(base, copy):
    whole = (copy / "adapter_model.safetensors").read_bytes()
    change_tensors(copy, lambda tensors: tensors.pop(f"{FIRST}.lora_B.weight"))
    with pytest.raises(CheckpointError, match=r"holds .*q_proj.lora_A.weight but not .*lora_B"):
        hub.load_adapter(base, copy)
    (copy / "adapter_model.safetensors").write_bytes(whole)
    change_tensors(copy, lambda tensors: tensors.update(odd=np.zeros(1, np.float32)))
    with pytest.raises(CheckpointError, match=r"holds what has no place in the model: odd"):
        hub.load_adapter(base, copy)
    (copy / "adapter_model.safetensors").write_bytes(whole)
    change_tensors(copy, lambda tensors: tensors.update(odd=np.zeros(1, np.int8)))
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: odd is of dtype I8"):
        hub.load_adapter(base, copy)
    (copy / "adapter_model.safetensors").write_bytes(whole)
    name = f"{FIRST}.lora_A.weight"
    change_tensors(copy, lambda tensors: tensors.update({name: np.zeros((4, 9), np.float32)}))
    with pytest.raises(
        CheckpointError, match=r"q_proj.lora_A.weight \[4, 9\] .*expected \[R, 16\]"
    ):
        hub.load_adapter(base, copy)


def test_missing_files_and_truncated_weights(base, copy, tmp_path):
    file = copy / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: truncated"):
        hub.load_adapter(base, copy)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: there is no such file"):
        hub.load_adapter(base, copy)
    with pytest.raises(CheckpointError, match=r"adapter_config.json: there is no such file"):
        hub.load_adapter(base, tmp_path)


def test_an_embedding_of_another_base(base, tmp_path):
    copy = shutil.copytree(FIXTURES / "adapters/embeddings", tmp_path / "adapter")
    name = "base_model.model.lm_head.base_layer.weight"
    change_tensors(copy, lambda tensors: tensors.update({name: tensors[name] + 1}))
    with pytest.raises(CheckpointError, match=r"lm_head.base_layer.weight is not the matrix of"):
        hub.load_adapter(base, copy)


def test_what_cannot_be_saved(base, key, tmp_path):
    with pytest.raises(CheckpointError, match="has no adapter to save: none of LoRA, DoRA"):
        hub.save_adapter(tmp_path / "out", base)
    twice = adapted(adapted(base, key), key)
    with pytest.raises(
        CheckpointError, match="q/kernel has a LoRA on a LoRA: merge or remove one first"
    ):
        hub.save_adapter(tmp_path / "out", twice)
    tied = adapted(hub.load(FIXTURES / "tiny_llama/tied_biased"), key, r"embed/table")
    with pytest.raises(CheckpointError, match="tied to the head"):
        hub.save_adapter(tmp_path / "out", tied)
    with pytest.raises(CheckpointError, match="tied to the head"):
        hub.load_adapter(
            hub.load(FIXTURES / "tiny_llama/tied_biased"), FIXTURES / "adapters/embeddings"
        )
    assert not (tmp_path / "out").exists()


PACKED = {
    "tiny_gpt/gpt2": "transformer.h.{layer}.attn.c_attn.weight",
    "chatglm2": "transformer.encoder.layers.{layer}.self_attention.query_key_value.weight",
}


@pytest.mark.parametrize("name", PACKED)
def test_a_part_of_a_packed_tensor_is_refused_by_name(name, key, tmp_path):
    if name == "chatglm2":
        model = hub.load(original_layouts.chatglm2(tmp_path / name, FIXTURES / "tiny_glm/biased"))
    else:
        model = hub.load(FIXTURES / name)
    for part in "qkv":
        one = adapted(model, key, f".*/{part}/kernel")
        with pytest.raises(
            CheckpointError, match=f"/{part}/kernel is a part of the tensor"
        ) as said:
            hub.save_adapter(tmp_path / "out", one)
        assert PACKED[name] in str(said.value)
    assert not (tmp_path / "out").exists()
    beside = adapted(model, key, r".*/attention/o/kernel")
    hub.save_adapter(tmp_path / "beside", beside)
    again = hub.load_adapter(model, tmp_path / "beside")
    ours, theirs = (dict(named_leaves(merge(m.params))) for m in (beside, again))
    for path, leaf in ours.items():
        np.testing.assert_allclose(leaf, theirs[path], rtol=0, atol=1e-6, err_msg=path)
    # An adapter of PEFT's own on the packed tensor.
    module = PACKED[name].format(layer=1).removesuffix(".weight")
    width = model.model.config.width
    factors = {"A": np.ones((2, width), np.float32), "B": np.ones((3 * width, 2), np.float32)}
    more = {f"base_model.model.{module}.lora_{k}.weight": v for k, v in factors.items()}
    change_tensors(tmp_path / "beside", lambda tensors: tensors.update(more))
    with pytest.raises(CheckpointError, match=r"1\..*attention.*lora_A|1\.attn.*lora_A") as said:
        hub.load_adapter(model, tmp_path / "beside")
    assert "attention/q/kernel, " in str(said.value) and "attention/v/kernel" in str(said.value)


def test_layers_of_one_module_with_other_scales_are_refused(key, tmp_path):
    model = hub.load(FIXTURES / "tiny_qwen/alternating")
    paths = [f"{name}/kernel" for name in ("stack_0/block_0/ffn/up", "stack_0/block_1/ffn/up")]
    one = adapted(model, key, paths[0], rank=2, alpha=4)
    both = adapted(one, key, paths[1], rank=2, alpha=8)
    with pytest.raises(CheckpointError, match=r"one module to PEFT.*\(2, 2.0\) and \(2, 4.0\)"):
        hub.save_adapter(tmp_path / "out", both)
    hub.save_adapter(tmp_path / "out", adapted(one, key, paths[1], rank=2, alpha=4))


def test_factors_are_float32_whatever_the_model_is(copy):
    model = hub.load_adapter(hub.load(BASE, dtype=jnp.bfloat16), copy)
    node = model.params["stack_0"]["block_0"]["attention"]["q"]["kernel"]
    assert (node.base.dtype, node.a.dtype, node.b.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    assert node.scale == pytest.approx(8 / 4**0.5)


def test_what_would_be_lost_beside_a_lora_is_refused(base, tmp_path, key):
    one = adapted(base, key)
    beside = dora.add(one.params, r".*/v/kernel", key, rank=2)
    model, inserted = bottleneck.pfeiffer(base.model, one.params, key, size=2)
    scored = {**one.params, "score": {"kernel": jnp.zeros((24, 2))}}
    for changed, words in [
        ({"params": beside}, "attention/v/kernel holds a DoRA"),
        ({"model": model, "params": inserted}, "ffn/adapter/.* is no part of the base model"),
        ({"params": scored}, "score/kernel is no part of the base model"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            hub.save_adapter(tmp_path / "out", dataclasses.replace(one, **changed))
    assert not (tmp_path / "out").exists()
