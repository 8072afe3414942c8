"""The same policy gradients on classic control: environments of gymnasium instead of text.

A row is an episode. What a decoder is to text a small network is here, and everything after the rollout,
estimators, losses, training loop, is the same. An episode that was cut off at its time limit is not over:
its last reward is followed by the critic's value of where it stood.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from research.data import shuffle
from research.data.source import normalise
from research.rl.objective import Loss, terms
from research.rl.policy import Said
from research.rl.source import Rollouts
from research.types import Array, Batch, Objective, Params, Source

Make = Callable[[], Any]  # of a gymnasium environment with numbers to observe and discrete actions


class ActorCritic(nn.Module):
    """Two networks of two layers; observations [..., O] -> (logits [..., A], values [...])."""

    actions: int
    width: int = 64

    @nn.compact
    def __call__(self, observations: Array) -> tuple[Array, Array]:
        def network(name: str, outputs: int, scale: float) -> Array:
            x = observations
            for layer in (0, 1):
                x = nn.tanh(self._dense(self.width, 2**0.5, f"{name}_{layer}")(x))
            return self._dense(outputs, scale, f"{name}_out")(x)

        return network("actor", self.actions, 0.01), network("critic", 1, 1.0)[..., 0]

    @staticmethod
    def _dense(width: int, scale: float, name: str) -> nn.Dense:
        return nn.Dense(width, kernel_init=nn.initializers.orthogonal(scale), name=name)


def of_observations(model: ActorCritic, params: Params, batch: Batch) -> Said:
    """What `research.rl.policy.said` is for text: of actions [B, T] after observations [B, T, O]."""
    logits, values = model.apply({"params": params}, batch["observations"])
    log_p, mask = jax.nn.log_softmax(logits), batch["mask"]
    chosen = jnp.take_along_axis(log_p, batch["actions"][..., None], -1)[..., 0]
    entropy = -(jnp.exp(log_p) * log_p).sum(-1)
    return Said(*(jnp.where(mask != 0, x, 0) for x in (chosen, entropy, values)))


def control_objective(model: ActorCritic, loss: Loss) -> Objective:
    def objective(params: Params, context: Any, batch: Batch, rng: Array | None):
        return terms(of_observations(model, params, batch), batch, loss)

    return objective


def episodes(
    model: ActorCritic, params: Params, environments: list[Any], limit: int, seed: int, rng: Array
) -> tuple[Batch, np.ndarray]:
    """One episode of each environment, at most `limit` steps: observations [B, T, O], actions, rewards, mask
    [B, T], and last_value [B]: the critic's where an episode was cut off, 0 where it was over."""
    B = len(environments)
    now = np.stack([e.reset(seed=seed + i)[0] for i, e in enumerate(environments)])
    found = {
        "observations": np.zeros((B, limit, now.shape[1]), np.float32),
        "actions": np.zeros((B, limit), np.int32),
        "rewards": np.zeros((B, limit), np.float32),
        "mask": np.zeros((B, limit), np.float32),
    }
    running, cut = np.ones(B, bool), np.ones(B, bool)
    for t in range(limit):
        actions = np.asarray(_act(model, params, jnp.asarray(now, jnp.float32), rng, t))
        found["observations"][:, t], found["actions"][:, t] = now, actions
        for i in np.flatnonzero(running):
            now[i], reward, over, late, _ = environments[i].step(int(actions[i]))
            found["rewards"][i, t], found["mask"][i, t] = reward, 1
            running[i], cut[i] = not (over or late), not over
        if not running.any():
            break
    values = np.asarray(_values(model, params, jnp.asarray(now, jnp.float32)))
    return found, np.where(cut, values, 0).astype(np.float32)


@jax.jit(static_argnums=0)
def _act(model: ActorCritic, params: Params, observations: Array, rng: Array, step: int) -> Array:
    logits, _ = model.apply({"params": params}, observations)
    return jax.random.categorical(jax.random.fold_in(rng, step), logits)


@jax.jit(static_argnums=0)
def _values(model: ActorCritic, params: Params, observations: Array) -> Array:
    return model.apply({"params": params}, observations)[1]


@jax.jit(static_argnums=0)
def _score(model: ActorCritic, params: Params, batch: Batch) -> Said:
    return of_observations(model, params, batch)


def control_source(
    model: ActorCritic,
    make: Make,
    settings: Rollouts,
    limit: int,
    keep: Callable[[int, np.ndarray], None] | None = None,
) -> Source:
    """Minibatches for `control_objective` from `settings.rows` episodes an iteration. `keep` gets the
    number of each iteration and its returns [B]. ValueError for settings that only answers of text have."""
    plain = Rollouts()
    for name in (
        "kl",
        "target_kl",
        "stop_kl",
        "lr_kl",
        "whiten_rewards",
        "missing_end",
        "temperature",
    ):
        if getattr(settings, name) != getattr(plain, name):
            raise ValueError(f"episodes of control have no {name}")
    environments = [make() for _ in range(settings.rows)]
    width = environments[0].observation_space.shape[0]

    def init(rng: Array) -> dict[str, Any]:
        shape = (settings.rows, limit)
        names = ("mask", "rewards", "log_probs", "values", "advantages", "returns")
        rollout = {name: np.zeros(shape, np.float32) for name in names}
        rollout |= {"observations": np.zeros((*shape, width), np.float32)}
        rollout |= {"actions": np.zeros(shape, np.int32)}
        place = np.full((), settings.steps, np.int32)
        return {"iteration": np.full((), -1, np.int32), "place": place, "rollout": rollout}

    def next(state, params, context, rng, last_metrics):
        iteration, place, rollout = int(state["iteration"]), int(state["place"]), state["rollout"]
        if place >= settings.steps:
            iteration, place = iteration + 1, 0
            rollout, totals = _collect(model, params, environments, settings, limit, iteration, rng)
            if keep is not None:
                keep(iteration, totals)
        epoch, part = divmod(place, settings.minibatches)
        stream = iteration * settings.epochs + epoch
        order = shuffle.permutation(settings.seed, stream, settings.rows)
        size = settings.rows // settings.minibatches
        batch = {name: x[order[part * size : (part + 1) * size]] for name, x in rollout.items()}
        batch = normalise({**batch, "weights": batch["mask"]})
        batch["rollout/return"] = np.float32(rollout["rewards"].sum(1).mean())
        counts = np.asarray(iteration, np.int32), np.asarray(place + 1, np.int32)
        return batch, {"iteration": counts[0], "place": counts[1], "rollout": rollout}

    return Source(init, next)


def _collect(model, params, environments, settings, limit, iteration, rng):
    seed = settings.seed * 1_000_003 + iteration * settings.rows
    batch, last_value = episodes(model, params, environments, limit, seed, rng)
    said, rewards = jax.device_get(_score(model, params, batch)), batch["rewards"]
    advantages, returns = settings.estimator(
        jnp.asarray(rewards), said.values, batch["mask"], settings.answers, jnp.asarray(last_value)
    )
    more = dict(log_probs=said.log_probs, values=said.values)
    more |= dict(advantages=np.asarray(advantages), returns=np.asarray(returns))
    return batch | more, rewards.sum(1)
