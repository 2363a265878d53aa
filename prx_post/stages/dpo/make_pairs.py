"""`prx-post data make-pairs`: preference pairs of a checkpoint's own images, ranked by a reward or a judge.

    output_dir/train-00003.parquet    prompt, chosen, rejected, and the scores and noise seeds of both
    output_dir/scores-00003.jsonl     a line per prompt: scores and noise seeds of all its images
    output_dir/pairs.json             what they were made with, and counts

A file holds the pairs of `prompts_per_file` prompts and is complete or absent, so an interrupted command continues, on
any number of processes, and makes the same pairs.
"""

import dataclasses
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from prx_post.base.errors import PrxPostError
from prx_post.base.files import (
    FolderLock,
    make_folder,
    replacing,
    require_empty,
    write_json,
    write_jsonl,
)
from prx_post.base.parsing import parse
from prx_post.base.progress import Progress
from prx_post.base.ranks import launched_ranks
from prx_post.base.settings import check_fields, doc
from prx_post.data.cache import content_key, fingerprint
from prx_post.data.encoders import Encoders
from prx_post.engine.signals import StopSignals
from prx_post.model.checkpoint import DTYPES, PipelineFolder, load, open_pipeline
from prx_post.model.config import DTYPE_NAMES, GUIDANCE
from prx_post.model.sampler import Sampler, build_sampler, default_device, generate_images
from prx_post.model.text import PromptCleaner
from prx_post.rewards.judges.config import VisionJudgeConfig
from prx_post.stages.dpo.config import RankingConfig
from prx_post.stages.dpo.ranking import Ranker, couples
from prx_post.stages.prompted import noise_seeds, read_prompts

MARK = "pairs.json"


@dataclass
class MakePairsConfig(RankingConfig):
    """Preference pairs of a checkpoint's own images."""

    model_name_or_path: str | None = doc(
        "Folder or Hub id of a PRX pipeline; `tiny` is the embedded base.",
        None,
        required=("a folder or a Hub id", "it makes the images"),
    )
    model_revision: str | None = doc("Hub revision (branch, tag or commit) of the checkpoint.", None)
    prompts_file: str | None = doc(
        "Text with a prompt on each line, or .jsonl, .json, .csv, .tsv with a `prompt` each.",
        None,
        required=("a file", "images are made of its prompts"),
    )
    num_prompts: int | None = doc("How many of them, spread evenly over the file; null: all.", None, above=0)
    output_dir: str | None = doc("Folder for the pairs.", None, required=("a folder", "the pairs are written there"))
    prompts_per_file: int = doc("Prompts per parquet file; an interruption costs one file at most.", 16, above=0)
    num_inference_steps: int = doc("Sampler steps.", 28, above=0)
    guidance_scale: float = doc("Classifier-free guidance; 1 switches it off.", 5.0, **GUIDANCE)
    height: int | None = doc("Height, pixels; null: the checkpoint's default_sample_size.", None, above=0)
    width: int | None = doc("Width, pixels; null: the checkpoint's default_sample_size.", None, above=0)
    batch_size: int = doc("Images at a time.", 8, above=0)
    dtype: str = doc("Precision of transformer and text encoder.", "float32", one_of=DTYPE_NAMES)
    skip_text_cleaning: bool = doc("Only light prompt cleaning; as in training.", False)
    seed: int = doc("The noise of a prompt's images is a function of it and the prompt.", 0, at_least=0)
    num_threads: int = doc("CPU threads torch may use; 0 leaves torch's own choice.", 0, at_least=0)

    def __post_init__(self) -> None:
        check_fields(self)
        self.check_ranking()


def check(args: Sequence[str]) -> tuple[MakePairsConfig, VisionJudgeConfig]:
    """The command's settings, checked as far as they can be without any file they name."""
    config, judge = parse([MakePairsConfig, VisionJudgeConfig], args, "prx-post data make-pairs")
    config.check_ranker(judge)
    return config, judge


def run(args: Sequence[str]) -> None:
    """`prx-post data make-pairs`"""
    make_pairs(*check(args))


