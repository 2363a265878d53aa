"""How far long work has come: a bar on a terminal; elsewhere, such as in a job's log, a plain line every minute."""

import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

EVERY_S = 60.0
"""Between two plain lines."""


class Progress(tqdm):
    """A tqdm bar whose `disable=None` shows plain lines off a terminal, instead of nothing."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._is_plain = settings.get("disable", False) is None and self.disable
        self._what, self._unit = settings.get("desc") or "done", settings.get("unit", "it")
        self._all = settings["total"] if settings.get("total") is not None else _length(self.iterable)
        self._count, self._said = 0, time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        if not self._is_plain:
            yield from super().__iter__()
            return
        for item in self.iterable:
            yield item
            self.update()

    def update(self, n: float | None = 1) -> bool | None:
        if not self._is_plain:
            return super().update(n)
        self._count += int(n or 0)
        if time.monotonic() - self._said >= EVERY_S:
            of_all = "" if self._all is None else f" of {self._all:,}"
            print(f"{self._what}: {self._count:,}{of_all} {self._unit}s", flush=True)
            self._said = time.monotonic()
        return None


def _length(items: Any) -> int | None:
    return len(items) if hasattr(items, "__len__") else None
