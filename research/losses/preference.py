"""Losses of preferences: each a few lines over the log-probabilities of answers.

    h = (log π(y_w|x) − log π_ref(y_w|x)) − (log π(y_l|x) − log π_ref(y_l|x))

is the margin of the log-ratios of the chosen answer y_w and the rejected one y_l; log-probabilities are
sums over the tokens of an answer, its end included, in nats. Every loss takes `Pairs` and its own
constants and gives a loss for each pair, [B]; weighting and averaging are the objective's business
(`research.objectives`). A new loss is one function here and one line of a test.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from research.types import Array

log_sigmoid = jax.nn.log_sigmoid


@struct.dataclass
class Pairs:
    """Of B pairs: log-probabilities of both answers [B], by the policy and by the reference, and how
    many tokens each has. Losses without a reference do not look at it."""

    chosen: Array
    rejected: Array
    reference_chosen: Array
    reference_rejected: Array
    chosen_tokens: Array
    rejected_tokens: Array

    @property
    def ratios(self) -> tuple[Array, Array]:
        """log π/π_ref of the chosen and the rejected answers."""
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected

    @property
    def margin(self) -> Array:
        """h above."""
        chosen, rejected = self.ratios
        return chosen - rejected

    @property
    def mean_ratios(self) -> tuple[Array, Array]:
        """The log-ratios a token."""
        chosen, rejected = self.ratios
        return chosen / self.chosen_tokens, rejected / self.rejected_tokens


PairLoss = Callable[..., Array]


def dpo(pairs: Pairs, beta: float = 0.1, smoothing: float = 0.0) -> Array:
    """−(1−ε) log σ(βh) − ε log σ(−βh): DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7); with ε > 0,
    the rate of labels that are the wrong way round, conservative DPO (Mitchell 2023)."""
    return _logistic(beta * pairs.margin, smoothing)


def sigmoid_norm(pairs: Pairs, beta: float = 0.1) -> Array:
    """−log σ(β(ρ_w/|y_w| − ρ_l/|y_l|)): DPO on log-ratios a token (Meng et al. 2024, arXiv:2405.14734, as a
    baseline). Answers of one token are DPO's."""
    return -log_sigmoid(beta * jnp.subtract(*pairs.mean_ratios))


def robust_dpo(pairs: Pairs, beta: float = 0.1, smoothing: float = 0.1) -> Array:
    """[−(1−ε) log σ(βh) + ε log σ(−βh)] / (1−2ε): its mean is DPO's on clean labels (Chowdhury et al. 2024,
    arXiv:2403.00409). It may be negative. ValueError unless 0 ≤ ε < 1/2."""
    if not 0 <= smoothing < 0.5:
        raise ValueError(
            f"the rate of wrong labels must be at least 0 and below 0.5, not {smoothing}"
        )
    h = beta * pairs.margin
    wrong = smoothing * log_sigmoid(-h)
    return (wrong - (1 - smoothing) * log_sigmoid(h)) / (1 - 2 * smoothing)


def ipo(pairs: Pairs, beta: float = 0.1, average: bool = False) -> Array:
    """(h − 1/(2β))²: IPO (Azar et al. 2023, arXiv:2310.12036, eq. 17). `average` has log-ratios a token."""
    margin = jnp.subtract(*pairs.mean_ratios) if average else pairs.margin
    return jnp.square(margin - 1 / (2 * beta))


def hinge(pairs: Pairs, beta: float = 0.1) -> Array:
    """max(0, 1 − βh): the hinge of SLiC on DPO's margin (Zhao et al. 2023, arXiv:2305.10425; Liu et al.
    2023, arXiv:2309.06657)."""
    return jax.nn.relu(1 - beta * pairs.margin)


def slic(pairs: Pairs, delta: float = 1.0, weight: float = 0.1) -> Array:
    """max(0, δ − log π(y_w) + log π(y_l)) − λ log π(y_w): SLiC-HF with the chosen answer as its target
    (Zhao et al. 2023, arXiv:2305.10425). No reference."""
    return jax.nn.relu(delta - pairs.chosen + pairs.rejected) - weight * pairs.chosen


