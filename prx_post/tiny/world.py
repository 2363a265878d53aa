"""How numbers are split: by *value*, so a held-out number is never written by any training image, in any language."""

import random
from functools import cache

from prx_post.rewards.scorers.numbers import FORMS, LANGUAGES, NUMBERS, caption, number_of

__all__ = ["FORMS", "LANGUAGES", "NUMBERS", "caption", "number_of", "split_of_numbers"]

SPLIT_SEED = 20_26
SPLIT_SIZES = {"test": 120, "validation": 60}


@cache
def split_of_numbers() -> dict[str, tuple[int, ...]]:
    """The numbers of each split: `test` (120), `validation` (60) and `train` (the other 810), each ascending."""
    shuffled = random.Random(SPLIT_SEED).sample(NUMBERS, len(NUMBERS))
    splits, start = {}, 0
    for name, size in SPLIT_SIZES.items():
        splits[name] = tuple(sorted(shuffled[start : start + size]))
        start += size
    splits["train"] = tuple(sorted(shuffled[start:]))
    return splits
