"""The chat loop on a tiny model whose tokens are bytes."""

import dataclasses
from functools import partial

import jax
import pytest

from research import hub
from research.adapters import prefix
from research.decode import Sampling
from research.hub.download import DownloadError
from research.models import decoder
from research.models.attention import Attention
from research.models.layers import GatedMlp
from research.paths import map_named
from research.tokenize.chat import ChatTemplateError
from research.weights import dora, lora, prompt
from scripts import chat
from scripts.chat import Chat


class Bytes:
    """Token i is byte i."""

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


@pytest.fixture(scope="module")
def parts():
    block = decoder.Block(Attention(heads=2, kv_heads=2, head_size=8), GatedMlp(32))
    model = decoder.Decoder(decoder.DecoderConfig(256, 16, (decoder.Stack(1, (block,)),), 96))
    params = jax.tree.map(
        lambda x: 6 * x, jax.jit(decoder.init, static_argnums=0)(model, jax.random.key(1))
    )
    params = lora.add(params, r".*/(v|o|up|down)/kernel", jax.random.key(2), rank=2)
    loud = partial(jax.random.normal, jax.random.key(3))
    return model, map_named(lambda p, x: 3 * loud(x.shape) if p.endswith("/b") else x, params)


@pytest.fixture
def written():
    return []


@pytest.fixture
def talk(parts, written, monkeypatch):
    join = lambda _, messages, **more: "".join(f"{m['role'][0]}:{m['content']}\n" for m in messages)  # noqa: E731
    monkeypatch.setattr(chat, "render", join)
    model, params = parts
    sampling = Sampling(temperature=0, max_tokens=6)
    return Chat(model, params, Bytes(), sampling, written.append, has_adapter=True, system="be")


def test_a_conversation(talk, written):
    first = talk.say("hi")
    assert "".join(written).rstrip("\n") == first.rstrip("\n")
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant"]
    talk.command("/adapter off")
    talk.reset()
    assert talk.say("hi") != first
    talk.command("/adapter on")
    talk.reset()
    assert talk.say("hi") == first


@pytest.mark.parametrize("kind", ["dora", "prompt", "prefix"])
def test_adapters_of_other_kinds_are_read_and_taken_off(kind, talk, parts):
    model, params = hub.without_adapter(*parts)
    key = jax.random.key(4)
    if kind == "prefix":
        model, params = prefix.add(model, params, key, length=3, std=8.0)
    elif kind == "prompt":
        params = prompt.add(params, key, length=3, initial=partial(prompt.normal, std=9.0))
    else:
        params = dora.add(params, r".*/(v|o)/kernel", key, rank=2)
        params = map_named(lambda p, x: 5 * x if p.endswith("/magnitude") else x, params)
    other = dataclasses.replace(talk, model=model, params=params)
    without = dataclasses.replace(talk, adapter=False)
    assert other.say("hi") != without.say("hi")
    other.adapter = False
    other.reset()
    without.reset()
    assert other.say("hi") == without.say("hi")


def test_commands(talk, written):
    talk.run(["/system x", "/nonsense", "/quit", "never read"])
    assert talk.messages == [{"role": "system", "content": "x"}]
    assert "commands:" in written[-1]
    talk.has_adapter = False
    talk.run(["/adapter off"])
    assert "no adapter" in written[-1]


def test_a_conversation_too_long_is_explained_and_goes_on(talk, written):
    talk.run(["y" * 95, "/reset", "hi"])
    assert "context of 96; /reset begins anew" in written[0]
    assert talk.messages[-1]["role"] == "assistant"


def test_a_missing_model_is_named(capsys):
    assert chat.main(["/nowhere/model"]) == 1
    assert "/nowhere/model" in capsys.readouterr().err


def test_without_a_network_one_line_says_so(monkeypatch, capsys):
    def offline():
        raise DownloadError("no network")

    monkeypatch.setattr(chat, "smollm2", offline)
    assert chat.main([]) == 1
    assert capsys.readouterr().err == "chat: no network\n"


def test_a_template_that_refuses_a_system_prompt_does_not_end_the_chat(talk, written, monkeypatch):
    joined = chat.render

    def refusing(tokenizer, messages, **more):
        if messages[0]["role"] == "system":
            raise ChatTemplateError("template failed: no system role")
        return joined(tokenizer, messages, **more)

    monkeypatch.setattr(chat, "render", refusing)
    talk.run(["hi"])
    assert written == [
        "[template failed: no system role; /system alone takes the system prompt away]\n"
    ]
    talk.run(["/system", "hi"])
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]
