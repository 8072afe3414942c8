"""GPT and Qwen directories: the numbers of transformers in, out and back, and names without prefix."""

import json
import shutil

import jax
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
from research.hub import CheckpointError

GPT = [FIXTURES / "tiny_gpt" / name for name in ("gpt1", "gpt2", "gpt2_untied")]
QWEN = [FIXTURES / "tiny_qwen" / name for name in ("tied", "sliding", "alternating")]
every_case = pytest.mark.parametrize("case", GPT + QWEN, ids=lambda case: case.name)


@every_case
def test_logits_and_gradients_equal_transformers(case):
    check_logits_and_gradients(case)


@every_case
def test_save_gives_back_every_tensor_and_field(case, tmp_path):
    check_round_trip(case, tmp_path / "out")


@pytest.mark.reference
@needs_reference
def test_transformers_opens_what_we_save(tmp_path):
    check_reference_opens(GPT + QWEN, tmp_path)


@pytest.mark.parametrize("case", [GPT[0], GPT[2], QWEN[1]], ids=lambda case: case.name)
def test_names_without_their_first_word_are_the_same_model(case, tmp_path):
    """A checkpoint of the trunk, with the buffers that GPT-2's have and the head under its name."""
    copy = shutil.copytree(case, tmp_path / "model")
    stored = load_file(copy / "model.safetensors")
    bare = {}
    for name, array in stored.items():
        bare[name.removeprefix("transformer.").removeprefix("model.")] = array
    bare["h.0.attn.bias"] = np.ones((1, 1, 24, 24), np.float32)
    bare["h.0.attn.masked_bias"] = np.float32(-1e4).reshape(1)
    save_file(bare, copy / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, hub.load(copy).params, hub.load(case).params)
    del bare["h.0.attn.bias"], bare["h.0.attn.masked_bias"]
    del bare["h.1.mlp.c_fc.bias" if case in GPT else "layers.1.self_attn.q_proj.bias"]
    save_file(bare, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 weights.*: (transformer|model)\..*\.1\."):
        hub.load(copy)


@pytest.mark.parametrize("case", QWEN, ids=lambda case: case.name)
def test_layers_that_slide_are_stacks_of_their_own(case):
    stacks = hub.load(case).model.config.stacks
    windows = [[block.attention.window for block in stack.pattern] for stack in stacks]
    counts = [stack.count for stack in stacks]
    wanted = {
        "tied": ([2], [[None]]),
        "sliding": ([1, 2], [[None], [4]]),
        "alternating": ([2], [[4, None]]),
    }
    assert (counts, windows) == wanted[case.name]


def test_an_older_config_says_where_sliding_begins(tmp_path):
    """Without layer_types, as transformers 4 wrote it."""
    copy = shutil.copytree(QWEN[1], tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    del config["layer_types"]
    (copy / "config.json").write_text(json.dumps(config))
    assert hub.load(copy).model.config == hub.load(QWEN[1]).model.config


def test_ill_typed_fields_are_named(tmp_path):
    copy = shutil.copytree(GPT[1], tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    for change, message in (
        ({"n_layer": "3"}, r"n_layer = '3'; expected a whole number above 0"),
        ({"attn_pdrop": 1.0}, r"attn_pdrop = 1.0; expected a number from 0 to below 1"),
        ({"n_head": 3}, r"n_head = 3 does not divide n_embd = 20"),
    ):
        (copy / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=message):
            hub.load(copy)
