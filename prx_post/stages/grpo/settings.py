"""Groups of `prx-post grpo`'s settings. Imports nothing heavy. Names are TRL's wherever one exists."""

import math
from dataclasses import dataclass

from prx_post.base.settings import doc, require
from prx_post.model.config import GUIDANCE
from prx_post.rewards.registry import RewardSpec, parse_specs

POLICY_GRADIENT = ("grpo", "pref_grpo")
FORWARD = ("nft", "dgpo", "awm")
METHODS = (*POLICY_GRADIENT, *FORWARD)
ODE = "ode"
NOISE_LEVELS = {"sde": 0.7, "cps": 0.8, "dance": 0.3, "renoise": None}
"""Stochastic samplers and the noise levels that their authors use."""
WINDOW_SIZES = {"all": None, "fast": 2, "mix": 4, "subset": 2}
WIN_RATE = "win_rate"
"""What the pairwise judge's reward is called."""
FEATURES = "features"
"""What features of images are called, beside their rewards."""


@dataclass
class RolloutConfig:
    """Groups of images that the policy generates, and how often it is trained on them."""

    num_generations: int = doc(
        "Images per prompt: the group that advantages are relative to.", 8, at_least=2, resume="fixed"
    )
    prompts_per_rollout: int = doc("Prompts of a rollout, on all processes.", 16, above=0, resume="fixed")
    steps_per_generation: int = doc(
        "Optimizer steps in which a rollout is gone through once, each on as many of its groups.",
        1,
        above=0,
        resume="fixed",
    )
    num_iterations: int = doc("Times that each rollout is gone through.", 1, above=0, resume="fixed")
    rollout_sampler: str | None = doc(
        "`sde` (Flow-GRPO), `cps`, `dance` or `renoise`, whose steps are random; or `ode`, for nft, dgpo and awm, "
        "which train no step. null: cps, or ode.",
        None,
        one_of=(*NOISE_LEVELS, ODE),
        resume="fixed",
    )
    noise_level: float | None = doc(
        "How random its steps are; null: as their authors have it (sde 0.7, cps 0.8, dance 0.3).", None, above=0
    )
    window: str = doc(
        "Which steps are random and trained. `all` but the last; `fast`: a few, before which a group is one image; "
        "`mix`: a few next to each other, which move on every window_rollouts; `subset`: a few, at the others a group "
        "has the same noise.",
        "all",
        one_of=tuple(WINDOW_SIZES),
        resume="fixed",
    )
    window_size: int | None = doc("How many are a few; null: fast 2, mix 4, subset 2.", None, above=0, resume="fixed")
    window_rollouts: int = doc("Rollouts after which a `mix` window moves on by a step.", 25, above=0)
    rollout_num_inference_steps: int | None = doc(
        "Sampler steps of rollouts; null: num_inference_steps.", None, above=0, resume="fixed"
    )
    rollout_guidance_scale: float = doc(
        "Guidance of rollouts, and of the policy that is trained; at 1 it learns to need none.",
        1.0,
        **GUIDANCE,
        resume="fixed",
    )
    rollout_height: int | None = doc("Height of rollouts, pixels; null: height.", None, above=0, resume="fixed")
    rollout_width: int | None = doc("Width of rollouts, pixels; null: width.", None, above=0, resume="fixed")
    rollout_batch_size: int | None = doc(
        "Images that each process generates at a time; null: per_device_train_batch_size, with which the first ratio "
        "is exactly 1.",
        None,
        above=0,
        resume="free",
    )
    async_rewards: str = doc(
        "`batch`: score images while the next are generated; `rollout`: while the policy is trained on the rollout "
        "before, so that it is a rollout ahead of what generated the images; `off`: wait for every score.",
        "batch",
        one_of=("off", "batch", "rollout"),
        resume="fixed",
    )


@dataclass
class RewardConfig:
    """What images are rewarded for."""

    reward_funcs: list[str] = doc("Rewards, as in `eval`; each image is scored by every one.", [])
    reward_weights: list[float] | None = doc("Of each of reward_funcs; null: 1 each.", None)
    pairwise_reward: str | None = doc(
        "pref_grpo: reward by whose score the images of a group are compared; null: the model at judge_url compares.",
        None,
    )
    pairwise_temperature: float = doc(
        "Of that comparison, in the reward's units: an image wins with the sigmoid of difference / temperature; 0: "
        "with certainty.",
        1.0,
        at_least=0,
    )
    pairwise_weight: float = doc("pref_grpo: weight of the win rates among reward_weights.", 1.0, above=0)
    scale_rewards: str = doc(
        "Standard deviation that advantages are divided by: of the `batch`, of each `group`, or `none`.",
        "batch",
        one_of=("batch", "group", "none"),
    )
    advantage_clip: float = doc("Advantages are clipped to ± this.", 5.0, above=0)
    reward_timeout_s: float = doc("Seconds that a batch of scores is waited for.", 1800.0, above=0, resume="free")

    @property
    def weights(self) -> dict[str, float]:
        """Of every reward, by the label that it goes by in the logs."""
        labels = [spec.label for spec in parse_specs(self.reward_funcs)]
        return dict(zip(labels, self.reward_weights or [1.0] * len(labels), strict=True))

    def check_rewards(self) -> None:
        """Raise ConfigError for a reward that there is not, or weights of another number."""
        labels = [spec.label for spec in parse_specs(self.reward_funcs)]
        given = self.reward_weights
        reason, action = "each reward has one", "Give as many, or leave it out"
        ok = given is None or len(given) == len(labels)
        require(ok, "reward_weights", given, f"{len(labels)} numbers", reason, action)
        reason, action = "all would be added as nothing", "Correct it"
        require(given is None or all(w != 0 for w in given), "reward_weights", given, "other than 0", reason, action)
        reason, action = "what is no reward goes by it", "Write another label before the reward, as in label=..."
        ok, rule = not {WIN_RATE, FEATURES} & set(labels), f"without {WIN_RATE} and {FEATURES}"
        require(ok, "reward_funcs", self.reward_funcs, rule, reason, action)
        if self.pairwise_reward is not None:
            RewardSpec.parse(self.pairwise_reward)


