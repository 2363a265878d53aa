"""Whether the reward that is optimised still means what it should, by held-out judgement; and what is done if not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prx_post.evaluation.monitor_config import LOWER_IS_BETTER
from prx_post.stages.grpo.config import GRPOConfig


@dataclass
class Guard:
    """What has been done, shared by the monitor, which decides, and by what it steers.

    Attributes:
        learning_rate_factor: what the policy's learning rate is multiplied by.
        regularizes: whether suspicious images are held to the reference.
    """

    learning_rate_factor: float = 1.0
    regularizes: bool = False


@dataclass(frozen=True)
class Point:
    """An evaluation: its step, the optimised reward and the held-out judgement, higher being better for both."""

    step: int
    optimised: float | None
    held_out: float


class Watch:
    """Compares each evaluation with that whose held-out judgement was best: is the optimised reward higher than it was
    then, but the judgement lower, `guard_patience` times in a row?

    Args:
        weights: of the optimised rewards that evaluations have too, by label; none where only a judge compares images,
            so that falling judgement alone counts.

    Attributes:
        points: all evaluations so far.
        acted: the steps at which the guard has acted.
    """

    def __init__(self, config: GRPOConfig, weights: Mapping[str, float]) -> None:
        self._config, self._weights = config, weights
        self.points: list[Point] = []
        self.acted: list[int] = []
        self._best: Point | None = None
        self._in_a_row = 0

    def point(self, line: Mapping[str, Any]) -> Point | None:
        """Of an evaluation's metrics; None if they are something else."""
        name, at = str(self._config.metric_for_best_model), f"{self._config.num_inference_steps}_steps"
        held_out = line.get(f"eval/{name}/{at}")
        if held_out is None:
            return None
        values = [weight * line[f"eval/{label}/{at}"] for label, weight in self._weights.items()]
        sign = -1 if name in LOWER_IS_BETTER else 1
        return Point(line["step"], sum(values) if values else None, sign * held_out)

    def add(self, point: Point) -> str | None:
        """Why the guard acts now; None if it does not."""
        self.points.append(point)
        best = self._best
        if best is None or point.held_out > best.held_out:
            self._best, self._in_a_row = point, 0
            return None
        rose = point.optimised is None or best.optimised is None or point.optimised > best.optimised
        fell = point.held_out < best.held_out
        self._in_a_row = self._in_a_row + 1 if rose and fell else 0
        if self._in_a_row < self._config.guard_patience:
            return None
        self._in_a_row = 0
        self.acted.append(point.step)
        name, sign = self._config.metric_for_best_model, -1 if best.held_out < 0 and self._is_lower_better else 1
        optimised = (
            "the reward that is optimised cannot be compared between evaluations"
            if point.optimised is None or best.optimised is None
            else f"the optimised reward rose from {best.optimised:.4g} to {point.optimised:.4g}"
        )
        return (
            f"since step {best.step} {optimised}, while {name}, which is held out, went from "
            f"{sign * best.held_out:.4g} to {sign * point.held_out:.4g} (step {point.step}; "
            f"{self._config.guard_patience} evaluations in a row, guard_patience): the reward is being hacked"
        )

    @property
    def _is_lower_better(self) -> bool:
        return self._config.metric_for_best_model in LOWER_IS_BETTER
