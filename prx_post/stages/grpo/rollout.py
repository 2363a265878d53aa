"""Rollouts as a source: the policy generates groups of images, they are scored, and several optimizer steps train on
them.

Legend: P prompts of a rollout × G images of each (a group).
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from prx_post.base.errors import PrxPostError
from prx_post.data.plan import Draw, DrawPlan, stream
from prx_post.data.source import timestep_and_noise
from prx_post.engine.protocols import Batch
from prx_post.engine.run import Run
from prx_post.engine.signals import StopRequested
from prx_post.evaluation.pixels import Look
from prx_post.model.text import pad_embeddings
from prx_post.objectives.grpo import combined_rewards, varies
from prx_post.sampling import VelocityFunction
from prx_post.stages.base import Encoded
from prx_post.stages.grpo.advantages import learnt_from
from prx_post.stages.grpo.config import GRPOConfig
from prx_post.stages.grpo.guard import Guard
from prx_post.stages.grpo.objective import guided_ask
from prx_post.stages.grpo.scoring import FEATURES, Background, Rows, Scorer, Scores, Scoring
from prx_post.stages.grpo.trajectories import Seeded, Trajectories, Transition, sample_trajectories
from prx_post.stages.grpo.windows import Window, window_of
from prx_post.stages.prompted import noise_seeds

FRESH = 9
"""Key of the random streams of timesteps and noise at which images are trained."""
NONE = -1
"""In the place of a rollout's number."""
MAX_CONSTANT = 3
"""Rollouts in a row of which no group may teach anything."""
CURRENT, AHEAD = "current/", "ahead/"
"""Before the tensors' names in a checkpoint."""
PLACES = "places"
Ask = Callable[[Tensor, Tensor, tuple[Tensor, Tensor]], Tensor]
"""(x_t, t, prompts) -> velocity of the policy that generates"""


