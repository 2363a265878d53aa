"""Settings of `prx-post dpo` and of `prx-post data make-pairs`. Imports nothing heavy."""

import dataclasses
from dataclasses import dataclass

from prx_post.base.settings import doc, require
from prx_post.data.config import PreferenceConfig, TimestepConfig
from prx_post.evaluation.monitor_config import MonitorConfig
from prx_post.model.config import GUIDANCE, ModelConfig
from prx_post.rewards.judges.config import VisionJudgeConfig
from prx_post.rewards.registry import RewardSpec
from prx_post.stages.anchor.config import AnchorConfig

STEP_SAMPLERS = ("cps", "renoise")
"""Whose steps are random, and keep to what a student was trained on."""


@dataclass
class RankingConfig:
    """Images of a prompt, ranked and paired."""

    num_generations: int = doc("Images per prompt.", 8, at_least=2)
    reward: str | None = doc("Reward that ranks them, as in `eval`; null: the model at judge_url compares them.", None)
    pairs_per_prompt: str = doc(
        "`best_worst`, or `all` pairs of a prompt's images.", "best_worst", one_of=("best_worst", "all")
    )
    min_gap: float = doc(
        "A pair's scores (of a judge: win rates within the group) must differ by more than this.", 0.0, at_least=0
    )

    def check_ranking(self) -> None:
        """Raise ConfigError for a reward that there is not."""
        if self.reward is not None:
            RewardSpec.parse(self.reward)

    def check_ranker(self, judge: VisionJudgeConfig) -> None:
        """Raise ConfigError unless either a reward or a judge ranks the images."""
        reason, action = "one of both ranks the images", "Set reward, or judge_url and judge_model"
        ok = (self.reward is None) != (judge.judge_url is None)
        require(ok, "reward", self.reward, "set if judge_url is null, and else null", reason, action)


@dataclass
class OnlineConfig(RankingConfig):
    """Pairs that the policy makes while it is trained."""

    pairs: str = doc(
        "`dataset`, or `online`: of the policy's own images, made anew every steps_per_round steps.",
        "dataset",
        one_of=("dataset", "online"),
        resume="fixed",
    )
    prompts_file: str | None = doc(
        "Prompts of online pairs: text with one on each line, or .jsonl, .json, .csv, .tsv with a `prompt` each.", None
    )
    prompts_per_round: int = doc("Of which online pairs are made at a time.", 64, above=0)
    steps_per_round: int = doc(
        "Optimizer steps on the same online pairs; 1: fresh ones in every step.", 1, above=0, resume="fixed"
    )
    sync_ref_model: bool = doc(
        "The policy at a round's start becomes the reference (iterated DPO); false: the start stays it.",
        False,
        resume="fixed",
    )
    rollout_num_inference_steps: int | None = doc(
        "Sampler steps of online pairs; null: num_inference_steps.", None, above=0
    )
    rollout_guidance_scale: float | None = doc("Guidance of online pairs; null: guidance_scale.", None, **GUIDANCE)
    rollout_batch_size: int = doc("Images that each process makes at a time.", 64, above=0, resume="free")

    @property
    def is_online(self) -> bool:
        return self.pairs == "online"

    def check_online(self) -> None:
        """Raise ConfigError for what contradicts `pairs`."""
        self.check_ranking()
        reason, action = f"pairs is {self.pairs!r}", "Set pairs: online, or leave it out"
        for field in dataclasses.fields(OnlineConfig):
            value = getattr(self, field.name)
            ok = self.is_online or field.name == "pairs" or value == field.default
            require(ok, field.name, value, "left out", reason, action)
        value, reason = self.prompts_file, "online pairs are made of prompts"
        require(not self.is_online or value is not None, "prompts_file", value, "a file", reason, "Set it")


