"""`prx-post generate`: images from prompts and seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

from prx_post import __version__
from prx_post.base.errors import PrxPostError
from prx_post.base.files import existing_file, make_folder, require_empty
from prx_post.base.parsing import parse
from prx_post.base.settings import doc
from prx_post.data.prompts import read_prompt_file
from prx_post.model.config import GENERATION_SAMPLERS, NOISE_LEVEL, DrawConfig, noise_level_of


@dataclass
class GenerateConfig(DrawConfig):
    """Images from prompts."""

    model_name_or_path: str | None = doc(
        "Folder or Hub id of a PRX pipeline; `tiny` is the embedded base.",
        None,
        required=("set", "it makes the images"),
    )
    model_revision: str | None = doc("Hub revision of the checkpoint.", None)
    adapter: str | None = doc("Folder of a LoRA adapter for it, such as a run's final-adapter.", None)
    sampler: str | None = doc(
        "`euler`, `renoise`, or `cps`, which stands between them; null: the checkpoint's own.",
        None,
        one_of=GENERATION_SAMPLERS,
    )
    noise_level: float | None = doc(
        f"Of `cps`: at 0 it is `euler`, at 1 `renoise`; null: {NOISE_LEVEL}.", None, between=(0, 1)
    )
    prompts: list[str] = doc("Prompts.", [])
    prompts_file: str | None = doc(
        "Text with a prompt on each line, or .jsonl, .json, .csv, .tsv with a `prompt` each.", None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        noise_level_of(self.sampler, self.noise_level)


def read_prompts(config: GenerateConfig) -> list[str]:
    """Prompts of the command line and of the file. Raises PrxPostError if there are none or the file is missing."""
    prompts = list(config.prompts)
    if config.prompts_file is not None:
        path = existing_file("prompts_file", config.prompts_file)
        prompts += [row["prompt"] for row in read_prompt_file(path)]
    if not prompts:
        raise PrxPostError("prompts is empty, but must hold at least one. Give --prompts or --prompts_file.")
    return prompts


def run(args: Sequence[str]) -> None:
    """`prx-post generate`"""
    (config,) = parse([GenerateConfig], args, "prx-post generate")
    generate(config)


def generate(config: GenerateConfig) -> None:
    """Write an image for every prompt and seed to `output_dir`. Raises PrxPostError before any model loads."""
    import torch

    from prx_post.base.progress import Progress
    from prx_post.data.encoders import Encoders
    from prx_post.model.checkpoint import DTYPES, load, open_pipeline
    from prx_post.model.inference import choose, describe
    from prx_post.model.lora import with_adapter
    from prx_post.model.sampler import build_sampler, default_device, generate_images, png_info
    from prx_post.model.scheduler import rescheduled
    from prx_post.model.text import PromptCleaner

    prompts = read_prompts(config)
    pipeline = with_adapter(open_pipeline(str(config.model_name_or_path), config.model_revision), config.adapter)
    chosen, own = choose(config, pipeline.inference)
    size = pipeline.resolve_size(chosen.height, chosen.width)
    output_dir = require_empty(config.output_dir)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device, dtype = default_device(), DTYPES[config.dtype]
    noise_level = noise_level_of(config.sampler, config.noise_level)
    print(describe(size, chosen, config.sampler or pipeline.sampler, own, noise_level))
    cleaner = PromptCleaner(chosen.skip_text_cleaning)
    cleaner.warn_of_lost(prompts)
    make_folder(output_dir)
    encoders = Encoders(pipeline, cleaner, device, dtype)
    checkpoint = load(pipeline, dtype)
    if config.sampler is not None:
        checkpoint.scheduler = rescheduled(checkpoint.scheduler, sampler=config.sampler)
    steps, guidance = chosen.num_inference_steps, chosen.guidance_scale
    sampler = build_sampler(checkpoint, size, steps, guidance, device, noise_level)

    jobs = [(prompt, seed) for prompt in prompts for seed in config.seeds]
    images = generate_images(
        sampler, encoders.prompts, encoders.codec.decode, [p for p, _ in jobs], [s for _, s in jobs], config.batch_size
    )
    for i, image in enumerate(Progress(images, total=len(jobs), desc="generating", unit="image", disable=None)):
        prompt, seed = jobs[i]
        settings = {
            "prompt": prompt,
            "seed": seed,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "sampler": config.sampler or pipeline.sampler,
            **({} if noise_level is None else {"noise_level": noise_level}),
            "height": size[0],
            "width": size[1],
            "checkpoint": config.model_name_or_path,
            **({} if config.adapter is None else {"adapter": config.adapter}),
            "dtype": config.dtype,
            "skip_text_cleaning": chosen.skip_text_cleaning,
            "software": f"prx-post {__version__}",
        }
        image.save(output_dir / f"{i:05d}.png", pnginfo=png_info(settings))
    print(f"{len(jobs)} image{'' if len(jobs) == 1 else 's'} in {output_dir}")
