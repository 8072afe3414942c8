"""What transformers' logits processors make of given logits: tests/decode/fixtures/processors.json.

    .references/venv/bin/python scripts/references/logits_processors.py

Writes {ids, logits, name: filtered logits, null where -inf}; the ids are what was said before.
"""

import json
from pathlib import Path

import torch
from transformers.generation import logits_process as lp

FIXTURE = Path(__file__).parents[2] / "tests/decode/fixtures/processors.json"
IDS = [[3, 7, 3, 9, 3, 7], [1, 1, 1, 1, 1, 1], [0, 5, 2, 0, 5, 2], [4, 8, 6, 2, 9, 0]]
CASES = {
    "typical 0.2": lp.TypicalLogitsWarper(0.2),
    "typical 0.9": lp.TypicalLogitsWarper(0.9),
    "epsilon 0.05": lp.EpsilonLogitsWarper(0.05),
    "epsilon 0.9": lp.EpsilonLogitsWarper(0.9),
    "eta 0.1": lp.EtaLogitsWarper(0.1),
    "eta 0.001": lp.EtaLogitsWarper(0.001),
    "ngram 1": lp.NoRepeatNGramLogitsProcessor(1),
    "ngram 2": lp.NoRepeatNGramLogitsProcessor(2),
    "ngram 3": lp.NoRepeatNGramLogitsProcessor(3),
    "ngram 7": lp.NoRepeatNGramLogitsProcessor(7),
    "banned 2 11": lp.SuppressTokensLogitsProcessor([2, 11]),
}
CHAIN = (
    lp.RepetitionPenaltyLogitsProcessor(1.3),
    lp.NoRepeatNGramLogitsProcessor(2),
    lp.SuppressTokensLogitsProcessor([5, 10]),
    lp.TemperatureLogitsWarper(0.8),
    lp.TopKLogitsWarper(10),
    lp.TopPLogitsWarper(0.9),
    lp.MinPLogitsWarper(0.03),
    lp.TypicalLogitsWarper(0.9),
    lp.EpsilonLogitsWarper(0.04),
    lp.EtaLogitsWarper(0.2),
)


def listed(scores: torch.Tensor) -> list:
    return [[round(x, 5) if x > -1e30 else None for x in row] for row in scores.tolist()]


if __name__ == "__main__":
    torch.manual_seed(0)
    ids, logits = torch.tensor(IDS), (3 * torch.randn(4, 16)).round(decimals=3)
    logits[3] /= 10  # nearly uniform
    found = {"ids": IDS, "logits": listed(logits)}
    found |= {name: listed(step(ids, logits.clone())) for name, step in CASES.items()}
    chained = logits
    for step in CHAIN:
        chained = step(ids, chained)
    found["chain"] = listed(chained)
    # It forces a first token only, which it takes from a prompt of one.
    found["forced 6"] = listed(lp.ForcedBOSTokenLogitsProcessor(6)(ids[:, :1], logits.clone()))
    FIXTURE.parent.mkdir(exist_ok=True)
    FIXTURE.write_text(json.dumps(found) + "\n")
