"""GGUF files written here as llama.cpp's converter writes them: what is read, and bad input."""

import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from gguf import GGMLQuantizationType as Type
from gguf_files import converted, metadata_for, permute, write
from hub_reference import FIXTURES

from research import hub
from research.hub import CheckpointError
from research.hub.gguf import open_gguf, unpermute
from research.hub.gguf_tokenizer import tokenizer_of
from research.models.families import llama
from research.models.position import Linear, Llama3


@pytest.mark.parametrize("name", ["gqa", "tied_biased"])
def test_equal_to_the_directory_it_was_converted_from(tmp_path, name):
    case = FIXTURES / "tiny_llama" / name
    path = write(tmp_path / "model.gguf", converted(case), **metadata_for(case))
    ours, theirs = hub.load(path), hub.load(case)
    assert ours.model.config == theirs.model.config
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


def test_saved_as_a_directory_and_read_again(tmp_path):
    case = FIXTURES / "tiny_llama" / "gqa"
    loaded = hub.load(write(tmp_path / "model.gguf", converted(case), **metadata_for(case)))
    hub.save(tmp_path / "out", loaded)
    again = hub.load(tmp_path / "out")
    assert again.model.config == loaded.model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    assert again.tokenizer.encode("the hat<|user|>") == loaded.tokenizer.encode("the hat<|user|>")
    assert again.tokenizer.eos_id == 30
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 30


def test_unpermute_by_hand():
    """One head of 4 features: the converter wrote rows 0, 2, 1, 3."""
    rows = np.arange(4)[:, None] * np.ones((1, 3))
    assert unpermute(rows[[0, 2, 1, 3]], heads=1)[:, 0].tolist() == [0, 1, 2, 3]
    wide = np.arange(48 * 5.0).reshape(48, 5)
    np.testing.assert_array_equal(unpermute(permute(wide, 6), 6), wide)


def llama3_factors(head_dim, theta, factor, low, high, original):
    """As llama.cpp's converter computes rope_freqs.weight."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_llama3_scaling_is_recovered_from_its_factors(tmp_path):
    case = FIXTURES / "tiny_llama" / "llama3"
    factors = llama3_factors(8, 5e5, 32.0, 1.0, 4.0, 8192)
    tensors = converted(case) | {"rope_freqs.weight": factors}
    metadata = metadata_for(case) | {"llama.rope.freq_base": 5e5}
    path = write(tmp_path / "model.gguf", tensors, **metadata)
    assert hub.load(path).model.config.position.scaling == Llama3(32.0)
    tensors["rope_freqs.weight"] = llama3_factors(8, 5e5, 32.0, 1.0, 2.0, 4096)
    path = write(tmp_path / "other.gguf", tensors, **metadata)
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight is not Llama 3.1's scaling"):
        hub.load(path)


def test_rope_scaling_linear_and_unsupported(tmp_path):
    case = FIXTURES / "tiny_llama" / "gqa"
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    path = write(tmp_path / "a.gguf", converted(case), **metadata_for(case), **scaling)
    assert hub.load(path).model.config.position.scaling == Linear(2.0)
    scaling["llama.rope.scaling.type"] = "longrope"
    path = write(tmp_path / "b.gguf", converted(case), **metadata_for(case), **scaling)
    with pytest.raises(CheckpointError, match=r"b.gguf: rope scaling 'longrope' is not supported"):
        hub.load(path)


def dequantizable(kind):
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def with_gate(kind):
    """Tiny tensors, the first gate matrix [24, 256] being random bytes of a type."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 60, (24, 256 // block * size), np.uint8)
    return {
        "token_embd.weight": np.ones((32, 16), np.float32),
        "blk.0.ffn_gate.weight": (data, kind),
    }


