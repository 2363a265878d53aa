"""What a student of few steps points to along its path, under Euler's steps and others: exact match of x0 by level.

    python benchmarks/student_path.py --output runs/student-path by-level=runs/demo/distill-ladd-8/final \
        regression=runs/demo/distill/final                                 # after `make ladd` and `make distill`

A student may say rightly where an image lies and still be led astray: Euler's step keeps the noise that it began
with, which in training never stood beside an image of its own. path.svg in the output shows it.
"""

import argparse
from pathlib import Path

import torch
from plotting import lines

from prx_post.data.encoders import Encoders
from prx_post.data.prompts import read_prompt_file
from prx_post.flow import inference_sigmas, x0_from_velocity
from prx_post.model.checkpoint import load, open_pipeline
from prx_post.model.codec import to_images
from prx_post.model.sampler import Sampler, build_sampler
from prx_post.model.scheduler import rescheduled
from prx_post.model.text import PromptCleaner
from prx_post.rewards import registry

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SAMPLERS = ("euler", "renoise")
READERS = ("ocr_exact", "judge_exact")


def pointed_to(sampler: Sampler, encoders: Encoders, prompts: list[str], batch: int) -> list[torch.Tensor]:
    """The clean samples that each step's velocity points to, [N, C, H, W] a step."""
    steps = sampler.num_inference_steps
    sigmas = inference_sigmas(sampler.scheduler, steps)
    found: list[list[torch.Tensor]] = [[] for _ in range(steps)]
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        seeds = range(start, start + len(part))
        embeds = [encoders.prompts(prompt) for prompt in part]
        sampler.latents(embeds, encoders.prompts(""), seeds, record=lambda x, v, seen=seen: seen.append((x, v)))
        for i, (x_t, velocity) in enumerate(seen):
            found[i].append(x0_from_velocity(x_t, velocity, sigmas[i].expand(len(part))))
    return [torch.cat(parts) for parts in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="name=folder of a student each")
    parser.add_argument("--prompts_file", type=Path, default=ROOT / "runs/demo/data/prompts-test.jsonl")
    parser.add_argument("--num_prompts", type=int, default=240)
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS))
    parser.add_argument("--output", type=Path, default=ROOT / "runs/student-path")
    given = parser.parse_args()
    every = [row["prompt"] for row in read_prompt_file(given.prompts_file)]
    prompts = every[:: max(1, len(every) // given.num_prompts)][: given.num_prompts]
    readers, curves, levels = {name: registry.load(name) for name in READERS}, {}, [1.0]
    print("exact match of x0 after each step, OCR / judge")
    for text in given.checkpoints:
        name, _, folder = text.partition("=")
        pipeline = open_pipeline(folder)
        settings, checkpoint = pipeline.inference, load(pipeline)
        assert settings is not None
        encoders, scheduler = Encoders(pipeline, PromptCleaner(), CPU, torch.float32), checkpoint.scheduler
        size = pipeline.resolve_size(settings.height or 32, settings.width or 64)
        for way in given.samplers:
            checkpoint.scheduler = rescheduled(scheduler, sampler=way)
            sampler = build_sampler(checkpoint, size, settings.num_inference_steps, 1.0, CPU)
            levels = inference_sigmas(sampler.scheduler, settings.num_inference_steps)[:-1].tolist()
            scores = []
            for x0 in pointed_to(sampler, encoders, prompts, 60):
                images = to_images(encoders.codec.decode(x0))
                scores.append([reader(images, prompts).mean().item() for reader in readers.values()])
            print(f"| {name}, {way} | " + " | ".join(" / ".join(f"{s:.3f}" for s in pair) for pair in scores) + " |")
            curves[f"{name}, {way}"] = [(i, pair[0]) for i, pair in enumerate(scores, start=1)]
    given.output.mkdir(parents=True, exist_ok=True)
    steps = len(levels)
    ends = (f"step 1, level {levels[0]:g}", f"step {steps}, level {levels[-1]:.2g}")
    (given.output / "path.svg").write_text(lines(curves, (1, steps), 0.0, ends))


if __name__ == "__main__":
    main()
