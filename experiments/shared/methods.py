"""Ways to fine-tune a pretrained decoder, as values of a config: another method is one changed line.

    @dataclasses.dataclass(frozen=True)
    class Config:
        method: methods.Method = methods.LoRA()        # or --set method=experiments.shared.methods:DoRA

    adapted = config.method.apply(loaded.model, loaded.params, rng, config.steps)

`METHODS` holds one of each, with a rate and a size of its own. The rates suit Adam and a few dozen
steps, far fewer than the papers', and so lie at the upper end of what a paper names, or above. Two of
LoRA and two of AdaLoRA were tried, on the 2,401st to 2,600th short headline of `sarcasm.read_rows`,
which no experiment tests on; of the other methods none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from research.adapters import bottleneck, prefix
from research.objectives import with_penalty
from research.train.optim import Finished, Optimizer
from research.types import Array, Objective, Params
from research.weights import adalora, bias, dora, ia3, lora, prompt, prompt_encoder
from research.weights.adalora_allocate import Allocation

BLOCK = r".*/(attention|ffn)/[a-z]+/kernel"  # all seven matrices of a LLaMA's block


def unchanged(given: Any) -> Any:
    return given


class Adapted(NamedTuple):
    """A model made ready to be trained by one method.

    rule        the leaves that train; None: nothing does
    lr          the rate at its highest
    before      tokens that stand before every example
    penalised   what the method adds to an objective
    finished    what the method does to an optimizer
    """

    model: Any
    params: Params
    rule: str | None
    lr: float
    before: tuple[int, ...] = ()
    penalised: Callable[[Objective], Objective] = unchanged
    finished: Callable[[Optimizer], Optimizer | Finished] = unchanged


@dataclasses.dataclass(frozen=True)
class Method:
    """`lr` is the rate at its highest."""

    lr: float = 0.0

    def apply(self, model: Any, params: Params, rng: Array, steps: int) -> Adapted:
        """The model and its parameters changed; `steps` is the length of the training to come."""
        raise NotImplementedError(f"{type(self).__name__} must say how it changes a model")


@dataclasses.dataclass(frozen=True)
class Nothing(Method):
    """The model as it is."""

    def apply(self, model: Any, params: Params, rng: Array, steps: int) -> Adapted:
        return Adapted(model, params, None, self.lr)


@dataclasses.dataclass(frozen=True)
class Full(Method):
    """All weights, the embedding table among them."""

    lr: float = 1e-4

    def apply(self, model: Any, params: Params, rng: Array, steps: int) -> Adapted:
        return Adapted(model, params, r".*", self.lr)


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """arXiv:2106.09685. The scale alpha / rank is that of `lora_rank`, the rate three times its."""

    lr: float = 3e-3
    rank: int = 8
    scale: float = 2.0
    targets: str = BLOCK

    def apply(self, model: Any, params: Params, rng: Array, steps: int) -> Adapted:
        params = lora.add(params, self.targets, rng, self.rank, self.scale * self.rank)
        return Adapted(model, params, lora.TRAINABLE, self.lr)


@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    """arXiv:2402.09353; all as LoRA's."""

    def apply(self, model: Any, params: Params, rng: Array, steps: int) -> Adapted:
        params = dora.add(params, self.targets, rng, self.rank, self.scale * self.rank)
        return Adapted(model, params, dora.TRAINABLE, self.lr)


