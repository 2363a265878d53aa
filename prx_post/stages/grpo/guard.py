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
    """An evaluation: its step, the held-out judgement, higher being better, and each optimised reward, by label."""

    step: int
    held_out: float
    optimised: dict[str, float]


class HackingDetector:
    """Compares each evaluation with that whose held-out judgement was best: are the optimised rewards higher than they
    were then, but the judgement lower, `guard_patience` times in a row?

    Args:
        weights: of the optimised rewards that evaluations have too, by label; empty where a judge alone compares
            images, so that falling judgement counts alone.

    Attributes:
        points: all evaluations so far.
        acted: the steps at which the guard has acted.
    """

    def __init__(self, config: GRPOConfig, weights: Mapping[str, float]) -> None:
        self._config, self._weights = config, weights
        self._sign = -1 if config.metric_for_best_model in LOWER_IS_BETTER else 1
        self.points: list[Point] = []
        self.acted: list[int] = []
        self._best: Point | None = None
        self._in_a_row = 0

    def point(self, line: Mapping[str, Any]) -> Point | None:
        """Of an evaluation's metrics; None if they are something else."""
        name, at = self._config.metric_for_best_model, f"{self._config.num_inference_steps}_steps"
        held_out = line.get(f"eval/{name}/{at}")
        if held_out is None:
            return None
        optimised = {label: line[f"eval/{label}/{at}"] for label in self._weights if f"eval/{label}/{at}" in line}
        return Point(line["step"], self._sign * held_out, optimised)

    def add(self, point: Point) -> str | None:
        """Why the guard acts now; None if it does not."""
        self.points.append(point)
        best = self._best
        if best is None or point.held_out > best.held_out:
            self._best, self._in_a_row = point, 0
            return None
        gained = best.held_out - self.points[0].held_out
        has_fallen = best.held_out - point.held_out > self._config.guard_tolerance * gained
        self._in_a_row = self._in_a_row + 1 if has_fallen and self._has_risen(best, point) else 0
        if self._in_a_row < self._config.guard_patience:
            return None
        self._in_a_row = 0
        self.acted.append(point.step)
        return self._reason(best, point)

    def score(self, point: Point) -> float | None:
        """The optimised rewards as one: each as a fraction of its range so far, weighted; None if there is none."""
        found = 0.0
        for label, weight in self._weights.items():
            values = [p.optimised[label] for p in self.points if label in p.optimised]
            if label not in point.optimised:
                return None
            span = max(values) - min(values)
            found += weight * (point.optimised[label] - min(values)) / span if span else 0.0
        return found if self._weights else None

    def _has_risen(self, best: Point, point: Point) -> bool:
        then, now = self.score(best), self.score(point)
        return then is None or now is None or now > then

    def _reason(self, best: Point, point: Point) -> str:
        changes = [
            f"{label} went from {best.optimised[label]:.4g} to {value:.4g}" for label, value in point.optimised.items()
        ]
        return (
            f"since step {best.step} {', '.join(changes) or 'the optimised judge was asked on'}, but "
            f"{self._config.metric_for_best_model}, which is held out, from {self._sign * best.held_out:.4g} to "
            f"{self._sign * point.held_out:.4g} (step {point.step}; {self._config.guard_patience} evaluations in a "
            f"row, guard_patience): the reward is being hacked"
        )
