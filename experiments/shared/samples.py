"""What models said, side by side, as Markdown: for the `samples` of an experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.shared.cells import markdown


def cell(text: str) -> str:
    """Text of any form inside a Markdown table: nothing in it may end its cell, or become HTML."""
    safe = text.strip().replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return "<br>".join(line.strip() for line in safe.splitlines()) or "(nothing)"


def side_by_side(
    prompts: Sequence[str], said: Mapping[str, Sequence[str]], notes: Mapping[str, Sequence[str]]
) -> str:
    """A table a prompt with a line a model: {label: answers} and {label: a note on each answer}."""
    parts = []
    for index, prompt in enumerate(prompts):
        lines = [[label, notes[label][index], cell(said[label][index])] for label in said]
        parts.append(f"**{cell(prompt)}**\n\n" + markdown(["model", "", "answer"], lines))
    return "\n".join(parts)
