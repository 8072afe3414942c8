"""Runs: strict overrides, sweeps, the command line of an experiment, and the record of what ran.

What an experiment file imports; the modules behind it are `overrides`, `sweep`, `command`,
`canonical`, `environment` and `results`.
"""

from research.runs.command import main
from research.runs.overrides import override
from research.runs.sweep import chain, param, product, zipped

__all__ = ["chain", "main", "override", "param", "product", "zipped"]
