"""Settings of validation while training, shared by every stage. Imports nothing heavy."""

from dataclasses import dataclass

from prx_post.base.settings import doc, require, require_one_of
from prx_post.engine.config import TrainConfig
from prx_post.rewards.registry import parse_specs

LOWER_IS_BETTER = ("fid", "validation_loss")
WINS = "_wins"
"""After a reward's name: the fraction of images that score higher than the start's (distill: the teacher's)."""


@dataclass
class MonitorConfig(TrainConfig):
    """What the averaged weights are judged by while they are trained."""

    group = "validation"

    eval_steps: int = doc("Optimizer steps between two evaluations of the averaged weights; 0: none.", 0, at_least=0)
    eval_prompts_file: str | None = doc(
        "Held-out prompts for them: text with one on each line, or .jsonl, .json, .csv, .tsv with a `prompt` each; "
        "null: four captions of the data.",
        None,
    )
    eval_num_prompts: int = doc(
        "How many of those, spread evenly over the file; two images are generated for each.", 64, above=0
    )
    eval_num_inference_steps: list[int] | None = doc(
        "Numbers of sampler steps at which images are evaluated; null: num_inference_steps.", None
    )
    eval_rewards: list[str] = doc("Rewards of the evaluations, as in `eval`.", [])
    eval_encoder: str | None = doc(
        "Encoder of diversity and of the Fréchet distance to the start's images (distill: the teacher's), as in "
        "`eval`; null: neither.",
        None,
    )
    load_best_model_at_end: bool = doc("Emit the best evaluated average, not the last.", False)
    metric_for_best_model: str | None = doc(
        "A reward's name, the same with `_wins` (images better than the start's), `fid`, or `validation_loss`; of "
        "images at num_inference_steps.",
        None,
    )
    early_stopping_patience: int = doc(
        "Stop after this many evaluations in a row without a new best by metric_for_best_model; 0: never.",
        0,
        at_least=0,
    )
    min_diversity: float = doc(
        "Stop when images of one prompt differ by less than this fraction of the start's (distill: the teacher's); "
        "0: never.",
        0.0,
        between=(0, 1),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_num_inference_steps is None:
            self.eval_num_inference_steps = [self.num_inference_steps]
        if not self.eval_steps:
            for name in ("load_best_model_at_end", "early_stopping_patience"):
                value, action = getattr(self, name), f"Set eval_steps, or leave {name} out"
                require(not value, name, value, "off without eval_steps", "the best is found by evaluations", action)
            return
        steps = self.eval_num_inference_steps
        rule, reason = (
            "positive and different numbers, num_inference_steps among them",
            "the emitted model is judged at it",
        )
        ok = len(set(steps)) == len(steps) and all(n > 0 for n in steps) and self.num_inference_steps in steps
        require(ok, "eval_num_inference_steps", steps, rule, reason, f"Add {self.num_inference_steps}")
        specs = parse_specs(self.eval_rewards)
        if self.load_best_model_at_end or self.early_stopping_patience:
            require_one_of("metric_for_best_model", str(self.metric_for_best_model), self.known_metrics(specs))

    @property
    def evaluated_rewards(self) -> list[str]:
        """What images of evaluations are scored by."""
        return self.eval_rewards

    def known_metrics(self, specs: list) -> list[str]:
        """What `metric_for_best_model` may be."""
        labels = [spec.label for spec in specs]
        return [*labels, *(f"{label}{WINS}" for label in labels), *(["fid"] if self.eval_encoder else [])]
