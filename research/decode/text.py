"""Token ids as they arrive -> text as it can be shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes a growing answer; a character whose bytes have not all arrived is held back."""

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self.decode = decode
        self.ids: list[int] = []
        self.shown = 0

    def add(self, ids: Sequence[int]) -> str:
        """What `ids` add to the text that can be shown."""
        self.ids += ids
        text = self.decode(self.ids)
        return self._new(text.rstrip(UNFINISHED))

    def end(self) -> str:
        """What was held back, were it not valid UTF-8."""
        return self._new(self.decode(self.ids))

    def _new(self, text: str) -> str:
        new, self.shown = text[self.shown :], max(self.shown, len(text))
        return new