@dataclasses.dataclass(frozen=True)
class AdaLoRA(Method):
    """arXiv:2303.10512: `start` triplets a matrix, `rank` on average at the end.

    A fifth of the steps passes before pruning, and the last third has its mask. What changes is a
    product of three small factors of which one begins as 0, so that the rate is above LoRA's.
    """

    lr: float = 1e-2
    rank: int = 8
    start: int = 12
    scale: float = 2.0
    orthogonality: float = 0.5
    targets: str = BLOCK

    def allocation(self, steps: int) -> Allocation:
        return Allocation(self.rank, steps, initial_steps=steps // 5, final_steps=steps // 3)

    def apply(self, model: Any, params: Params, rng: Array, steps: int) -> Adapted:
        params = adalora.add(params, self.targets, rng, self.start, self.scale * self.start)
        penalty = adalora.orthogonality(self.orthogonality)
        return Adapted(
            model,
            params,
            adalora.TRAINABLE,
            self.lr,
            penalised=partial(with_penalty, penalty=penalty),
            finished=partial(Finished, finish=self.allocation(steps)),
        )


@dataclasses.dataclass(frozen=True)
class IA3(Method):
    """arXiv:2205.05638, which trains at 3e-3 for 1,000 steps."""

    lr: float = 1e-2

    def apply(self, model: Any, params: Params, rng: Array, steps: int) -> Adapted:
        return Adapted(model, ia3.add(params), ia3.TRAINABLE, self.lr)


@dataclasses.dataclass(frozen=True)
class BitFit(Method):
    """arXiv:2106.10199, rates of 1e-4 to 1e-3 there. LLaMA has no biases: they are added, as 0."""

    lr: float = 5e-3
    targets: str = BLOCK

    def apply(self, model: Any, params: Params, rng: Array, steps: int) -> Adapted:
        return Adapted(model, bias.add(params, self.targets), bias.TRAINABLE, self.lr)


@dataclasses.dataclass(frozen=True)
class Prompt(Method):
    """arXiv:2104.08691, `length` tokens before every example; P-tuning with another `initial`."""

    lr: float = 3e-2
    length: int = 8
    initial: prompt.Initial = prompt.sampled

    def apply(self, model: Any, params: Params, rng: Array, steps: int) -> Adapted:
        params = prompt.add(params, rng, self.length, self.initial)
        before = tuple(prompt.ids(params))
        return Adapted(model, params, prompt.TRAINABLE, self.lr, before)


@dataclasses.dataclass(frozen=True)
class Prefix(Method):
    """arXiv:2101.00190 with an MLP of `hidden` features; without one P-tuning v2, arXiv:2110.07602.

    The papers' rates are 5e-5 and about 5e-3.
    """

    lr: float = 1e-3
    length: int = 8
    hidden: int | None = 512

    def apply(self, model: Any, params: Params, rng: Array, steps: int) -> Adapted:
        model, params = prefix.add(model, params, rng, self.length, self.hidden)
        return Adapted(model, params, prefix.TRAINABLE, self.lr)


@dataclasses.dataclass(frozen=True)
class Bottleneck(Method):
    """Adapters of `size` features put in by `insert`, a function of `adapters.bottleneck`."""

    lr: float = 1e-3
    insert: Callable[..., tuple[Any, Params]] = bottleneck.houlsby
    size: int = 32

    def apply(self, model: Any, params: Params, rng: Array, steps: int) -> Adapted:
        model, params = self.insert(model, params, rng, self.size)
        return Adapted(model, params, bottleneck.TRAINABLE, self.lr)


METHODS: dict[str, Method] = {
    "nothing": Nothing(),
    "full": Full(),
    "LoRA": LoRA(),
    "DoRA": DoRA(),
    "AdaLoRA": AdaLoRA(),
    "(IA)³": IA3(),
    "BitFit": BitFit(),
    "prompt tuning": Prompt(),
    "P-tuning": Prompt(lr=1e-3, initial=prompt_encoder.lstm),  # arXiv:2103.10385
    "prefix tuning": Prefix(),
    "P-tuning v2": Prefix(lr=1e-2, hidden=None),
    # arXiv:1902.00751 (rates 3e-5 to 3e-3), arXiv:2005.00247, arXiv:2110.04366.
    "Houlsby adapters": Bottleneck(),
    "Pfeiffer adapters": Bottleneck(insert=bottleneck.pfeiffer, size=64),
    "parallel adapters": Bottleneck(insert=bottleneck.parallel, size=64),
}
