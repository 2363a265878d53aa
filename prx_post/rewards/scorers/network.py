"""What rewards that run a network in this process have in common: placement, batches, checks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from prx_post.base.errors import PrxPostError
from prx_post.base.settings import require, require_one_of
from prx_post.rewards.reward import check_counts, checked
from prx_post.rewards.scorers.pixels import Images
from prx_post.rewards.scorers.weights import Files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class NetworkReward(ABC):
    """Scores by a network that is loaded at the first call.

    The network runs in `dtype`; embeddings are normalised, and scores computed from them, in fp32.
    """

    name: ClassVar[str]
    uses_prompts: ClassVar[bool] = True
    gradient: ClassVar[bool] = True

    def __init__(self, files: Sequence[Files], device: str | None, dtype: str, batch_size: int) -> None:
        """Raises PrxPostError for a device that is not there, and ConfigError for what is no dtype or batch size."""
        require_one_of("dtype", dtype, tuple(DTYPES))
        reason = "so many images go through the network at once"
        require(batch_size > 0, "batch_size", batch_size, "above 0", reason, "Set it to 1 or more")
        self.device, self.dtype, self.batch_size = _device(device), DTYPES[dtype], batch_size
        self.identity = ", ".join((self.name, *(each.version for each in files), dtype))

    def check(self, prompts: Sequence[str]) -> None:
        for i, prompt in enumerate(prompts):
            if self.uses_prompts and not prompt.strip():
                raise PrxPostError(f"prompt {i} is empty, so {self.name} has nothing to compare an image with.")

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        check_counts(images, prompts)
        self.check(prompts)
        if not images:
            return torch.zeros(0)
        return checked(self.score(images, prompts), self.name, len(images))

    def of_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """As of DifferentiableReward."""
        self.check(prompts)
        return self.score(pixels, prompts).float()

    @abstractmethod
    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores [B]; B ≥ 1, and what `check` refuses does not come. Of pixels they have a gradient."""

    def in_batches(self, function: Callable[[Any], Tensor], items: Sequence[Any] | Tensor) -> Tensor:
        """`function` of consecutive parts of at most batch_size, put together again."""
        starts = range(0, len(items), self.batch_size)
        return torch.cat([function(items[start : start + self.batch_size]) for start in starts])


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise PrxPostError(
            f"device is {name!r}, but must be one of torch's, such as cpu or cuda:0. Correct it."
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PrxPostError(f"device is {name!r}, but this process sees {torch.cuda.device_count()} GPUs. Correct it.")
    return device
