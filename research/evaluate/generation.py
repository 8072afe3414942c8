"""How near generated text is to reference answers: exact match, ROUGE, BLEU, chrF.

    exact match   after SQuAD's normalisation (Rajpurkar et al. 2016, arXiv:1606.05250): lower case,
                  no punctuation, no English articles, single spaces
    ROUGE-n, -L   Lin 2004 (aclanthology.org/W04-1013), the F1 of n-grams and of the longest common
                  subsequence
    BLEU, chrF    sacrebleu's: Post 2018 (arXiv:1804.08771), Popović 2015 (aclanthology.org/W15-3049)

Every prediction has one or more references. Exact match and ROUGE are in [0, 1], the best reference
counts, and a corpus has the mean over its predictions; BLEU and chrF are in [0, 100] and of the
corpus as one. Numbers are comparable only where the words are cut alike: `words` cuts as Google's
rouge_score does without stemming (it sees nothing but a-z and 0-9), `characters` is for Chinese.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import sacrebleu

from research.evaluate.diversity import ngrams

References = Sequence[Sequence[str]]  # of each prediction, one or more
Split = Callable[[str], Sequence[str]]


def words(text: str) -> list[str]:
    """Lower-case runs of a-z and 0-9."""
    return re.findall(r"[a-z0-9]+", text.lower())


def characters(text: str) -> list[str]:
    """Every character that is not white space."""
    return [character for character in text if not character.isspace()]


def normalised(text: str) -> str:
    """Lower case, without punctuation and the articles a, an, the, single spaces."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(
    predictions: Sequence[str],
    references: References,
    normalise: Callable[[str], str] = normalised,
) -> float:
    """The part of predictions that equals one of its references once both are normalised."""
    pairs = _pairs(predictions, references)
    hits = [any(normalise(p) == normalise(r) for r in own) for p, own in pairs]
    return sum(hits) / len(hits)


def rouge_n(
    predictions: Sequence[str], references: References, n: int = 1, split: Split = words
) -> float:
    """The mean F1 of n-grams, each counted as often as both texts have it."""

    def score(p: Sequence[str], r: Sequence[str]) -> float:
        ours, theirs = Counter(ngrams(p, n)), Counter(ngrams(r, n))
        return _f1((ours & theirs).total(), ours.total(), theirs.total())

    return _best_mean(predictions, references, split, score)


def rouge_l(predictions: Sequence[str], references: References, split: Split = words) -> float:
    """The mean F1 of the longest common subsequence, each text being one sequence."""

    def score(p: Sequence[str], r: Sequence[str]) -> float:
        return _f1(common_subsequence(p, r), len(p), len(r))

    return _best_mean(predictions, references, split, score)


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest sequence that both have, in order, with gaps."""
    row = [0] * (len(b) + 1)
    for x in a:
        before, row = row, [0]
        for j, y in enumerate(b):
            row.append(before[j] + 1 if x == y else max(before[j + 1], row[j]))
    return row[-1]


def bleu(predictions: Sequence[str], references: References, tokenize: str = "13a") -> float:
    """Corpus BLEU; `tokenize` is sacrebleu's ("zh" for Chinese)."""
    found = sacrebleu.corpus_bleu(
        list(predictions), _streams(predictions, references), tokenize=tokenize
    )
    return found.score


def chrf(predictions: Sequence[str], references: References) -> float:
    """Corpus chrF2: six-grams of characters, recall counting twice."""
    return sacrebleu.corpus_chrf(list(predictions), _streams(predictions, references)).score


def _best_mean(
    predictions: Sequence[str],
    references: References,
    split: Split,
    score: Callable[[Sequence[str], Sequence[str]], float],
) -> float:
    pairs = _pairs(predictions, references)
    best = [max(score(split(p), split(r)) for r in own) for p, own in pairs]
    return sum(best) / len(best)


def _f1(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs) if common else 0.0


def _streams(predictions: Sequence[str], references: References) -> list[list[str | None]]:
    """References as sacrebleu has them: the first of each prediction, the second, ..."""
    own = [refs for _, refs in _pairs(predictions, references)]
    most = max(map(len, own))
    return [[refs[i] if i < len(refs) else None for refs in own] for i in range(most)]


def _pairs(predictions: Sequence[str], references: References) -> list[tuple[str, Sequence[str]]]:
    if len(predictions) != len(references) or not predictions:
        raise ValueError(f"{len(predictions)} predictions, references for {len(references)}")
    for index, own in enumerate(references):
        if isinstance(own, str) or not len(own):
            raise ValueError(
                f"references of prediction {index}: expected one text or more in a list, "
                f"got {own!r}"
            )
    return list(zip(predictions, references, strict=True))
