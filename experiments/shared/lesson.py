"""What an experiment's config says of training, for shared code that trains by it."""

from __future__ import annotations

from typing import Protocol


class Lesson(Protocol):
    """A step sees batch_size rows. The rate is said elsewhere, by a method say."""

    warmup_steps: int
    steps: int
    batch_size: int
    seed: int


class Schedule(Lesson, Protocol):
    """`lr` is the rate at its highest."""

    lr: float
