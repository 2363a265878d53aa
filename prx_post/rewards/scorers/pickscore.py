"""PickScore (Kirstain et al. 2023): CLIP ViT-H/14 trained on which of two images users of Pick-a-Pic preferred."""

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from prx_post.rewards.scorers.clip import CLIP, PREPROCESSOR, TOKENIZER, cosines, load_clip
from prx_post.rewards.scorers.network import NetworkReward
from prx_post.rewards.scorers.pixels import Images
from prx_post.rewards.scorers.weights import MODEL, Published, locate, locate_companion

VIT_H_14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PUBLISHED = Published("yuvalkirstain/PickScore_v1", (MODEL, ("config.json",)))
PROCESSOR = Published(VIT_H_14, (*PREPROCESSOR, *TOKENIZER))
"""PickScore has none of its own."""


class PickScore(NetworkReward):
    """Logit scale (about 100) · cos(image, prompt), the prompt cut to 77 tokens."""

    name = "pickscore"

    def __init__(
        self, weights: str | None = None, device: str | None = None, dtype: str = "float32", batch_size: int = 16
    ) -> None:
        self._files = locate(self.name, PUBLISHED, weights)
        self._processor = locate_companion(self.name, PROCESSOR, weights)
        super().__init__([self._files, self._processor], device, dtype, batch_size)

    @cached_property
    def _clip(self) -> CLIP:
        preprocessor, *tokenizer = self._processor.paths
        return load_clip(self._files.paths, preprocessor, tokenizer, self)

    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        return self._clip.logit_scale * cosines(self, self._clip, images, prompts)
