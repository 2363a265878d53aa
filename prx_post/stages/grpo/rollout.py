"""Rollouts as a source: the policy generates groups of images, they are scored, and several optimizer steps train on
them.

Legend: P prompts of a rollout × G images of each (a group).
"""

import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prx_post.base.errors import PrxPostError
from prx_post.base.progress import Progress
from prx_post.data.plan import Draw, DrawPlan, stream
from prx_post.data.source import timestep_and_noise
from prx_post.engine.protocols import Batch
from prx_post.engine.run import Run
from prx_post.engine.signals import StopRequested
from prx_post.model.denoiser import PromptedVelocity
from prx_post.model.text import pad_embeddings
from prx_post.objectives.grpo import combined_rewards, varies
from prx_post.sampling import VelocityFunction
from prx_post.stages.base import Encoded
from prx_post.stages.grpo.advantages import compute_advantages
from prx_post.stages.grpo.config import GRPOConfig
from prx_post.stages.grpo.guard import Guard
from prx_post.stages.grpo.objective import batch_velocity
from prx_post.stages.grpo.scoring import Background, Rows, Scorer, Scores, Scoring
from prx_post.stages.grpo.settings import FEATURES
from prx_post.stages.grpo.windows import Window, window_of
from prx_post.stages.prompted import noise_seeds
from prx_post.stages.trajectories import Seeded, Trajectories, Transition, sample_trajectories

FRESH = 9
"""Key of the random streams of timesteps and noise at which images are trained."""
NONE = -1
"""In the place of a rollout's number."""
MAX_CONSTANT = 3
"""Rollouts in a row of which no group may teach anything."""
CURRENT, AHEAD = "current/", "ahead/"
"""Before the tensors' names in a checkpoint."""
PLACES = "places"


