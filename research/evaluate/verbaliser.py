"""Classification by label words: which word does the model expect after a template?

Schick & Schütze 2021, pattern-exploiting training (arXiv:2001.07676), section 3: a pattern makes a
text with a gap of an input, a verbaliser gives each label a word, and

    q(label | x) = softmax over labels of log p(word of label | pattern(x))

No parameters are added, so a model classifies before it has been trained. It is trained in one of
two ways: `Verbaliser.example` with `objectives.next_token` has a loss on the right word's tokens
alone, among the whole vocabulary; `Verbaliser.candidates` with `objectives.choose` is the paper's
softmax over the label words alone, at one forward pass a label.

Differs from the paper: the gap is at the end, as a decoder reads; a word may be several tokens,
whose log-probabilities add, with no training of patterns against each other and no distillation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from research.data import labelled
from research.data.packing import Table
from research.data.supervised import Example, shift
from research.evaluate import choice, prompting
from research.evaluate.prompting import Encode, Template
from research.types import Params


class Labelled(NamedTuple):
    """A text and its label, in the form of a multiple-choice question."""

    question: str
    options: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Verbaliser:
    """A template, whose {question} is the text and whose {option} a label word, and one word a label.

    ValueError for fewer than two words, or one that stands for two labels.
    """

    template: Template
    words: tuple[str, ...]

    def __post_init__(self):
        if len(self.words) < 2 or len(set(self.words)) != len(self.words):
            raise ValueError(f"expected a word of its own for two labels or more, got {self.words}")

    def ask(self, text: str, label: int) -> Labelled:
        """For `prompting.examine`, as a question or a solved example."""
        if not 0 <= label < len(self.words):
            raise ValueError(f"label {label} is not one of {len(self.words)}")
        return Labelled(text, self.words, label)

    def example(
        self, encode: Encode, text: str, label: int, shots: Sequence[Labelled] = ()
    ) -> Example:
        """The text with its label's word; the word's tokens alone have weight."""
        question = self._question(encode, text, label, shots)
        ids, start = question.sequences[label], question.starts[label]
        return shift(ids, [float(place >= start) for place in range(len(ids))])

    def candidates(
        self, encode: Encode, texts: Sequence[str], labels: Sequence[int], length: int
    ) -> Table:
        """Every text with every label's word, as `objectives.choose` takes them."""
        pairs = zip(texts, labels, strict=True)
        asked = [self._question(encode, text, label, ()) for text, label in pairs]
        sequences, starts = [q.sequences for q in asked], [q.starts for q in asked]
        return labelled.candidate_rows(sequences, starts, labels, length)

    def _question(
        self, encode: Encode, text: str, label: int, shots: Sequence[Labelled]
    ) -> choice.Question:
        asked = self.ask(text, label)
        prompt = self.template.prompt(text, shots)
        return choice.question(encode, prompt, self.template.options(asked), label)


def label_log_probs(
    model: Any,
    params: Params,
    encode: Encode,
    verbaliser: Verbaliser,
    texts: Sequence[str],
    shots: Sequence[Labelled] = (),
    batch_size: int = 8,
) -> np.ndarray:
    """log q(label | text) [texts, labels], normalised over the labels; the largest is the answer."""
    template = verbaliser.template
    asked = [verbaliser.ask(text, 0) for text in texts]
    prompts = [template.prompt(text, shots) for text in texts]
    scores = prompting.option_log_probs(model, params, encode, template, prompts, asked, batch_size)
    return prompting.normalised(np.stack(scores))
