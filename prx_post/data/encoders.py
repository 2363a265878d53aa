"""The VAE and the text encoder of a pipeline at work on samples, alone or several at a time."""

import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prx_post.data.buckets import Size
from prx_post.data.images import decode
from prx_post.data.rows import ImageRows
from prx_post.data.scan import Sample
from prx_post.model.checkpoint import PipelineFolder
from prx_post.model.codec import LatentCodec, to_pixels
from prx_post.model.text import PromptCleaner, PromptEncoder

Item = TypeVar("Item")


class Cleaned(NamedTuple):
    """A prompt as it is encoded, and how many tokens it has before it is cut."""

    text: str
    tokens: int


class Encoders:
    """The VAE and the text encoder of a pipeline, each loaded at its first use.

    Args:
        batch_size: images or prompts that are encoded at a time, where many are.
        num_workers: processes that read, decode and resize images; 0: this one.
    """

    def __init__(
        self,
        pipeline: PipelineFolder,
        cleaner: PromptCleaner,
        device: torch.device,
        text_dtype: torch.dtype,
        *,
        batch_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        self.pipeline, self.cleaner, self.device, self.text_dtype = pipeline, cleaner, device, text_dtype
        self.batch_size, self.num_workers = batch_size, num_workers
        self._codec: LatentCodec | None = None
        self._prompts: PromptEncoder | None = None

    @property
    def codec(self) -> LatentCodec:
        # fp32 always: the VAE runs once an image, and bfloat16 latents would cap what training can reach.
        if self._codec is None:
            self._codec = LatentCodec(self.pipeline.load_vae().to(self.device))
        return self._codec

    @property
    def prompts(self) -> PromptEncoder:
        if self._prompts is None:
            text_encoder = self.pipeline.load_text_encoder(self.text_dtype).to(self.device)
            self._prompts = PromptEncoder(self.pipeline.load_tokenizer(), text_encoder, self.cleaner)
        return self._prompts

    def latents(self, data: bytes, size: Size) -> Tensor:
        """Latents of one encoded image, [C, H/f, W/f] fp32. Raises OSError if it cannot be decoded."""
        pixels = to_pixels(decode(data), *size)  # first, so that a broken image does not load the VAE
        return self.codec.encode(pixels[None])[0]

    def embeddings_of(self, prompts: Mapping[str, Cleaned]) -> Iterator[tuple[str, Tensor]]:
        """Embeddings [L, D] of prompts by key, each without its padding; together go those of about one length."""
        if self.batch_size == 1:
            for key, prompt in prompts.items():
                yield key, self.prompts.of_cleaned(prompt.text)
            return
        keys = sorted(prompts, key=lambda key: prompts[key].tokens)
        for part in _parts(keys, self.batch_size):
            yield from zip(part, self.prompts.together([prompts[key].text for key in part]), strict=True)

    def latents_of(self, samples: Sequence[Sample], rows: ImageRows) -> Iterator[tuple[Sample, Tensor | str]]:
        """Latents of samples, or why an image cannot be decoded; together go those of one size."""
        by_size: dict[Size, list[int]] = {}
        for place, sample in enumerate(samples):
            by_size.setdefault(sample.size, []).append(place)
        batches = [part for places in by_size.values() for part in _parts(places, self.batch_size)]
        pixels: DataLoader[Any] = DataLoader(
            _Pixels(samples, rows),
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=list,
            worker_init_fn=_leave_signals_to_parent,
        )
        for places, found in zip(batches, pixels, strict=True):
            good = [torch.from_numpy(one) for one in found if isinstance(one, np.ndarray)]
            latents: Iterator[Tensor] = iter(self.codec.encode(torch.stack(good)) if good else ())
            for place, one in zip(places, found, strict=True):
                yield samples[place], next(latents) if isinstance(one, np.ndarray) else one

    def free(self) -> None:
        """Let go of both, and of their memory."""
        self._codec = self._prompts = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Pixels(Dataset[Any]):
    """Of samples: [3, H, W], or why there are none.

    Arrays, not tensors: a worker hands a tensor over by a descriptor that is asked of it later, when whoever asks may
    have been stopped.
    """

    def __init__(self, samples: Sequence[Sample], rows: ImageRows) -> None:
        self._samples, self._rows = samples, rows

    def __getitem__(self, place: int) -> np.ndarray | str:
        sample = self._samples[place]
        try:
            return to_pixels(decode(self._rows.image_bytes(sample.row)), *sample.size).numpy()
        except OSError as error:
            return str(error)


def _leave_signals_to_parent(worker: int) -> None:
    """A stop signal reaches the whole process group; a worker ends when the process that it reads for does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _parts(items: list[Item], size: int) -> list[list[Item]]:
    return [items[first : first + size] for first in range(0, len(items), size)]
