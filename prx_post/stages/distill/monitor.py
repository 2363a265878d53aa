"""What ends a distillation early, besides collapse: a discriminator that is never wrong teaches nothing."""

from dataclasses import dataclass
from typing import Any

from prx_post.engine.signals import StopTraining
from prx_post.evaluation.monitor import ImageMonitor


@dataclass
class StudentMonitor(ImageMonitor):
    """Compares with the teacher's images, and watches the discriminator's accuracy.

    Args:
        max_accuracy: of the discriminator, in `patience` logged windows in a row after `warmup_steps`; 1: never stop.
    """

    max_accuracy: float = 1.0
    patience: int = 1
    warmup_steps: int = 0
    _saturated: int = 0

    remedy = "Lower learning_rate, or begin again with a student from `method: trajectory`."

    def watch(self, step: int, metrics: dict[str, float]) -> None:
        super().watch(step, metrics)
        self._count(step, metrics)
        if self._saturated >= self.patience:
            raise StopTraining(
                f"the discriminator told real from fake with accuracy {self.max_accuracy:g} or more "
                f"(max_discriminator_accuracy) in {self.patience} logged windows in a row, so the student learns "
                f"nothing from it; stopped at step {step}. Lower discriminator_learning_rate, or raise renoise_mean or "
                f"r1_weight."
            )

    def resume(self, evaluations: list[dict[str, Any]], logged: list[dict[str, Any]]) -> None:
        super().resume(evaluations, logged)
        for line in logged:
            self._count(line["step"], line)

    def _count(self, step: int, metrics: dict[str, Any]) -> None:
        accuracy = metrics.get("discriminator_accuracy")
        if accuracy is None:
            return
        is_perfect = self.max_accuracy < 1 and accuracy >= self.max_accuracy and step > self.warmup_steps
        self._saturated = self._saturated + 1 if is_perfect else 0
