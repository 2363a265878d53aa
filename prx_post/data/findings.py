"""What a data set turned out to hold, in one line, so that nothing is lost in silence."""

from collections import Counter
from collections.abc import Iterable, Sequence

from prx_post.data.scan import Sample

SHOWN_SIZES = 6


def findings(images: str, samples: Sequence[Sample], notes: Iterable[str], max_tokens: int) -> list[str]:
    """In parts: images and their sizes in training, width x height, and what is done to some images or captions.

    Args:
        images: how many of what they are, such as "12 images".
        notes: what was found beside the samples.
        max_tokens: at which captions are cut.
    """
    parts = [f"{images}, {_sizes(samples)}", *notes]
    enlarged = sum(sample.is_enlarged for sample in samples)
    if enlarged:
        parts.append(f"{_count(enlarged, 'image')} smaller than that and enlarged")
    captions = {sample.prompt: sample for sample in samples}.values()
    changed = sum(sample.has_changed_caption for sample in captions)
    if changed:
        parts.append(f"{_count(changed, 'caption')} changed by cleaning")
    cut = sum(sample.tokens > max_tokens for sample in captions)
    if cut:
        parts.append(f"{_count(cut, 'caption')} longer than {max_tokens} tokens and cut there")
    return parts


def describe(name: str, images: str, samples: Sequence[Sample], notes: Iterable[str], max_tokens: int) -> str:
    """The same in one line."""
    return f"{name}: {'; '.join(findings(images, samples, notes, max_tokens))}"


def counted(kept: int, total: int, what: str) -> str:
    """How many there are of `what`, and of how many if some are left out."""
    return f"{total} {what}" if kept == total else f"{kept} of {total} {what}"


def _count(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def _sizes(samples: Sequence[Sample]) -> str:
    counts = Counter(sample.size for sample in samples).most_common()
    if len(counts) == 1:
        (height, width), _ = counts[0]
        return f"all {width}x{height}"
    shown = [f"{count} {width}x{height}" for (height, width), count in counts[:SHOWN_SIZES]]
    rest = len(counts) - SHOWN_SIZES
    return ", ".join([*shown, *([f"and {rest} more sizes"] if rest > 0 else [])])
