"""Tokens a second with prompt lookup next to plain decoding, on a text that is to be repeated.

    python -m scripts.bench_speculative                    5 repetitions each, alternating
    python -m scripts.bench_speculative --tokens 200 --count 12 --ngram 2
    python -m scripts.bench_speculative --quick            16 tokens, once each: does it run?

SmolLM2-135M-Instruct reads a passage of Shakespeare, twice or as often as --copies says, and its
beginning once more, and goes on greedily: the more copies, the more exactly it copies. Both ways must say the same tokens, or the command fails. A time is that
of a whole call, prompt included; the last lines are medians, their ratio, and how many tokens a
forward pass gave.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import jax

from research import hub
from research.data import corpora
from research.decode import Lookup, Sampling, Speculation, generate, speculate
from research.decode.generate import for_decoding
from research.hub.download import smollm2

AGAIN = 8  # tokens of the passage that the prompt repeats


@dataclass(frozen=True)
class Measured:
    """Seconds of each repetition, in the order in which they were taken."""

    plain: list[float]
    lookup: list[float]
    tokens: int
    found: Speculation

    def summary(self) -> str:
        plain, lookup = self.tokens / median(self.plain), self.tokens / median(self.lookup)
        ratios = [a / b for a, b in zip(self.plain, self.lookup, strict=True)]
        found = self.found
        return (
            f"plain {plain:.1f} tokens/s, prompt lookup {lookup:.1f}, ratio of medians "
            f"{lookup / plain:.2f}, of pairs {min(ratios):.2f} to {max(ratios):.2f}\n"
            f"{found.rounds} forward passes for {self.tokens} tokens "
            f"({found.tokens_per_round:.2f} each); {found.accepted} of {found.proposed} proposals "
            f"accepted; the same tokens both ways"
        )


def alternate(
    plain: Callable[[], list[int]], lookup: Callable[[], Speculation], repeats: int
) -> Measured:
    """Times of both, taking turns after one warm-up each; SystemExit when they say different things."""
    expected, found = plain(), lookup()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for taken, call in zip(times, (plain, lookup), strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    said = found.generation.rows()[0]
    if said != expected:
        place = next(
            (i for i, (a, b) in enumerate(zip(said, expected, strict=False)) if a != b), None
        )
        raise SystemExit(f"prompt lookup and plain decoding differ, first at new token {place}")
    return Measured(*times, len(expected), found)


def copying(encode: Callable[[str], Sequence[int]], length: int, copies: int) -> list[int]:
    """A passage of `length` tokens, `copies` times, and how it begins."""
    play = corpora.shakespeare()["hamlet"]
    place = play.index("To be, or not to be")
    passage = list(encode(play[place : place + 8 * length]))[:length]
    return [*passage, *encode("\n\n")] * copies + passage[:AGAIN]


def measure(options: argparse.Namespace) -> Measured:
    base = hub.load(smollm2())
    params = for_decoding(base.params, donate=True)
    prompt = copying(base.tokenizer.encode, options.tokens + 2 * AGAIN, options.copies)
    sampling, rng = Sampling(temperature=0.0, max_tokens=options.tokens), jax.random.key(0)
    draft = Lookup(options.count, options.ngram)
    return alternate(
        lambda: generate(base.model, params, [prompt], rng, sampling).rows()[0],
        lambda: speculate(base.model, params, prompt, rng, sampling, draft),
        options.repeats,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench_speculative",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=128, help="new tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--copies", type=int, default=2, help="of the passage in the prompt")
    parser.add_argument("--count", type=int, default=8, help="tokens proposed at a time")
    parser.add_argument("--ngram", type=int, default=3, help="longest match")
    parser.add_argument("--quick", action="store_true", help="16 tokens, one repetition")
    options = parser.parse_args(arguments)
    if options.quick:
        options.tokens, options.repeats = 16, 1
    if min(options.tokens, options.repeats, options.copies) < 1:
        parser.error("--tokens, --repeats and --copies must be at least 1")
    return options


if __name__ == "__main__":
    print(measure(parse(None)).summary())
