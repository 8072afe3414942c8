"""Conversations as text and as tokens with a loss mask.

A message is {"role": "system" | "user" | "assistant" | "tool", "content": str}, with an optional
"loss_weight" on assistant messages. Chat templates are Jinja sources that come with a model, so
they are programs by strangers: they run in Jinja's sandbox and see plain data only.

The mask is found by characters. The whole conversation is tokenized once; an answer's span is
what its turn adds to the rendered text of the turns before it, so a prompt and its answer cannot
be merged differently from how they stand in the conversation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from research.tokenize.tokenizer import Tokenizer

Message = dict[str, Any]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# Taori et al. 2023, Stanford Alpaca.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


class ChatTemplateError(ValueError):
    """A chat template is missing, malformed, unsafe, or of no use for a loss mask."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks answers in some templates; here it is inert."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own form)

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, except that an unsafe access raises at once instead of printing nothing."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is unsafe")


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    sandbox = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    sandbox.filters["tojson"] = _to_json
    sandbox.globals["raise_exception"] = _raise_exception
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return sandbox.from_string(source)


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    tools: list | None = None,
) -> str:
    """The conversation as the model was trained to read it; ChatTemplateError names the template."""
    name = tokenizer.template_name
    if tokenizer.chat_template is None:
        raise ChatTemplateError("the tokenizer has no chat template; chat.CHATML is a plain one")
    special = {
        f"{kind}_token": tokenizer.id_to_token(index)
        for kind in ("bos", "eos", "pad", "unk")
        if (index := getattr(tokenizer, f"{kind}_id")) is not None
    }
    # A round trip through JSON leaves plain values only: no object whose methods a template could
    # call, and nothing of the caller's that it could change.
    try:
        data = json.loads(json.dumps({"messages": list(messages), "tools": tools}))
    except TypeError as error:
        raise ChatTemplateError(f"messages must be plain JSON values: {error}") from error
    try:
        template = _compile(tokenizer.chat_template)
        return template.render(
            **data, documents=None, add_generation_prompt=add_generation_prompt, **special
        )
    except SecurityError as error:
        raise ChatTemplateError(f"{name} reaches outside its sandbox: {error}") from error
    except Exception as error:  # a template is a program and can fail in any way
        raise ChatTemplateError(f"{name} failed: {type(error).__name__}: {error}") from error


def answer_spans(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: list | None = None
) -> tuple[str, list[tuple[int, int, int]]]:
    """(text, [(message index, start, end)]): what each assistant turn adds after its prompt.

    Raises ChatTemplateError when the text of the first turns is not the beginning of the text of
    more turns (a template that drops earlier reasoning, say): no span could be trusted then.
    """
    messages = list(messages)
    text = render(tokenizer, messages, tools=tools)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(tokenizer, messages[:index], add_generation_prompt=True, tools=tools)
        upto = render(tokenizer, messages[: index + 1], tools=tools)
        if not (upto.startswith(prompt) and text.startswith(upto)):
            raise ChatTemplateError(
                f"{tokenizer.template_name} is not prefix-consistent: the text before the answer "
                f"in message {index} changes when later turns are added, so it has no loss mask"
            )
        spans.append((index, len(prompt), len(upto)))
    return text, spans


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: list | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(ids [T] int32, mask [T] float32) of a whole conversation.

    The mask is 1 (or the message's `loss_weight`) exactly on the tokens of assistant turns, from
    the first token of the answer to the turn's end token (one of `tokenizer.stop_ids`); what the
    template writes after that, a newline say, is not part of the answer. A token that begins in
    the prompt is not part of the answer either.
    """
    text, spans = answer_spans(tokenizer, messages, tools)
    ids, offsets = tokenizer.encode_with_offsets(text)
    ids = np.asarray(ids, np.int32)
    starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    mask = np.zeros(len(ids), np.float32)
    stop = np.isin(ids, tokenizer.stop_ids)
    for index, start, end in spans:
        inside = np.flatnonzero((starts >= start) & (ends <= end) & (ends > starts))
        if stop[inside].any():
            inside = inside[: np.flatnonzero(stop[inside])[-1] + 1]
        mask[inside] = messages[index].get("loss_weight", 1.0)
    return ids, mask


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Stanford Alpaca's prompt, which needs no template; `input` may be empty."""
    if input:
        return ALPACA_WITH_INPUT.format(instruction=instruction, input=input)
    return ALPACA.format(instruction=instruction)


def encode_completion(
    tokenizer: Tokenizer, prompt: str, completion: str
) -> tuple[np.ndarray, np.ndarray]:
    """(ids [T] int32, mask [T] float32) of prompt + completion + eos, with bos if there is one.

    The mask is 1 on the tokens that begin in the completion, and on the eos.
    """
    if tokenizer.eos_id is None:
        raise ChatTemplateError("the tokenizer has no eos token to end a completion with")
    ids, offsets = tokenizer.encode_with_offsets(prompt + completion)
    mask = [float(start >= len(prompt)) for start, _ in offsets]
    if tokenizer.bos_id is not None:
        ids, mask = [tokenizer.bos_id, *ids], [0.0, *mask]
    ids, mask = [*ids, tokenizer.eos_id], [*mask, 1.0]
    return np.asarray(ids, np.int32), np.asarray(mask, np.float32)
