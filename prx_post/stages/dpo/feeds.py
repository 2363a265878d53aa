"""What `prx-post dpo` trains on: pairs of a data set, images labelled one by one, or pairs that the policy makes."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from prx_post.base.settings import require
from prx_post.data.config import DataConfig
from prx_post.data.encoding import EncodedCache, prepare
from prx_post.data.labels import LabelledSource, read_labelled
from prx_post.data.pairs import Pair, PairSource, RefErrors, prepare_pairs, read_pairs
from prx_post.data.plan import DrawPlan
from prx_post.data.rows import ImageRows
from prx_post.data.sizes import CacheSize, cache_size
from prx_post.data.source import timestep_and_noise
from prx_post.engine.protocols import Batch, Source
from prx_post.engine.run import Run
from prx_post.model.config import NOISE_LEVEL
from prx_post.rewards.judges.config import VisionJudgeConfig
from prx_post.stages.base import Encoded
from prx_post.stages.dpo.objective import ComparedWithReference, LabelObjective, PairObjective, StepPairObjective
from prx_post.stages.dpo.online import OnlinePairs
from prx_post.stages.dpo.ranking import Ranker
from prx_post.stages.dpo.references import ReferenceErrors
from prx_post.stages.dpo.steps import StepPairSource, StepSampler, random_step
from prx_post.stages.prompted import encode_prompt_set, read_prompts
from prx_post.stages.trajectories import Transition, transition_of


class Feed(Protocol):
    """Opened before any model is loaded: raises then what can be known."""

    @property
    def objective(self) -> Callable[..., ComparedWithReference]:
        """Makes it of a policy, its learning rate, the reference, when that is synced, and the loss's settings."""

    def data(self, run: Run) -> Encoded: ...

    def steps_per_epoch(self, run: Run, data: Encoded) -> float: ...

    def source(self, run: Run, data: Encoded, policy: Any) -> Source: ...

    def example(self, batch: Batch) -> Batch:
        """An example of latents and prompts, with what else a batch has."""

    def cache_size(self) -> CacheSize | str: ...


class PairFeed:
    """Pairs of a data set."""

    objective = PairObjective

    def __init__(self, stage: Any, planned: bool) -> None:
        self.stage, self.config, self.data_config = stage, stage.config, stage.data_config
        self.rows = None if planned else read_pairs(self.data_config)
        self.pairs: list[Pair] = []
        self.ref_errors: RefErrors | None = None

    def data(self, run: Run) -> Encoded:
        """Samples are the chosen and the rejected image of each pair in turn."""
        stage, config, rows = self.stage, self.config, self.rows
        assert rows is not None
        encoders = stage.encoders(run)
        self.pairs, cache = prepare_pairs(
            *(self.data_config, rows, encoders, stage.buckets, run.output_dir, stage.shown_prompts(), run.ranks),
            own_noise=config.pair_noise == "own",
            by_gap=config.beta_by_gap > 0,
        )
        encoders.free()
        samples = [sample for pair in self.pairs for sample in (pair.chosen, pair.rejected)]
        described = f"{self.data_config.dataset_name} ({len(self.pairs)} of {len(rows) // 2} preference pairs)"
        told = [(pair.seeds, pair.gap) for pair in self.pairs] if config.uses_what_is_told else None
        data = Encoded(samples, rows, cache, encoders, lambda sample: rows.name(sample.row), described, told)
        if config.precompute_ref_errors:
            source, plan = self.source(run, data, None), self._plan(run)
            reference, dtype = stage.reference_pipeline, stage.text_dtype()
            self.ref_errors = ReferenceErrors(run, config, reference, source, plan, dtype, stage.cache_dir).compute()
        return data

    def steps_per_epoch(self, run: Run, data: Encoded) -> float:
        return len(self.pairs) / run.global_batch_size

    def source(self, run: Run, data: Encoded, policy: Any) -> PairSource:
        return pair_source(self.stage, run, self.pairs, data, self._plan(run), ref_errors=self.ref_errors)

    def _plan(self, run: Run) -> DrawPlan:
        config, sizes = self.config, [pair.chosen.size for pair in self.pairs]
        draws = config.precompute_ref_errors or None
        return DrawPlan(sizes, run.global_batch_size, config.seed, config.max_steps, draws)

    def example(self, batch: Batch) -> Batch:
        example = _example_of_pairs(batch, own_noise=self.config.pair_noise == "own")
        if self.config.precompute_ref_errors:
            example["ref_errors"] = torch.empty(len(batch["latents"]), 2, device=batch["latents"].device)
        return example

    def cache_size(self) -> CacheSize | str:
        return _cache_size(self.stage, lambda: read_pairs(self.data_config))


