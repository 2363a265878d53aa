"""Pictures from a checkpoint: the sampler that training, evaluation and `prx-post generate` share."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from prx_post import __version__
from prx_post.config import (
    PrxPostError,
    check_types,
    doc,
    make_folder,
    require,
    require_empty,
    require_guidance,
    require_one_of,
    require_positive,
)
from prx_post.data.encoding import Encoders
from prx_post.data.prompts import read_prompt_lines, read_prompt_rows
from prx_post.flow import inference_sigmas, seeded_noise
from prx_post.model.checkpoint import DTYPES, Checkpoint, load, open_pipeline
from prx_post.model.codec import to_images
from prx_post.model.denoiser import guided
from prx_post.model.text import PromptCleaner, pad_embeddings
from prx_post.parsing import parse
from prx_post.sampling import euler_sample, renoise_sample

Embed = Callable[[str], Tensor]
"""prompt -> embedding without padding, [L, D]"""


@dataclass
class Sampler:
    """Draws pictures from a transformer, many at a time, with and without guidance.

    The noise of a picture is that of `torch.Generator().manual_seed(seed)`, so in float32 one picture equals what
    PRXPipeline makes with that generator. (PRXPipeline itself fails on guided batches.) Whatever the transformer's
    precision, the trajectory is kept in float32. A scheduler with `stochastic_sampling` re-noises between steps.
    """

    transformer: Any
    scheduler: Any
    num_inference_steps: int
    guidance_scale: float
    latent_shape: tuple[int, int, int]
    device: torch.device
    pad_length: int
    """Tokens that prompts are padded to; the tokenizer's model_max_length, as in the pipeline."""
    autocast: bool = False
    """bfloat16 autocast, for a transformer whose weights are float32 while it is trained so."""

    @torch.no_grad()
    def latents(
        self,
        embeddings: Sequence[Tensor],
        null: Tensor,
        seeds: Sequence[int],
        record: Callable[[Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """One picture for each embedding and seed. Returns latents [B, C, H/f, W/f] fp32.

        Args:
            record: called with x_t and the (guided) velocity of every step, [B, C, H/f, W/f] each.
        """
        dtype = next(self.transformer.parameters()).dtype

        def pad(embeds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            return pad_embeddings([e.to(self.device, dtype) for e in embeds], self.pad_length)

        uncond = pad([null] * len(embeddings)) if self.guidance_scale > 1 else None
        velocity = guided(self.transformer, pad(embeddings), uncond, self.guidance_scale)

        def step(x_t: Tensor, t: Tensor) -> Tensor:
            predicted = velocity(x_t.to(dtype), t)
            if record is not None:
                record(x_t, predicted)
            return predicted

        noise = seeded_noise(seeds, self.latent_shape).to(self.device)
        sigmas = inference_sigmas(self.scheduler, self.num_inference_steps)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            if self.scheduler.config.stochastic_sampling:
                return renoise_sample(step, noise, sigmas, lambda number: self.fresh_noise(seeds, number))
            return euler_sample(step, noise, sigmas)

    def fresh_noise(self, seeds: Sequence[int], step: int) -> Tensor:
        """What a re-noising sampler adds after step `step`, counted from 1."""
        mixed = [np.random.SeedSequence([seed, step]).generate_state(1)[0] for seed in seeds]
        return seeded_noise([int(seed) for seed in mixed], self.latent_shape).to(self.device)


def generate_images(
    sampler: Sampler,
    embed: Embed,
    decode: Callable[[Tensor], Tensor],
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
) -> Iterator[Image.Image]:
    """Pictures of `prompts[i]` from noise `seeds[i]`, in order."""
    memo: dict[str, Tensor] = {}
    for prompt in ["", *prompts]:
        if prompt not in memo:
            memo[prompt] = embed(prompt)
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        latents = sampler.latents([memo[p] for p in prompts[part]], memo[""], seeds[part])
        yield from to_images(decode(latents))


def grid(images: list[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Put pictures of one size in rows of `columns`, `gap` pixels apart."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), (200, 200, 200))
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    return sheet


@dataclass
class DrawConfig:
    """How pictures are drawn, and where they go; `generate` and `eval` extend it."""

    num_inference_steps: int = doc("Sampler steps.", 28)
    guidance_scale: float = doc("Classifier-free guidance; 1 switches it off.", 5.0)
    seeds: list[int] = doc("Noise seeds; every prompt is drawn once with each.", [0])
    height: int | None = doc("Height, pixels; null: the checkpoint's default_sample_size.", None)
    width: int | None = doc("Width, pixels; null: the checkpoint's default_sample_size.", None)
    batch_size: int = doc("Pictures at a time.", 8)
    skip_text_cleaning: bool = doc("Only light prompt cleaning; as in training.", False)
    dtype: str = doc("Precision of the transformer and text encoder: `float32` or `bfloat16`.", "float32")
    output_dir: str | None = doc("Folder for what is made; must be new or empty.", None)
    num_threads: int = doc("CPU threads torch may use; 0 leaves torch's own choice.", 0)

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("output_dir", "seeds"):
            value = getattr(self, name)
            require(bool(value), name, value, "set", "the command needs it", f"Set {name}")
        require_positive(self, "num_inference_steps", "batch_size")
        require_one_of("dtype", self.dtype, tuple(DTYPES))
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        require_guidance(self.guidance_scale)
        for seed in self.seeds:
            rule, reason = "from 0 to 2^31 - 1", "noise seeds are made of it"
            require(0 <= seed < 2**31, "seeds", seed, rule, reason, "Choose other seeds")


@dataclass
class GenerateConfig(DrawConfig):
    """Pictures from prompts."""

    model_name_or_path: str | None = doc("Folder or Hub id of a PRX pipeline; `tiny` is the embedded base.", None)
    model_revision: str | None = doc("Hub revision of the checkpoint.", None)
    prompts: list[str] = doc("Prompts.", [])
    prompts_file: str | None = doc("A text file with a prompt a line; or .jsonl or .json with a `prompt` each.", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        value = self.model_name_or_path
        require(bool(value), "model_name_or_path", value, "set", "it makes the pictures", "Set model_name_or_path")


def read_prompts(config: GenerateConfig) -> list[str]:
    """Prompts of the command line and of the file. Raises PrxPostError if there are none or the file is missing."""
    prompts = list(config.prompts)
    if config.prompts_file is not None:
        path = existing_file("prompts_file", config.prompts_file)
        rows = read_prompt_rows(path) if path.suffix in (".json", ".jsonl") else read_prompt_lines(path)
        prompts += [row["prompt"] for row in rows]
    if not prompts:
        raise PrxPostError("prompts is empty, but must hold at least one. Give --prompts or --prompts_file.")
    return prompts


def existing_file(name: str, value: str) -> Path:
    path = Path(value).expanduser()
    if not path.is_file():
        raise PrxPostError(f"{name} is {value!r}, but there is no such file. Check the path.")
    return path


def default_device() -> torch.device:
    """The GPU of this process (by LOCAL_RANK, where a launcher set it), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def build_sampler(
    checkpoint: Checkpoint, size: tuple[int, int], num_inference_steps: int, guidance_scale: float, device: torch.device
) -> Sampler:
    pipeline = checkpoint.pipeline
    return Sampler(
        transformer=checkpoint.transformer.to(device).eval(),
        scheduler=checkpoint.scheduler,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        latent_shape=pipeline.latent_shape(*size),
        device=device,
        pad_length=pipeline.max_prompt_tokens,
    )


def run(args: Sequence[str]) -> None:
    """`prx-post generate`"""
    (config,) = parse([GenerateConfig], args, "prx-post generate")
    prompts = read_prompts(config)
    pipeline = open_pipeline(config.model_name_or_path, config.model_revision)
    size = pipeline.resolve_size(config.height, config.width)
    output_dir = require_empty(config.output_dir)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device, dtype = default_device(), DTYPES[config.dtype]
    cleaner = PromptCleaner(config.skip_text_cleaning)
    cleaner.warn_of_lost(prompts)
    make_folder(output_dir)
    encoders = Encoders(pipeline, cleaner, device, dtype)
    checkpoint = load(pipeline, dtype)
    sampler = build_sampler(checkpoint, size, config.num_inference_steps, config.guidance_scale, device)

    jobs = [(prompt, seed) for prompt in prompts for seed in config.seeds]
    pictures = generate_images(
        sampler, encoders.prompts, encoders.codec.decode, [p for p, _ in jobs], [s for _, s in jobs], config.batch_size
    )
    for i, image in enumerate(tqdm(pictures, total=len(jobs), desc="generating", unit="image")):
        prompt, seed = jobs[i]
        settings = {
            "prompt": prompt,
            "seed": seed,
            "num_inference_steps": config.num_inference_steps,
            "guidance_scale": config.guidance_scale,
            "height": size[0],
            "width": size[1],
            "checkpoint": config.model_name_or_path,
            "dtype": config.dtype,
            "skip_text_cleaning": config.skip_text_cleaning,
            "software": f"prx-post {__version__}",
        }
        image.save(output_dir / f"{i:05d}.png", pnginfo=png_info(settings))
    print(f"{len(jobs)} pictures in {output_dir}")


def png_info(settings: dict[str, Any]) -> PngInfo:
    """Settings as PNG text chunks, one each."""
    info = PngInfo()
    for name, value in settings.items():
        info.add_itxt(name, str(value))
    return info
