"""Settings of `prx-post draft` and their checks. Names are TRL's wherever one exists."""

from dataclasses import dataclass

from prx_post.base.settings import doc, require
from prx_post.data.config import PromptConfig
from prx_post.evaluation.monitor_config import MonitorConfig
from prx_post.model.config import ModelConfig, SchedulerConfig
from prx_post.rewards.registry import RewardSpec, parse_specs
from prx_post.stages.anchor.config import AnchorConfig

METHODS = ("draft",)


@dataclass
class DraftConfig(SchedulerConfig, AnchorConfig, MonitorConfig):
    """How the reward's gradient reaches the policy, on top of the training loop's settings."""

    method: str = doc("`draft`, and nothing else.", "draft", one_of=METHODS, resume="fixed")
    reward_funcs: list[str] = doc(
        "Rewards, as in `eval`, that have a gradient.", [], required=("one reward or more", "their sum is climbed")
    )
    reward_weights: list[float] | None = doc("Of each of reward_funcs; null: 1 each.", None)
    reward_margin: float | None = doc("Images that score this or more are left alone; null: none are.", None)
    gradient_steps: int = doc(
        "Last steps of the sampler that the gradient goes through (DRaFT-K); memory grows with it.", 1, above=0
    )
    refl_steps: int | None = doc(
        "ReFL: the sampler stops after a random one of its last so many steps, and what that one points to is scored; "
        "null: it goes to the end.",
        None,
        above=0,
    )
    beta: float = doc(
        "Weight of the squared distance of velocities from the start's, at the steps with a gradient.", 0.0, at_least=0
    )

    def __post_init__(self) -> None:
        if isinstance(self.reward_funcs, str):
            self.reward_funcs = [self.reward_funcs]
        super().__post_init__()
        specs, steps = parse_specs(self.reward_funcs), self.num_inference_steps
        if self.reward_weights is not None:
            rule, reason = f"{len(specs)} numbers", "each reward has one"
            ok, action = len(self.reward_weights) == len(specs), "Give as many weights as rewards"
            require(ok, "reward_weights", self.reward_weights, rule, reason, action)
        reason, action = f"num_inference_steps is {steps}", "Lower it"
        for name in ("gradient_steps", "refl_steps"):
            value = getattr(self, name)
            require(value is None or value <= steps, name, value, f"at most {steps}", reason, action)
        most = steps if self.refl_steps is None else steps - self.refl_steps + 1
        reason, action = f"refl_steps is {self.refl_steps}, so that the sampler may stop after {most}", "Lower it"
        require(self.gradient_steps <= most, "gradient_steps", self.gradient_steps, f"at most {most}", reason, action)
        self.check_scheduler()
        self.check_anchor()
        reason, action = "the best is not to be judged by what is climbed", "Name another reward"
        climbed, judged = {spec.target for spec in specs}, parse_specs(self.eval_rewards)
        metric = {spec.label: spec.target for spec in judged}.get(str(self.metric_for_best_model))
        require(metric not in climbed, "metric_for_best_model", metric, "a held-out reward", reason, action)

    @property
    def weights(self) -> dict[str, float]:
        """Of the rewards, by label."""
        labels = [RewardSpec.parse(text).label for text in self.reward_funcs]
        return dict(zip(labels, self.reward_weights or [1.0] * len(labels), strict=True))


CONFIGS = (ModelConfig, PromptConfig, DraftConfig)
