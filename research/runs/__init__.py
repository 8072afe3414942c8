"""Runs: strict overrides, sweeps, the command line of an experiment, and the record of what ran.

What an experiment file imports; the modules behind it are `overrides`, `sweep`, `command`,
`canonical`, `environment`, `results` and `page`.
"""

from research.runs.command import Places, main
from research.runs.overrides import override
from research.runs.sweep import chain, param, product, zipped

__all__ = ["Places", "chain", "main", "override", "param", "product", "zipped"]