@pytest.mark.parametrize(
    "kind", [kind for kind in Type if dequantizable(kind)], ids=lambda k: k.name
)
def test_every_type_that_dequantizes(tmp_path, kind):
    tensors = with_gate(kind)
    checkpoint, _ = open_gguf(write(tmp_path / "model.gguf", tensors))
    name = "model.layers.0.mlp.gate_proj.weight"
    assert checkpoint.shapes[name] == (24, 256)
    data, _ = tensors["blk.0.ffn_gate.weight"]
    np.testing.assert_array_equal(checkpoint.read(name), gguf.quants.dequantize(data, kind))


@pytest.mark.parametrize("kind", [Type.I8, Type.Q8_K, Type.F64], ids=lambda k: k.name)
def test_type_that_does_not_dequantize(tmp_path, kind):
    path = write(tmp_path / "model.gguf", with_gate(kind))
    with pytest.raises(
        CheckpointError, match=rf"tensor 'blk.0.ffn_gate.weight' has type {kind.name}, which cannot"
    ):
        hub.load(path)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    case = FIXTURES / "tiny_llama" / "gqa"
    folder = tmp_path_factory.mktemp("gguf")
    return write(folder / "model.gguf", converted(case), **metadata_for(case))


def test_truncated_anywhere(good, tmp_path):
    """Cut in the header, in the metadata, in the tensor table, in the first and the last tensor."""
    whole, path = good.read_bytes(), tmp_path / "cut.gguf"
    lengths = np.unique(np.geomspace(4, len(whole) - 1, 60).astype(int)).tolist()
    for length in [*lengths, len(whole) - 33]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=rf"cut.gguf: truncated.* {length} bytes there"):
            hub.load(path)


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 not this one"])
def test_not_gguf(tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.gguf: not a GGUF file: it begins with b"):
        hub.load(tmp_path / "model.gguf")


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"none.gguf: there is no such file"):
        hub.load(tmp_path / "none.gguf")


def test_other_architecture(tmp_path):
    path = write(tmp_path / "model.gguf", {}, architecture="rwkv6")
    with pytest.raises(CheckpointError, match=r"architecture 'rwkv6' is not .*supported: llama"):
        hub.load(path)


