"""The processes of a command, and how work is split among them."""

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

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def hides_progress(self) -> bool | None:
        """tqdm's `disable`: None, by which a bar is shown on a terminal alone, for the main process."""
        return None if self.is_main else True

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every `world`-th item, beginning with the `rank`-th."""
        return items[self.rank :: self.world]

    def wait(self) -> None:
        """Until every process is here."""
        self.gather([])

    def together(self, work: Callable[[], Item]) -> list[Item]:
        """Do `work`, which holds no collective, on every process; every process gets all results, in rank order.

        Whatever goes wrong on one of them reaches all at once: the others need not wait until they time out.
        """
        return self._outcomes([self._attempt(work)])

    def on_main(self, work: Callable[[], Item]) -> Item:
        """Do `work` on rank 0 alone. Its result, which must pickle, or its error reaches every process."""
        (result,) = self._outcomes([self._attempt(work)] if self.is_main else [])
        return result

    def _attempt(self, work: Callable[[], Item]) -> "_Outcome":
        try:
            return _Outcome(self.rank, work())
        except PrxPostError as error:
            own: Exception = error
            told = error
        except OSError as error:
            place = error.filename or "the disk"
            own = told = PrxPostError(f"{place} cannot be used: {error.strerror or error}. Check the disk.")
        except Exception as error:  # not handled, but raised below, by this process as it is
            own = error
            told = PrxPostError(f"rank {self.rank} failed ({type(error).__name__}: {error}); it says more")
        return _Outcome(self.rank, None, told, own)

    def _outcomes(self, mine: list["_Outcome"]) -> list[Any]:
        outcomes = mine if self.world == 1 else self.gather([_Outcome(o.rank, o.result, o.told) for o in mine])
        first = next((outcome for outcome in outcomes if outcome.told is not None), None)
        for own in (outcome.own for outcome in mine if outcome.own is not None):
            if isinstance(own, PrxPostError) and first is not None:
                own.raised_by_all(first.rank == self.rank)  # the first of them says it
            raise own
        if first is not None and first.told is not None:
            raise first.told.raised_by_all(False)
        return [outcome.result for outcome in outcomes]


@dataclass(frozen=True)
class _Outcome:
    """Of a piece of work: its result, or its error as others are told it and as it was."""

    rank: int
    result: Any
    told: PrxPostError | None = None
    own: Exception | None = None


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