class LabelFeed:
    """Images labelled good or bad."""

    objective = LabelObjective

    def __init__(self, stage: Any, planned: bool) -> None:
        self.stage, self.config, self.data_config = stage, stage.config, stage.data_config
        self.rows = None if planned else read_labelled(self.data_config)

    def data(self, run: Run) -> Encoded:
        stage, rows, given = self.stage, self.rows, self.data_config
        assert rows is not None
        images = DataConfig(
            dataset_name=given.dataset_name,
            skip_text_cleaning=given.skip_text_cleaning,
            cache_dir=given.cache_dir,
            max_bad_fraction=given.max_bad_fraction,
        )
        encoders, bad_rows = stage.encoders(run), run.output_dir / "bad_rows.jsonl"
        samples, cache = prepare(images, rows, encoders, stage.buckets, bad_rows, stage.shown_prompts(), run.ranks)
        encoders.free()
        good = sum(rows.labels[sample.row] for sample in samples)
        described = f"{given.dataset_name} ({good} good and {len(samples) - good} bad images)"
        told = [rows.labels[sample.row] for sample in samples]
        return Encoded(samples, rows, cache, encoders, lambda sample: rows.name(sample.row), described, told)

    def steps_per_epoch(self, run: Run, data: Encoded) -> float:
        return len(data.samples) / run.global_batch_size

    def source(self, run: Run, data: Encoded, policy: Any) -> LabelledSource:
        assert self.rows is not None
        config = self.config
        plan = DrawPlan([s.size for s in data.samples], run.global_batch_size, config.seed, config.max_steps)
        return LabelledSource(
            *(data.samples, data.rows, data.cache, data.encoders, plan),
            **self.stage.batch_options(run),
            randomness=partial(timestep_and_noise, **config.timestep_density),
            labels=self.rows.labels,
        )

    def example(self, batch: Batch) -> Batch:
        count, device = len(batch["latents"]), batch["latents"].device
        drawn = {"noise": torch.empty_like(batch["latents"]), "t": torch.empty(count, device=device)}
        return {**batch, **drawn, "desirable": torch.ones(count, dtype=torch.bool, device=device)}

    def cache_size(self) -> CacheSize | str:
        return _cache_size(self.stage, lambda: read_labelled(self.data_config))