@dataclass
class Rollout:
    """This process's images of a rollout, group by group.

    Attributes:
        number: counted from 0.
        groups: the numbers of its groups, of 0..P-1.
        prompts: each image's row of the prompts file.
        seeds: each image's.
        tensors: by name, [n, ...], n images; `places`, each image's number among the P·G.
        scoring: of its images, which may still be under way; None once it is over.
    """

    number: int
    groups: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    seeds: list[Seeded] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    scoring: Scoring | None = None
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Rollouts:
    """A source whose batches are made of the policy's own images.

    Which prompts a rollout has, and all noise, are functions of the seed, the rollout and the prompt, and a group is
    whole in one process; so any number of processes makes the same rollouts. A checkpoint holds what is trained on.

    Args:
        rows: of the prompts file; data.samples are in their order.
        policy: in training; put into evaluation mode while it generates.
        velocity: its velocity, or that of the lagged policy where that one generates.
        sigmas: the grid, [N + 1].
        transition: of random steps; None: the ODE.
        guard: whose regularization changes what is learnt.
    """

    run: Run
    config: GRPOConfig
    rows: Rows
    data: Encoded
    policy: Any
    velocity: PromptedVelocity
    latent_shape: tuple[int, int, int]
    sigmas: Tensor
    transition: Transition | None
    scorer: Scorer
    guard: Guard
    pad_length: int
    online = True

    def __post_init__(self) -> None:
        config = self.config
        count = math.ceil(config.max_steps / config.steps_per_rollout) + 1
        self._plan = DrawPlan(["all"] * len(self.rows), config.prompts_per_rollout, config.seed, count)
        self._background = Background()
        self._current = Rollout(NONE)
        self._ahead: Rollout | None = None
        self._constant_in_a_row = 0
        self._is_spent = False
        self._embeddings: dict[str, Tensor] = {}  # of the prompts of the rollouts at hand, which are asked for often

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A rollout that all its steps have trained on is left out. Of a rollout ahead there are the images without
        their
        scores: what waits for these is the training step alone.
        """
        ahead = self._ahead or Rollout(NONE)
        current = Rollout(NONE) if self._is_spent else self._current
        info = {
            "rollout": current.number,
            "ahead": ahead.number,
            "constant_in_a_row": self._constant_in_a_row,
            "made_with": [self._made_with(rollout.number) for rollout in (current, ahead)],
        }
        tensors = {f"{CURRENT}{name}": value for name, value in current.tensors.items()}
        return info, tensors | {f"{AHEAD}{name}": value for name, value in ahead.tensors.items()}

    def load_state(self, info: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Raises PrxPostError if what was generated was generated with other settings."""
        self._constant_in_a_row = info["constant_in_a_row"]
        if info["made_with"] != [self._made_with(info[name]) for name in ("rollout", "ahead")]:
            raise PrxPostError(
                "the checkpoint's rollout was generated with another grid, window, noise level or trust region "
                "(num_inference_steps, shift_terminal, window_rollouts, noise_level, normalise_ratio, max_divergence). "
                "Set them back, or start a new run from the emitted pipeline."
            )
        self._current = self._loaded(info["rollout"], tensors, CURRENT)
        if info["ahead"] != NONE:
            self._ahead = self._loaded(info["ahead"], tensors, AHEAD)
            self._ahead.scoring = self._scoring(self._ahead)
            self._ahead.scoring.add(self._ahead.tensors["x0"])  # scores that were under way were not saved

    def batches(self, step: int) -> Iterator[Batch]:
        number, within = divmod(step, self.config.steps_per_rollout)
        metrics = {} if number == self._current.number else self._next(number)
        self._is_spent = within == self.config.steps_per_rollout - 1
        for batch in self._trained(within, step):
            yield {**batch, "metrics": metrics}
            metrics = {}

    def _next(self, number: int) -> dict[str, Tensor]:
        """Take up rollout `number`. Returns what it was like, for the log."""
        config, ahead = self.config, self._ahead
        rollout = ahead if ahead is not None and ahead.number == number else self._generate(number)
        lag = config.steps_per_rollout if rollout is ahead and number else 0
        self._ahead, self._embeddings = None, {}
        has_next = (number + 1) * config.steps_per_rollout < config.max_steps
        if config.async_rewards == "rollout" and has_next:
            self._ahead = self._generate(number + 1)
        metrics = self._finish(rollout)
        self._current = rollout
        return {**metrics, "policy_lag": torch.tensor(float(lag))}

    def _planned(self, number: int) -> Rollout:
        """Rollout `number` before anything is generated."""
        config, ranks = self.config, self.run.ranks
        draws, size = self._plan.draws(number, range(config.prompts_per_rollout)), config.num_generations
        per_step = config.prompts_per_rollout // config.steps_per_generation
        groups = [  # those of an optimizer step together
            part * per_step + group
            for part in range(config.steps_per_generation)
            for group in range(ranks.rank, per_step, ranks.world)
        ]
        prompts = [draws[group].index for group in groups for _ in range(size)]
        seeds = [
            Seeded(own, draws[group].seed)
            for group in groups
            for own in noise_seeds(draws[group].seed, self.rows[draws[group].index]["prompt"], size)
        ]
        places = torch.tensor([group * size + k for group in groups for k in range(size)])
        return Rollout(number, groups, prompts, seeds, {PLACES: places})

    def _made_with(self, number: int) -> list[Any]:
        """What the tensors of a rollout mean nothing without."""
        if number == NONE:
            return []
        window, names = window_of(self.config, number), self._kept_names()
        return [self.sigmas.tolist(), list(window.random), list(window.trained), self.config.sampler_noise, names]

    def _loaded(self, number: int, tensors: dict[str, Tensor], prefix: str) -> Rollout:
        """A rollout of a checkpoint: of all processes' images, this one's."""
        if number == NONE:
            return Rollout(NONE)
        rollout = self._planned(number)
        found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        at = {int(place): i for i, place in enumerate(found[PLACES])}
        mine = [at[int(place)] for place in rollout.tensors[PLACES]]
        rollout.tensors = {name: value[mine] for name, value in found.items()}
        return rollout

    def _generate(self, number: int) -> Rollout:
        """The images of rollout `number`, whose scores may come later.

        Raises:
            StopRequested: on all ranks, if one was asked to stop.
            PrxPostError: on all ranks, if a reward failed on one.
        """
        config, ranks, signals = self.config, self.run.ranks, self.run.signals
        rollout, window = self._planned(number), window_of(config, number)
        most = config.rollout_batch_size or config.per_device_train_batch_size
        rollout.scoring = scoring = self._scoring(rollout)
        made, began = list[dict[str, Tensor]](), time.perf_counter()
        self.policy.eval()
        firsts = range(0, len(rollout.seeds), most)
        for first in Progress(firsts, desc=f"rollout {number + 1}", leave=False, disable=ranks.hides_progress):

            def work(part: slice = slice(first, first + most)) -> int:
                trajectories = self._trajectories(rollout, part, window)
                made.append(self._kept(trajectories))
                scoring.add(trajectories.x0)
                return signals.received

            received = max(ranks.together(work))
            if received:
                raise StopRequested(
                    f"stopped by {signal.Signals(received).name} in a rollout; what was trained before is saved. "
                    f"Resume with resume_from_checkpoint: latest."
                ).raised_by_all(ranks.is_main)
        self.policy.train()
        rollout.tensors |= {name: torch.cat([part[name] for part in made]) for name in made[0]}
        rollout.seconds["rollout"] = time.perf_counter() - began - scoring.decode_s - scoring.waited_s
        return rollout

    def _trajectories(self, rollout: Rollout, part: slice, window: Window) -> Trajectories:
        chosen, device = rollout.prompts[part], self.run.device

        def velocity_of(images: Sequence[int]) -> VelocityFunction:
            scale = self.config.rollout_guidance_scale
            batch = self._prompts([chosen[i] for i in images], has_null=scale > 1)
            batch = {name: value.to(device) for name, value in batch.items()}
            return lambda x_t, t: batch_velocity(self.velocity, x_t, t, batch, scale)

        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.bf16):
            return sample_trajectories(
                velocity_of, rollout.seeds[part], self.sigmas, self.transition, window, self.latent_shape, device
            )

    def _kept(self, trajectories: Trajectories) -> dict[str, Tensor]:
        """What training needs of them, on the host: clean latents, or the trained steps, [B, K, ...]."""
        steps = {name: torch.stack(getattr(trajectories, name), dim=1).cpu() for name in self._kept_names()}
        last = {"x_last": trajectories.x_last.cpu()} if self.config.climbs_last_step else {}
        return {"x0": trajectories.x0.cpu(), **last, **steps}

    def _kept_names(self) -> list[str]:
        if not self.config.is_policy_gradient:
            return []
        has_mean = self.config.normalise_ratio or self.config.max_divergence is not None
        return ["x_t", "x_next", "log_prob", *(["mean"] if has_mean else [])]

    def _prompts(self, rows: Sequence[int], has_null: bool) -> dict[str, Tensor]:
        """Embeddings of the prompts of these rows, and if that is asked for the empty prompt's."""
        embeds, mask = pad_embeddings([self._embed(self.rows[row]["prompt"]) for row in rows], self.pad_length)
        batch = {"prompt_embeds": embeds, "prompt_mask": mask}
        if has_null:
            null, null_mask = pad_embeddings([self._embed("")] * len(rows), self.pad_length)
            batch |= {"null_embeds": null, "null_mask": null_mask}
        return batch

    def _embed(self, prompt: str) -> Tensor:
        if prompt not in self._embeddings:
            self._embeddings[prompt] = self.data.embed(prompt).cpu()
        return self._embeddings[prompt]

    def _scoring(self, rollout: Rollout) -> Scoring:
        config = self.config
        return Scoring(
            scorer=self.scorer,
            decode=self.data.decode,
            rows=[self.rows[prompt] for prompt in rollout.prompts[:: config.num_generations]],
            group_size=config.num_generations,
            batch_size=config.per_device_train_batch_size,
            background=self._background,
            timeout_s=config.reward_timeout_s,
            waits=config.async_rewards == "off",
        )

    def _finish(self, rollout: Rollout) -> dict[str, Tensor]:
        """Wait for the scores of all groups, and work out what they teach. Returns metrics.

        Raises:
            PrxPostError: on all ranks, if a reward failed or is late on one, or no group has had any variance for long.
        """
        config, scoring, began = self.config, rollout.scoring, time.perf_counter()
        assert scoring is not None

        def collect() -> dict[int, Scores]:
            return dict(zip(rollout.groups, scoring.results(), strict=True))

        by_group: dict[int, Scores] = {}
        for part in self.run.ranks.together(collect):
            by_group |= part
        names = list(by_group[0])
        scores = {name: torch.stack([by_group[g][name] for g in range(config.prompts_per_rollout)]) for name in names}
        features = scores.pop(FEATURES, None)
        waited = time.perf_counter() - began + scoring.waited_s
        rollout.seconds |= {"decode": scoring.decode_s, "scoring": scoring.score_s, "scoring_wait": waited}
        rollout.scoring = None
        optimised = {name: scores[name] for name in self.scorer.weights}
        combined_PG = combined_rewards(optimised, self.scorer.weights)
        self._check_variance(rollout.number, combined_PG)
        targets = compute_advantages(config, self.guard, combined_PG, scores, self.scorer.weights, features)
        places = rollout.tensors[PLACES]
        rollout.tensors |= {name: value.flatten()[places] for name, value in targets.items()}
        return self._metrics(rollout, scores, combined_PG, scoring.statistics)

    def _check_variance(self, number: int, rewards_PG: Tensor) -> None:
        if varies(rewards_PG).any():
            self._constant_in_a_row = 0
            return
        self._constant_in_a_row += 1
        if number == 0 or self._constant_in_a_row >= MAX_CONSTANT:
            raise PrxPostError(
                f"in rollout {number + 1} no group has images that score differently by "
                f"{', '.join(self.scorer.weights)}, so there is nothing to learn from any of its "
                f"{len(rewards_PG)} prompts; the first group's score is {rewards_PG[0, 0].item():.4g}. Choose a graded "
                f"reward, or raise num_generations or prompts_per_rollout."
            ).raised_by_all(self.run.ranks.is_main)

    def _metrics(
        self, rollout: Rollout, scores: Scores, combined_PG: Tensor, statistics: dict[str, list[float]]
    ) -> dict[str, Tensor]:
        own = rollout.tensors["x0"].unflatten(0, (-1, self.config.num_generations))
        return {
            **{f"reward/{name}": value.mean() for name, value in scores.items()},
            **{f"reward_std/{name}": value.std(1).mean() for name, value in scores.items()},
            "zero_std_ratio": 1 - varies(combined_PG).float().mean(),
            "rollout/latent_std": own.float().std(1).mean(),
            **{f"rollout/{name}": torch.tensor(values).mean() for name, values in statistics.items()},
            **{f"seconds/{name}": torch.tensor(value) for name, value in rollout.seconds.items()},
        }

    def _trained(self, within: int, step: int) -> Iterator[Batch]:
        """The micro-batches of an optimizer step of the current rollout."""
        config, rollout = self.config, self._current
        iteration, part = divmod(within, config.steps_per_generation)
        count = len(rollout.tensors[PLACES]) // config.steps_per_generation
        size = config.per_device_train_batch_size
        for first in range(part * count, (part + 1) * count, size):
            images = slice(first, first + size)
            for row in range(config.rows_per_image):
                yield self._batch(rollout, images, row, iteration) | {"step": step}

    def _batch(self, rollout: Rollout, images: slice, row: int, iteration: int) -> Batch:
        """Row `row` of each of some images: a step of its trajectory, or a noise that it is trained at."""
        config, tensors, seeds, chosen = self.config, rollout.tensors, rollout.seeds[images], rollout.prompts[images]
        batch: Batch = {
            **self._prompts(chosen, config.has_null_prompts),
            **{name: tensors[name][images] for name in ("advantages", "weight", "kl_weight") if name in tensors},
            "seeds": [seeded.own for seeded in seeds],
            "rows": chosen,
        }
        if config.is_policy_gradient and row == config.trained_steps:
            texts = [self.rows[prompt]["prompt"] for prompt in chosen]
            last = self.sigmas[-2].expand(len(seeds))
            return batch | {"x_last": tensors["x_last"][images], "sigma": last, "prompts": texts}
        if config.is_policy_gradient:
            step = window_of(config, rollout.number).trained[row]
            batch |= {name: tensors[name][images, row] for name in self._kept_names()}
            return batch | {
                "sigma": self.sigmas[step].expand(len(seeds)),
                "sigma_next": self.sigmas[step + 1].expand(len(seeds)),
            }
        shared = config.method == "dgpo"
        drawn = [
            timestep_and_noise(
                Draw(prompt, stream(s.group if shared else s.own, FRESH, iteration, row)),
                self.latent_shape,
                rollout.number,
                **config.timestep_density,
            )
            for prompt, s in zip(chosen, seeds, strict=True)
        ]
        return batch | {
            "latents": tensors["x0"][images],
            **{name: torch.stack([one[name] for one in drawn]) for name in ("t", "noise")},
        }
