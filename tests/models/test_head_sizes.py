"""Heads that do not divide the width: refused wherever their size is the quotient."""

import pytest

from research.models.families.baichuan import baichuan
from research.models.families.chatglm import chatglm
from research.models.families.glm import glm
from research.models.families.gpt import gpt
from research.models.families.llama import llama
from research.models.families.qwen import qwen
from research.models.families.transformer import transformer
from research.models.layers import Mlp

MADE = {
    "gpt": lambda width, heads, **more: gpt(11, 2, width, heads, 16, **more),
    "llama": lambda width, heads, **more: llama(11, 2, width, heads, 2, 16, **more),
    "qwen": lambda width, heads, **more: qwen(11, 2, width, heads, 2, 16, **more),
    "glm": lambda width, heads, **more: glm(11, 2, width, heads, 2, 16, **more),
    "baichuan": lambda width, heads, **more: baichuan(11, 2, width, heads, 16, **more),
    "chatglm": lambda width, heads: chatglm(11, 2, width, heads, Mlp(16)),
    "transformer": lambda width, heads: transformer(11, 2, width, heads, 16),
}


@pytest.mark.parametrize("family", MADE)
def test_heads_must_divide_the_width(family):
    with pytest.raises(ValueError, match="6 heads do not divide the width 64"):
        MADE[family](64, 6)
    config = MADE[family](48, 6)
    stacks = config.encoder if family == "transformer" else config.stacks
    assert stacks[0].pattern[0].attention.head_size == 8


@pytest.mark.parametrize("family", ["gpt", "llama", "qwen", "glm", "baichuan"])
def test_a_head_size_that_is_given_need_not_be_the_quotient(family):
    config = MADE[family](64, 6, head_size=10)
    assert config.stacks[0].pattern[0].attention.head_size == 10
