"""Adapters of every kind: what peft saved gives peft's logits, and peft opens what we save."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
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
from research.hub import CheckpointError
from research.hub.peft_lora import alphas_to_save
from research.paths import map_named, named_leaves
from research.weights import adalora, dora, ia3, lora
from research.weights.base import is_weight, merge

MATRICES = [
    "rslora",
    "dora",
    "dora_ragged",
    "conv1d",
    "adalora",
    "adalora_whole",
    "ia3",
    "ia3_biased",
]


@pytest.mark.parametrize("name", MATRICES)
def test_logits_equal_those_of_peft(name):
    base, (prompt, expected) = base_of(name), expected_of(name)
    loaded = hub.load_adapter(base, ADAPTERS / name)
    ours = np.asarray(loaded.logits(prompt)[0])
    assert np.abs(ours - base.logits(prompt)[0]).max() > 0.05
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def base_copies(tensors):
    return {name for name in tensors if name.endswith(".base_layer.weight")}


@pytest.mark.parametrize("name", MATRICES)
def test_saved_again_it_has_the_names_and_shapes_that_peft_wrote(name, tmp_path):
    hub.save_adapter(tmp_path / "out", hub.load_adapter(base_of(name), ADAPTERS / name))
    theirs, ours = load_file(ADAPTERS / name / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    ragged = name in ("dora_ragged", "ia3_biased")  # ours have all layers
    assert theirs.keys() - base_copies(theirs) <= ours.keys()
    assert ragged or len(ours) == len(theirs) - len(base_copies(theirs))
    for tensor in ours.keys() & theirs.keys():
        if name == "rslora":  # the ratio of two scales is in lora_B
            assert ours[tensor].shape == theirs[tensor].shape, tensor
        else:
            np.testing.assert_array_equal(ours[tensor], theirs[tensor], err_msg=tensor)
    mine, peft = config_of(tmp_path / "out"), config_of(ADAPTERS / name)
    assert mine.keys() <= peft.keys()
    told = ["peft_type", "r", "init_r", "lora_alpha", "use_rslora", "use_dora"]
    for field in [*told, "target_r" if "whole" not in name else "peft_type"]:
        assert mine.get(field, peft.get(field)) == peft.get(field), field
    assert (mine.get("rank_pattern") or {}) == (peft.get("rank_pattern") or {})


def require_same_function(one, other):
    """Matrices and biases agree once the adapters are merged into them."""
    before, after = (dict(named_leaves(merge(ia3.merge(m.params)))) for m in (one, other))
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        np.testing.assert_allclose(after[path], leaf, rtol=0, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", MATRICES)
def test_saved_and_loaded_again_it_is_the_same_function(name, tmp_path):
    base = base_of(name)
    loaded = hub.load_adapter(base, ADAPTERS / name)
    hub.save_adapter(tmp_path / "out", loaded)
    again = hub.load_adapter(base, tmp_path / "out")
    require_same_function(loaded, again)


def test_what_a_layer_has_not_is_the_base():
    """Rows that the adapter leaves out: a rank of 0, lengths of columns, vectors of ones."""
    counts = adalora.ranks(hub.load_adapter(base_of("adalora"), ADAPTERS / "adalora").params)
    assert {path: n.tolist() for path, n in counts.items()} == {
        "stack_0/block_0/attention/q/kernel": [2, 0],
        "stack_0/block_0/attention/v/kernel": [3, 3],
    }
    for name, part in [("dora_ragged", "down"), ("ia3_biased", "o")]:
        base = base_of(name)
        loaded = hub.load_adapter(base, ADAPTERS / name)
        before, after = (dict(named_leaves(m.params, is_leaf=is_weight)) for m in (base, loaded))
        (path,) = [path for path in before if path.endswith(f"/{part}/kernel")]
        made = after[path].dense()
        np.testing.assert_allclose(made[0], before[path][0], rtol=1e-6)
        assert np.abs(made[1] - before[path][1]).max() > 0.01


# Ours, as peft opens them: a base, and what is put on it.


def noisy(base, params, key, names=("a", "b", "e", "scale", "magnitude")):
    """Params whose trained numbers are off their beginning."""

    def off(path, leaf):
        if path.split("/")[-1] in names and path not in dict(named_leaves(base.params)):
            number = sum(map(ord, path))
            return leaf + 0.3 * jax.random.normal(jax.random.fold_in(key, number), leaf.shape)
        return leaf

    return dataclasses.replace(base, params=map_named(off, params))


def pruned(params):
    """AdaLoRAs some of whose triplets are gone, and all of one layer."""

    def cut(node):
        if not isinstance(node, adalora.AdaLoRA):
            return node
        kept = jnp.ones_like(node.e).at[0, 1].set(0).at[1, :].set(0)
        return node.replace(e=node.e * kept)

    return jax.tree.map(cut, params, is_leaf=is_weight)


def triplets(base, key):
    params = adalora.add(base.params, r".*/(k|up)/kernel", key, rank=3, alpha=7)
    return noisy(base, params, key)


def cut_triplets(base, key):
    model = triplets(base, key)
    return dataclasses.replace(model, params=pruned(model.params))


def as_lora(base, key):
    model = cut_triplets(base, key)
    return dataclasses.replace(model, params=adalora.to_lora(model.params))


LLAMA, QWEN, GPT = "tiny_llama/gqa", "tiny_qwen/tied", "tiny_gpt/gpt2"
HEAD = r".*/(q|down)/kernel|embed/table|head/kernel"
OURS = {
    "rslora": (
        LLAMA,
        lambda m, key: noisy(
            m, lora.add(m.params, HEAD, key, rank=3, alpha=4, rank_stabilized=True), key
        ),
    ),
    "dora": (LLAMA, lambda m, key: noisy(m, dora.add(m.params, HEAD, key, rank=3, alpha=4), key)),
    "dora_biased": (QWEN, lambda m, key: noisy(m, dora.add(m.params, r".*/v/kernel", key), key)),
    "dora_conv1d": (
        GPT,
        lambda m, key: noisy(m, dora.add(m.params, r".*/(o|up|down)/kernel", key, rank=2), key),
    ),
    "dora_one_block": (  # peft puts one on the other block too, which does nothing
        "tiny_qwen/alternating",
        lambda m, key: noisy(m, dora.add(m.params, r".*/block_1/.*/(q|down)/kernel", key), key),
    ),
    "adalora": (LLAMA, triplets),
    "adalora_pruned": (QWEN, cut_triplets),
    "adalora_as_lora": (QWEN, as_lora),
    "ia3": (LLAMA, lambda m, key: noisy(m, ia3.add(m.params), key)),
    "ia3_biased": (QWEN, lambda m, key: noisy(m, ia3.add(m.params), key)),
    "ia3_conv1d": (
        GPT,
        lambda m, key: noisy(m, ia3.add(m.params, r".*/(up|down)/kernel"), key),
    ),
}


def saved(name, key, folder):
    base, put_on = OURS[name]
    model = put_on(opened(FIXTURES / base), key)
    hub.save_adapter(folder, model)
    return FIXTURES / base, model


@pytest.mark.parametrize("name", OURS)
def test_what_we_save_comes_back(name, key, tmp_path):
    base, model = saved(name, key, tmp_path / "out")
    require_same_function(model, hub.load_adapter(opened(base), tmp_path / "out"))


@pytest.mark.reference
@needs_reference
def test_peft_opens_what_we_save(key, tmp_path):
    requests, ours = [], []
    for name in OURS:
        base, model = saved(name, key, tmp_path / name)
        prompts = prompts_of(base)
        requests.append({"model": base, "adapter": str(tmp_path / name), "prompts": prompts})
        ours.append([model.logits(ids)[0] for ids in prompts])
        assert np.abs(ours[-1][0] - opened(base).logits(prompts[0])[0]).max() > 0.05, name
    for name, theirs, logits in zip(OURS, ask(tmp_path, *requests), ours, strict=True):
        for number, mine in enumerate(logits):
            np.testing.assert_allclose(
                theirs[f"logits.{number}"], mine, rtol=1e-5, atol=1e-5, err_msg=name
            )


# What is refused, and how it is said.

OTHER = {  # names a file and a tensor, its shape, and what this base would have
    "dora": r"lora_embedding_A \[3, 64\] .*lora_magnitude_vector \[15\]; expected \[R, 64\]",
    "adalora": r"adapter_model.safetensors: .*lora_A \[2, 15\] .*; expected \[2, 16\] and \[2, 1\]",
    "ia3": r"adapter_model.safetensors: .*k_proj.ia3_l \[8, 2\]; expected \[8, 1\] on this base",
}


@pytest.fixture
def copy_of(tmp_path):
    return lambda name: shutil.copytree(ADAPTERS / name, tmp_path / name)


def narrower(name, tensor):
    if name.endswith("magnitude_vector") or name.endswith("lora_A"):
        return {name: np.ascontiguousarray(tensor[..., :15])}
    if name.endswith("k_proj.ia3_l"):
        return {name: np.concatenate([tensor, tensor], axis=1)}
    return {name: tensor}


@pytest.mark.parametrize("name", OTHER)
def test_an_adapter_of_another_size_is_named(name, copy_of):
    folder = copy_of(name)
    change_tensors(folder, narrower)
    with pytest.raises(CheckpointError, match=OTHER[name]):
        hub.load_adapter(base_of(name), folder)


@pytest.mark.parametrize("name", ["dora", "adalora", "ia3"])
def test_an_adapter_of_other_names_is_named(name, copy_of):
    folder = copy_of(name)
    change_tensors(folder, lambda name, x: {name.replace("layers.1.", "layers.7."): x})
    with pytest.raises(CheckpointError, match=r"no place in the model: model.layers.7.* are like"):
        hub.load_adapter(base_of(name), folder)


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("rslora", {"r": 6}, r"k_proj have rank 8; expected 6 \(r or rank_pattern"),
        ("rslora", {"use_dora": True}, r"holds .*lora_A.weight but not .*lora_magnitude_vector"),
        ("dora", {"use_dora": False}, r"no place in the model: .*lora_magnitude_vector"),
        (
            "adalora",
            {"init_r": 5},
            r"rank_pattern of .*lora_E is \[True, .*init_r = 5 truth values",
        ),
        ("adalora", {"rank_pattern": None}, r"q_proj.lora_A \[2, 16\] .*expected \[4, 16\]"),
        ("adalora_whole", {"rank_pattern": {"odd.lora_E": [True] * 4}}, r"rank_pattern names odd,"),
        ("adalora", {"lora_alpha": 0}, r"lora_alpha = 0; expected a number > 0"),
        ("adalora", {"modules_to_save": ["lm_head"]}, r"modules_to_save = .* is not supported"),
        ("ia3", {"modules_to_save": ["lm_head"]}, r"modules_to_save = .* is not supported"),
        ("ia3", {"feedforward_modules": None}, r"feedforward_modules = None; expected a list"),
        ("ia3", {"feedforward_modules": []}, r"down_proj.ia3_l \[1, 24\]; expected \[16, 1\]"),
    ],
)
def test_a_config_that_contradicts_the_tensors(name, fields, message, copy_of):
    folder = copy_of(name)
    change_config(folder, **fields)
    with pytest.raises(CheckpointError, match=message):
        hub.load_adapter(base_of(name), folder)


def test_vectors_on_both_sides_of_one_stack_are_refused(copy_of):
    folder = copy_of("ia3")
    change_config(folder, feedforward_modules=["0.mlp.down_proj"])
    name = "base_model.model.model.layers.1.mlp.down_proj.ia3_l"
    change_tensors(folder, lambda n, x: {n: np.ones((16, 1), np.float32) if n == name else x})
    with pytest.raises(CheckpointError, match=r"names some layers of .*down_proj and not others"):
        hub.load_adapter(base_of("ia3"), folder)


def test_what_cannot_be_written(key, tmp_path):
    model = opened(FIXTURES / LLAMA)
    first = adalora.add(model.params, r".*/q/kernel", key, rank=2)
    cases = {
        r"\(rank, scale, dropout\) .* PEFT has one": adalora.add(
            first, r".*/k/kernel", key, rank=3
        ),
        "an embedding, on which PEFT has no AdaLoRA": adalora.add(model.params, "embed/table", key),
        r"an embedding, on which PEFT has no \(IA\)\^3": ia3.add(
            model.params, "embed/table", inputs=None
        ),
        "q/kernel holds a AdaLoRA, which is not written beside DoRA": dora.add(
            first, r".*/v/kernel", key
        ),
        "q/kernel has a LoRA on a AdaLoRA: merge or remove one first": lora.add(
            first, r".*/q/kernel", key
        ),
        r"k/kernel has a \(IA\)\^3 on a DoRA": ia3.add(dora.add(model.params, r".*/k/kernel", key)),
    }
    for message, params in cases.items():
        with pytest.raises(CheckpointError, match=message):
            hub.save_adapter(tmp_path / "out", dataclasses.replace(model, params=params))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("of", [dora.add, adalora.add, ia3.add])
def test_a_part_of_a_packed_tensor_is_refused(key, of, tmp_path):
    model = opened(FIXTURES / GPT)
    rule = {"inputs": None} if of is ia3.add else {}
    one = dataclasses.replace(model, params=of(model.params, r".*/v/kernel", key, **rule))
    with pytest.raises(CheckpointError, match=r"v/kernel is a part of the tensor .*c_attn"):
        hub.save_adapter(tmp_path / "out", one)


def test_the_form_of_a_scale():
    """rsLoRA is told from LoRA by its rounder or fewer alphas; else LoRA it is."""
    ranks = {"x": 8, "y": 2}
    stable = {"x": 16 / 8**0.5, "y": 16 / 2**0.5}
    assert alphas_to_save(stable, ranks) == (True, {"x": 16, "y": 16})
    assert alphas_to_save({"x": 2.0, "y": 2.0}, ranks) == (False, {"x": 16, "y": 4})
    assert alphas_to_save({"x": 4.0}, {"x": 4}) == (False, {"x": 16})
