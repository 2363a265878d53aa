"""LAION's improved aesthetic predictor (Schuhmann 2022): how people rate an image, 1 to 10, whatever the prompt."""

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor, nn

from prx_post.rewards.scorers.clip import CLIP, PREPROCESSOR, load_clip
from prx_post.rewards.scorers.clip_score import VIT_L_14
from prx_post.rewards.scorers.linear_head import linear_head
from prx_post.rewards.scorers.network import NetworkReward
from prx_post.rewards.scorers.pixels import Images
from prx_post.rewards.scorers.weights import MODEL, Published, locate, locate_companion, read_tensors

PUBLISHED = Published(
    "trl-lib/ddpo-aesthetic-predictor", (("aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth"),)
)
"""A copy on the Hub of the original, which has the second name and is published on GitHub alone."""
CLIP_FILES = Published(VIT_L_14, (MODEL, ("config.json",), *PREPROCESSOR))


class Aesthetic(NetworkReward):
    """Five linear layers on the unit embedding of OpenAI's CLIP ViT-L/14."""

    name = "aesthetic"
    uses_prompts = False

    def __init__(
        self, weights: str | None = None, device: str | None = None, dtype: str = "float32", batch_size: int = 16
    ) -> None:
        self._files = locate(self.name, PUBLISHED, weights)
        self._clip_files = locate_companion(self.name, CLIP_FILES, weights)
        super().__init__([self._files, self._clip_files], device, dtype, batch_size)

    @cached_property
    def _network(self) -> tuple[CLIP, nn.Module]:
        path = self._files.paths[0]
        *clip_files, preprocessor = self._clip_files.paths
        clip = load_clip(clip_files, preprocessor, [], self)
        return clip, linear_head(read_tensors(path), clip.width, path).to(self.device)

    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        clip, head = self._network
        return head(self.in_batches(clip.embed_images, images)).squeeze(-1)
