"""Which number a prompt names: in digits, or in the words of five languages."""

import re
from functools import cache

from num2words import num2words

LANGUAGES = ("en", "fr", "de", "es", "it")
FORMS = ("digits", *LANGUAGES)
NUMBERS = tuple(range(10, 1000))


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
    """The number a caption asks for, or None if it names none of NUMBERS in one of FORMS."""
    return _numbers_by_caption().get(_normalise(prompt))