def simpo(pairs: Pairs, beta: float = 2.0, gamma: float = 1.0) -> Array:
    """−log σ(β(mean log π(y_w) − mean log π(y_l)) − γ), means over tokens (Meng et al. 2024,
    arXiv:2405.14734). No reference."""
    chosen, rejected = _per_token(pairs)
    return -log_sigmoid(beta * (chosen - rejected) - gamma)


def cpo(pairs: Pairs, beta: float = 0.1, weight: float = 1.0) -> Array:
    """−log σ(β(log π(y_w) − log π(y_l))) − λ mean log π(y_w) (Xu et al. 2024, arXiv:2401.08417). No
    reference; the second term a token."""
    return -log_sigmoid(beta * (pairs.chosen - pairs.rejected)) - weight * _per_token(pairs)[0]


def orpo(pairs: Pairs, beta: float = 0.1) -> Array:
    """−mean log π(y_w) − β log σ(log odds(y_w) − log odds(y_l)), odds p/(1−p) of the geometric mean
    probability p of a token (Hong et al. 2024, arXiv:2403.07691). No reference."""
    chosen, rejected = _per_token(pairs)
    odds = (chosen - _log_one_minus_exp(chosen)) - (rejected - _log_one_minus_exp(rejected))
    return -chosen - beta * log_sigmoid(odds)


def exo(pairs: Pairs, beta: float = 0.1, smoothing: float = 1e-3) -> Array:
    """KL(σ(±βh) ‖ (1−ε, ε)): reverse KL from the policy's preference to the label's (Ji et al. 2024,
    arXiv:2402.00856, eq. 16). ValueError unless 0 < ε < 1."""
    if not 0 < smoothing < 1:
        raise ValueError(f"EXO needs a smoothing between 0 and 1, not {smoothing}")
    h = beta * pairs.margin
    right = jax.nn.sigmoid(h) * (log_sigmoid(h) - math.log1p(-smoothing))
    return right + jax.nn.sigmoid(-h) * (log_sigmoid(-h) - math.log(smoothing))


def nca(pairs: Pairs, beta: float = 0.1) -> Array:
    """−log σ(r_w) − ½ log σ(−r_w) − ½ log σ(−r_l), r = β log-ratio (Chen et al. 2024, arXiv:2402.05369)."""
    chosen, rejected = (beta * x for x in pairs.ratios)
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


def sppo(pairs: Pairs, beta: float = 0.1) -> Array:
    """(ρ_w − 1/(2β))² + (ρ_l + 1/(2β))², ρ the log-ratios: self-play with a sure winner (Wu et al. 2024,
    arXiv:2405.00675, eq. 4.7)."""
    chosen, rejected = pairs.ratios
    return jnp.square(chosen - 1 / (2 * beta)) + jnp.square(rejected + 1 / (2 * beta))


def aot_paired(pairs: Pairs, beta: float = 0.1, smoothing: float = 0.0) -> Array:
    """DPO on the sorted margins: the k-th greatest of the policy's against the k-th greatest of the
    reference's (Melnyk et al. 2024, arXiv:2406.05882, for paired data). Ranks are those within what is given:
    pairs of a step must weigh alike, and none may be padding."""
    policy, reference = (
        pairs.chosen - pairs.rejected,
        pairs.reference_chosen - pairs.reference_rejected,
    )
    return _logistic(beta * (jnp.sort(policy) - jnp.sort(reference)), smoothing)


def aot_unpaired(pairs: Pairs, beta: float = 0.1, smoothing: float = 0.0) -> Array:
    """DPO on the sorted log-ratios of chosen answers against the sorted ones of rejected answers, which
    need not belong together (Melnyk et al. 2024, for unpaired data)."""
    chosen, rejected = pairs.ratios
    return _logistic(beta * (jnp.sort(chosen) - jnp.sort(rejected)), smoothing)


def apo_zero(pairs: Pairs, beta: float = 0.1) -> Array:
    """1 − σ(βρ_w) + σ(βρ_l): where chosen answers are better than the model's own (D'Oosterlinck et al.
    2024, arXiv:2408.06266, eq. 7)."""
    chosen, rejected = pairs.ratios
    return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


