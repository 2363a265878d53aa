"""The processes of a command, and how work is shared out among them."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from prx_post.base.errors import PrxPostError

Item = TypeVar("Item")
TIMEOUT = timedelta(hours=12)
"""Of waiting for another process, which may be encoding a data set or scoring thousands of images."""


def _alone(items: list[Any]) -> list[Any]:
    return items


@dataclass(frozen=True)
class Ranks:
    """Process `rank` of `world`. `gather` concatenates every process's list, in rank order, on all of them."""

    rank: int = 0
    world: int = 1
    gather: Callable[[list[Any]], list[Any]] = _alone

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every `world`-th item, beginning with the `rank`-th."""
        return items[self.rank :: self.world]

    def wait(self) -> None:
        """Until every process is here."""
        self.gather([])


ALONE = Ranks()


def gathering(rank: int, world: int, group: Any = None) -> Ranks:
    """Ranks of a process group that has met; of its own (None: torch's default). Objects travel by pickle, between the
    processes of this run only.
    """
    if world == 1:
        return ALONE
    import torch.distributed

    def gather(items: list[Any]) -> list[Any]:
        parts: list[Any] = [None] * world
        torch.distributed.all_gather_object(parts, items, group)
        return [item for part in parts for item in part]

    return Ranks(rank, world, gather)


@contextmanager
def launched_ranks() -> Iterator[Ranks]:
    """The processes of a command that does not train, by the environment of a launcher; alone without one.

    Raises:
        PrxPostError: WORLD_SIZE says that there are several, but not which this one is.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    if "RANK" not in os.environ:
        raise PrxPostError(f"WORLD_SIZE is {world}, but RANK is not set. Start the processes with a launcher.")
    import torch.distributed

    torch.distributed.init_process_group("gloo", timeout=TIMEOUT)
    yield gathering(int(os.environ["RANK"]), world)
    torch.distributed.destroy_process_group()  # not after an error, whose report tells by it that processes had met
