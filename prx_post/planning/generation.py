"""What a stage that generates its own training images costs between two rollouts: network evaluations, and their
time."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from prx_post.model.denoiser import predict_velocity
from prx_post.planning.planner import Planner
from prx_post.stages.registry import RolloutWork

REPEATS = 3


@dataclass(frozen=True)
class Timing:
    """Seconds of one process, for a batch of `batch_size` latents on `device`."""

    device: str
    batch_size: int
    forward: float
    forward_and_backward: float

    def of(self, work: RolloutWork, num_processes: int) -> float:
        """Seconds from one rollout to the next, without decoding and scoring, when each process does its part."""
        forward, both = self.forward / self.batch_size, self.forward_and_backward / self.batch_size
        total = (work.generated + work.frozen) * forward + work.trained * both
        return total / num_processes


def measure(planner: Planner) -> Timing:
    """The median of a few forward and backward passes of the real network, of random weights, at the training batch."""
    from diffusers import PRXTransformer2DModel

    device, config = torch.device(planner.device), planner.config
    pipeline, size = planner.stage.pipeline, config.per_device_train_batch_size
    network: Any = PRXTransformer2DModel.from_config(pipeline.configs["transformer"]).to(device).train()
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    x_t = torch.randn(size, *pipeline.latent_shape(*planner.largest_size), device=device)
    t, tokens = torch.full((size,), 0.5, device=device), pipeline.max_prompt_tokens
    embeds = torch.randn(size, tokens, pipeline.configs["transformer"]["context_in_dim"], device=device)
    mask = torch.ones(size, tokens, dtype=torch.bool, device=device)

    def seconds(train: bool) -> float:
        began = time.perf_counter()
        with (
            torch.set_grad_enabled(train),
            torch.autocast(device.type, torch.bfloat16, enabled=config.bf16),
        ):
            output = predict_velocity(network, x_t, t, embeds, mask)
        if train:
            output.float().square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    forward, both = (statistics.median([seconds(train) for _ in range(REPEATS + 1)][1:]) for train in (False, True))
    return Timing(device.type, size, forward, both)


def lines(work: RolloutWork, timing: Timing | None, num_processes: int) -> list[str]:
    """The section of the plan."""
    found = [
        "rollout",
        f"  images       {work.images:>9,}   {work.described}",
        f"  generated    {work.generated:>9,}   network evaluations",
        f"  trained      {work.trained:>9,}   forward and backward passes",
        f"  frozen       {work.frozen:>9,}   forward passes of frozen networks",
    ]
    if timing is None:
        return [*found, "  time           unknown   set measure: true to time the network here", ""]
    passes = f"{timing.forward:.3g} s forward, {timing.forward_and_backward:.3g} s with backward"
    return [
        *found,
        f"  time       {timing.of(work, num_processes):>9.3g} s on {num_processes} process(es), without decoding and "
        f"scoring",
        f"  measured on this {timing.device}, {timing.batch_size} images: {passes}",
        "",
    ]