@dataclass
class DPOConfig(TimestepConfig, OnlineConfig, AnchorConfig, MonitorConfig):
    """Preference optimisation, on top of the training loop's settings. Names are TRL's wherever one exists."""

    beta: float = doc(
        "How dearly leaving the reference is paid, per mean squared velocity error: 100 moves far, 2000 hardly.",
        500.0,
        above=0,
    )
    loss_type: str = doc(
        "`sigmoid` (DPO), `hinge` (SLiC), `ipo`, whose margin is bounded; or `kto`, for images labelled one by one.",
        "sigmoid",
        one_of=("sigmoid", "hinge", "ipo", "kto"),
    )
    label_smoothing: float = doc(
        "Probability that a label is wrong (conservative DPO), for `sigmoid`; 0: none is.", 0.0, at_least=0, below=0.5
    )
    lose_weight: float = doc(
        "Weight of the rejected image's change of error; below 1, less is gained by spoiling it.", 1.0, between=(0, 1)
    )
    sft_weight: float = doc("Weight of the chosen image's own flow-matching error; 0: none.", 0.0, at_least=0)
    desirable_weight: float = doc("Weight of good images, for `kto`.", 1.0, above=0)
    undesirable_weight: float = doc("Weight of bad images, for `kto`.", 1.0, above=0)
    beta_by_gap: float = doc(
        "A pair's beta is multiplied by (the gap of its scores / the mean gap) to this power; 0: one beta for all.",
        0.0,
        at_least=0,
    )
    pair_noise: str = doc(
        "`shared`: fresh noise, one for both images of a pair; `own`: the noise that each was generated from.",
        "shared",
        one_of=("shared", "own"),
    )
    log_ratio: str = doc(
        "What stands for an image's log-probability. `noised`: its error when it is noised (Diffusion-DPO); `steps`: "
        "exact, of the random steps that the policy made it in (D3PO, PSO), for pairs: online without guidance; the "
        "default there for a checkpoint that is sampled in 3 to 8 steps without guidance.",
        "noised",
        one_of=("noised", "steps"),
        resume="fixed",
    )
    rollout_sampler: str | None = doc(
        "Of those steps: `cps`, between Euler and re-noising, or `renoise`; null: renoise if the checkpoint's "
        "scheduler does, else cps.",
        None,
        one_of=STEP_SAMPLERS,
        resume="fixed",
    )
    noise_level: float | None = doc("How random cps is, below 1; null: 0.5.", None, above=0, below=1, resume="fixed")
    ref_model_name_or_path: str | None = doc("Reference; null: the checkpoint that is trained.", None)
    ref_model_revision: str | None = doc("Hub revision of the reference.", None)
    reference_free: bool = doc("Compare with errors of 0, not a reference's; needs no second network.", False)
    precompute_ref_errors: int = doc(
        "Draws of timestep and noise that each pair has, whose reference errors are computed before training, which "
        "then holds no reference; 0: fresh draws in every step.",
        0,
        at_least=0,
    )
    max_both_rise: float = doc(
        "Warn when the fraction of pairs whose two errors both rose is above this; 1: never.", 0.5, between=(0, 1)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_online()
        self.check_anchor()
        self._only_for(("sigmoid",), "label_smoothing", 0.0)
        for name, default in (
            ("lose_weight", 1.0),
            ("sft_weight", 0.0),
            ("pair_noise", "shared"),
            ("max_both_rise", 0.5),
            ("beta_by_gap", 0.0),
        ):
            self._only_for(("sigmoid", "hinge", "ipo"), name, default)
        for name in ("desirable_weight", "undesirable_weight"):
            self._only_for(("kto",), name, 1.0)
        ok, reason = self.ref_model_name_or_path is not None, "ref_model_name_or_path is null"
        value, action = self.ref_model_revision, "Name the checkpoint too"
        require(ok or value is None, "ref_model_revision", value, "left out", reason, action)
        for name in ("ref_model_name_or_path", "precompute_ref_errors"):
            value, reason = getattr(self, name), "reference_free asks no reference"
            require(not (self.reference_free and value), name, value, "left out", reason, "Set one of them")
        is_kto = self.loss_type == "kto"
        self._refuse(is_kto, ("pairs", "dataset"), ("precompute_ref_errors", 0), ("reference_free", False))
        self._refuse(self.is_online, ("precompute_ref_errors", 0))
        self._check_steps()
        self._refuse(self.sync_ref_model, ("ref_model_name_or_path", None), ("reference_free", False))

    def _check_steps(self) -> None:
        """What contradicts `log_ratio`."""
        reason = "log_ratio is 'steps'"
        if not self.is_by_steps:
            for name in ("rollout_sampler", "noise_level"):
                value, why = getattr(self, name), f"log_ratio is {self.log_ratio!r}"
                require(value is None, name, value, "null", why, "Leave it out, or set log_ratio: steps")
            return
        why, action = f"{reason}, and a policy knows the steps of its own images alone", "Set it"
        require(self.is_online, "pairs", self.pairs, "'online'", why, action)
        guidance = self.rollout_guidance_scale or self.guidance_scale
        name = "guidance_scale" if self.rollout_guidance_scale is None else "rollout_guidance_scale"
        require(guidance == 1, name, guidance, "1", f"{reason}, of steps without guidance", action)
        steps = self.rollout_num_inference_steps or self.num_inference_steps
        name = "num_inference_steps" if self.rollout_num_inference_steps is None else "rollout_num_inference_steps"
        require(
            steps > 1, name, steps, "2 or more", "the last step is not random, and one before it must be", "Raise it"
        )
        why, ok = "rollout_sampler is 'renoise'", self.rollout_sampler != "renoise" or self.noise_level is None
        require(ok, "noise_level", self.noise_level, "null", why, "Leave it out")
        for field in dataclasses.fields(TimestepConfig):
            value = getattr(self, field.name)
            ok, why = value == field.default, f"{reason}, and nothing is noised"
            require(ok, field.name, value, f"{field.default!r}", why, "Leave it out")
        ok, why = self.pair_noise == "shared", f"{reason}, whose noise is known"
        require(ok, "pair_noise", self.pair_noise, "shared", why, "Leave it out")

    @property
    def is_by_steps(self) -> bool:
        """Whether the loss is on the sampler's steps."""
        return self.log_ratio == "steps"

    def _refuse(self, is_set: bool, *defaults: tuple[str, object]) -> None:
        """What must be at its default if `is_set`."""
        for name, default in defaults:
            value = getattr(self, name)
            reason = f"loss_type is {self.loss_type!r}, pairs {self.pairs!r} and sync_ref_model {self.sync_ref_model}"
            require(not is_set or value == default, name, value, f"{default!r}", reason, "Change one of them")

    def _only_for(self, losses: tuple[str, ...], name: str, default: object) -> None:
        value, reason = getattr(self, name), f"loss_type is {self.loss_type!r}, which does not use it"
        ok = value == default or self.loss_type in losses
        require(ok, name, value, f"{default!r}", reason, f"Leave it out, or set loss_type: {losses[0]}")

    def check_zero(self, stage: int, offload: bool) -> None:
        """Raise ConfigError for what cannot be done with split weights."""
        super().check_zero(stage, offload)
        reason = "images are made, and the reference is brought up to date, with whole weights"
        require(stage < 3 or not self.is_online, "deepspeed", f"zero{stage}", "zero1 or zero2", reason, "Set it")

    @property
    def uses_what_is_told(self) -> bool:
        """Whether the loss depends on the pairs' seeds or scores."""
        return self.pair_noise == "own" or self.beta_by_gap > 0

    @property
    def loss_settings(self) -> dict[str, object]:
        """Keyword arguments of the loss that `loss_type` names."""
        of_pairs = ("loss_type", "label_smoothing", "lose_weight", "sft_weight")
        names = ("desirable_weight", "undesirable_weight") if self.loss_type == "kto" else of_pairs
        return {name: getattr(self, name) for name in ("beta", *names)}


def check_together(data: PreferenceConfig, judge: VisionJudgeConfig, config: DPOConfig) -> None:
    """Raise ConfigError for settings of several groups that contradict each other."""
    is_online, value = config.is_online, data.dataset_name
    reason = "the policy makes its own pairs" if is_online else "there is nothing to train on"
    rule = "left out" if is_online else "a folder, a parquet file or a Hub id"
    require((value is None) == is_online, "dataset_name", value, rule, reason, "Change it, or pairs")
    if is_online:
        config.check_ranker(judge)
        return
    reason = "the pairs are ranked already"
    require(
        judge.judge_url is None, "judge_url", judge.judge_url, "left out", reason, "Remove it, or set pairs: online"
    )


CONFIGS = (ModelConfig, PreferenceConfig, VisionJudgeConfig, DPOConfig)
