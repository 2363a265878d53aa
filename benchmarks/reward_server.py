"""Images/s of a reward behind `prx-post reward-serve`, against the same reward in process.

    python benchmarks/reward_server.py [--rounds 5] [--images 128] [--clients 1 8] [--sizes 64 512]

Two rewards: `ocr`, whose network takes about a millisecond an image, so that carrying the image is most of the work;
and a CLIP ViT-B/32 with random weights, which is the size of network that preference rewards start at. The server is a
process on the same machine and clients are threads of this one, so that both share its cores, which a server on another
machine would not. All ways run in turn, round after round; ratios are taken within a round, and the median is reported.
Every score of the server is compared with the one in process.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prx_post.rewards.registry import load
from prx_post.rewards.reward import Reward
from prx_post.tiny.handwriting import write_number

BATCH = 16
CLIP = """
import numpy as np
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

torch.manual_seed(0)
model = CLIPVisionModel(CLIPVisionConfig()).eval()


@torch.no_grad()
def clip(images, prompts):
    pixels = np.stack([np.asarray(image.resize((224, 224))) for image in images]).astype(np.float32) / 127.5 - 1
    return model(torch.from_numpy(pixels).permute(0, 3, 1, 2)).pooler_output.mean(-1)
"""
TOLERANCE = 1e-4
"""The last bits of a network's output depend on which images share its batch."""


def square_numbers(count: int, size: int) -> tuple[list[Image.Image], list[str]]:
    """Handwritten numbers in a square, with a little noise: like generated images, they hardly compress."""
    rng = np.random.default_rng(size)
    numbers = [int(n) for n in rng.integers(10, 1000, size=count)]
    drawn = [np.asarray(write_number(n, "reference", rng).resize((size, size))) for n in numbers]
    noisy = [(pixels + rng.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8) for pixels in drawn]
    return [Image.fromarray(pixels) for pixels in noisy], [str(n) for n in numbers]


@contextmanager
def served(targets: Sequence[str]) -> Iterator[str]:
    """The URL of a server of these rewards, with as many threads as this process."""
    settings = ["--port", "0", "--batch_size", str(BATCH), "--num_threads", str(torch.get_num_threads())]
    command = [sys.executable, "-m", "prx_post.cli", "reward-serve", "--rewards", *targets, *settings]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line.startswith("serving "):
                raise SystemExit("the server did not start; its message is above")
            yield line.split()[-1]
        finally:
            process.terminate()


def in_process(reward: Reward, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
    parts = [slice(start, start + BATCH) for start in range(0, len(images), BATCH)]
    return torch.cat([reward(images[part], prompts[part]) for part in parts])


def by_clients(remotes: Sequence[Reward], images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
    """Each client has its share, and asks for all of it at once."""
    bounds = [round(i * len(images) / len(remotes)) for i in range(len(remotes) + 1)]
    parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
    with ThreadPoolExecutor(len(remotes)) as threads:
        scores = threads.map(lambda remote, part: remote(images[part], prompts[part]), remotes, parts)
        return torch.cat(list(scores))


def measure(target: str, url: str, clients: Sequence[int], count: int, size: int, rounds: int) -> list[list[float]]:
    """Images/s, a list a round: in process, then with each number of clients."""
    reward, remotes = load(target), [load(url) for _ in range(max(clients))]
    images, prompts = square_numbers(count, size)
    expected = in_process(reward, images, prompts)
    by_clients(remotes, images, prompts)  # opens the connections
    speeds = []
    for _ in range(rounds):
        began = time.perf_counter()
        in_process(reward, images, prompts)
        speeds.append([count / (time.perf_counter() - began)])
        for number in clients:
            began = time.perf_counter()
            scores = by_clients(remotes[:number], images, prompts)
            speeds[-1].append(count / (time.perf_counter() - began))
            torch.testing.assert_close(scores, expected, rtol=0, atol=TOLERANCE)
        print(target.rpartition(":")[2], size, [round(speed, 1) for speed in speeds[-1]], flush=True)
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 512])
    options = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "reward.py"
        file.write_text(CLIP)
        targets = {"ocr": "ocr", "clip": f"{file}:clip"}
        with served(list(targets.values())) as url:
            for name, target in targets.items():
                for size in options.sizes:
                    one = (target, f"{url}/{name}", options.clients, options.images, size, options.rounds)
                    speeds = measure(*one)
                    alone = statistics.median(speed[0] for speed in speeds)
                    for i, number in enumerate(options.clients, start=1):
                        through = statistics.median(speed[i] for speed in speeds)
                        ratio = statistics.median(speed[i] / speed[0] for speed in speeds)
                        lines.append(f"| {name} | {size} px | {number} | {alone:.0f} | {through:.0f} | {ratio:.2f} |")
    print("\n| reward | images | clients | in process, images/s | server, images/s | server / in process |")
    print("\n".join(["|---|---|---|---|---|---|", *lines]))
    threads = torch.get_num_threads()
    print(
        f"\n{threads} threads each, torch {torch.__version__}, batches of {BATCH}, {options.images} images, "
        f"{options.rounds} rounds."
    )


if __name__ == "__main__":
    main()
