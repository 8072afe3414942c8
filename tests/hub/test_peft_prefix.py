"""Prefixes in peft's directories: what peft saved gives peft's logits, and peft opens what we save."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from hub_reference import FIXTURES, ask, needs_reference
from peft_folders import (
    ADAPTERS,
    WEIGHTS,
    base_of,
    change_config,
    config_of,
    expected_of,
    opened,
    prompts_of,
)
from safetensors.numpy import load_file

from research import hub
from research.adapters import prefix
from research.hub import CheckpointError
from research.weights import lora

PREFIXES = ["prefix_tuning", "prefix_projected"]
LLAMA, GPT = "tiny_llama/gqa", "tiny_gpt/gpt2"
OURS = {
    "plain": (LLAMA, {"std": 1.0}),
    "projected": (LLAMA, {"hidden": 5}),
    "learned_positions": (GPT, {"std": 1.0}),
}


@pytest.mark.parametrize("name", PREFIXES)
def test_logits_equal_those_of_peft(name):
    base, (ids, expected) = base_of(name), expected_of(name)
    ours = np.asarray(hub.load_adapter(base, ADAPTERS / name).logits(ids)[0])
    assert np.abs(ours - base.logits(ids)[0]).max() > 0.01
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PREFIXES)
def test_saved_again_it_has_the_names_and_shapes_that_peft_wrote(name, tmp_path):
    hub.save_adapter(tmp_path / "out", hub.load_adapter(base_of(name), ADAPTERS / name))
    theirs, ours = load_file(ADAPTERS / name / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert ours.keys() == theirs.keys() == {"prompt_embeddings"}
    np.testing.assert_array_equal(ours["prompt_embeddings"], theirs["prompt_embeddings"])
    mine, peft = config_of(tmp_path / "out"), config_of(ADAPTERS / name)
    assert mine.keys() <= peft.keys()
    peft |= {"base_model_name_or_path": None, "prefix_projection": False}  # the network is gone
    assert mine == {field: peft[field] for field in mine}


def with_prefix(name, key):
    folder, how = OURS[name]
    base = opened(FIXTURES / folder)
    model, params = prefix.add(base.model, base.params, key, length=4, **how)
    return dataclasses.replace(base, model=model, params=params)


@pytest.mark.reference
@needs_reference
def test_peft_opens_the_prefixes_that_we_save(key, tmp_path):
    requests, ours = [], []
    for name, (folder, _) in OURS.items():
        model, texts = with_prefix(name, key), prompts_of(FIXTURES / folder)
        hub.save_adapter(tmp_path / name, model)
        requests.append(
            {"model": FIXTURES / folder, "adapter": str(tmp_path / name), "prompts": texts}
        )
        ours.append([model.logits([ids])[0] for ids in texts])
        moved = ours[-1][0] - opened(FIXTURES / folder).logits(texts[0])[0]
        assert np.abs(moved).max() > 0.05, name
    for name, theirs, logits in zip(OURS, ask(tmp_path, *requests), ours, strict=True):
        for number, mine in enumerate(logits):
            np.testing.assert_allclose(
                theirs[f"logits.{number}"], mine, rtol=1e-5, atol=1e-5, err_msg=name
            )


def test_a_network_is_written_as_what_it_gives(key, tmp_path):
    model = with_prefix("projected", key)
    hub.save_adapter(tmp_path / "out", model)
    config = config_of(tmp_path / "out")
    assert (config["prefix_projection"], config["encoder_hidden_size"]) == (True, 5)
    again = hub.load_adapter(opened(FIXTURES / LLAMA), tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again.params, prefix.finish(model.params))


def test_a_prefix_of_another_base_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"prompt_embeddings \[3, 32\]; expected \[3, \d+\]"):
        hub.load_adapter(opened(FIXTURES / GPT), ADAPTERS / "prefix_tuning")
    folder = shutil.copytree(ADAPTERS / "prefix_tuning", tmp_path / "copy")
    change_config(folder, num_virtual_tokens=128)
    with pytest.raises(CheckpointError, match=r"a prefix of 128 does not fit the context of 128"):
        hub.load_adapter(base_of("prefix_tuning"), folder)
    loaded = hub.load_adapter(base_of("prefix_tuning"), ADAPTERS / "prefix_tuning")
    with pytest.raises(CheckpointError, match="have a prefix already"):
        hub.load_adapter(loaded, ADAPTERS / "prefix_tuning")


def test_what_would_be_lost_beside_a_prefix_is_refused(key, tmp_path):
    model = with_prefix("plain", key)
    both = lora.add(model.params, r".*/q/kernel", key)
    still, params = prefix.add(
        opened(FIXTURES / LLAMA).model, opened(FIXTURES / LLAMA).params, key, moves=False
    )
    for changed, message in [
        ({"params": both}, "prefix/table is no part of the base model"),
        ({"model": still, "params": params}, r"positions 0, 1, ... \(moves=False\)"),
        ({"model": opened(FIXTURES / LLAMA).model}, "the model is a Decoder, not a Prefixed"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            hub.save_adapter(tmp_path / "out", dataclasses.replace(model, **changed))
    assert not (tmp_path / "out").exists()
