"""Signals that ask a run to stop, and the errors with which one ends early."""

import signal
from types import FrameType
from typing import Any

from prx_post.base.errors import PrxPostError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""SIGHUP: the terminal is gone."""


class StopRequested(PrxPostError):
    """The run was asked to stop; what it had done is saved and it can be resumed."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class StopTraining(PrxPostError):
    """A run that is not worth continuing. Its state is saved."""


class StopEarly(StopTraining):
    """More steps would gain nothing: the run ends as one that made all of them, and its pipeline is emitted."""


class StopSignals:
    """While entered, a stop signal ends the preparation of data at once, and during training is noted in `received`.

    SIGHUP is left alone where it is ignored already, as under nohup. A second SIGINT in training acts as it always
    does. The others may well come twice: from a scheduler to every process, and from a launcher that passes its own on.
    """

    def __init__(self) -> None:
        self.received = 0
        self.is_training = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def note_only(self) -> None:
        """From now on whoever trains looks at `received` after each step."""
        self.is_training = True

    def while_preparing(self) -> StopRequested:
        """The error of a run that was stopped before it trained."""
        return StopRequested(
            f"stopped by {signal.Signals(self.received).name} while data were prepared; what was encoded is kept. "
            f"Run the same command again."
        )

    def _note(self, number: int, _: FrameType | None) -> None:
        is_first = not self.received
        self.received = number
        if number == signal.SIGINT:
            signal.signal(number, self._before[signal.SIGINT])
        if is_first and not self.is_training:
            raise self.while_preparing()