def test_experts_and_unknown_tensors(tmp_path):
    path = write(tmp_path / "a.gguf", {}, **{"llama.expert_count": 8})
    with pytest.raises(CheckpointError, match=r"a.gguf: llama.expert_count = 8 is not supported"):
        hub.load(path)
    path = write(tmp_path / "b.gguf", {"blk.0.ssm_in.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(CheckpointError, match=r"tensor 'blk.0.ssm_in.weight' has no place"):
        hub.load(path)


def test_missing_metadata_partial_rotation_and_missing_tensor(tmp_path):
    path = write(tmp_path / "a.gguf", {}, drop=["llama.block_count"])
    with pytest.raises(CheckpointError, match=r"a.gguf: the metadata lacks 'llama.block_count'"):
        hub.load(path)
    path = write(tmp_path / "b.gguf", {}, **{"llama.rope.dimension_count": 1})
    with pytest.raises(CheckpointError, match=r"b.gguf: rotates 1 of 2 features"):
        hub.load(path)
    case = FIXTURES / "tiny_llama" / "gqa"
    tensors = converted(case)
    del tensors["blk.1.ffn_up.weight"]
    path = write(tmp_path / "c.gguf", tensors, **metadata_for(case))
    with pytest.raises(CheckpointError, match=r"lacks 1 weights.* model.layers.1.mlp.up_proj.weig"):
        hub.load(path)


def tokenizer_from(tmp_path, **metadata):
    path = write(tmp_path / "tokenizer.gguf", {}, **metadata)
    return tokenizer_of(path, open_gguf(path)[1])


def test_byte_level_tokens_merges_and_special_tokens(tmp_path):
    tokenizer = tokenizer_from(tmp_path)
    ids = tokenizer.encode("he the<|end|>")
    assert [tokenizer.id_to_token(i) for i in ids] == ["he", "Ġthe", "<|end|>"]
    assert tokenizer.decode(ids) == "he the"  # <|end|> is a control token,
    assert tokenizer.decode(tokenizer.encode("a<|user|>")) == "a<|user|>"  # <|user|> is not


def test_bos_is_added_when_the_file_says_so(tmp_path):
    bos = {"tokenizer.ggml.bos_token_id": 31, "tokenizer.ggml.eot_token_id": 31}
    plain = tokenizer_from(tmp_path, **bos)
    assert plain.encode("he", add_special=True) == plain.encode("he")
    assert plain.stop_ids == (30, 31)
    adding = tokenizer_from(tmp_path, **bos, **{"tokenizer.ggml.add_bos_token": True})
    assert adding.encode("he", add_special=True) == [31, *plain.encode("he")]


def test_unknown_tokenizers_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"pre-tokenizer 'tekken'.*supported: gpt-2, smollm"):
        tokenizer_from(tmp_path, **{"tokenizer.ggml.pre": "tekken"})
    with pytest.raises(CheckpointError, match=r"tokenizer model 'bert'.*supported: gpt2, llama"):
        tokenizer_from(tmp_path, **{"tokenizer.ggml.model": "bert"})


def test_more_tokens_than_embeddings(tmp_path):
    case = FIXTURES / "tiny_llama" / "gqa"
    many = {
        "tokenizer.ggml.tokens": ["t", "1", *(f"t{i}" for i in range(1, 69))],
        "tokenizer.ggml.token_type": [1] * 70,
        "tokenizer.ggml.merges": ["t 1"],
    }
    path = write(tmp_path / "model.gguf", converted(case), **metadata_for(case), **many)
    with pytest.raises(CheckpointError, match=r"tokenizer has 70 tokens, the model only 64"):
        hub.load(path)


def test_llama3_and_qwen2_split_digits_differently(tmp_path):
    tokens = [*"0123456789", "12", "123", "45", "Ġ", "end"]
    fields = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 14 + [3],
        "tokenizer.ggml.merges": ["1 2", "12 3", "4 5"],
        "tokenizer.ggml.eos_token_id": 14,
    }
    for pre, expected in {"llama-bpe": ["123", "45"], "qwen2": list("12345")}.items():
        tokenizer = tokenizer_from(tmp_path, **fields, **{"tokenizer.ggml.pre": pre})
        assert [tokenizer.id_to_token(i) for i in tokenizer.encode("12345")] == expected


def test_sentencepiece_bpe_gives_the_ids_of_sentencepiece(tmp_path):
    text = "the cat sat on the mat, the rat ate the hat; that fat cat hates the wet hat\n"
    (tmp_path / "corpus.txt").write_text(text * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "m"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    spm = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    kinds = [(spm.is_unknown, 2), (spm.is_control, 3), (spm.is_byte, 6), (lambda i: True, 1)]
    count = spm.vocab_size()
    tokenizer = tokenizer_from(
        tmp_path,
        **{
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [spm.id_to_piece(i) for i in range(count)],
            "tokenizer.ggml.scores": [spm.get_score(i) for i in range(count)],
            "tokenizer.ggml.token_type": [
                next(kind for holds, kind in kinds if holds(i)) for i in range(count)
            ],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
        },
    )
    for line in ["the cat that ate", "  two  spaces", "Zürich 猫 the\thats", "athethat"]:
        assert tokenizer.encode(line) == spm.encode(line), line
        assert tokenizer.decode(tokenizer.encode(line)) == line
    assert tokenizer.encode("the", add_special=True)[0] == 1


def test_dtype_of_loading(good):
    assert hub.load(good, dtype=jnp.bfloat16).params["embed"]["table"].dtype == jnp.bfloat16


def test_config_round_trips_through_the_family(good):
    loaded = hub.load(good)
    said = llama.to_huggingface(loaded.model.config)
    assert {name: loaded.config[name] for name in said} == said
