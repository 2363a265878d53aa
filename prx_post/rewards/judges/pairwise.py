"""Pairwise judges: which of two images of one prompt is better, and how sure of it.

Shapes: B comparisons, P prompts, G images of each prompt (a group).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from prx_post.base.errors import PrxPostError
from prx_post.base.settings import require
from prx_post.rewards.cache import image_digest
from prx_post.rewards.reward import Reward, checked


@dataclass
class JudgeCounts:
    """What a judge has done since it was made.

    Ties, unparsable answers and the sums about places count every answer that was used, those of the cache too;
    retries, tokens and cost count what was sent.
    """

    comparisons: int = 0
    asked: int = 0
    """Answers that were not in the cache: images scored by a pointwise judge, questions put to a vision judge, which
    needs two a comparison."""
    from_cache: int = 0
    ties: int = 0
    """Answers that name no winner."""
    unparsable: int = 0
    """Answers that are none; each counts as a tie of ½, but not among `ties`."""
    first_place_wins: int = 0
    second_place_wins: int = 0
    """Answers that name the image shown first, or second. A vision judge shows every pair in both orders, so without
    position bias they are equally many; see `position_bias`."""
    contradictions: int = 0
    """Comparisons whose two orders named the same place, and so different images."""
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None
    """In the currency of the prices; None without prices."""


def position_bias(counts: JudgeCounts) -> float | None:
    """Fraction of the answers naming a winner that named the first place: ½ is fair. None if there are none.

    It has this meaning for a judge that was asked in both orders, as VisionJudge is.
    """
    named = counts.first_place_wins + counts.second_place_wins
    return counts.first_place_wins / named if named else None


class PairwiseJudge(Protocol):
    """Compares images two by two."""

    counts: JudgeCounts

    def __call__(self, prompts: Sequence[str], first: Sequence[Image.Image], second: Sequence[Image.Image]) -> Tensor:
        """Probabilities [B] in [0, 1], fp32 on the CPU, that `first[i]` beats `second[i]` for `prompts[i]`."""

    def check(self, prompts: Sequence[str]) -> None:
        """Raise PrxPostError for a prompt that cannot be judged. Called before any image is made."""

    @property
    def identity(self) -> str:
        """What an answer depends on besides the images and the prompt."""


def check_pairs(prompts: Sequence[str], first: Sequence[Image.Image], second: Sequence[Image.Image]) -> None:
    if not len(prompts) == len(first) == len(second):
        raise PrxPostError(
            f"a judge got {len(first)} first and {len(second)} second images, but must get as many of each as "
            f"prompts ({len(prompts)})."
        )


class PointwiseJudge:
    """A pointwise reward as a judge: sigmoid((score of first - score of second) / temperature), as Bradley and Terry.

    Temperature 0 compares: 1 for the higher score, ½ for equal ones. An image is scored once a call and prompt,
    however many images it is compared with.
    """

    def __init__(self, reward: Reward, temperature: float = 1.0) -> None:
        """Raises ConfigError if `temperature`, in the reward's units, is negative."""
        reason, action = "scores are divided by it", "Set 0 to compare the scores alone"
        require(temperature >= 0, "temperature", temperature, "0 or more", reason, action)
        self._reward, self._temperature = reward, temperature
        self.counts = JudgeCounts()

    @property
    def identity(self) -> str:
        return f"pointwise at {self._temperature} of {self._reward.identity}"

    def check(self, prompts: Sequence[str]) -> None:
        self._reward.check(prompts)

    def __call__(self, prompts: Sequence[str], first: Sequence[Image.Image], second: Sequence[Image.Image]) -> Tensor:
        check_pairs(prompts, first, second)
        if not prompts:
            return torch.zeros(0)
        places: dict[tuple[str, str], int] = {}
        images: list[Image.Image] = []
        texts: list[str] = []
        digests = Digests()
        index: list[int] = []
        for image, prompt in zip([*first, *second], [*prompts, *prompts], strict=True):
            key = (digests.of(image), prompt)
            if key not in places:
                places[key] = len(images)
                images.append(image)
                texts.append(prompt)
            index.append(places[key])
        scores = checked(self._reward(images, texts), "of the judge", len(images))
        difference = scores[index[: len(prompts)]] - scores[index[len(prompts) :]]
        self._count(difference, len(images))
        if self._temperature == 0:
            return (difference.sign() + 1) / 2
        return torch.sigmoid(difference / self._temperature)

    def _count(self, difference: Tensor, scored: int) -> None:
        self.counts.comparisons += len(difference)
        self.counts.asked += scored
        self.counts.ties += int((difference == 0).sum())
        self.counts.first_place_wins += int((difference > 0).sum())
        self.counts.second_place_wins += int((difference < 0).sum())


class Digests:
    """Digests of images, each computed once while this lives: an image of a group is in many comparisons."""

    def __init__(self) -> None:
        self._by_id: dict[int, tuple[Image.Image, str]] = {}  # holding the image, so that its id stays its own

    def of(self, image: Image.Image) -> str:
        if id(image) not in self._by_id:
            self._by_id[id(image)] = (image, image_digest(image))
        return self._by_id[id(image)][1]


def compare_groups(
    judge: PairwiseJudge, prompts_P: Sequence[str], images_PG: Sequence[Sequence[Image.Image]]
) -> Tensor:
    """Every two images of each group, for Pref-GRPO (Wang et al. 2025, arXiv:2508.20751).

    A group is told by its index, never by its prompt's text: two groups of one prompt stay two.

    Args:
        prompts_P: one prompt a group.
        images_PG: the groups, of equally many images, two or more.

    Returns:
        first_wins_PGG [P, G, G] fp32: [p, i, j] is the probability that image i of group p beats image j, and
        [p, j, i] is 1 minus that; the diagonal is ½. Each two are asked about once (a judge with position bias asks in
        both orders itself), all in one call.

    Raises:
        PrxPostError: groups and prompts differ in number, groups differ in size or have one image, or the judge gave
            no probabilities.
    """
    sizes = {len(group) for group in images_PG}
    if len(prompts_P) != len(images_PG) or len(sizes) != 1 or min(sizes) < 2:
        raise PrxPostError(
            f"compare_groups got {len(prompts_P)} prompts and groups of {[len(group) for group in images_PG]} "
            f"images, but must get one group a prompt, all of the same size, 2 or more."
        )
    (size,) = sizes
    couples = list(itertools.combinations(range(size), 2))
    asked = [(p, i, j) for p in range(len(prompts_P)) for i, j in couples]
    wins = checked(
        judge(
            [prompts_P[p] for p, _, _ in asked],
            [images_PG[p][i] for p, i, _ in asked],
            [images_PG[p][j] for p, _, j in asked],
        ),
        "of the judge",
        len(asked),
    )
    if ((wins < 0) | (wins > 1)).any():
        raise PrxPostError("the judge gave a number outside [0, 1], but must give probabilities. Fix the judge.")
    p, i, j = torch.tensor(asked).unbind(1)
    first_wins_PGG = torch.full((len(prompts_P), size, size), 0.5)
    first_wins_PGG[p, i, j] = wins
    first_wins_PGG[p, j, i] = 1 - wins
    return first_wins_PGG
