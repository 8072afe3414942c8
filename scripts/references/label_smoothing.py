"""What torch computes for label smoothing: tests/losses/fixtures/label_smoothing.json.

    .references/venv/bin/python scripts/references/label_smoothing.py

Writes {logits, targets, epsilon: {loss, gradient}}: the mean over the targets that are not -100.
"""

import json
from pathlib import Path

import torch

FIXTURE = Path(__file__).parents[2] / "tests/losses/fixtures/label_smoothing.json"
TARGETS = [3, 0, -100, 6]

if __name__ == "__main__":
    torch.manual_seed(0)
    logits = (2 * torch.randn(len(TARGETS), 7)).round(decimals=3)
    found = {"logits": logits.tolist(), "targets": TARGETS}
    for epsilon in (0.0, 0.1, 0.3):
        z = logits.double().requires_grad_()
        loss = torch.nn.CrossEntropyLoss(label_smoothing=epsilon)(z, torch.tensor(TARGETS))
        loss.backward()
        gradient = [[round(x, 9) for x in row] for row in z.grad.tolist()]
        found[str(epsilon)] = {"loss": round(loss.item(), 9), "gradient": gradient}
    FIXTURE.parent.mkdir(exist_ok=True)
    FIXTURE.write_text(json.dumps(found) + "\n")
