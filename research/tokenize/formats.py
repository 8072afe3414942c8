"""The chat formats of published models, for `layout.encode`: ids with exact loss masks.

What differs is more than the words. LLaMA-2 writes one text a round between bos and eos; LLaMA-3
and Qwen frame every message by control tokens; ChatGLM-6B ends its prompt with [gMASK] sop and
ChatGLM2 begins with them, one numbers rounds from 0 and the other from 1; Baichuan and ChatGLM3
encode each message by itself, Vicuna all that stands between two answers' ends.

A text that marks roles with plain words ([INST], USER:, 问：) cannot keep a user from writing those
words; control tokens it can, and does.
"""

from __future__ import annotations

from functools import partial

from research.tokenize.chat import Message, alpaca_prompt
from research.tokenize.layout import (
    Control,
    Format,
    FormatError,
    Layout,
    Part,
    Round,
    rounds,
    turns,
)

QWEN15_SYSTEM = "You are a helpful assistant."
QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ROLES = ("system", "user", "assistant")

# The control tokens that ChatGLM2 and 3 number in their code, from 64789 on: see control.add_control.
CHATGLM2_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
CHATGLM3_TOKENS = (
    *CHATGLM2_TOKENS,
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
)


def _llama2(messages: list[Message]) -> Layout:
    system, found = rounds(messages)
    layout: Layout = []
    for index, (user, answer, weight) in enumerate(found):
        if index == 0 and system is not None:
            user = f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}"
        run = [Part(f"[INST] {user.strip()} [/INST]")]
        layout += [Control("bos"), run]
        if answer is not None:
            run.append(Part(f" {answer.strip()} ", weight))
            layout.append(Control("eos", weight))
    return layout


def _llama3(messages: list[Message]) -> Layout:
    layout: Layout = [Control("<|begin_of_text|>")]

    def header(role: str) -> Layout:
        return [Control("<|start_header_id|>"), [Part(role)], Control("<|end_header_id|>")]

    for role, content, weight in turns(messages, ROLES):
        run = [Part("\n\n"), Part(content.strip(), weight)]
        layout += [*header(role), run, Control("<|eot_id|>", weight)]
    if messages[-1]["role"] != "assistant":
        layout += [*header("assistant"), [Part("\n\n")]]
    return layout


def _chatml(messages: list[Message], system: str | None) -> Layout:
    if system is not None and messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    layout: Layout = []
    for role, content, weight in turns(messages, ROLES):
        layout += [
            Control("<|im_start|>"),
            [Part(f"{role}\n"), Part(content, weight)],
            Control("<|im_end|>", weight),
            [Part("\n")],
        ]
    if messages[-1]["role"] != "assistant":
        layout += [Control("<|im_start|>"), [Part("assistant\n")]]
    return layout


def _numbered(found: list[Round], first: int, gap: str) -> str:
    """ChatGLM's rounds as one text, up to the last answer."""
    written = ""
    for number, (user, answer, _) in enumerate(found, start=first):
        written += f"[Round {number}]{gap}问：{user}{gap}答："
        if number < first + len(found) - 1:
            written += f"{answer}{gap}"
    return written


def _chatglm(messages: list[Message]) -> Layout:
    _, found = rounds(messages, system=False)
    prompt = found[0].user if len(found) == 1 else _numbered(found, 0, "\n")
    layout: Layout = [[Part(prompt)], Control("[gMASK]"), Control("<sop>")]
    if found[-1].answer is not None:
        layout += [[Part(found[-1].answer, found[-1].weight)], Control("<eop>", found[-1].weight)]
    return layout


def _chatglm2(messages: list[Message]) -> Layout:
    _, found = rounds(messages, system=False)
    prompt = _numbered(found, 1, "\n\n")
    layout: Layout = [Control("[gMASK]"), Control("sop"), [Part(prompt)]]
    if found[-1].answer is not None:
        layout += [[Part(found[-1].answer, found[-1].weight)], Control("eos", found[-1].weight)]
    return layout


def _chatglm3(messages: list[Message]) -> Layout:
    layout: Layout = [Control("[gMASK]"), Control("sop")]
    ends = 0.0  # the weight of the answer that the next control token ends
    for role, content, weight in turns(messages, (*ROLES, "tool")):
        name = "<|observation|>" if role == "tool" else f"<|{role}|>"
        layout += [Control(name, ends), [Part("\n", weight)], [Part(content, weight)]]
        ends = weight
    last = Control("eos", ends) if messages[-1]["role"] == "assistant" else Control("<|assistant|>")
    return [*layout, last]


