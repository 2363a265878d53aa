"""Batches of cached (or freshly encoded) latents and embeddings, in an order that is a function of the step.

Legend: G global batch (samples of one optimizer step on all processes), B samples of one micro-batch on one process.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from prx_post.data.cache import content_key
from prx_post.data.encoding import EncodedCache, Encoders, Sample
from prx_post.data.readers import PictureRows
from prx_post.engine.protocols import Batch
from prx_post.model.text import pad_embeddings


@dataclass(frozen=True)
class Draw:
    """One appearance of one sample: which, and the seed of everything random that happens to it."""

    index: int
    seed: int


class DrawPlan:
    """Which samples make up each step's global batch.

    Samples are grouped by size. A step's batch comes from one group, chosen in proportion to the groups' sizes; a
    group's samples come in one endless stream of permutations, each complete before the next begins. So every sample
    is drawn as often as any other of its group, nothing is dropped at the end of an epoch, and the global batch of a
    step is the same for any number of processes and micro-batches that multiply to G.
    """

    def __init__(self, group_of_sample: list[Any], global_batch_size: int, seed: int, num_steps: int) -> None:
        self.global_batch_size, self.seed = global_batch_size, seed
        names = sorted(set(group_of_sample))
        self._groups = [np.flatnonzero([g == name for g in group_of_sample]) for name in names]
        shares = np.array([len(g) for g in self._groups]) / len(group_of_sample)
        self._group_of_step = np.random.default_rng([seed, 1]).choice(len(names), size=num_steps, p=shares)

    def draws(self, step: int) -> list[Draw]:
        """The G draws of `step`, counted from 0."""
        group = int(self._group_of_step[step])
        before = int((self._group_of_step[:step] == group).sum())
        first = before * self.global_batch_size
        return [self._draw(group, first + i) for i in range(self.global_batch_size)]

    def _draw(self, group: int, position: int) -> Draw:
        members = self._groups[group]
        epoch, place = divmod(position, len(members))
        seed = int(np.random.SeedSequence([self.seed, group, position]).generate_state(1, np.uint64)[0] >> 1)
        return Draw(int(members[self._permutation(group, epoch)[place]]), seed)

    def _permutation(self, group: int, epoch: int) -> np.ndarray:
        key = (group, epoch)
        if getattr(self, "_permutation_key", None) != key:
            rng = np.random.default_rng([self.seed, 2, group, epoch])
            self._permutation_key, self._permutation_cached = key, rng.permutation(len(self._groups[group]))
        return self._permutation_cached


class MixedPlan:
    """Two sets of samples in a fixed proportion in every batch, in an order that is shuffled by step.

    The second set's samples are counted on from the first's.
    """

    def __init__(
        self, first: int, second: int, second_fraction: float, global_batch_size: int, seed: int, num_steps: int
    ) -> None:
        """first, second: how many samples each set has."""
        self.global_batch_size, self.seed = global_batch_size, seed
        of_second = round(second_fraction * global_batch_size)
        parts = [(0, first, global_batch_size - of_second, seed), (first, second, of_second, seed + 2**40)]
        self._parts = [
            (offset, DrawPlan(["all"] * count, share, own_seed, num_steps))
            for offset, count, share, own_seed in parts
            if share
        ]

    def draws(self, step: int) -> list[Draw]:
        both = [Draw(draw.index + offset, draw.seed) for offset, part in self._parts for draw in part.draws(step)]
        order = np.random.default_rng([self.seed, 4, step]).permutation(len(both))
        return [both[i] for i in order]


class _Items(Dataset):
    """Draw -> one item; latents and embedding if cached, else the picture's bytes for `BatchSource` to encode."""

    def __init__(self, source: "BatchSource") -> None:
        self.source = source

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        source = self.source
        sample = source.samples[draw.index]
        item: dict[str, Any] = {"sample": sample, "seed": draw.seed, "dropped": source.drops_caption(draw)}
        if source.cache is None:
            assert source.rows is not None
            item["bytes"] = source.rows.image_bytes(sample.row)
        else:
            item["latents"] = source.cache.latents[sample.image_key]
            key = source.null_key if item["dropped"] else sample.prompt_key
            item["embedding"] = source.cache.embeddings[key]
        return item


class BatchSource:
    """Endless micro-batches of one process, starting at `step`; the order depends on (seed, step) alone.

    Args:
        rows: the pictures to encode; may be None with a cache.
        plan: whose global batch is `micro_batch_size · world_size · accumulation`.
        cache: None encodes every picture and prompt on the fly.
        caption_dropout: probability that a draw's prompt is replaced by the encoded empty prompt.
        pad_length: pad prompts to this many tokens; None pads to the longest of the batch (masked either way).
    """

    def __init__(
        self,
        samples: list[Sample],
        rows: PictureRows | None,
        cache: EncodedCache | None,
        encoders: Encoders,
        plan: DrawPlan | MixedPlan,
        *,
        micro_batch_size: int,
        num_steps: int,
        rank: int = 0,
        world_size: int = 1,
        caption_dropout: float = 0.0,
        pad_length: int | None = None,
    ) -> None:
        self.samples, self.rows, self.cache, self.encoders, self.plan = samples, rows, cache, encoders, plan
        self.micro_batch_size, self.num_steps = micro_batch_size, num_steps
        self.rank, self.world_size = rank, world_size
        self.caption_dropout, self.pad_length = caption_dropout, pad_length
        self.null_key = content_key(encoders.cleaner(""))
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        """Steps whose batches are all out."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]

    def drops_caption(self, draw: Draw) -> bool:
        return np.random.default_rng([draw.seed, 3]).random() < self.caption_dropout

    def _micro_batches(self) -> Iterator[list[Draw]]:
        size, world = self.micro_batch_size, self.world_size
        for step in range(self.step, self.num_steps):
            draws = self.plan.draws(step)
            for start in range(self.rank * size, len(draws), world * size):
                yield draws[start : start + size]

    def __iter__(self) -> Iterator[Batch]:
        # batch_sampler gives whole micro-batches; a list of items comes back, to be encoded or padded here.
        # A generator of its own, because DataLoader draws from torch's global one, which dropout's exact resume needs.
        batches, generator = _Once(self._micro_batches()), torch.Generator()
        loader = DataLoader(_Items(self), batch_sampler=batches, collate_fn=list, generator=generator)
        accumulation = self.plan.global_batch_size // (self.micro_batch_size * self.world_size)
        for count, items in enumerate(loader, start=1):
            batch = {**self._collate(items), "step": self.step}
            if count % accumulation == 0:
                self.step += 1  # before the step's last batch is out: whoever has it may save the state
            yield batch

    def _collate(self, items: list[dict[str, Any]]) -> Batch:
        if self.cache is None:
            for item in items:
                sample = item["sample"]
                item["latents"] = self.encoders.latents(item["bytes"], sample.size).cpu()
                item["embedding"] = self.encoders.prompts("" if item["dropped"] else sample.prompt).cpu()
        embeds, mask = pad_embeddings([item["embedding"] for item in items], self.pad_length)
        return {
            "latents": torch.stack([item["latents"] for item in items]),
            "prompt_embeds": embeds,
            "prompt_mask": mask,
            "seeds": [item["seed"] for item in items],
            "rows": [item["sample"].row for item in items],
        }


class _Once:
    """A batch sampler over an iterator, for DataLoader."""

    def __init__(self, batches: Iterator[list[Draw]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[Draw]]:
        return self._batches
