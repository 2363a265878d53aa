"""Signals that ask a run to stop."""

import signal
from types import FrameType
from typing import Any

from prx_post.base.errors import PrxPostError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequested(PrxPostError):
    """The run was asked to stop; it has saved a checkpoint and can go on from there."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class StopSignals:
    """While entered, a stop signal is noted in `received`. A second SIGINT acts as it always does.

    The others may well come twice: from a scheduler to every process, and from a launcher that hands its own on.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            signal.signal(number, self._before[signal.SIGINT])
