"""Images of one prompt, ranked by a reward or a judge, and paired: the better with the worse."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from prx_post.model.sampler import default_device
from prx_post.objectives.grpo import pairwise_win_rates
from prx_post.rewards.judges.config import VisionJudgeConfig
from prx_post.rewards.judges.pairwise import PairwiseJudge, compare_groups
from prx_post.rewards.judges.vision_judge import VisionJudge
from prx_post.rewards.registry import RewardSpec
from prx_post.rewards.reward import Reward, checked
from prx_post.stages.dpo.config import RankingConfig


@dataclass(frozen=True)
class Ranker:
    """What gives each image of a group its score: a reward, or a judge's win rates."""

    reward: Reward | None
    judge: PairwiseJudge | None

    @classmethod
    def open(cls, config: RankingConfig, judge: VisionJudgeConfig) -> "Ranker":
        """Raises PrxPostError if the reward is not installed or its weights are missing."""
        if config.reward is None:
            return cls(None, VisionJudge(judge))
        return cls(RewardSpec.parse(config.reward).load(device=str(default_device())), None)

    @property
    def identity(self) -> str:
        return self.reward.identity if self.reward is not None else self._judge.identity

    @property
    def _judge(self) -> PairwiseJudge:
        assert self.judge is not None
        return self.judge

    def check(self, prompts: Sequence[str]) -> None:
        (self.reward or self._judge).check(prompts)

    def scores(self, prompts: Sequence[str], groups: Sequence[Sequence[Image.Image]]) -> Tensor:
        """[P, G] fp32. Win rates are means over the group's other images."""
        size = len(groups[0])
        if self.reward is None:
            return pairwise_win_rates(compare_groups(self._judge, prompts, groups))
        images, repeated = list(itertools.chain(*groups)), [prompt for prompt in prompts for _ in range(size)]
        return checked(self.reward(images, repeated), "that ranks", len(images)).view(len(prompts), size)


def couples(scores: Sequence[float], pairs_per_prompt: str, min_gap: float) -> list[tuple[int, int]]:
    """(better, worse) of a prompt's images, by their scores, that differ by more than `min_gap`."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    chosen = [(order[0], order[-1])] if pairs_per_prompt == "best_worst" else itertools.combinations(order, 2)
    return [(better, worse) for better, worse in chosen if scores[better] - scores[worse] > min_gap]
