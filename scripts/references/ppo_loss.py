"""Writes tests/losses/fixtures/ppo_loss.safetensors: trl 0.11.4's own PPO on random numbers.

    bash scripts/references.sh trl
    .references/trl/bin/python -m pip download --no-deps -d .references/older trl==0.11.4
    .references/trl/bin/python scripts/references/ppo_loss.py .references/older/trl-0.11.4-py3-none-any.whl

That release needs libraries of its time, so its trainer is not imported: the two methods and the helpers that they
call are taken out of the wheel's files as they stand and run by themselves. Rewards are not whitened: that
release does not mask them again afterwards, so that padding reaches the advantages.
"""

import ast
import sys
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import torch
from safetensors.torch import save_file

PATH = Path(__file__).parents[2] / "tests" / "losses" / "fixtures" / "ppo_loss.safetensors"
HELPERS = ("masked_mean", "masked_var", "masked_whiten", "clip_by_value", "entropy_from_logits")
METHODS = ("compute_advantages", "loss")
B, T, V = 3, 7, 11


def taken(
    wheel: zipfile.ZipFile, name: str, wanted: tuple[str, ...], scope: dict[str, Any]
) -> None:
    """Defines the wanted functions of a file in `scope`, with nothing else of it."""
    for node in ast.walk(ast.parse(wheel.read(name).decode())):
        if isinstance(node, ast.FunctionDef) and node.name in wanted:
            alone = ast.Module([node], [])
            exec(compile(ast.fix_missing_locations(alone), name, "exec"), scope)


def main(wheel: str) -> None:
    scope = {"torch": torch, "F": torch.nn.functional, "warnings": warnings}
    scope |= {"Optional": Optional, "flatten_dict": lambda x: x}
    with zipfile.ZipFile(wheel) as file:
        taken(file, "trl/core.py", HELPERS, scope)
        taken(file, "trl/trainer/ppo_trainer.py", METHODS, scope)
    config = SimpleNamespace(
        cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, ratio_threshold=10.0, gamma=0.99, lam=0.95,
        whiten_rewards=False,
    )  # fmt: skip
    trainer = SimpleNamespace(config=config)
    torch.manual_seed(0)
    random = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    mask = (torch.arange(T) < torch.tensor([7, 4, 1])[:, None]).double()
    rewards, values = random(B, T), random(B, T)
    used, advantages, returns = scope["compute_advantages"](trainer, values, rewards, mask)
    old, logits = -random(B, T).abs(), random(B, T, V)
    new, predicted = (
        (old + 0.3 * random(B, T)).requires_grad_(),
        (used + 0.3 * random(B, T)).requires_grad_(),
    )
    policy, value, stats = scope["loss"](
        trainer, old, used, logits, predicted, new, mask, advantages, returns
    )
    (policy + value).backward()
    found = {
        "mask": mask, "rewards": rewards, "values": values, "advantages": advantages * mask,
        "returns": returns * mask, "old": old, "new": new, "predicted": predicted, "logits": logits,
        "policy_loss": stats["loss"]["policy"],
        "value_loss": stats["loss"]["value"], "entropy": stats["policy"]["entropy"],
        "approximate_kl": stats["policy"]["approxkl"], "clip_fraction": stats["policy"]["clipfrac"],
        "value_clip_fraction": stats["val"]["clipfrac"], "new_grad": new.grad, "predicted_grad": predicted.grad,
    }  # fmt: skip
    save_file({k: v.detach().float().contiguous() for k, v in found.items()}, str(PATH))
    print(f"written to {PATH}")


if __name__ == "__main__":
    main(sys.argv[1])
