"""Pairs that the policy makes while it is trained: of its own images of some prompts, ranked and paired in rounds.

A round of one step is online DPO. Longer rounds, each of which takes the policy at its start as the reference, are
iterated DPO.
"""

import itertools
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prx_post.base.errors import PrxPostError
from prx_post.base.progress import Progress
from prx_post.data.buckets import Size
from prx_post.data.pairs import Pair, PairSource
from prx_post.data.plan import Draw, DrawPlan, stream
from prx_post.data.scan import Sample
from prx_post.engine.protocols import Batch
from prx_post.engine.run import Run
from prx_post.engine.signals import StopRequested
from prx_post.model.codec import to_images
from prx_post.model.sampler import Sampler
from prx_post.stages.base import Encoded
from prx_post.stages.dpo.config import DPOConfig
from prx_post.stages.dpo.ranking import Ranker, couples
from prx_post.stages.dpo.steps import StepSampler
from prx_post.stages.prompted import noise_seeds

ROUND = 7
"""Key of the rounds' random streams."""
NONE = -1
"""In the place of a round's number."""


@dataclass(frozen=True)
class Made:
    """A pair that the policy made.

    Attributes:
        prompt: its place among the prompts.
        images: places of the better and the worse image among the images that are kept.
        seeds: of the noise that both were generated from.
        scores: of both.
    """

    prompt: int
    images: tuple[int, int]
    seeds: tuple[int, int]
    scores: tuple[float, float]


@dataclass
class Group:
    """What came of one prompt: all images' scores, the pairs, and of the images in them the latents [N, C, H, W], or
    the states of their trajectories [N, T, C, H, W].
    """

    scores: list[float]
    pairs: list[Made]
    latents: Tensor


