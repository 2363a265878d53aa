"""Kill many short runs at random moments and inside saves, resume them, and compare with one never killed.

python benchmarks/reliability.py [--trials 100] [--seed 0]
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.conftest import numbered_images
from tests.faults import kill_trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from prx_post.tiny.datasets import write_folder

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_folder(numbered_images(list(range(100, 148))), root / "images")
        found = kill_trials(root / "images", root / "cache", root, options.trials, options.seed)
    print("| trials | SIGKILLs | of them inside a save | starts from a checkpoint | lost or not bit-identical |")
    print("|---|---|---|---|---|")
    print(
        f"| {found.trials} | {found.kills} | {found.kills_in_a_save} | {found.resumed} "
        f"| {found.lost_or_changed or 'none'} |"
    )


if __name__ == "__main__":
    main()