class OnlineFeed:
    """Pairs that the policy makes."""

    def __init__(self, stage: Any, judge: VisionJudgeConfig, planned: bool) -> None:
        self.stage, self.config = stage, stage.config
        self.sigmas = stage.grid(self._num_steps) if self.config.is_by_steps else None
        value, reason = self.config.noise_level, "the checkpoint's scheduler re-noises"
        ok, action = value is None or self._step_sampler == "cps", "Leave it out, or set rollout_sampler: cps"
        require(ok, "noise_level", value, "null", reason, action)
        rows = [] if planned else read_prompts(self.config.prompts_file, stage.cleaner)
        self.prompts = [row["prompt"] for row in rows]
        self.ranker = None if planned else Ranker.open(self.config, judge)
        if self.ranker is not None:
            self.ranker.check(self.prompts)

    @property
    def objective(self) -> Callable[..., ComparedWithReference]:
        if self.sigmas is None:
            return PairObjective
        return partial(StepPairObjective, transition=self._transition, sigmas=self.sigmas)

    @property
    def _num_steps(self) -> int:
        return self.config.rollout_num_inference_steps or self.config.num_inference_steps

    @property
    def _transition(self) -> Transition:
        assert self.sigmas is not None
        found = transition_of(self._step_sampler, self.config.noise_level or NOISE_LEVEL, self.sigmas)
        assert found is not None
        return found

    @property
    def _step_sampler(self) -> str:
        renoises = self.stage.scheduler.config.stochastic_sampling
        return self.config.rollout_sampler or ("renoise" if renoises else "cps")

    def data(self, run: Run) -> Encoded:
        """Samples are the prompts."""
        purpose = f"ranked by {self.config.reward or 'a judge'}"
        return encode_prompt_set(self.stage, run, self.prompts, self.config.prompts_file, purpose)

    def steps_per_epoch(self, run: Run, data: Encoded) -> float:
        """Of all prompts, whatever pairs their images make."""
        return len(data.samples) / self.config.prompts_per_round * self.config.steps_per_round

    def source(self, run: Run, data: Encoded, policy: Any) -> OnlinePairs:
        stage, config = self.stage, self.config
        assert data.cache is not None
        assert self.ranker is not None
        embeddings = data.cache.embeddings

        def source_of(pairs: list[Pair], latents: dict[str, Tensor], seed: int) -> PairSource:
            held: Any = latents
            plan = DrawPlan(["all"] * len(pairs), run.global_batch_size, seed, config.steps_per_round)
            return pair_source(stage, run, pairs, data, plan, cache=EncodedCache(held, embeddings))

        sampler = stage.sampler(policy, run)
        sampler.num_inference_steps = self._num_steps
        sampler.guidance_scale = config.rollout_guidance_scale or config.guidance_scale
        steps = None
        if self.sigmas is not None:
            given = (policy, self._transition, self.sigmas, sampler.latent_shape, run.device, sampler.pad_length)
            steps = StepSampler(*given, autocast=config.bf16)
        return OnlinePairs(
            *(run, config, stage.largest_size, data.samples, policy, sampler, data, self.ranker), source_of, steps
        )

    def example(self, batch: Batch) -> Batch:
        if self.sigmas is None:
            return _example_of_pairs(batch, own_noise=self.config.pair_noise == "own")
        like = torch.empty_like(batch["latents"])
        index = torch.zeros(len(like), dtype=torch.int64, device=like.device)
        return {**batch, "rejected": like, "x_next": like, "rejected_x_next": like, "step_index": index}

    def cache_size(self) -> str:
        return "of images nothing is cached: the policy makes them"


def _cache_size(stage: Any, read: Callable[[], ImageRows]) -> CacheSize | str:
    name, dtype = stage.data_config.dataset_name, stage.text_dtype()
    return cache_size(name, read, stage.pipeline, stage.buckets, stage.cleaner, dtype)


def pair_source(
    stage: Any,
    run: Run,
    pairs: list[Pair],
    data: Encoded,
    plan: DrawPlan,
    *,
    cache: EncodedCache | None = None,
    ref_errors: RefErrors | None = None,
) -> PairSource:
    """cache: with the images' latents, if it is another than the data's."""
    by_steps = stage.config.is_by_steps
    kind = StepPairSource if by_steps else PairSource
    return kind(
        samples=[pair.chosen for pair in pairs],
        rows=data.rows,
        cache=data.cache if cache is None else cache,
        encoders=data.encoders,
        plan=plan,
        **stage.batch_options(run),
        randomness=random_step if by_steps else partial(timestep_and_noise, **stage.config.timestep_density),
        pairs=pairs,
        own_noise=stage.config.pair_noise == "own",
        beta_by_gap=stage.config.beta_by_gap,
        ref_errors=ref_errors,
    )


def _example_of_pairs(batch: Batch, own_noise: bool) -> Batch:
    like, device = torch.empty_like(batch["latents"]), batch["latents"].device
    example = {**batch, "rejected": like, "noise": like, "t": torch.empty(len(like), device=device)}
    return example | {"rejected_noise": like} if own_noise else example