@dataclass
class OnlinePairs:
    """A source of pairs that are made anew every `steps_per_round` steps.

    Which prompts a round has, and the noise of their images, are functions of the seed, the round and the prompt, so
    any number of processes makes the same pairs. A checkpoint holds the round's pairs.

    Args:
        prompts: of which each round takes `prompts_per_round`, all of them before any comes again.
        sampler: generates with `policy`, in training.
        source_of: makes the source of a round: from its pairs, their latents by key, and a seed.
        steps: generates in the place of `sampler`, where the states of trajectories are what is kept.
    """

    run: Run
    config: DPOConfig
    size: Size
    prompts: Sequence[Sample]
    policy: Any
    sampler: Sampler
    images: Encoded
    ranker: Ranker
    source_of: Callable[[list[Pair], dict[str, Tensor], int], PairSource]
    steps: StepSampler | None = None
    online = True

    def __post_init__(self) -> None:
        config = self.config
        rounds = math.ceil(config.max_steps / config.steps_per_round)
        self._plan = DrawPlan(["all"] * len(self.prompts), config.prompts_per_round, config.seed, rounds)
        self._take_up(NONE, [], torch.empty(0, *self.sampler.latent_shape))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Latents, or states, of the images in the round's pairs; the main process has them all."""
        pairs = [[made.prompt, *made.images, *made.seeds, *made.scores] for made in self._pairs]
        return {"round": self._round, "pairs": pairs}, {
            "latents": self._latents if self.run.ranks.is_main else self._latents[:0]
        }

    def load_state(self, info: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        pairs = [Made(prompt, (i, j), (a, b), (x, y)) for prompt, i, j, a, b, x, y in info["pairs"]]
        self._take_up(info["round"], pairs, tensors["latents"])

    def batches(self, step: int) -> Iterator[Batch]:
        number, within = divmod(step, self.config.steps_per_round)
        metrics = {} if number == self._round else self._make(number)
        for batch in self._source.batches(within):
            yield {**batch, "step": step, "metrics": metrics}
            metrics = {}

    def _take_up(self, number: int, pairs: list[Made], latents: Tensor) -> None:
        self._round, self._pairs, self._latents = number, pairs, latents
        if not pairs:
            return
        described = []
        for row, made in enumerate(pairs):
            prompt = self.prompts[made.prompt]
            better, worse = (
                Sample(2 * row + side, prompt.prompt, self.size, f"{number}-{image}", prompt.prompt_key)
                for side, image in enumerate(made.images)
            )
            described.append(Pair(better, worse, made.seeds, made.scores[0] - made.scores[1]))
        by_key = {f"{number}-{image}": one for image, one in enumerate(latents)}
        self._source = self.source_of(described, by_key, stream(self.config.seed, ROUND, number))

    def _make(self, number: int) -> dict[str, Tensor]:
        """A round's pairs, each rank its part of the prompts. Returns what they were like, for the log.

        Raises:
            StopRequested: on all ranks, if one was asked to stop.
            PrxPostError: the reward failed, or no image of a prompt is better than another.
        """
        config, ranks, signals = self.config, self.run.ranks, self.run.signals
        draws = self._plan.draws(number, range(config.prompts_per_round))
        per_batch = max(1, config.rollout_batch_size // config.num_generations)
        batches = [draws[i : i + per_batch] for i in range(0, len(draws), per_batch)]
        groups: list[Group] = []
        self.policy.eval()
        firsts = range(0, len(batches), ranks.world)
        for first in Progress(firsts, desc=f"pairs of round {number + 1}", leave=False, disable=ranks.hides_progress):

            def work(mine: int = first + ranks.rank) -> tuple[list[Group], int]:
                return self._groups(batches[mine]) if mine < len(batches) else [], signals.received

            results = ranks.together(work)
            received = max(number for _, number in results)
            if received:
                raise StopRequested(
                    f"stopped by {signal.Signals(received).name} while pairs were made; what was trained before is "
                    f"saved. Resume with resume_from_checkpoint: latest."
                ).raised_by_all(ranks.is_main)
            groups += [group for found, _ in results for group in found]
        self.policy.train()
        if config.steps_per_round > 1:
            self.images.free()  # what decoded them is not needed for a while
        return self._take_up_made(number, groups)

    def _groups(self, draws: Sequence[Draw]) -> list[Group]:
        """Images of some prompts, generated at a time, scored and paired."""
        config, size = self.config, self.config.num_generations
        prompts = [self.prompts[draw.index] for draw in draws]
        seeds_PG = [noise_seeds(draw.seed, prompt.prompt, size) for draw, prompt in zip(draws, prompts, strict=True)]
        latents, kept = self._images_of([p for p in prompts for _ in range(size)], list(itertools.chain(*seeds_PG)))
        few = config.per_device_train_batch_size  # what training has memory for
        images = [image for part in latents.split(few) for image in to_images(self.images.decode(part))]
        images_PG = [images[i : i + size] for i in range(0, len(images), size)]
        scores_PG = self.ranker.scores([prompt.prompt for prompt in prompts], images_PG).tolist()
        groups = []
        for draw, seeds, scores, own in zip(draws, seeds_PG, scores_PG, kept.cpu().split(size), strict=True):
            found = couples(scores, config.pairs_per_prompt, config.min_gap)
            paired = sorted({image for couple in found for image in couple})
            pairs = [
                Made(draw.index, (paired.index(a), paired.index(b)), (seeds[a], seeds[b]), (scores[a], scores[b]))
                for a, b in found
            ]
            groups.append(Group(scores, pairs, own[paired]))
        return groups

    def _images_of(self, prompts: Sequence[Sample], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Clean latents, and what of the images is kept: these, or the states of their trajectories. fp32."""
        most = self.config.rollout_batch_size
        embeddings = [self.images.embed(prompt.prompt) for prompt in prompts]
        parts = [(embeddings[i : i + most], seeds[i : i + most]) for i in range(0, len(prompts), most)]
        if self.steps is not None:
            made = [self.steps.states(*part) for part in parts]
            return torch.cat([x0 for x0, _ in made]), torch.cat([states for _, states in made])
        null = self.images.embed("")
        latents = torch.cat([self.sampler.latents(given, null, own) for given, own in parts]).float()
        return latents, latents

    def _take_up_made(self, number: int, groups: Sequence[Group]) -> dict[str, Tensor]:
        pairs, kept = list[Made](), 0
        for group in groups:
            pairs += [replace(made, images=(made.images[0] + kept, made.images[1] + kept)) for made in group.pairs]
            kept += len(group.latents)
        scores = torch.tensor([group.scores for group in groups])
        if not pairs:
            alike = int((scores.amax(1) == scores.amin(1)).sum())
            raise PrxPostError(
                f"no two images of a prompt differ by more than min_gap ({self.config.min_gap:g}) in round "
                f"{number + 1}; of {len(groups)} prompts, the images of {alike} all score alike. Lower min_gap, raise "
                f"prompts_per_round or num_generations, or choose another reward."
            ).raised_by_all(self.run.ranks.is_main)
        self._take_up(number, pairs, torch.cat([group.latents for group in groups]))
        gaps = torch.tensor([made.scores[0] - made.scores[1] for made in pairs])
        return {
            "rollout_score": scores.mean(),
            "rollout_gap": gaps.mean(),
            "rollout_pairs": torch.tensor(len(pairs) / len(groups)),
        }
