"""From rows to samples: which rows are usable, and at which size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prx_post.base.progress import Progress
from prx_post.base.ranks import ALONE, Ranks
from prx_post.data.buckets import Buckets, Size
from prx_post.data.cache import content_key
from prx_post.data.images import decode, image_size
from prx_post.data.rows import BadRow, ImageRows
from prx_post.model.text import PromptCleaner, count_tokens

EMPTY_CAPTION = "the caption is empty"
LOST_CAPTION = "prompt cleaning leaves nothing of the caption; set skip_text_cleaning: true to keep it"
AT_A_TIME = 1000
"""Captions that are tokenized together."""


@dataclass(frozen=True)
class Sample:
    """A usable row: its size in training, pixels, and its keys in the caches.

    Attributes:
        cleaned: the prompt as it is encoded.
        tokens: that the cleaned prompt has, before it is cut.
        own_size: of its image before it is resized; None of what has no image.
    """

    row: int
    prompt: str
    size: Size
    image_key: str
    prompt_key: str
    cleaned: str = ""
    tokens: int = 0
    own_size: Size | None = None

    @property
    def is_enlarged(self) -> bool:
        own = self.own_size or self.size
        return own[0] < self.size[0] or own[1] < self.size[1]

    @property
    def has_changed_caption(self) -> bool:
        """Whether cleaning changes more than its case and white space."""
        return self.cleaned.casefold().split() != self.prompt.casefold().split()


def scan(
    rows: ImageRows, buckets: Buckets, cleaner: PromptCleaner, tokenizer: Any, decode_all: bool, ranks: Ranks = ALONE
) -> tuple[list[Sample], list[BadRow]]:
    """Sort this process's rows into usable samples and bad rows, from captions and image headers (or images).

    Rows that are of use only together are bad together, and have the size that the first of them asks for.
    """
    each, samples, bad = rows.images_per_entry, list[Sample](), list[BadRow]()
    numbers = ranks.share(range(len(rows) // each))
    progress = Progress(total=len(numbers), desc="scanning", unit="row", leave=False, disable=ranks.hides_progress)
    for first in range(0, len(numbers), AT_A_TIME):
        part = numbers[first : first + AT_A_TIME]
        texts = [cleaner(rows.prompts[each * number] or "") for number in part]
        for number, text, tokens in zip(part, texts, count_tokens(tokenizer, texts), strict=True):
            progress.update()
            of_entry = range(each * number, each * (number + 1))
            if not is_visible(text):
                is_lost = is_visible(rows.prompts[of_entry[0]] or "")
                bad.append(BadRow(number, rows.entry_name(number), LOST_CAPTION if is_lost else EMPTY_CAPTION))
                continue
            try:
                samples += _images(rows, of_entry, buckets, text, tokens, decode_all)
            except _Unusable as error:
                bad.append(BadRow(number, rows.name(error.row), str(error)))
    progress.close()
    return samples, bad


class _Unusable(Exception):
    def __init__(self, row: int, reason: object) -> None:
        super().__init__(str(reason))
        self.row = row


def _images(
    rows: ImageRows, of_entry: Sequence[int], buckets: Buckets, cleaned: str, tokens: int, decode_all: bool
) -> list[Sample]:
    samples, size, key = list[Sample](), None, content_key(cleaned)
    for row in of_entry:
        try:
            data = rows.image_bytes(row)
            own = image_size(data)
            if decode_all:
                decode(data)
        except OSError as error:
            raise _Unusable(row, error) from error
        size = size or buckets(*own)
        image_key = f"{content_key(data)}-{size[0]}x{size[1]}"
        samples.append(Sample(row, rows.prompts[row] or "", size, image_key, key, cleaned, tokens, own))
    return samples


def is_visible(text: str) -> bool:
    """Whether there is anything to see: spaces without width, say, are nothing."""
    return any(letter.isprintable() and not letter.isspace() for letter in text)
