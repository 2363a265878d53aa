"""Images/s of each scorer: in batches, and one call an image as the published packages score.

    python benchmarks/rewards.py [--rounds 5] [--images 32] [--batch 16] [--threads 2]

The networks have the published kinds of layers and the published input of 224×224, but random weights, fewer layers
and smaller widths: what a batch gains depends on those and on the machine, so measure again where it matters. The two
ways run in turn, round after round, on the same images and prompts (as in GRPO, eight images a prompt); ratios are
taken within a round. The largest difference between the two ways' scores is shown beside.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from PIL import Image

from prx_post.rewards import registry
from tests.scorer_checkpoints import CHECKPOINTS, Size

SIZE = Size(image=224, layers=4, times=4)
IMAGES_A_PROMPT = 8


def samples(count: int) -> tuple[list[Image.Image], list[str]]:
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]
    words = ["red", "blue", "cat", "dogs", "photo"]
    prompts = [f"a {' '.join(rng.choice(words, 6))}" for _ in range(-(-count // IMAGES_A_PROMPT))]
    return [image.resize((512, 512)) for image in noise], [prompts[i // IMAGES_A_PROMPT] for i in range(count)]


def timed(score: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Seconds, and the scores."""
    began = time.perf_counter()
    scores = score()
    return time.perf_counter() - began, scores


def compare(name: str, reward: registry.Reward, rounds: int, count: int) -> str:
    """A row of the table."""
    images, prompts = samples(count)
    pairs = list(zip(images, prompts, strict=True))
    reward(images[:1], prompts[:1])  # loads the network
    together, alone, difference = [], [], 0.0
    for _ in range(rounds):
        seconds, scores = timed(lambda: reward(images, prompts))
        together.append(count / seconds)
        seconds, one_by_one = timed(lambda: torch.cat([reward([image], [prompt]) for image, prompt in pairs]))
        alone.append(count / seconds)
        difference = max(difference, (scores - one_by_one).abs().max().item())
    ratio = statistics.median(a / b for a, b in zip(together, alone, strict=True))
    rates = f"{statistics.median(together):.1f} | {statistics.median(alone):.1f}"
    return f"| {name} | {rates} | {ratio:.2f}× | {difference:.0e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, write in CHECKPOINTS.items():
            folder = Path(temporary) / name
            folder.mkdir()
            write(folder, SIZE)
            reward = registry.load(name, weights=str(folder), device="cpu", batch_size=options.batch)
            rows.append(compare(name, reward, options.rounds, options.images))
            print(rows[-1], flush=True)
    rows.append(compare("jpeg_compressibility", registry.load("jpeg_compressibility"), options.rounds, options.images))
    print(f"\n| scorer | images/s in batches of {options.batch} | one by one | ratio | scores differ by |")
    print("|---|---|---|---|---|")
    print("\n".join(rows))
    machine = f"{options.threads} threads, torch {torch.__version__}"
    print(f"\n{machine}, {options.rounds} rounds of {options.images} images.")


if __name__ == "__main__":
    main()
