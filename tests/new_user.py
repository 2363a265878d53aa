"""The path of a new user, as the README has it: from `git clone` to images from an own folder of twelve JPEGs, timed.

    python tests/new_user.py            # in a temporary folder; about three minutes on two cores

tests/integration/test_new_user.py runs the same lines with what is installed already.
"""

import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
SECTION = "## Your own images"


def readme_lines() -> list[str]:
    """Of the block that turns a folder into images, without comments; continued lines are one."""
    section = (ROOT / "README.md").read_text().partition(SECTION)[2]
    block = section.partition("```bash\n")[2].partition("```")[0]
    lines = re.sub(r"\\\n\s*", " ", block).splitlines()
    return [re.sub(r"\s+# .*", "", line) for line in lines]


def make_images(folder: Path) -> None:
    """Twelve photographs, as far as that goes: JPEGs of several sizes, a caption beside each."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(12):
        height, width = [(480, 640), (640, 480), (512, 512)][i % 3]
        coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"img_{i:02d}.jpg")
        (folder / f"img_{i:02d}.txt").write_text(f"colours number {i}, blurred\n")


def run(line: str, folder: Path, environment: dict[str, str]) -> float:
    """Seconds that a line takes. Raises CalledProcessError if it fails."""
    began = time.perf_counter()
    subprocess.run(["bash", "-ec", line], cwd=folder, env=environment, check=True)
    return time.perf_counter() - began


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "prx-post"
        activate, *lines = readme_lines()
        first = [f"git clone --quiet {ROOT} {folder}", f"make -C {folder} .venv/installed"]
        taken = {line: run(line, Path(place), dict(os.environ)) for line in first}
        make_images(folder / "my" / "images")
        for line in lines:
            taken[line] = run(f"{activate} && {line}", folder, dict(os.environ))
        made = sorted((folder / "runs" / "images").glob("*.png"))
        for line, seconds in taken.items():
            print(f"{seconds:7.1f} s  {line}")
        print(f"{sum(taken.values()):7.1f} s  in all, to {len(made)} images of {Image.open(made[0]).size} pixels")


if __name__ == "__main__":
    main()
