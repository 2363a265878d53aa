"""How a reward is found by name. Imports neither torch nor a scorer: a reward's module loads when it is asked for."""

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prx_post.base.errors import ConfigError
from prx_post.base.settings import require, require_one_of

if TYPE_CHECKING:
    from prx_post.rewards.reward import Reward


@dataclass(frozen=True)
class Entry:
    """Where a reward's factory is; its module loads when the reward is asked for."""

    module: str
    factory: str
    has_weights: bool = False
    """Whether the factory takes `weights`, `device`, `dtype` and `batch_size`."""


REGISTRY = {
    "ocr": Entry("prx_post.rewards.scorers.ocr", "similarity"),
    "ocr_exact": Entry("prx_post.rewards.scorers.ocr", "exact_match"),
    "ocr_graded": Entry("prx_post.rewards.scorers.ocr", "graded"),
    "ocr_probability": Entry("prx_post.rewards.scorers.ocr", "probability"),
    "judge_exact": Entry("prx_post.rewards.scorers.number_judge", "exact_match"),
    "judge_graded": Entry("prx_post.rewards.scorers.number_judge", "graded"),
    "jpeg_compressibility": Entry("prx_post.rewards.scorers.jpeg", "JPEGCompressibility"),
    "clip_score": Entry("prx_post.rewards.scorers.clip_score", "CLIPScore", has_weights=True),
    "pickscore": Entry("prx_post.rewards.scorers.pickscore", "PickScore", has_weights=True),
    "hpsv2": Entry("prx_post.rewards.scorers.hpsv2", "HPSv2", has_weights=True),
    "image_reward": Entry("prx_post.rewards.scorers.image_reward", "ImageReward", has_weights=True),
    "aesthetic": Entry("prx_post.rewards.scorers.aesthetic", "Aesthetic", has_weights=True),
}

MEANINGS = {
    "ocr": "1 - edit distance between what OCR reads and the text asked for, over its length: 1 is exact",
    "ocr_exact": "whether OCR reads exactly the text asked for",
    "ocr_graded": "log-probability that OCR gives the text asked for, per character: 0 is certain",
    "ocr_probability": "probability that OCR gives the text asked for, per character",
    "judge_exact": "whether the embedded judge reads exactly the number asked for",
    "judge_graded": "log-probability that the embedded judge gives the number asked for, per character: 0 is certain",
    "jpeg_compressibility": "minus the size as a JPEG of quality 95, kB",
    "clip_score": "100 times the cosine of image and prompt in CLIP ViT-L/14",
    "pickscore": "how people would prefer the image for the prompt, by CLIP ViT-H/14 tuned on Pick-a-Pic",
    "hpsv2": "how people would prefer the image for the prompt, by CLIP ViT-H/14 tuned on HPDv2; about 0.2 to 0.4",
    "image_reward": "how people would rate the image for the prompt, about -2 to 2",
    "aesthetic": "how people would rate the image, 1 to 10, whatever the prompt",
}
"""What their scores are."""


def meaning(text: str) -> str:
    """What a reward's scores are, by how it is written in a configuration."""
    spec = RewardSpec.parse(text)
    if spec.target in REGISTRY:
        return MEANINGS[spec.target]
    return f"what {spec.target} gives"


LEFT_OUT = {
    "mps": "its weights are published as a pickle of the whole module, which runs code of its own when it is loaded. "
    "Use pickscore or hpsv2, or serve it from a process that you trust with that and name its http:// address",
}
"""Rewards that others have and why there is none here, by name."""


@dataclass(frozen=True)
class RewardSpec:
    """A reward as it is written in a configuration.

    `hpsv2`; `hpsv2=FOLDER or FILE or Hub id` (weights from elsewhere); `path/to/module.py:function`;
    `http://host:port/name` (a reward server's); the last two also with a label before them, `taste=my.py:score`.
    """

    label: str
    """The name that results go by."""
    target: str
    """A name of REGISTRY, `module.py:function`, or a URL."""
    weights: str | None = None

    @classmethod
    def parse(cls, text: str) -> "RewardSpec":
        """Raises ConfigError for what is none of the above."""
        named = re.fullmatch(r"([A-Za-z][\w-]*)=(.+)", text)
        label, target = (named[1], named[2]) if named else (None, text)
        if _is_url(target):
            return cls(label or target.rstrip("/").rpartition("/")[2], target)
        if function := re.fullmatch(r".+\.py:([A-Za-z_]\w*)", target):
            return cls(label or function[1], target)
        name, weights = (label, target) if label else (target, None)
        if name in LEFT_OUT:
            raise ConfigError(f"rewards has {text!r}, but there is no {name} because {LEFT_OUT[name]}.")
        require_one_of("rewards", str(name), tuple(REGISTRY))
        if weights is not None and not REGISTRY[str(name)].has_weights:
            raise ConfigError(f"rewards has {text!r}, but {name} takes no weights. Write {name} alone.")
        return cls(str(name), str(name), weights)

    def load(self, *, device: str | None = None, dtype: str = "float32", batch_size: int = 16) -> "Reward":
        """Make the reward. See `load`."""
        if _is_url(self.target):
            return importlib.import_module("prx_post.rewards.service.client").connect(self.target)
        if ".py:" in self.target:
            return importlib.import_module("prx_post.rewards.function").load_function(self.target)
        entry = REGISTRY[self.target]
        factory = getattr(importlib.import_module(entry.module), entry.factory)
        if not entry.has_weights:
            return factory()
        return factory(weights=self.weights, device=device, dtype=dtype, batch_size=batch_size)


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def load(name_or_path: str, *, weights: str | None = None, **placement: Any) -> "Reward":
    """A reward by name, `module.py:function`, or URL of a reward server.

    Args:
        weights: a folder, file or Hub id in place of the published weights.
        placement: `device` (null: a GPU if there is one), `dtype` (`float32` or `bfloat16`), `batch_size`; for the
            rewards that run a model here.

    Raises:
        PrxPostError: there is none of that name, its library is not installed, or its weights are not there.
    """
    spec = RewardSpec.parse(name_or_path if weights is None else f"{name_or_path}={weights}")
    return spec.load(**placement)


def parse_specs(rewards: Sequence[str]) -> list[RewardSpec]:
    """The rewards of a configuration. Raises ConfigError if two have one label."""
    specs = [RewardSpec.parse(text) for text in rewards]
    labels = [spec.label for spec in specs]
    action = "Write label=... before one of them"
    require(len(set(labels)) == len(labels), "rewards", labels, "distinctly named", "names label results", action)
    return specs
