"""What is compared with the reference: its numbers, where it is installed, and the same loss."""

import json
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from research import hub
from research.hub.assemble import disassemble
from research.models import families

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


def prompts_of(case):
    return json.loads((case / "prompts.json").read_text())


def check_logits_and_gradients(case):
    """Those of a model directory are those in its expected.safetensors."""
    expected, prompts = load_file(case / "expected.safetensors"), prompts_of(case)
    loaded = hub.load(case)
    for number, ids in enumerate(prompts):
        np.testing.assert_allclose(
            loaded.logits(ids)[0], expected[f"logits.{number}"], rtol=0, atol=1e-4
        )
    gradient = jax.jit(jax.grad(lambda params: loss(loaded.model, params, prompts)))
    names = families.find(loaded.config).name_map(loaded.model.config)
    _, ours = disassemble(names, gradient(loaded.params))
    ours = {f"grad.{name}": array for name, array in ours}
    theirs = {name: array for name, array in expected.items() if name.startswith("grad.")}
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, rtol=0, atol=1e-3, err_msg=name)


def check_round_trip(case, folder):
    """Loaded and saved into `folder`, a model directory has the tensors and fields it had."""
    hub.save(folder, hub.load(case))
    before, after = (load_file(at / "model.safetensors") for at in (case, folder))
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)
    before, after = (json.loads((at / "config.json").read_text()) for at in (case, folder))
    assert {name: after.get(name) for name in before} == before


def check_reference_opens(cases, folder, max_shard_bytes=10**9):
    """transformers opens what `hub.save` writes of each case, and finds the same logits."""
    requests, ours = [], []
    for number, case in enumerate(cases):
        loaded, prompts = hub.load(case), prompts_of(case)
        hub.save(folder / str(number), loaded, max_shard_bytes=max_shard_bytes)
        requests.append({"model": folder / str(number), "prompts": prompts})
        ours.append([loaded.logits(ids)[0] for ids in prompts])
    for theirs, logits in zip(ask(folder, *requests), ours, strict=True):
        for number, expected in enumerate(logits):
            np.testing.assert_allclose(theirs[f"logits.{number}"], expected, rtol=0, atol=1e-4)
