"""Numbers, their split, and their captions in digits and in words.

Numbers are split by *value*: a held-out number is never written by any training picture, in any language.
"""

import random
import re
from functools import cache

from num2words import num2words

LANGUAGES = ("en", "fr", "de", "es", "it")
FORMS = ("digits", *LANGUAGES)
NUMBERS = tuple(range(10, 1000))
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


@cache
def caption(number: int, form: str) -> str:
    """`number` as digits ("472") or in the words of a language ("four hundred and seventy-two")."""
    return str(number) if form == "digits" else num2words(number, lang=form)


@cache
def _numbers_by_caption() -> dict[str, int]:
    return {_normalise(caption(number, form)): number for number in NUMBERS for form in FORMS}


def _normalise(text: str) -> str:
    # The pipeline's cleaner lowercases and turns the hyphens of a word with more than three of them into spaces.
    return re.sub(r"[\s\-]+", " ", text.strip().lower())


def number_of(prompt: str) -> int | None:
    """The number a caption asks for, or None if `prompt` is not a caption of this world."""
    return _numbers_by_caption().get(_normalise(prompt))
