"""From rows to samples: which rows are usable, and at which size."""

from dataclasses import dataclass

from tqdm import tqdm

from prx_post.base.ranks import ALONE, Ranks
from prx_post.data.buckets import Buckets, Size
from prx_post.data.cache import content_key
from prx_post.data.images import decode, image_size
from prx_post.data.rows import BadRow, ImageRows
from prx_post.model.text import PromptCleaner

EMPTY_CAPTION = "the caption is empty"
LOST_CAPTION = "prompt cleaning leaves nothing of the caption; set skip_text_cleaning: true to keep it"


@dataclass(frozen=True)
class Sample:
    """A usable row: its size in training, pixels, and its keys in the caches.

    Attributes:
        cleaned: the prompt as it is encoded.
        is_enlarged: whether its image is smaller than that size.
    """

    row: int
    prompt: str
    size: Size
    image_key: str
    prompt_key: str
    cleaned: str = ""
    is_enlarged: bool = False

    @classmethod
    def of(cls, row: int, prompt: str, cleaned: str, data: bytes, own: Size, size: Size) -> "Sample":
        """Of an image of size `own`, that is trained at `size`."""
        image_key, is_enlarged = f"{content_key(data)}-{size[0]}x{size[1]}", own[0] < size[0] or own[1] < size[1]
        return cls(row, prompt, size, image_key, content_key(cleaned), cleaned, is_enlarged)

    @property
    def has_changed_caption(self) -> bool:
        """Whether cleaning changes more than its case and white space."""
        return self.cleaned.casefold().split() != self.prompt.casefold().split()


def scan(
    rows: ImageRows, buckets: Buckets, cleaner: PromptCleaner, decode_all: bool, ranks: Ranks = ALONE
) -> tuple[list[Sample], list[BadRow]]:
    """Sort this process's rows into usable samples and bad rows, from captions and image headers (or images)."""
    samples, bad = [], []
    for row in tqdm(
        ranks.share(range(len(rows))), desc="scanning", unit="row", leave=False, disable=ranks.hides_progress
    ):
        prompt = rows.prompts[row] or ""
        cleaned = cleaner(prompt)
        if not is_visible(cleaned):
            bad.append(BadRow(row, rows.name(row), LOST_CAPTION if is_visible(prompt) else EMPTY_CAPTION))
            continue
        try:
            data = rows.image_bytes(row)
            own = image_size(data)
            if decode_all:
                decode(data)
        except OSError as error:
            bad.append(BadRow(row, rows.name(row), str(error)))
            continue
        samples.append(Sample.of(row, prompt, cleaned, data, own, buckets(*own)))
    return samples, bad


def is_visible(text: str) -> bool:
    """Whether there is anything to see: spaces without width, say, are nothing."""
    return any(letter.isprintable() and not letter.isspace() for letter in text)