@dataclass
class MethodConfig:
    """How the policy learns from them."""

    method: str = doc(
        "`grpo`, `pref_grpo` (grpo on win rates within the group): policy gradients through the sampler's steps. "
        "`dgpo`, `nft`, `awm`: on the images themselves, noised anew.",
        "dgpo",
        one_of=METHODS,
        resume="fixed",
    )
    epsilon: float | None = doc(
        "Clip range of the ratio to the policy that sampled (dgpo, awm: to the lagged policy). null, for dgpo alone: "
        "no "
        "clip, and no lagged policy.",
        1e-3,
        above=0,
        resume="fixed",
    )
    beta: float = doc(
        "Weight of the divergence from the reference: the steps' KL; nft, dgpo, awm: squared difference of velocities.",
        0.0,
        at_least=0,
    )
    ref_guidance_scale: float | None = doc(
        "Guidance of the reference; above that of rollouts, the policy is held to images that it needs no guidance "
        "for. "
        "null: as in rollouts (nft, dgpo, awm: 1).",
        None,
        **GUIDANCE,
    )
    sync_ref_model: bool = doc("The policy becomes the reference every ref_model_sync_steps.", False, resume="fixed")
    ref_model_sync_steps: int = doc("Optimizer steps between two such times.", 512, above=0)
    normalise_ratio: bool = doc("GRPO-Guard: one spread of ln ratio at all steps, and losses divided by -dt.", False)
    max_divergence: float | None = doc(
        "DPPO: instead of the clip, no gradient where a step's KL from the policy that sampled is above this and the "
        "update leads further away; about 1e-6. null: the clip.",
        None,
        above=0,
    )
    last_step_reward_weight: float = doc(
        "Weight of the rewards' own gradient through the decoder and the sampler's last step, which is not random, so "
        "that a policy gradient does not reach it; of those of reward_funcs that have one. It counts as one more step.",
        0.0,
        at_least=0,
        resume="fixed",
    )
    last_step_reward_margin: float | None = doc(
        "Images that score this or more there are left alone; null: none are.", None
    )
    noises_per_image: int = doc(
        "Timesteps and noises at which each image is trained a time.", 1, above=0, resume="fixed"
    )
    old_policy_decay: float | None = doc(
        "Of the lagged policy of nft, dgpo and awm, per rollout; null: dgpo 0.5, nft up to 0.5, awm up to 0.3.",
        None,
        at_least=0,
        below=1,
    )
    nft_beta: float = doc("How far nft's positive and negative policy reach; 1: to the policy itself.", 1.0, above=0)
    dgpo_beta: float = doc("How soon a group that was learnt counts less: 10 to 100 or, synced, 2000.", 100.0, above=0)
    awm_power: float | None = doc("awm: errors to this power, which evens them out over t; null: as they are.", None)

    @property
    def is_policy_gradient(self) -> bool:
        return self.method in POLICY_GRADIENT

    @property
    def clip(self) -> float:
        """`epsilon`; infinite if there is none."""
        return math.inf if self.epsilon is None else self.epsilon

    @property
    def has_old_policy(self) -> bool:
        """Whether a lagged policy is held."""
        return self.method in FORWARD and not (self.method == "dgpo" and self.epsilon is None)

    def decay_of(self, rollout: int) -> float:
        """Of the lagged policy, after rollout `rollout`, counted from 0."""
        if self.old_policy_decay is not None:
            return self.old_policy_decay
        return {"dgpo": 0.5, "nft": min(0.001 * rollout, 0.5), "awm": min(0.001 * rollout, 0.3)}[self.method]


@dataclass
class GuardConfig:
    """What happens when the reward that is optimised rises while held-out judgement falls."""

    guard: str = doc(
        "`stop` (the best by that judgement is emitted in any case), `lower_lr`, `regularize` (GARDO), `warn`; or "
        "`off`, which needs no evaluations.",
        "warn",
        one_of=("stop", "lower_lr", "regularize", "warn", "off"),
        resume="fixed",
    )
    guard_patience: int = doc(
        "Evaluations in a row in which that happens before the guard acts.", 2, above=0, resume="fixed"
    )
    guard_tolerance: float = doc(
        "How far the judgement must fall below its best to count, as a fraction of what it had gained since the start.",
        0.1,
        between=(0, 1),
        resume="fixed",
    )
    guard_lr_factor: float = doc(
        "lower_lr: what the learning rate is multiplied by.",
        0.3,
        above=0,
        below=1,
        action="Set it to 0.3",
        resume="fixed",
    )
    guard_rewards: list[str] = doc(
        "regularize: light rewards by which images are ranked besides; one that the optimised reward ranks far higher "
        "is suspicious.",
        [],
    )
    guard_beta: float = doc("regularize: weight of the divergence from the reference on these images.", 0.1, above=0)
    guard_fraction: float = doc("regularize: most images of a rollout that count so.", 0.1, between=(0, 1))
    guard_sync_rollouts: int = doc("regularize: rollouts after which the policy becomes the reference.", 15, above=0)
    guard_max_divergence: float | None = doc("regularize: or as soon as the divergence is above this.", None, above=0)
    guard_encoder: str | None = doc(
        "regularize: encoder of features by whose distance from the group's others good images are weighted; null: "
        "they are not.",
        None,
    )