def make_pairs(config: MakePairsConfig, judge_config: VisionJudgeConfig) -> Path:
    """Generate, score and pair what is missing. Returns the folder.

    Raises:
        PrxPostError: a file is missing, a prompt cannot be used, or the folder holds pairs of other settings, before
            any model is loaded; the reward fails, after which what was made is kept; no pair is left.
    """
    pipeline = open_pipeline(str(config.model_name_or_path), config.model_revision)
    size = pipeline.resolve_size(config.height, config.width)
    cleaner = PromptCleaner(config.skip_text_cleaning)
    prompts = [row["prompt"] for row in read_prompts(str(config.prompts_file), cleaner, config.num_prompts)]
    ranker = Ranker.open(config, judge_config)
    ranker.check(prompts)
    folder = Path(str(config.output_dir)).expanduser()
    if not (folder / MARK).is_file():
        require_empty(config.output_dir)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    with ExitStack() as stack:
        stack.enter_context(StopSignals())
        ranks = stack.enter_context(launched_ranks())

        def claim() -> None:
            stack.enter_context(FolderLock(make_folder(folder)))
            _claim(folder, _made_with(config, pipeline, size, ranker, prompts))

        ranks.on_main(claim)
        files = [prompts[i : i + config.prompts_per_file] for i in range(0, len(prompts), config.prompts_per_file)]
        missing = ranks.on_main(lambda: [i for i in range(len(files)) if not _scores_path(folder, i).is_file()])
        maker = _Maker(config, pipeline, size, cleaner, ranker, folder)
        for first in Progress(range(0, len(missing), ranks.world), desc="making pairs", disable=ranks.hides_progress):
            own = {number: files[number] for number in missing[first : first + ranks.world][ranks.rank :][:1]}
            ranks.together(partial(maker.make, own))
        judged = ranks.gather([dataclasses.asdict(ranker.judge.counts)] if ranker.judge is not None else [])
        ranks.on_main(lambda: _finish(config, folder, len(files), judged))
    return folder


def _made_with(
    config: MakePairsConfig, pipeline: PipelineFolder, size: tuple[int, int], ranker: Ranker, prompts: Sequence[str]
) -> dict[str, Any]:
    """All that the pairs depend on."""
    where = {"output_dir", "num_threads", "prompts_file", "num_prompts", "height", "width"}
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in where}
    weights = [pipeline.path / name for name in ("transformer", "scheduler", "vae", "text_encoder", "tokenizer")]
    return {
        **settings,
        "model_name_or_path": pipeline.source,
        "weights": fingerprint(Path(str(config.output_dir)).expanduser(), *weights),
        "height": size[0],
        "width": size[1],
        "ranked_by": ranker.identity,
        "prompts": content_key(json.dumps(list(prompts))),
    }


def _claim(folder: Path, made_with: dict[str, Any]) -> None:
    path = folder / MARK
    before = json.loads(path.read_text(encoding="utf-8"))["made_with"] if path.is_file() else made_with
    differing = [key for key in made_with if before.get(key) != made_with[key]]
    if differing:
        key = differing[0]
        raise PrxPostError(
            f"output_dir is {str(folder)!r}, whose pairs were made with {key} {before.get(key)!r}, but now {key} is "
            f"{made_with[key]!r}. Choose another output_dir."
        )
    write_json(path, {"made_with": made_with})


def _scores_path(folder: Path, number: int) -> Path:
    """Written last: a file of pairs is complete when this is there."""
    return folder / f"scores-{number:05d}.jsonl"


