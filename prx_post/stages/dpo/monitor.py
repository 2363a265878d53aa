"""Validation of preference optimisation: what every stage has, and a word when both images of the pairs decay."""

from dataclasses import dataclass
from typing import Any

from prx_post.evaluation.monitor import ImageMonitor


@dataclass
class PreferenceMonitor(ImageMonitor):
    """Warns, once until it is over, when `both_rise` is above `max_both_rise`.

    Not where it says nothing of decay: without a reference, or with another than the start.
    """

    _is_warned: bool = False

    def watch(self, step: int, metrics: dict[str, float]) -> None:
        super().watch(step, metrics)
        config: Any = self.config
        is_start = not config.reference_free and config.ref_model_name_or_path is None
        if "both_rise" not in metrics or not is_start:  # it is not in evaluations, nor with labelled images
            return
        limit = config.max_both_rise
        is_high = metrics["both_rise"] > limit
        if is_high and not self._is_warned and self.run.log is not None:
            self.run.log.say(
                f"warning: at step {step} the policy denoises both images worse than the reference in "
                f"{metrics['both_rise']:.0%} of the pairs (both_rise; max_both_rise {limit:g}), so the margin may grow "
                f"because images decay. If held-out rewards fall, lower learning_rate, raise beta, set lose_weight "
                f"below 1 or sft_weight above 0."
            )
        self._is_warned = is_high