@dataclass
class Rollout:
    """This process's images of a rollout.

    Attributes:
        number: counted from 0.
        tensors: by name, [n, ...], n images; `places`, each image's number among the P·G.
        scoring: of its images, which may still be under way; None once it is over.
    """

    number: int
    tensors: dict[str, Tensor]
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
        ask: its velocity, or that of the lagged policy where that one generates.
        sigmas: the grid, [N + 1].
        transition: of random steps; None: the ODE.
        guard: whose regularization changes what is learnt.
    """

    run: Run
    config: GRPOConfig
    rows: Rows
    data: Encoded
    policy: Any
    ask: Ask
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
        self._current = Rollout(NONE, {})
        self._ahead: Rollout | None = None
        self._constant_in_a_row = 0

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Of a rollout ahead, the images without their scores: what waits for these is the training step alone."""
        ahead = self._ahead or Rollout(NONE, {})
        info = {"rollout": self._current.number, "ahead": ahead.number, "constant_in_a_row": self._constant_in_a_row}
        tensors = {f"{CURRENT}{name}": value for name, value in self._current.tensors.items()}
        return info, tensors | {f"{AHEAD}{name}": value for name, value in ahead.tensors.items()}

    def load_state(self, info: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._constant_in_a_row = info["constant_in_a_row"]
        self._current = Rollout(info["rollout"], self._own(tensors, CURRENT))
        if info["ahead"] != NONE:
            self._ahead = Rollout(info["ahead"], self._own(tensors, AHEAD))
            self._score_again(self._ahead)

    def batches(self, step: int) -> Iterator[Batch]:
        number, within = divmod(step, self.config.steps_per_rollout)
        metrics = {} if number == self._current.number else self._next(number)
        for batch in self._trained(within, step):
            yield {**batch, "metrics": metrics}
            metrics = {}

    def _next(self, number: int) -> dict[str, Tensor]:
        """Take up rollout `number`. Returns what it was like, for the log."""
        config, ahead = self.config, self._ahead
        rollout = ahead if ahead is not None and ahead.number == number else self._generate(number)
        lag = config.steps_per_rollout if rollout is ahead and number else 0
        self._ahead = None
        has_next = (number + 1) * config.steps_per_rollout < config.max_steps
        if config.async_rewards == "rollout" and has_next:
            self._ahead = self._generate(number + 1)
        metrics = self._finish(rollout)
        self._current = rollout
        return {**metrics, "policy_lag": torch.tensor(float(lag))}

    def _groups(self) -> list[int]:
        """The numbers of this process's groups, those of an optimizer step together."""
        config, ranks = self.config, self.run.ranks
        per_step = config.prompts_per_rollout // config.steps_per_generation
        return [
            part * per_step + group
            for part in range(config.steps_per_generation)
            for group in range(ranks.rank, per_step, ranks.world)
        ]

    def _own(self, tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Of all processes' images, this one's, in its order."""
        found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if PLACES not in found:
            return {}
        at = {int(place): i for i, place in enumerate(found[PLACES])}
        size = self.config.num_generations
        mine = [at[group * size + k] for group in self._groups() for k in range(size)]
        return {name: value[mine] for name, value in found.items()}

    def _draws(self, number: int) -> list[Draw]:
        return self._plan.draws(number, range(self.config.prompts_per_rollout))

    def _seeds(self, number: int) -> list[Seeded]:
        """Of this process's images."""
        draws, size = self._draws(number), self.config.num_generations
        return [
            Seeded(own, draws[group].seed)
            for group in self._groups()
            for own in noise_seeds(draws[group].seed, self.rows[draws[group].index]["prompt"], size)
        ]

    def _generate(self, number: int) -> Rollout:
        """The images of rollout `number`, whose scores may come later.

        Raises:
            StopRequested: on all ranks, if one was asked to stop.
            PrxPostError: on all ranks, if a reward failed on one.
        """
        config, ranks, signals = self.config, self.run.ranks, self.run.signals
        seeds, window = self._seeds(number), window_of(config, number)
        most = config.rollout_batch_size or config.per_device_train_batch_size
        scoring, made, began = self._scoring(number), list[dict[str, Tensor]](), time.perf_counter()
        was_training = self.policy.training
        self.policy.eval()
        firsts = range(0, len(seeds), most)
        for first in tqdm(firsts, desc=f"rollout {number + 1}", leave=False, disable=not ranks.is_main):

            def work(part: slice = slice(first, first + most)) -> int:
                trajectories = self._trajectories(number, seeds[part], part, window)
                made.append(self._kept(trajectories))
                scoring.add(trajectories.x0)
                return signals.received

            received = max(ranks.together(work))
            if received:
                self.policy.train(was_training)
                raise StopRequested(
                    f"stopped by {signal.Signals(received).name} in a rollout; what was trained before is saved. "
                    f"Resume with resume_from_checkpoint: latest."
                ).raised_by_all(ranks.is_main)
        self.policy.train(was_training)
        size = config.num_generations
        places = torch.tensor([group * size + k for group in self._groups() for k in range(size)])
        tensors = {name: torch.cat([part[name] for part in made]) for name in made[0]} | {PLACES: places}
        seconds = time.perf_counter() - began - scoring.decode_s - scoring.waited_s
        return Rollout(number, tensors, scoring, {"rollout": seconds})

    def _trajectories(self, number: int, seeds: Sequence[Seeded], part: slice, window: Window) -> Trajectories:
        draws, size, groups = self._draws(number), self.config.num_generations, self._groups()
        chosen = [draws[groups[place // size]].index for place in range(part.start, part.start + len(seeds))]
        device = self.run.device

        def velocity_of(images: Sequence[int]) -> VelocityFunction:
            batch = {k: v.to(device) for k, v in self._prompts([chosen[i] for i in images]).items()}
            return lambda x_t, t: guided_ask(self.ask, x_t, t, batch, self.config.rollout_guidance_scale)

        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.bf16):
            return sample_trajectories(
                velocity_of, seeds, self.sigmas, self.transition, window, self.latent_shape, device
            )

    def _kept(self, trajectories: Trajectories) -> dict[str, Tensor]:
        """What training needs of them, on the host: clean latents, or the trained steps, [B, K, ...]."""
        names = ["x_t", "x_next", "log_prob"] if self.config.is_policy_gradient else []
        if self.config.normalise_ratio or self.config.max_divergence is not None:
            names.append("mean")
        steps = {name: torch.stack(getattr(trajectories, name), dim=1).cpu() for name in names}
        return {"x0": trajectories.x0.cpu(), **steps}

    def _prompts(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Embeddings of the prompts of these rows, and with guidance the empty prompt's."""
        texts = [self.rows[row]["prompt"] for row in rows]
        embeds, mask = pad_embeddings([self.data.embed(text).cpu() for text in texts], self.pad_length)
        batch = {"prompt_embeds": embeds, "prompt_mask": mask}
        if self.config.rollout_guidance_scale > 1:
            null, null_mask = pad_embeddings([self.data.embed("").cpu()] * len(rows), self.pad_length)
            batch |= {"null_embeds": null, "null_mask": null_mask}
        return batch

    def _scoring(self, number: int) -> Scoring:
        config, draws = self.config, self._draws(number)
        return Scoring(
            scorer=self.scorer,
            decode=self.data.decode,
            rows=[self.rows[draws[group].index] for group in self._groups()],
            group_size=config.num_generations,
            batch_size=config.per_device_train_batch_size,
            background=self._background,
            timeout_s=config.reward_timeout_s,
            waits=config.async_rewards == "off",
        )

    def _score_again(self, rollout: Rollout) -> None:
        """A rollout ahead that was resumed: its scores were not saved."""
        rollout.scoring = self._scoring(rollout.number)
        rollout.scoring.add(rollout.tensors["x0"])

    def _finish(self, rollout: Rollout) -> dict[str, Tensor]:
        """Wait for the scores of all groups, and work out what they teach. Returns metrics.

        Raises:
            PrxPostError: on all ranks, if a reward failed or is late on one, or no group has had any variance for long.
        """
        config, began = self.config, time.perf_counter()

        scoring = rollout.scoring
        assert scoring is not None

        def collect() -> dict[int, Scores]:
            return dict(zip(self._groups(), scoring.results(), strict=True))

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
        taught = learnt_from(config, self.guard, combined_PG, scores, self.scorer.weights, features)
        places = rollout.tensors[PLACES]
        rollout.tensors |= {name: value.flatten()[places] for name, value in taught.items()}
        return self._metrics(rollout, scores, combined_PG, scoring.looks)

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
        self, rollout: Rollout, scores: Scores, combined_PG: Tensor, looks: Sequence[Look]
    ) -> dict[str, Tensor]:
        own = rollout.tensors["x0"].unflatten(0, (-1, self.config.num_generations))
        return {
            **{f"reward/{name}": value.mean() for name, value in scores.items()},
            **{f"reward_std/{name}": value.std(1).mean() for name, value in scores.items()},
            "zero_std_ratio": 1 - varies(combined_PG).float().mean(),
            "rollout/latent_std": own.float().std(1).mean(),
            "rollout/edge_energy": torch.tensor([look.edge_energy for look in looks]).mean(),
            "rollout/entropy": torch.tensor([look.entropy for look in looks]).mean(),
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
        config, tensors, draws = self.config, rollout.tensors, self._draws(rollout.number)
        groups = [int(place) // config.num_generations for place in tensors[PLACES][images]]
        seeds = self._seeds(rollout.number)[images]
        chosen = [draws[group].index for group in groups]
        batch: Batch = {
            **self._prompts(chosen),
            **{name: tensors[name][images] for name in ("advantages", "weight", "kl_weight") if name in tensors},
            "seeds": [seeded.own for seeded in seeds],
            "rows": chosen,
        }
        if config.is_policy_gradient:
            step = window_of(config, rollout.number).trained[row]
            names = [name for name in ("x_t", "x_next", "log_prob", "mean") if name in tensors]
            batch |= {name: tensors[name][images, row] for name in names}
            return batch | {
                "sigma": self.sigmas[step].expand(len(seeds)),
                "sigma_next": self.sigmas[step + 1].expand(len(seeds)),
            }
        shared = config.method == "dgpo"
        drawn = [
            timestep_and_noise(
                stream(s.group if shared else s.own, FRESH, iteration, row),
                self.latent_shape,
                rollout.number,
                **config.timestep_density,
            )
            for s in seeds
        ]
        return batch | {
            "latents": tensors["x0"][images],
            **{name: torch.stack([one[name] for one in drawn]) for name in ("t", "noise")},
        }