@dataclass
class _Maker:
    """Generates, scores and writes; what it needs is loaded at the first file."""

    config: MakePairsConfig
    pipeline: PipelineFolder
    size: tuple[int, int]
    cleaner: PromptCleaner
    ranker: Ranker
    folder: Path

    @cached_property
    def encoders(self) -> Encoders:
        return Encoders(self.pipeline, self.cleaner, default_device(), DTYPES[self.config.dtype])

    @cached_property
    def sampler(self) -> Sampler:
        checkpoint, config = load(self.pipeline, DTYPES[self.config.dtype]), self.config
        steps, guidance = config.num_inference_steps, config.guidance_scale
        return build_sampler(checkpoint, self.size, steps, guidance, default_device())

    def make(self, files: Mapping[int, Sequence[str]]) -> None:
        """Files by number, from the prompts of each."""
        for number, prompts in files.items():
            self._file(number, prompts)

    def _file(self, number: int, prompts: Sequence[str]) -> None:
        config = self.config
        seeds_PG = [noise_seeds(config.seed, prompt, config.num_generations) for prompt in prompts]
        images_PG = self._generate(prompts, seeds_PG)
        scores_PG = self.ranker.scores(prompts, images_PG).tolist()
        rows, lines = [], []
        for prompt, seeds, images, scores in zip(prompts, seeds_PG, images_PG, scores_PG, strict=True):
            found = couples(scores, config.pairs_per_prompt, config.min_gap)
            lines.append({"prompt": prompt, "scores": scores, "seeds": seeds, "pairs": len(found)})
            for couple in found:
                sides = dict(zip(("chosen", "rejected"), couple, strict=True))
                rows.append(
                    {
                        "prompt": prompt,
                        **{side: {"bytes": _png(images[i]), "path": None} for side, i in sides.items()},
                        **{f"{side}_score": scores[i] for side, i in sides.items()},
                        **{f"{side}_seed": seeds[i] for side, i in sides.items()},
                    }
                )
        _write_pairs(self.folder / f"train-{number:05d}.parquet", rows)
        write_jsonl(_scores_path(self.folder, number), lines)

    def _generate(self, prompts: Sequence[str], seeds_PG: Sequence[Sequence[int]]) -> list[list[Image.Image]]:
        embed, decode, size = self.encoders.prompts, self.encoders.codec.decode, self.config.num_generations
        repeated, seeds = [prompt for prompt in prompts for _ in range(size)], list(itertools.chain(*seeds_PG))
        images = list(generate_images(self.sampler, embed, decode, repeated, seeds, self.config.batch_size))
        return [images[i : i + size] for i in range(0, len(images), size)]


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _write_pairs(path: Path, rows: list[dict[str, Any]]) -> None:
    """A parquet file, or none if there are no pairs."""
    import datasets

    if not rows:
        return
    numbers = {"score": datasets.Value("float32"), "seed": datasets.Value("int64")}
    features = {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
    features |= {f"{side}_{name}": kind for side in ("chosen", "rejected") for name, kind in numbers.items()}
    datasets.disable_progress_bars()  # of a file that is written in a moment
    with replacing(path) as partial:
        datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(str(partial))


def _finish(config: MakePairsConfig, folder: Path, files: int, judged: Sequence[dict[str, Any]]) -> None:
    """Count, and say it. Raises PrxPostError if there is no pair.

    Args:
        judged: a judge's counts in each process, of this call.
    """
    lines = [json.loads(line) for i in range(files) for line in _scores_path(folder, i).read_text().splitlines()]
    pairs, without = sum(line["pairs"] for line in lines), sum(not line["pairs"] for line in lines)
    alike = sum(len(set(line["scores"])) == 1 for line in lines)
    told = json.loads((folder / MARK).read_text(encoding="utf-8"))
    counts = {"prompts": len(lines), "pairs": pairs, "prompts_without_a_pair": without, "prompts_scored_alike": alike}
    sums = {name: sum(one[name] or 0 for one in judged) for name in judged[0]} if judged else {}
    write_json(folder / MARK, {**told, "counts": counts, **({"judge_in_last_call": sums} if sums else {})})
    if not pairs:
        raise PrxPostError(
            f"no two images of a prompt differ by more than min_gap ({config.min_gap:g}); of {len(lines)} prompts, the "
            f"images of {alike} all score alike. Choose another reward, a lower min_gap or more "
            f"num_generations, in another output_dir."
        )
    print(
        f"{pairs} pairs of {len(lines)} prompts in {folder}; {without} prompts gave none, {alike} of them scored alike"
    )
