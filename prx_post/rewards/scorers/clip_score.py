"""CLIPScore (Hessel et al. 2021) by OpenAI's CLIP ViT-L/14."""

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from prx_post.rewards.scorers.clip import CLIP, PREPROCESSOR, TOKENIZER, cosines, load_clip
from prx_post.rewards.scorers.network import NetworkReward
from prx_post.rewards.scorers.pixels import Images
from prx_post.rewards.scorers.weights import MODEL, Published, locate

VIT_L_14 = "openai/clip-vit-large-patch14"
PUBLISHED = Published(VIT_L_14, (MODEL, ("config.json",), *PREPROCESSOR, *TOKENIZER))


class CLIPScore(NetworkReward):
    """100 · max(cos(image, prompt), 0), the prompt cut to 77 tokens.

    Differs from Hessel et al.: the factor is 100, as reports on text-to-image models (and torchmetrics) have it, in
    place of 2.5; the network is ViT-L/14 in place of B/32; the prompt gets no "A photo depicts" before it.
    """

    name = "clip_score"

    def __init__(
        self, weights: str | None = None, device: str | None = None, dtype: str = "float32", batch_size: int = 16
    ) -> None:
        self._files = locate(self.name, PUBLISHED, weights)
        super().__init__([self._files], device, dtype, batch_size)

    @cached_property
    def _clip(self) -> CLIP:
        weights, config, preprocessor, *tokenizer = self._files.paths
        return load_clip((weights, config), preprocessor, tokenizer, self)

    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        return 100 * cosines(self, self._clip, images, prompts).clamp_min(0)
