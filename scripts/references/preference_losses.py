"""Writes tests/losses/fixtures/preference_losses.safetensors: values and gradients of trl's losses.

    bash scripts/references.sh trl
    .references/trl/bin/python scripts/references/preference_losses.py

trl 0.24.0 is the last release whose losses can be called apart from a trainer; a namespace stands in for
it. Log-probabilities are those that a tiny Llama and a slightly different one give random answers. Of each
loss NAME: NAME.loss [B], NAME.chosen and NAME.rejected [B], the gradients of its sum in the two.
"""

from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.cpo_trainer import CPOTrainer
from trl.trainer.dpo_config import FDivergenceType
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.orpo_trainer import ORPOTrainer
from trl.trainer.utils import RunningMoments

PATH = Path(__file__).parents[2] / "tests" / "losses" / "fixtures" / "preference_losses.safetensors"
B, PROMPT, LONGEST, BETA = 6, 5, 9, 0.3
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), use_distributed=False, gather_for_metrics=lambda x: x
)


@torch.no_grad()
def log_probs(model: LlamaForCausalLM, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Sums over the answers' tokens, [B]."""
    scores = model(tokens).logits.double().log_softmax(-1)[:, :-1]
    each = scores.gather(-1, tokens[:, 1:, None])[..., 0][:, PROMPT - 1 :]
    return (each * (torch.arange(LONGEST) < lengths[:, None])).sum(-1)


def models() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """(policy, reference)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3,
    )  # fmt: skip
    reference, policy = (LlamaForCausalLM(config).eval() for _ in range(2))
    policy.load_state_dict(reference.state_dict())
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return policy, reference


def batch() -> dict[str, torch.Tensor]:
    policy, reference = models()
    prompts = torch.randint(0, 40, (B, PROMPT))
    found = {}
    for name in ("chosen", "rejected"):
        answers, lengths = torch.randint(0, 40, (B, LONGEST)), torch.randint(2, LONGEST + 1, (B,))
        tokens = torch.cat([prompts, answers], 1)
        moved = torch.cat([prompts, answers.roll(1, 0)], 1)
        found[f"{name}_tokens"] = lengths.double()
        for model, whose in ((policy, ""), (reference, "reference_")):
            found[f"{whose}{name}"] = log_probs(model, tokens, lengths)
            found[f"{whose}{name}_moved"] = log_probs(model, moved, lengths.roll(1, 0))
    return found


def dpo(loss: str, smoothing: float = 0.0, divergence: str = "reverse_kl"):
    trainer = SimpleNamespace(
        accelerator=ACCELERATOR, reference_free=False, beta=BETA, label_smoothing=smoothing,
        f_divergence_type=FDivergenceType(divergence), f_divergence_params={"alpha_divergence_coef": 0.5},
        args=SimpleNamespace(discopop_tau=0.05), running=RunningMoments(ACCELERATOR),
    )  # fmt: skip

    def call(chosen, rejected, given):
        reference = given["reference_chosen"], given["reference_rejected"]
        return DPOTrainer.dpo_loss(trainer, chosen, rejected, *reference, loss)[0]

    return call


def averaged_ipo(chosen, rejected, given):
    """As its trainer has it: log-probabilities a token."""
    lengths = given["chosen_tokens"], given["rejected_tokens"]
    short = {
        f"reference_{n}": given[f"reference_{n}"] / given[f"{n}_tokens"]
        for n in ("chosen", "rejected")
    }
    return dpo("ipo")(chosen / lengths[0], rejected / lengths[1], short)


def cpo(loss: str):
    trainer = SimpleNamespace(
        accelerator=ACCELERATOR,
        beta=BETA,
        alpha=0.0,
        loss_type=loss,
        simpo_gamma=0.5,
        label_smoothing=0.0,
    )

    def call(chosen, rejected, given):
        if loss == "simpo":
            chosen, rejected = chosen / given["chosen_tokens"], rejected / given["rejected_tokens"]
            return CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]
        return CPOTrainer.cpo_loss(trainer, chosen, rejected)[0] - chosen / given["chosen_tokens"]

    return call


def orpo(chosen, rejected, given):
    """Its trainer's total: likelihood of the answer less the helper's term."""
    chosen, rejected = chosen / given["chosen_tokens"], rejected / given["rejected_tokens"]
    trainer = SimpleNamespace(accelerator=ACCELERATOR, beta=BETA)
    return -chosen - ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]


def kto(loss: str):
    trainer = SimpleNamespace(
        accelerator=ACCELERATOR, beta=BETA, loss_type=loss, calculate_KL=loss == "kto",
        desirable_weight=1.2, undesirable_weight=0.9,
    )  # fmt: skip

    def call(chosen, rejected, given):
        moved = [
            torch.cat([given[f"{w}{n}_moved"] for n in ("chosen", "rejected")])
            for w in ("", "reference_")
        ]
        reference = given["reference_chosen"], given["reference_rejected"]
        losses, *_ = KTOTrainer.kto_loss(trainer, chosen, rejected, moved[0], *reference, moved[1])
        return losses

    return call


LOSSES = {
    "dpo": dpo("sigmoid"),
    "cdpo": dpo("sigmoid", 0.1),
    "robust": dpo("robust", 0.1),
    "ipo": dpo("ipo"),
    "ipo_average": averaged_ipo,
    "hinge": dpo("hinge"),
    "exo": dpo("exo_pair", 0.01),
    "nca": dpo("nca_pair"),
    "sppo": dpo("sppo_hard"),
    "aot_paired": dpo("aot", 0.1),
    "aot_unpaired": dpo("aot_pair", 0.1),
    "apo_zero": dpo("apo_zero"),
    "apo_down": dpo("apo_down"),
    "discopop": dpo("discopop"),
    "bco": dpo("bco_pair"),
    "f_js": dpo("sigmoid", 0.0, "js_divergence"),
    "f_alpha": dpo("sigmoid", 0.0, "alpha_divergence"),
    "simpo": cpo("simpo"),
    "cpo": cpo("sigmoid"),
    "orpo": orpo,
    "kto": kto("kto"),
    "unpaired_apo": kto("apo_zero_unpaired"),
}


def main() -> None:
    given = batch()
    found = dict(given)
    for name, loss in LOSSES.items():
        leaves = [given[n].clone().requires_grad_() for n in ("chosen", "rejected")]
        losses = loss(*leaves, given)
        losses.sum().backward()
        found[f"{name}.loss"] = losses.detach()
        found[f"{name}.chosen"], found[f"{name}.rejected"] = (leaf.grad for leaf in leaves)
    PATH.parent.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in found.items()}, PATH)


if __name__ == "__main__":
    main()
