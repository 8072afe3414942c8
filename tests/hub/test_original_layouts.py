"""ChatGLM2 and 3, GLM-4 and Baichuan: the numbers of transformers, in their layouts and back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import original_layouts
import pytest
from hub_reference import (
    FIXTURES,
    check_logits_and_gradients,
    check_reference_opens,
    check_round_trip,
    loss,
    needs_reference,
    prompts_of,
)
from safetensors.numpy import load_file

from research import hub
from research.hub import CheckpointError
from research.hub.assemble import disassemble
from research.models.decoder import Decoder
from research.models.families import baichuan, glm, llama
from research.models.position import Alibi, Rope

GLM = [FIXTURES / "tiny_glm" / name for name in ("biased", "tied")]
BAICHUAN = {  # case: what its config says besides the sizes
    "rope": {"architectures": ["BaiChuanForCausalLM"], "max_position_embeddings": 64},
    "alibi": {"model_max_length": 64},
    "norm_head": {"model_max_length": 64, "z_loss_weight": 0},
}
PROMPTS = prompts_of(GLM[0])
every_baichuan = pytest.mark.parametrize("case", BAICHUAN)


def expected_of(case):
    return load_file(FIXTURES / "tiny_baichuan" / f"{case}.safetensors")


@pytest.fixture
def chatglm2(tmp_path):
    return original_layouts.chatglm2(tmp_path / "chatglm2", GLM[0])


@pytest.fixture
def directory(case, tmp_path):
    file = FIXTURES / "tiny_baichuan" / f"{case}.safetensors"
    return original_layouts.baichuan(tmp_path / case, file, **BAICHUAN[case])


def check_logits(loaded, expected):
    for number, ids in enumerate(PROMPTS):
        np.testing.assert_allclose(
            loaded.logits(ids)[0], expected[f"logits.{number}"], rtol=0, atol=1e-5
        )


def check_saved(folder, written):
    """What `hub.save` wrote is what was there, buffers apart."""
    before, after = (load_file(at / "model.safetensors") for at in (written, folder))
    before = {name: array for name, array in before.items() if "inv_freq" not in name}
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)
    before, after = (json.loads((at / "config.json").read_text()) for at in (written, folder))
    assert {name: after.get(name) for name in before} == before


@pytest.mark.parametrize("case", GLM, ids=lambda case: case.name)
def test_glm_has_the_numbers_of_transformers(case, tmp_path):
    check_logits_and_gradients(case)
    check_logits(hub.load(case), load_file(case / "expected.safetensors"))
    check_round_trip(case, tmp_path / "out")


@pytest.mark.reference
@needs_reference
def test_transformers_opens_the_glm_that_we_save(tmp_path):
    check_reference_opens(GLM, tmp_path)


def test_chatglm2_is_a_glm_in_another_layout(chatglm2, tmp_path):
    loaded = hub.load(chatglm2)
    check_logits(loaded, load_file(GLM[0] / "expected.safetensors"))
    hub.save(tmp_path / "out", loaded)
    check_saved(tmp_path / "out", chatglm2)
    as_glm = dataclasses.replace(loaded, config=glm.to_huggingface(loaded.model.config))
    hub.save(tmp_path / "glm", as_glm)
    before, after = (load_file(at / "model.safetensors") for at in (GLM[0], tmp_path / "glm"))
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"post_layer_norm": False}, "post_layer_norm = False is not implemented"),
        ({"multi_query_attention": False}, "multi_query_attention = False is not implemented"),
        ({"rmsnorm": False}, "rmsnorm = False"),
        ({"add_bias_linear": True}, "add_bias_linear = True"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post"),
        ({"quantization_bit": 4}, "quantization_bit = 4 is not implemented"),
        ({"pre_seq_len": 128}, "pre_seq_len = 128 is not implemented"),
        ({"rope_ratio": 16}, "rope_ratio = 16 divides positions in ChatGLM2's code"),
        ({"inner_hidden_size": 24}, "has inner_hidden_size and padded_vocab_size"),
        ({"kv_channels": "8"}, "kv_channels = '8'; expected a whole number"),
        ({"seq_length": None}, "seq_length = None; expected a whole number"),
    ],
)
def test_what_would_change_chatglm2_is_refused(chatglm2, fields, message):
    config = json.loads((chatglm2 / "config.json").read_text()) | fields
    (chatglm2 / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        hub.load(chatglm2)


@every_baichuan
def test_baichuan_has_the_numbers_of_transformers(case, directory, tmp_path):
    loaded, expected = hub.load(directory), expected_of(case)
    assert isinstance(loaded.model.config.position, Rope if case == "rope" else Alibi)
    check_logits(loaded, expected)
    gradient = jax.jit(jax.grad(lambda params: loss(loaded.model, params, PROMPTS)))
    _, ours = disassemble(baichuan.name_map(loaded.model.config), gradient(loaded.params))
    theirs = {n.removeprefix("grad."): a for n, a in expected.items() if n.startswith("grad.")}
    theirs, ours = original_layouts.baichuan_names(theirs), dict(ours)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, rtol=0, atol=1e-3, err_msg=name)
    hub.save(tmp_path / "out", loaded)
    check_saved(tmp_path / "out", directory)


@pytest.mark.parametrize("case", ["rope"])
def test_a_baichuan_7b_is_saved_as_a_llama(case, directory, tmp_path):
    loaded, expected = hub.load(directory), expected_of(case)
    as_llama = dataclasses.replace(loaded, config=llama.to_huggingface(loaded.model.config))
    hub.save(tmp_path / "out", as_llama)
    saved = load_file(tmp_path / "out/model.safetensors")
    weights = {n.removeprefix("weight."): a for n, a in expected.items() if n[:7] == "weight."}
    assert saved.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(saved[name], array, err_msg=name)
    check_logits(hub.load(tmp_path / "out"), expected)


@pytest.mark.parametrize("case", ["norm_head"])
def test_a_folded_head_computes_the_same(case, directory):
    loaded = hub.load(directory)
    config, params = baichuan.fold_head(loaded.model.config, loaded.params)
    check_logits(hub.Pretrained(Decoder(config), params, None, {}), expected_of(case))
    lengths = jnp.linalg.norm(params["head"]["kernel"], axis=0)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)
    assert np.abs(np.linalg.norm(loaded.params["head"]["kernel"], axis=0) - 1).min() > 1e-3
    with pytest.raises(ValueError, match="the head is no NormHead but Linear"):
        baichuan.fold_head(config, params)
