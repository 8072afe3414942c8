"""Chat templates: the loss mask covers answers and nothing else; strangers' templates are caged."""

import dataclasses

import numpy as np
import pytest

from research.tokenize import chat
from research.tokenize.train import train_bpe

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say hello."},
    {"role": "assistant", "content": "\nHello, 你好 😀!\n"},
    {"role": "user", "content": "And goodbye?"},
    {"role": "assistant", "content": "Goodbye."},
]
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    corpus = ["hello goodbye brief say and\nuser\nassistant\n\n\nsystem 你好 😀\n" * 20]
    return train_bpe(
        corpus,
        400,
        chat.CHATML_TOKENS,
        bos="<|im_start|>",
        eos="<|im_end|>",
        chat_template=chat.CHATML,
    )


def with_template(tokenizer, template, name="model/chat_template.jinja"):
    return dataclasses.replace(tokenizer, chat_template=template, template_name=name)


def test_chatml_text(tokenizer):
    text = chat.render(tokenizer, TALK[:2], add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay hello.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_mask_is_answers_and_their_ends(tokenizer):
    ids, mask = chat.encode_chat(tokenizer, TALK[3:])
    assert set(mask.tolist()) == {0.0, 1.0}
    assert tokenizer.decode(ids[mask == 1], skip_special=False) == "Goodbye.<|im_end|>"
    assert tokenizer.decode(ids, skip_special=False) == chat.render(tokenizer, TALK[3:])


def test_every_answer_of_a_long_talk(tokenizer):
    ids, mask = chat.encode_chat(tokenizer, TALK)
    answers = tokenizer.decode(ids[mask == 1], skip_special=False).split("<|im_end|>")
    assert [answer.strip() for answer in answers] == ["Hello, 你好 😀!", "Goodbye.", ""]
    assert (ids[mask == 1] == tokenizer.eos_id).sum() == 2


def test_token_across_the_boundary_is_prompt(tokenizer):
    """'\\n' of the template and '\\n' of the answer merge into one token, which is not learned."""
    assert len(tokenizer.encode("\n\n")) == 1
    talk = [TALK[1], {"role": "assistant", "content": "\n\nHi"}]
    ids, mask = chat.encode_chat(tokenizer, talk)
    assert tokenizer.decode(ids[mask == 1], skip_special=False) == "\nHi<|im_end|>"


def test_template_without_generation_prompt(tokenizer):
    ids, mask = chat.encode_chat(with_template(tokenizer, LLAMA2), TALK[1:])
    text = tokenizer.decode(ids[mask == 1], skip_special=False)
    assert text == " \nHello, 你好 😀!\n<|im_end|> Goodbye.<|im_end|>"


def test_loss_weight_scales_one_answer(tokenizer):
    talk = [dict(message) for message in TALK]
    talk[2]["loss_weight"] = 0.25
    _, plain = chat.encode_chat(tokenizer, TALK)
    _, mask = chat.encode_chat(tokenizer, talk)
    first = np.flatnonzero(mask == 0.25)
    assert len(first) and ((mask > 0) == (plain > 0)).all()
    assert (mask[first[-1] + 1 :] == plain[first[-1] + 1 :]).all()


def test_a_template_that_rewrites_history_is_refused(tokenizer):
    drops = (
        "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}"
        "{{ m.role + ': ' + m.content + '\n' }}{% endif %}{% endfor %}"
    )
    with pytest.raises(chat.ChatTemplateError, match=r"jinja is not prefix-consistent.*message 2"):
        chat.encode_chat(with_template(tokenizer, drops), TALK)


@pytest.mark.parametrize(
    "escape",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.__init__ }}",
        "{{ ''['__class__'] }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}",
    ],
)
def test_escapes_are_errors_with_the_templates_name(tokenizer, escape):
    with pytest.raises(
        chat.ChatTemplateError, match=r"chat_template\.jinja reaches outside its sandbox"
    ):
        chat.render(with_template(tokenizer, escape), TALK)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[0].nothing.content }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% for i in range(10000000) %}{% endfor %}", "OverflowError"),
    ],
)
def test_other_failures_name_the_template(tokenizer, template, message):
    with pytest.raises(chat.ChatTemplateError, match=rf"chat_template\.jinja failed: .*{message}"):
        chat.render(with_template(tokenizer, template), TALK)


def test_templates_have_what_transformers_gives_them(tokenizer):
    template = (
        "{%- for m in messages -%}{%- if loop.index0 == 1 %}{% break %}{% endif -%}"
        "{% generation %}{{ m.content }}{% endgeneration %}{%- endfor -%}"
        "{{ {'a': '<é>'} | tojson }}{{ strftime_now('%Y') | length }}{{ eos_token }}"
    )
    text = chat.render(with_template(tokenizer, template), TALK)
    assert text == 'Be brief.{"a": "<é>"}4<|im_end|>'


def test_no_template_is_an_error(tokenizer):
    with pytest.raises(chat.ChatTemplateError, match="no chat template"):
        chat.render(with_template(tokenizer, None), TALK)


def test_alpaca_prompt_and_completion(tokenizer):
    assert chat.alpaca_prompt("Add.", "1 2").endswith(
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"
    )
    prompt = chat.alpaca_prompt("Add.")
    assert "### Input" not in prompt and prompt.endswith("Add.\n\n### Response:")
    ids, mask = chat.encode_completion(tokenizer, prompt, "Goodbye.")
    assert tokenizer.decode(ids[mask == 1], skip_special=False) == "Goodbye.<|im_end|>"
    assert ids[0] == tokenizer.bos_id and mask[0] == 0
