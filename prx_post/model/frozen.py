"""Frozen networks that answer: a teacher, or the policy as it was. Four ways to hold one, behind one interface.

    AdapterOff     no second network: the policy's own, without its adapter
    EarlierSelf    no second network: the policy's own, with its trained weights as they were
    FrozenCopy     a copy, in any precision
    SlowAverage    a copy that follows the policy

None is registered in the objective, so that no wrapper takes it for something to train or to split. Under ZeRO-3 a copy
is whole in every process, unless `Run.frozen` has split it; AdapterOff is split as the policy is.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prx_post.engine.protocols import Prompts
from prx_post.model.denoiser import guided
from prx_post.model.text import pad_embeddings


class FrozenCopy:
    """A network with its weights frozen, optionally guided.

    Args:
        null: embedding of the empty prompt, [L0, E]; needed for a guidance_scale above 1.
    """

    def __init__(self, transformer: Any, null: Tensor | None = None, guidance_scale: float = 1.0) -> None:
        self.transformer = transformer
        transformer.eval()  # DeepSpeed's engine returns nothing here
        transformer.requires_grad_(False)
        self.null, self.guidance_scale = null, guidance_scale

    @torch.no_grad()
    def velocity(self, x_t: Tensor, t: Tensor, prompts: Prompts) -> Tensor:
        """fp32, with guidance."""
        if self.guidance_scale == 1:
            return guided(self.transformer, prompts, None, 1.0)(x_t, t).float()
        assert self.null is not None
        embeds, mask = prompts
        null, null_mask = pad_embeddings([self.null.to(embeds)] * len(embeds), max(embeds.shape[1], len(self.null)))
        if null.shape[1] > embeds.shape[1]:
            missing = null.shape[1] - embeds.shape[1]
            embeds, mask = nn.functional.pad(embeds, (0, 0, 0, missing)), nn.functional.pad(mask, (0, missing))
        return guided(self.transformer, (embeds, mask), (null, null_mask), self.guidance_scale)(x_t, t).float()


class SlowAverage(FrozenCopy):
    """A copy that moves a little towards the policy when told to: weight = decay · weight + (1 - decay) · policy's."""

    @torch.no_grad()
    def follow(self, weights: Mapping[str, Tensor], decay: float) -> None:
        """`weights`: the policy's, whole, by name; decay 0 replaces the copy."""
        _move_towards(dict(self.transformer.named_parameters()), weights, 1 - decay)

    def kept(self, name: str) -> dict[str, Tensor]:
        """Its weights as `Objective.kept` has them, under `name`: unlike a plain copy they cannot be had again."""
        return {f"{name}.{key}": value for key, value in self.transformer.named_parameters()}


class AdapterOff:
    """The policy, a PeftModel, as it is without its adapter."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    @torch.no_grad()
    def velocity(self, x_t: Tensor, t: Tensor, prompts: Prompts) -> Tensor:
        """fp32."""
        was_training = self.policy.training
        self.policy.eval()
        try:
            with self.policy.disable_adapter():
                return guided(self.policy, prompts, None, 1.0)(x_t, t).float()
        finally:
            self.policy.train(was_training)


class EarlierSelf:
    """The policy as it was at an earlier step: while it answers, its trained weights are exchanged for those.

    For adapters, whose weights are few; the answer must come before the policy's own forward pass, whose backward pass
    would find weights that were changed. Not for weights that are split (ZeRO-3), which are gathered ahead of time.
    """

    def __init__(self, policy: Any, device: torch.device) -> None:
        self.policy = policy
        self._trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self._earlier = {name: p.detach().to(device, copy=True) for name, p in self._trained.items()}

    @torch.no_grad()
    def velocity(self, x_t: Tensor, t: Tensor, prompts: Prompts) -> Tensor:
        """fp32."""
        now = {name: p.detach().clone() for name, p in self._trained.items()}
        was_training = self.policy.training
        self.policy.eval()
        try:
            self._set(self._earlier)
            return guided(self.policy, prompts, None, 1.0)(x_t, t).float()
        finally:
            self._set(now)
            self.policy.train(was_training)

    @torch.no_grad()
    def follow(self, weights: Mapping[str, Tensor], decay: float) -> None:
        """As SlowAverage."""
        _move_towards(self._earlier, weights, 1 - decay)

    def kept(self, name: str) -> dict[str, Tensor]:
        """As SlowAverage."""
        return {f"{name}.{key}": value for key, value in self._earlier.items()}

    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._trained[name].copy_(value)
        torch.clear_autocast_cache()  # which holds casts of the weights as they were


def _move_towards(held: Mapping[str, Tensor], weights: Mapping[str, Tensor], fraction: float) -> None:
    for name, value in weights.items():
        held[name].lerp_(value.to(held[name]), fraction)
