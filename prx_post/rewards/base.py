"""What a reward is, how one is found by name, and how several make one."""

import importlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from prx_post.config import ConfigError, PrxPostError, require, require_one_of


class Reward(Protocol):
    """Scores pictures against their prompts.

    Making one checks what it needs (libraries, weight files) and loads nothing; a model loads at the first call.
    """

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores [B] fp32 on the CPU, higher is better, of `images[i]` for `prompts[i]`; independent of each other."""

    def check(self, prompts: Sequence[str]) -> None:
        """Raise PrxPostError for a prompt that cannot be scored. Called before any picture is made."""

    @property
    def identity(self) -> str:
        """What a score depends on besides picture and prompt (weights, version, precision); the cache's key."""


@dataclass(frozen=True)
class Entry:
    """Where a reward's factory is; its module loads when the reward is asked for."""

    module: str
    factory: str
    has_weights: bool = False
    """Whether the factory takes `weights`, `device`, `dtype` and `batch_size`."""


REGISTRY = {
    "ocr": Entry("prx_post.rewards.ocr", "similarity"),
    "ocr_exact": Entry("prx_post.rewards.ocr", "exact_match"),
    "ocr_graded": Entry("prx_post.rewards.ocr", "graded"),
    "judge_exact": Entry("prx_post.rewards.number_judge", "exact_match"),
    "judge_graded": Entry("prx_post.rewards.number_judge", "graded"),
    "jpeg_compressibility": Entry("prx_post.rewards.jpeg", "JPEGCompressibility"),
    "clip_score": Entry("prx_post.rewards.clip_score", "CLIPScore", has_weights=True),
    "pickscore": Entry("prx_post.rewards.pickscore", "PickScore", has_weights=True),
    "hpsv2": Entry("prx_post.rewards.hpsv2", "HPSv2", has_weights=True),
    "image_reward": Entry("prx_post.rewards.image_reward", "ImageReward", has_weights=True),
    "aesthetic": Entry("prx_post.rewards.aesthetic", "Aesthetic", has_weights=True),
}

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

    def load(self, *, device: str | None = None, dtype: str = "float32", batch_size: int = 16) -> Reward:
        """Make the reward. See `load`."""
        if _is_url(self.target):
            return importlib.import_module("prx_post.rewards.client").connect(self.target)
        if ".py:" in self.target:
            return importlib.import_module("prx_post.rewards.function").load_function(self.target)
        entry = REGISTRY[self.target]
        factory = getattr(importlib.import_module(entry.module), entry.factory)
        if not entry.has_weights:
            return factory()
        return factory(weights=self.weights, device=device, dtype=dtype, batch_size=batch_size)


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def load(name_or_path: str, *, weights: str | None = None, **placement: Any) -> Reward:
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


def check_counts(images: Sequence[Image.Image], prompts: Sequence[str]) -> None:
    if len(images) != len(prompts):
        raise PrxPostError(f"a reward got {len(images)} pictures, but must get as many as prompts ({len(prompts)}).")


def checked(scores: Tensor, name: str, count: int) -> Tensor:
    """`scores` as fp32 on the CPU. Raises PrxPostError unless they are `count` finite numbers."""
    if scores.shape != (count,):
        shape = tuple(scores.shape)
        raise PrxPostError(f"the reward {name} gave scores of shape {shape} for {count} pictures. Mend the reward.")
    scores = scores.detach().float().cpu()
    if not torch.isfinite(scores).all():
        first = int((~torch.isfinite(scores)).nonzero()[0])
        raise PrxPostError(
            f"the reward {name} gave {scores[first].item()} for picture {first} of {count}, but must give finite "
            f"numbers. Mend the reward."
        )
    return scores


@dataclass(frozen=True)
class Statistics:
    """Of one reward's scores."""

    mean: float
    std: float
    """Population standard deviation."""
    min: float
    max: float


def statistics(scores: Tensor) -> Statistics:
    """Of scores [B]."""
    return Statistics(scores.mean().item(), scores.std(correction=0).item(), scores.min().item(), scores.max().item())


class WeightedSum:
    """Several rewards as one: the sum of weight · score."""

    def __init__(self, rewards: Mapping[str, Reward], weights: Sequence[float]) -> None:
        """Raises ConfigError if weights and rewards differ in number, or a weight is not finite."""
        count = len(rewards)
        reason, action = "each reward has one", "Give as many weights as rewards"
        require(len(weights) == count > 0, "reward_weights", list(weights), f"{count} numbers", reason, action)
        for weight in weights:
            require(math.isfinite(weight), "reward_weights", weight, "finite", "it scales a score", "Correct it")
        self._rewards, self._weights = dict(rewards), dict(zip(rewards, weights, strict=True))

    @property
    def identity(self) -> str:
        return " + ".join(f"{self._weights[name]} * ({part.identity})" for name, part in self._rewards.items())

    def check(self, prompts: Sequence[str]) -> None:
        for reward in self._rewards.values():
            reward.check(prompts)

    def parts(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Tensor]:
        """Each reward's own scores [B], by name; for statistics, and for `combine`."""
        return {name: checked(reward(images, prompts), name, len(images)) for name, reward in self._rewards.items()}

    def combine(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum [B] of what `parts` returned."""
        return torch.stack([self._weights[name] * scores for name, scores in parts.items()]).sum(0)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self.combine(self.parts(images, prompts))
