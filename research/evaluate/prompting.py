"""Few-shot prompts for multiple choice, and scores that take out what a prompt favours anyway.

A question is scored by log p(option | prompt), where the prompt holds k solved examples (Brown et
al. 2020, arXiv:2005.14165, section 2.4). Two corrections:

PMI (Holtzman et al. 2021, arXiv:2104.08315, eq. 2): log p(option | prompt) - log p(option | neutral),
`neutral` a prompt that names the task but no question. Common words lose their head start.

Contextual calibration (Zhao et al. 2021, arXiv:2102.09690, section 5): with p_cf the options'
probabilities after a content-free question such as "N/A", normalised over the options and averaged
over such questions, the score is log(p / p_cf), normalised: W = diag(p_cf)⁻¹ and b = 0.

Differs from the papers: all tokens of an option count, as in `choice`, where Zhao et al. take the
first; both corrections need no training and are made question by question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from research.data.shuffle import permutation
from research.evaluate import choice
from research.types import Params

Encode = Callable[[str], Sequence[int]]


class Asked(Protocol):
    """A multiple-choice question; label words are its options, as in a classification."""

    question: str
    options: Sequence[str]
    answer: int


@dataclass(frozen=True)
class Template:
    """How a question and its options become text.

    question must hold "{question}"; option "{option}", and usually begins with a space; neutral is
    the prompt of PMI; between stands after each solved example.
    """

    question: str = "Question: {question}\nAnswer:"
    option: str = " {option}"
    neutral: str = "Answer:"
    between: str = "\n\n"

    def __post_init__(self):
        for name in ("question", "option"):
            if "{" + name + "}" not in getattr(self, name):
                raise ValueError(
                    f"template: {name} must hold {{{name}}}, got {getattr(self, name)!r}"
                )

    def options(self, question: Asked) -> list[str]:
        return [self.option.replace("{option}", option) for option in question.options]

    def prompt(self, question: str, shots: Sequence[Asked] = ()) -> str:
        """The question after solved examples, up to where the option begins."""
        solved = [
            self.question.replace("{question}", shot.question) + self.options(shot)[shot.answer]
            for shot in shots
        ]
        return self.between.join([*solved, self.question.replace("{question}", question)])


def split(questions: Sequence[Asked], held_out: int, seed: int) -> tuple[list[Asked], list[Asked]]:
    """(training, held-out) questions in an order that depends on the seed and their number alone.

    No question that is held out is among the others, nor is its text. ValueError when none is left.
    """
    if not 0 < held_out < len(questions):
        raise ValueError(f"held_out must be in 1..{len(questions) - 1}, got {held_out}")
    order = [questions[i] for i in permutation(seed, 0, len(questions))]
    asked = {question.question for question in order[:held_out]}
    rest = [question for question in order[held_out:] if question.question not in asked]
    return rest, order[:held_out]


def shots(pool: Sequence[Asked], count: int, seed: int) -> list[Asked]:
    """`count` different examples of the pool, the same for the same seed; ValueError for too many."""
    if not 0 <= count <= len(pool):
        raise ValueError(f"asked for {count} examples of a pool of {len(pool)}")
    return [pool[i] for i in permutation(seed, 1, len(pool))[:count]]


def option_log_probs(
    model: Any,
    params: Params,
    encode: Encode,
    template: Template,
    prompts: Sequence[str],
    questions: Sequence[Asked],
    batch_size: int = 8,
) -> list[np.ndarray]:
    """log p(option | prompt) for each question's options after its prompt: [options] each.

    The same prompt with the same options is scored once.
    """
    options = [tuple(template.options(question)) for question in questions]
    keys = list(zip(prompts, options, strict=True))
    distinct = list(dict.fromkeys(keys))
    asked = [choice.question(encode, prompt, options, 0) for prompt, options in distinct]
    found = choice.multiple_choice(model, params, asked, batch_size).log_probs
    scores = dict(zip(distinct, found, strict=True))
    return [np.array(scores[key]) for key in keys]


def pmi(conditional: np.ndarray, neutral: np.ndarray) -> np.ndarray:
    """log p(option | prompt) - log p(option | neutral) [options]."""
    return conditional - neutral


def calibrated(conditional: np.ndarray, content_free: np.ndarray) -> np.ndarray:
    """log q [options], q ∝ p / p_cf.

    conditional [options]; content_free [C, options], log-probabilities after C content-free
    questions, which are normalised over the options and then averaged.
    """
    p_cf = np.exp(normalised(content_free)).mean(axis=0)
    return normalised(normalised(conditional) - np.log(p_cf))


def normalised(log_probs: np.ndarray) -> np.ndarray:
    """Log-probabilities [..., options] that add up to one over the options."""
    return log_probs - np.logaddexp.reduce(log_probs, axis=-1, keepdims=True)


def accuracy(scores: Sequence[np.ndarray], questions: Sequence[Asked]) -> choice.Proportion:
    """How often the option of the largest score is right; the first of equals counts."""
    pairs = zip(scores, questions, strict=True)
    return choice.Proportion(sum(int(s.argmax()) == q.answer for s, q in pairs), len(questions))


def examine(
    model: Any,
    params: Params,
    encode: Encode,
    template: Template,
    questions: Sequence[Asked],
    examples: Sequence[Asked] = (),
    content_free: Sequence[str] = ("N/A",),
    batch_size: int = 8,
) -> dict[str, choice.Proportion]:
    """Accuracy after `examples` by score: raw, per_byte, pmi, calibrated."""

    def score(prompts: Sequence[str]) -> list[np.ndarray]:
        return option_log_probs(model, params, encode, template, prompts, questions, batch_size)

    raw = score([template.prompt(q.question, examples) for q in questions])
    neutral = score([template.neutral] * len(questions))
    free = [score([template.prompt(empty, examples)] * len(questions)) for empty in content_free]
    sizes = [[len(text.encode()) for text in template.options(q)] for q in questions]
    chosen = {
        "raw": raw,
        "per_byte": [s / np.array(n) for s, n in zip(raw, sizes, strict=True)],
        "pmi": [pmi(s, n) for s, n in zip(raw, neutral, strict=True)],
        "calibrated": [calibrated(s, np.stack(f)) for s, *f in zip(raw, *free, strict=True)],
    }
    return {name: accuracy(scores, questions) for name, scores in chosen.items()}
