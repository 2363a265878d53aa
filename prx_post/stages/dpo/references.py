"""What the policy is compared with: another network, the policy as it was, or errors computed before training."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prx_post.base.progress import Progress
from prx_post.data.cache import TensorCache, content_key, fingerprint
from prx_post.data.images import PREPROCESSING
from prx_post.data.pairs import Pair, PairSource, RefErrors
from prx_post.data.plan import Draw, DrawPlan
from prx_post.engine.protocols import Reference, to_device
from prx_post.engine.run import Run
from prx_post.model.checkpoint import PipelineFolder
from prx_post.model.config import ModelConfig
from prx_post.model.frozen import FrozenCopy
from prx_post.stages.dpo.config import DPOConfig
from prx_post.stages.dpo.objective import pair_errors
from prx_post.stages.references import earlier_policy


def build_reference(
    run: Run, config: DPOConfig, model: ModelConfig, pipeline: PipelineFolder, policy: Any, dtype: torch.dtype
) -> Reference | None:
    """The reference of a run; None if it has none, or its errors are known.

    Args:
        pipeline: of the reference.
        dtype: of a copy of it.
    """
    if config.reference_free or config.precompute_ref_errors:
        return None
    is_adapter = model.use_peft and config.ref_model_name_or_path is None
    return earlier_policy(run, pipeline, policy, is_adapter=is_adapter, follows=config.sync_ref_model, dtype=dtype)


@dataclass
class ReferenceErrors:
    """The reference's errors at every draw of every pair, computed before training, each rank its part.

    They are kept in cache_dir/ref-errors, by pair, so that an interrupted run, or another with the same reference and
    draws, resumes with them.

    Args:
        pipeline: the reference.
        source: makes the batches.
        plan: its `draws_per_sample` is how many draws a pair has.
        dtype: of the reference's weights.
    """

    run: Run
    config: DPOConfig
    pipeline: PipelineFolder
    source: PairSource
    plan: DrawPlan
    dtype: torch.dtype
    cache_dir: Path

    def compute(self) -> RefErrors:
        count, pairs, ranks = self.config.precompute_ref_errors, self.source.pairs, self.run.ranks
        draws = [[self.plan.fixed_draw(place, number) for number in range(count)] for place in range(len(pairs))]
        keys = [self._key(pair, of_pair) for pair, of_pair in zip(pairs, draws, strict=True)]
        cache = TensorCache(ranks.on_main(self._folder))
        known = ranks.on_main(lambda: {i: cache[key].tolist() for i, key in enumerate(keys) if key in cache})
        missing = [i for i in range(len(pairs)) if i not in known]

        def work() -> dict[int, list[list[float]]]:
            found: dict[int, list[list[float]]] = {}
            mine = ranks.share(missing)

            def to_keep() -> Iterator[tuple[str, Tensor]]:
                for i, errors in self._errors(mine, draws):
                    found[i] = errors.tolist()
                    yield keys[i], errors

            if mine:
                cache.write(to_keep())
            return found

        for part in ranks.together(work):
            known |= part
        return {
            (draw.index, draw.seed): (win, lose)
            for i, of_pair in enumerate(draws)
            for draw, (win, lose) in zip(of_pair, known[i], strict=True)
        }

    def _errors(self, places: Sequence[int], draws: Sequence[Sequence[Draw]]) -> Iterator[tuple[int, Tensor]]:
        """Of each pair, by its place, [draws, 2]; computed in micro-batches of pairs of one size."""
        run, pairs, count = self.run, self.source.pairs, self.config.precompute_ref_errors
        most, hides_progress = self.config.per_device_train_batch_size, run.ranks.hides_progress
        reference = FrozenCopy(run.place(run.transformer(self.pipeline, self.dtype)))
        with Progress(
            total=len(places), desc="errors of the reference", unit="pair", leave=False, disable=hides_progress
        ) as progress:
            for size in sorted({pairs[i].chosen.size for i in places}):
                of_size = [i for i in places if pairs[i].chosen.size == size]
                work, unfinished = [draw for i in of_size for draw in draws[i]], iter(of_size)
                done: list[Tensor] = []
                for start in range(0, len(work), most):
                    batch = to_device(self.source.batch(work[start : start + most], 0), run.device)
                    with torch.no_grad(), torch.autocast(run.device.type, torch.bfloat16, enabled=self.config.bf16):
                        done += pair_errors(reference.velocity, batch).float().cpu()
                    while len(done) >= count:
                        place, errors, done = next(unfinished), torch.stack(done[:count]), done[count:]
                        progress.update()
                        yield place, errors

    def _folder(self) -> Path:
        parts = [self.pipeline.path / name for name in ("vae", "text_encoder", "tokenizer")]
        parts += self.pipeline.transformer_files
        made_with = {
            "reference": fingerprint(self.cache_dir, *parts),
            "dtype": str(self.dtype),
            "bf16": self.config.bf16,
            "preprocessing": PREPROCESSING,
            "pair_noise": self.config.pair_noise,
            **self.config.timestep_density,
        }
        return self.cache_dir / "ref-errors" / content_key(json.dumps(made_with))[:16]

    def _key(self, pair: Pair, draws: Sequence[Draw]) -> str:
        """What a pair's errors depend on, besides the reference."""
        images = [pair.chosen.image_key, pair.rejected.image_key, pair.chosen.prompt_key]
        own_noise = pair.seeds if self.config.pair_noise == "own" else None
        return content_key(json.dumps([images, own_noise, [draw.seed for draw in draws]]))