def _baichuan(messages: list[Message]) -> Layout:
    layout: Layout = []
    for user, answer, weight in rounds(messages, system=False)[1]:
        layout += [Control(195), [Part(user)], Control(196)]
        if answer is not None:
            layout += [[Part(answer, weight)], Control("eos", weight)]
    return layout


def _baichuan2(messages: list[Message]) -> Layout:
    system, found = rounds(messages)
    layout: Layout = [[Part(system)]] if system else []
    for user, answer, weight in found:
        layout += [Control(195), [Part(user)], Control(196)]
        if answer is not None:
            layout.append([Part(answer, weight)])
    return layout if found[-1].answer is None else [*layout, Control("eos", found[-1].weight)]


def _vicuna(messages: list[Message]) -> Layout:
    system, found = rounds(messages)
    before = f"{VICUNA_SYSTEM if system is None else system} "
    layout: Layout = [Control("bos")]
    for user, answer, weight in found:
        run = [Part(f"{before}USER: {user} ASSISTANT:")]
        layout.append(run)
        if answer is not None:
            run.append(Part(f" {answer}", weight))
            layout.append(Control("eos", weight))
        before = ""
    return layout


def _alpaca(messages: list[Message]) -> Layout:
    _, found = rounds(messages, system=False)
    if len(found) > 1:
        raise FormatError(
            f"Alpaca's format holds one user and one assistant turn; got {len(found)}"
        )
    ((user, answer, weight),) = found
    run = [Part(alpaca_prompt(user))]
    layout: Layout = [Control("bos", needed=False), run]
    if answer is not None:
        run.append(Part(answer, weight))
        layout.append(Control("eos", weight))
    return layout


# Touvron et al. 2023 (arXiv:2307.09288). One text a round, in its own bos and eos; the space before
# eos belongs to the answer. The system prompt stands in the first user message.
LLAMA2 = Format(_llama2, ("bos", "eos"), ("eos",))

# Grattafiori et al. 2024 (arXiv:2407.21783): ids 128000, 128006, 128007, 128009.
LLAMA3 = Format(
    _llama3,
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ("<|eot_id|>", "<|end_of_text|>"),
)

# ChatML with Qwen's default system prompts (Bai et al. 2023, arXiv:2309.16609; Qwen2.5,
# arXiv:2412.15115); no bos. CHATML has none.
_CHATML = (("<|im_start|>", "<|im_end|>"), ("<|im_end|>",))
CHATML = Format(partial(_chatml, system=None), *_CHATML)
QWEN15 = Format(partial(_chatml, system=QWEN15_SYSTEM), *_CHATML)
QWEN25 = Format(partial(_chatml, system=QWEN25_SYSTEM), *_CHATML)

# Du et al. 2022 (arXiv:2103.10360), ChatGLM-6B: text [gMASK] <sop> answer <eop>. In it and in
# ChatGLM2 only the last answer is learned: earlier ones are part of the prompt, without their ends.
CHATGLM = Format(_chatglm, ("[gMASK]", "<sop>", "<eop>"), ("<eop>",))
CHATGLM2 = Format(_chatglm2, ("[gMASK]", "sop", "eos"), ("eos",))

# ChatGLM3: the line break and the text after a role are encoded apart, and the model itself says the
# line break. An answer ends with the role that speaks next, or eos: both are learned.
CHATGLM3 = Format(_chatglm3, (*CHATGLM3_TOKENS, "eos"), ("eos", "<|user|>", "<|observation|>"))

# Yang et al. 2023 (arXiv:2309.10305). 195 and 196 are reserved tokens of no fixed name. The first
# version ends each answer with eos; Baichuan2 the last only, and its training code asks for eos in
# the place of the next 195 besides, which (ids, mask) cannot say.
BAICHUAN = Format(_baichuan, (195, 196, "eos"), ("eos",))
BAICHUAN2 = Format(_baichuan2, (195, 196, "eos"), ("eos",))

# Chiang et al. 2023, Vicuna v1.1.
VICUNA = Format(_vicuna, ("bos", "eos"), ("eos",))

# Taori et al. 2023, Stanford Alpaca: one round, no system prompt. LLaMA's tokenizer put bos before
# it; of a tokenizer without one there is none.
ALPACA = Format(_alpaca, ("bos", "eos"), ("eos",))
