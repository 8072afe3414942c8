"""Prompts in peft's directories: what peft saved gives peft's logits, and peft opens what we save."""

import dataclasses
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from hub_reference import FIXTURES, ask, needs_reference
from peft_folders import (
    ADAPTERS,
    WEIGHTS,
    base_of,
    change_config,
    change_tensors,
    config_of,
    expected_of,
    opened,
    prompts_of,
)
from safetensors.numpy import load_file

from research import hub
from research.decode.generate import generate
from research.decode.sampling import Sampling
from research.hub import CheckpointError
from research.weights import lora, prompt, prompt_encoder

PROMPTS = ["prompt_tuning", "p_tuning"]


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_equal_those_of_peft(name):
    """PEFT's are of the virtual tokens too, which stand first."""
    base, (ids, expected) = base_of(name), expected_of(name)
    loaded = hub.load_adapter(base, ADAPTERS / name)
    ours = np.asarray(loaded.logits(prompt.before(loaded.params, [ids]))[0])
    assert np.abs(ours[-len(ids) :] - base.logits(ids)[0]).max() > 0.05
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(loaded.logits(ids), base.logits(ids))


def test_generation_reads_a_loaded_prompt():
    base, (ids, expected) = base_of("prompt_tuning"), expected_of("prompt_tuning")
    greedy = Sampling(temperature=0.0, max_tokens=1)
    params = hub.load_adapter(base, ADAPTERS / "prompt_tuning").params
    said = generate(base.model, params, prompt.before(params, [ids]), jax.random.key(0), greedy)
    assert int(said.tokens[0][0]) == int(expected[-1].argmax())


@pytest.mark.parametrize("name", PROMPTS)
def test_saved_again_it_has_the_names_and_shapes_that_peft_wrote(name, tmp_path):
    hub.save_adapter(tmp_path / "out", hub.load_adapter(base_of(name), ADAPTERS / name))
    theirs, ours = load_file(ADAPTERS / name / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert ours.keys() == theirs.keys() == {"prompt_embeddings"}
    np.testing.assert_array_equal(ours["prompt_embeddings"], theirs["prompt_embeddings"])
    mine, peft = config_of(tmp_path / "out"), config_of(ADAPTERS / name)
    assert mine.keys() <= peft.keys()
    kinds = mine.pop("peft_type"), peft.pop("peft_type")
    assert kinds == ("PROMPT_TUNING", name.upper())  # what is left of P-tuning are rows
    peft["base_model_name_or_path"] = None
    assert mine == {field: peft[field] for field in mine}


LLAMA, QWEN = "tiny_llama/gqa", "tiny_qwen/tied"
OURS = {
    "rows": (LLAMA, prompt.normal),
    "mlp": (QWEN, partial(prompt_encoder.mlp, hidden=6)),
    "lstm": (QWEN, partial(prompt_encoder.lstm, hidden=6, layers=1)),
}


def with_prompt(name, key):
    base = opened(FIXTURES / OURS[name][0])
    params = prompt.add(base.params, key, length=4, initial=OURS[name][1])
    return dataclasses.replace(base, params=params)


@pytest.mark.reference
@needs_reference
def test_peft_opens_the_prompts_that_we_save(key, tmp_path):
    requests, ours = [], []
    for name, (folder, _) in OURS.items():
        model, texts = with_prompt(name, key), prompts_of(FIXTURES / folder)
        hub.save_adapter(tmp_path / name, model)
        requests.append(
            {"model": FIXTURES / folder, "adapter": str(tmp_path / name), "prompts": texts}
        )
        ours.append([model.logits([ids])[0] for ids in prompt.before(model.params, texts)])
    for name, theirs, logits in zip(OURS, ask(tmp_path, *requests), ours, strict=True):
        for number, mine in enumerate(logits):
            np.testing.assert_allclose(
                theirs[f"logits.{number}"], mine, rtol=1e-5, atol=1e-5, err_msg=name
            )


@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_a_network_is_written_as_the_rows_that_it_gives(name, key, tmp_path):
    model = with_prompt(name, key)
    hub.save_adapter(tmp_path / "out", model)
    config, peft = config_of(tmp_path / "out"), config_of(ADAPTERS / "p_tuning")
    assert config["peft_type"] == "P_TUNING" and config.keys() <= peft.keys()
    assert config["encoder_reparameterization_type"] == name.upper()
    assert config["encoder_hidden_size"] == 6
    again = hub.load_adapter(opened(FIXTURES / QWEN), tmp_path / "out")
    node = again.params["embed"]["table"]
    np.testing.assert_array_equal(node.prompt, model.params["embed"]["table"].rows())


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_virtual_tokens": 4}, r"prompt_embeddings \[3, 16\]; expected \[4, 16\]"),
        ({"num_virtual_tokens": None}, r"num_virtual_tokens = None; expected a whole number > 0"),
        ({"num_virtual_tokens": 2.5}, r"num_virtual_tokens = 2.5; expected a whole number > 0"),
        ({"num_virtual_tokens": True}, r"num_virtual_tokens = True; expected a whole number > 0"),
        ({"num_transformer_submodules": 2}, r"num_transformer_submodules = 2; expected one of"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = .* is not supported"),
    ],
)
def test_a_prompt_whose_config_does_not_fit(fields, message, tmp_path):
    folder = shutil.copytree(ADAPTERS / "prompt_tuning", tmp_path / "copy")
    change_config(folder, **fields)
    with pytest.raises(CheckpointError, match=message):
        hub.load_adapter(base_of("prompt_tuning"), folder)


def test_a_prompt_of_another_base_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"prompt_embeddings \[3, 16\]; expected \[3, 20\]"):
        hub.load_adapter(opened(FIXTURES / QWEN), ADAPTERS / "prompt_tuning")
    folder = shutil.copytree(ADAPTERS / "prompt_tuning", tmp_path / "copy")
    change_tensors(folder, lambda name, x: {name: x, "odd": x})
    with pytest.raises(CheckpointError, match=r"holds \['odd', 'prompt_.*expected .* alone"):
        hub.load_adapter(base_of("prompt_tuning"), folder)


def test_what_would_be_lost_beside_a_prompt_is_refused(key, tmp_path):
    model = with_prompt("rows", key)
    both = lora.add(model.params, r".*/q/kernel", key)
    twice = prompt.add(model.params, key, length=2)
    for params, message in [
        (both, "table holds a Prompt, which is not written beside LoRA"),
        (twice, "embed/table has a prompt on a Prompt: merge or remove one first"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            hub.save_adapter(tmp_path / "out", dataclasses.replace(model, params=params))
    assert not (tmp_path / "out").exists()