def apo_down(pairs: Pairs, beta: float = 0.1) -> Array:
    """σ(βρ_w) + 1 − σ(βh): where they are worse (eq. 8 there)."""
    return jax.nn.sigmoid(beta * pairs.ratios[0]) + jax.nn.sigmoid(-beta * pairs.margin)


def discopop(pairs: Pairs, beta: float = 0.1, tau: float = 0.05) -> Array:
    """−(1−m) log σ(βh) + m exp(−βh), m = σ(βh/τ): found by a search of language models (Lu et al. 2024,
    arXiv:2406.08414, eq. 5). −βh is kept below 80, where float32 ends."""
    h = beta * pairs.margin
    mix = jax.nn.sigmoid(h / tau)
    return -(1 - mix) * log_sigmoid(h) + mix * jnp.exp(jnp.minimum(-h, 80.0))


def bco(pairs: Pairs, beta: float = 0.1, delta: Array | float = 0.0) -> Array:
    """−log σ(βρ_w − δ) − log σ(δ − βρ_l): a classifier of single answers whose threshold δ is the running
    mean of rewards (Jung et al. 2024, arXiv:2404.04656); `bco_threshold` moves it."""
    chosen, rejected = (beta * x for x in pairs.ratios)
    return -log_sigmoid(chosen - delta) - log_sigmoid(delta - rejected)


def bco_threshold(pairs: Pairs, beta: float, mean: Array, batches: Array) -> tuple[Array, Array]:
    """(mean, count) of the rewards of a batch's answers after one more batch; no gradient."""
    now = lax.stop_gradient(beta * jnp.concatenate(pairs.ratios)).mean()
    return mean + (now - mean) / (batches + 1), batches + 1


def f_dpo(
    pairs: Pairs, beta: float = 0.1, divergence: str = "reverse_kl", alpha: float = 0.5
) -> Array:
    """−log σ(β(f'(u_w) − f'(u_l))), u = π/π_ref, for the divergence f (Wang et al. 2023, arXiv:2309.16240).

    f'(u) is log u for 'reverse_kl', −1/u for 'forward_kl', log(2u/(1+u)) for 'js' and (1−u^−α)/α for
    'alpha'. ValueError for another name, and for α outside (0, 1).
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, not {divergence!r}")
    if divergence == "alpha" and not 0 < alpha < 1:
        raise ValueError(f"alpha must be between 0 and 1, not {alpha}")
    chosen, rejected = (DIVERGENCES[divergence](x, alpha) for x in pairs.ratios)
    return -log_sigmoid(beta * (chosen - rejected))


def _forward_kl(t: Array, alpha: float) -> Array:
    return -jnp.exp(jnp.minimum(-t, 80.0))


def _alpha(t: Array, alpha: float) -> Array:
    return -jnp.expm1(jnp.minimum(-alpha * t, 80.0)) / alpha


# f' of t = log u.
DIVERGENCES: dict[str, Callable[[Array, float], Array]] = {
    "reverse_kl": lambda t, alpha: t,
    "forward_kl": _forward_kl,
    "js": lambda t, alpha: math.log(2) + log_sigmoid(t),
    "alpha": _alpha,
}


def _logistic(h: Array, smoothing: float) -> Array:
    return -(1 - smoothing) * log_sigmoid(h) - smoothing * log_sigmoid(-h)


def _per_token(pairs: Pairs) -> tuple[Array, Array]:
    return pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens


def _log_one_minus_exp(x: Array) -> Array:
    """log(1 − exp(x)) for x < 0, exact at both ends; x is kept away from 0."""
    x = jnp.minimum(x, -1e-7)
    near = x > -math.log(2)
    small = jnp.log(-jnp.expm1(jnp.where(near, x, -1.0)))
    return jnp.where(near, small, jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


LOSSES: dict[str, PairLoss] = {
    "dpo": dpo,
    "sigmoid_norm": sigmoid_norm,
    "robust": robust_dpo,
    "ipo": ipo,
    "hinge": hinge,
    "slic": slic,
    "simpo": simpo,
    "cpo": cpo,
    "orpo": orpo,
    "exo": exo,
    "nca": nca,
    "sppo": sppo,
    "aot_paired": aot_paired,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "bco": bco,
    "f_dpo": f_dpo,
}
