"""What is compared with the reference: its numbers, where it is installed, and the same loss."""

import json
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".references" / "venv" / "bin" / "python"
FIXTURES = Path(__file__).parent / "fixtures"

needs_reference = pytest.mark.skipif(
    not PYTHON.exists(), reason="no reference libraries in .references/venv"
)


def ask(folder: Path, *requests: dict) -> list[dict]:
    """What transformers says to each request; `folder` is for the files in between."""
    replies = [folder / f"reply_{number}.safetensors" for number in range(len(requests))]
    jobs = [
        {**request, "model": str(request["model"]), "out": str(reply)}
        for request, reply in zip(requests, replies, strict=True)
    ]
    (folder / "requests.json").write_text(json.dumps(jobs))
    script = ROOT / "scripts" / "references" / "hub_logits.py"
    done = subprocess.run(
        [PYTHON, script, folder / "requests.json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return [load_file(reply) for reply in replies]


def loss(model, params, prompts):
    """The sum over prompts of the mean next-token negative log-likelihood."""
    total = 0.0
    for ids in prompts:
        ids = jnp.asarray(ids)
        logits = model.apply({"params": params}, ids[None])[0, :-1]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[1:, None], axis=-1)
        total -= picked.mean()
    return total
