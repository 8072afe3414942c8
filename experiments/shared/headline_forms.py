"""One labelled task in two forms for a language model: label words after a pattern, and a chat.

    task = label_words(tokenizer, train_headlines, test_headlines, questions)
    task = chat_answers(tokenizer, train_headlines, test_headlines, questions)

    label words   "<headline>\\nSarcastic? Answer:" and " no" or " yes" (PET, arXiv:2001.07676),
                  the pattern of `sarcasm`
    chat          the model's own template: instruction, headline as the user's message, "no" or
                  "yes" as the assistant's answer, which ends its turn

The answer is the likelier of the two words, one token each. `other` is a task that is not trained,
multiple choice in the same form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.shared.sarcasm import LABELS, QUESTION
from research.data import packing, supervised
from research.data.corpora import Headline, Question
from research.data.supervised import Example
from research.decode.prompts import bucket
from research.evaluate import choice
from research.evaluate.prompting import Template
from research.evaluate.verbaliser import Verbaliser
from research.tokenize import chat
from research.types import Params

PATTERN = Verbaliser(Template("{question}" + QUESTION, "{option}"), LABELS)
INSTRUCTION = "Is this headline sarcastic? Answer yes or no."
ANSWERS = ("no", "yes")
OTHER_INSTRUCTION = "Answer the question."


class Task(NamedTuple):
    """train: one headline a row, loss on the answer; None without headlines to train on.

    test: packed rows, weight on the answer's first token; labels: the ids of the two words.
    """

    train: packing.Table | None
    test: packing.Table
    labels: list[int]
    other: list[choice.Question]


# (tokenizer, headlines to train on, to test on, questions) -> Task
Form = Callable[[Any, Sequence[Headline], Sequence[Headline], Sequence[Question]], Task]


def label_words(
    tokenizer: Any,
    train: Sequence[Headline],
    test: Sequence[Headline],
    questions: Sequence[Question],
) -> Task:
    """The pattern and its words; other questions as "Question: ...\\nAnswer:" and an option."""
    encode, template = tokenizer.encode, Template()

    def examples(headlines: Sequence[Headline]) -> list[Example]:
        return [PATTERN.example(encode, h.text, int(h.sarcastic)) for h in headlines]

    other = [
        choice.question(encode, template.prompt(q.question), template.options(q), q.answer)
        for q in questions
    ]
    return _task(examples(train), examples(test), [encode(word) for word in LABELS], other)


def chat_answers(
    tokenizer: Any,
    train: Sequence[Headline],
    test: Sequence[Headline],
    questions: Sequence[Question],
) -> Task:
    """The chat template with an instruction; other questions as a user's message and an answer."""
    encode = tokenizer.encode

    def example(headline: Headline) -> Example:
        said = {"role": "assistant", "content": ANSWERS[headline.sarcastic]}
        messages = [*asked(INSTRUCTION, headline.text), said]
        return supervised.shift(*chat.encode_chat(tokenizer, messages))

    def prompt(question: Question) -> str:
        return chat.render(tokenizer, asked(OTHER_INSTRUCTION, question.question), True)

    other = [choice.question(encode, prompt(q), q.options, q.answer) for q in questions]
    tests = [answer_only(example(headline)) for headline in test]
    return _task([example(h) for h in train], tests, [encode(word) for word in ANSWERS], other)


def asked(instruction: str, text: str) -> list[chat.Message]:
    return [{"role": "system", "content": instruction}, {"role": "user", "content": text}]


def answer_only(example: Example) -> Example:
    """Weight on the first supervised token alone, not on the end of the turn."""
    first = np.zeros_like(example.weights)
    first[np.argmax(example.weights != 0)] = 1
    return example._replace(weights=first)


def _task(
    train: list[Example],
    test: list[Example],
    labels: list[list[int]],
    other: list[choice.Question],
) -> Task:
    if any(len(ids) != 1 for ids in labels):
        raise ValueError(f"expected label words of one token each, got {labels}")
    rows = packing.pad(train, bucket(max(len(e.tokens) for e in train))) if train else None
    return Task(rows, packing.pack(test, 256), [ids[0] for ids in labels], other)


def other_task(model: Any, params: Params, questions: Sequence[choice.Question]) -> dict[str, Any]:
    """Accuracy on questions, and nats of the right option among a question's options."""
    found = choice.multiple_choice(model, params, questions)
    nats = [
        np.logaddexp.reduce(scores) - scores[question.answer]
        for scores, question in zip(found.log_probs, questions, strict=True)
    ]
    return {"other_accuracy": found.raw.value, "other_nll": float(np.mean(nats))}
