"""Processes of a command that does not train, as a launcher (torchrun, `accelerate launch`) started them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed

from prx_post.base.errors import PrxPostError
from prx_post.base.ranks import Ranks

TIMEOUT = timedelta(hours=12)
"""Of waiting for another process, which may be scoring thousands of pictures with a large model."""


@contextmanager
def launched_ranks() -> Iterator[Ranks]:
    """This process's share, by the environment of a launcher; alone without one. Objects travel over gloo, by pickle,
    between the processes of this run only.

    Raises:
        PrxPostError: WORLD_SIZE says that there are several, but not which this one is.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return
    if "RANK" not in os.environ:
        raise PrxPostError(f"WORLD_SIZE is {world}, but RANK is not set. Start the processes with a launcher.")
    torch.distributed.init_process_group("gloo", timeout=TIMEOUT)

    def gather(items: list[Any]) -> list[Any]:
        parts: list[Any] = [None] * world
        torch.distributed.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    yield Ranks(int(os.environ["RANK"]), world, gather)
    torch.distributed.destroy_process_group()  # not after an error, whose report tells by it that processes had met
