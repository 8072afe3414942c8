"""Rows of a sweep that nobody ran, for the tests of tables and figures."""

from research.runs import override
from research.runs.canonical import run_id, to_json


def rows(experiment, metrics):
    """One for each run that is planned, with metrics(config)."""
    found = []
    for point in experiment.SWEEP:
        config = override(experiment.BASE, point)
        name = experiment.__name__.rpartition(".")[2]
        row = {"id": run_id(name, config), "config": to_json(config), "overrides": to_json(point)}
        found.append(row | {"metrics": metrics(config)})
    return found
