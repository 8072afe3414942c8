"""SIGTERM and Ctrl-C end a run after the step that is under way, with its state saved."""

from __future__ import annotations

import signal
import threading


class Interrupted(SystemExit):
    """The run was asked to stop and has stopped; exit status 128 + signal, without a traceback."""


class StopRequest:
    """While entered, the first SIGTERM or SIGINT is noted in `signal`; a second one acts at once.

    Outside the main thread, where Python allows no handlers, signals act as they always do.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: object) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
