"""Errors that are shown as one line, and the exit codes that go with them."""

import os
import sys
from typing import Self


class PrxPostError(Exception):
    """An error in what the user gave, or in the world around. Shown as one line, without a traceback."""

    exit_code = 2
    _is_printed_elsewhere = False

    def raised_by_all(self, is_main: bool) -> Self:
        """Mark as raised alike by every process of a run, so that only the main one prints it."""
        self._is_printed_elsewhere = not is_main
        return self

    def report(self) -> str | None:
        """The line to print; None if another process prints it: the first of a machine, before processes have met."""
        rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
        distributed = sys.modules.get("torch.distributed")
        have_met = distributed is not None and distributed.is_available() and distributed.is_initialized()
        if self._is_printed_elsewhere or (local_rank != "0" and not have_met):
            return None
        return f"error: {self}" if rank == "0" else f"error on rank {rank}: {self}"


class ConfigError(PrxPostError):
    """A setting that cannot be used."""
