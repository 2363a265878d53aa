"""`prx-post data preview DATASET`: a data set as it would be trained on, as a page: crops, captions, what is lost."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prx_post.base.files import make_folder, write_bytes
from prx_post.base.pages import data_uri, page_template
from prx_post.base.parsing import parse
from prx_post.base.ranks import ALONE
from prx_post.base.settings import doc
from prx_post.data.buckets import Buckets
from prx_post.data.config import DataConfig
from prx_post.data.encoders import Encoders
from prx_post.data.findings import counted, findings
from prx_post.data.images import decode
from prx_post.data.readers import read_rows
from prx_post.data.rows import BadRow, DataError, ImageRows
from prx_post.data.scan import Sample
from prx_post.data.scan_memory import scanned
from prx_post.model.checkpoint import open_pipeline
from prx_post.model.codec import to_images, to_pixels
from prx_post.model.text import PromptCleaner

LISTED = 50
"""Captions or rows of a kind that are listed."""
BARS, WORDS = 24, 40


@dataclass
class PreviewConfig(DataConfig):
    """A data set as a checkpoint would be trained on it."""

    group = "data"

    model_name_or_path: str | None = doc(
        "Folder or Hub id of the pipeline that is to be trained: sizes, tokens and prompt cleaning are its own.",
        None,
        required=("a folder or a Hub id", "sizes and tokens depend on it"),
    )
    model_revision: str | None = doc("Hub revision (branch, tag or commit) of it.", None)
    images_per_size: int = doc("Images of each size that are shown, spread evenly over them.", 24, above=0)
    output_file: str = doc("The page.", "preview.html")


@dataclass(frozen=True)
class Caption:
    """One that is changed or cut: as it was written, what is encoded, and what is cut off."""

    name: str
    written: str
    kept: str
    lost: str = ""


def run(args: Sequence[str]) -> None:
    """`prx-post data preview`"""
    flags = list(args)
    if flags and not flags[0].startswith("-"):
        flags = ["--dataset_name", *flags]
    (config,) = parse([PreviewConfig], flags, "prx-post data preview")
    print(f"page in {preview(config)}")


def preview(config: PreviewConfig) -> Path:
    """Write the page. Returns its path. Raises PrxPostError if the data or the pipeline cannot be used."""
    pipeline = open_pipeline(str(config.model_name_or_path), config.model_revision)
    own = pipeline.inference
    size = config.fixed_size or ((own.height, own.width) if own else (None, None))
    buckets, cleaner = Buckets(pipeline, *size), PromptCleaner(config.skip_text_cleaning)
    rows = read_rows(config)
    encoders = Encoders(pipeline, cleaner, torch.device("cpu"), torch.float32)
    samples, bad = scanned(rows, buckets, encoders, False, Path(config.cache_dir).expanduser(), ALONE)
    if not samples:
        raise DataError(f"{len(rows)} of {len(rows)} rows cannot be used. The first is {bad[0].name}: {bad[0].reason}.")
    most = pipeline.max_prompt_tokens
    unreadable: list[BadRow] = []
    page = page_template("data/preview.html.j2").render(
        title=str(config.dataset_name),
        found=findings(counted(len(samples), len(rows), "images"), samples, rows.notes, most),
        pipeline=pipeline.source,
        sizes=[_size(size, samples, rows, config.images_per_size, unreadable) for size in _sizes(samples)],
        lengths=_lengths(samples, most),
        most=most,
        changed=_changed(samples, rows),
        cut=_cut(samples, rows, pipeline.load_tokenizer()),
        bad=[*bad, *unreadable][:LISTED],
        listed=LISTED,
    )
    path = Path(config.output_file).expanduser()
    make_folder(path.parent)
    write_bytes(path, page.encode("utf-8", "replace"))
    return path


def _sizes(samples: Sequence[Sample]) -> list[tuple[int, int]]:
    """The most frequent first."""
    counts: dict[tuple[int, int], int] = {}
    for sample in samples:
        counts[sample.size] = counts.get(sample.size, 0) + 1
    return sorted(counts, key=lambda size: -counts[size])


def _size(
    size: tuple[int, int], samples: Sequence[Sample], rows: ImageRows, count: int, unreadable: list[BadRow]
) -> dict[str, Any]:
    """Of the images of a size, a few as they are cropped; those that turn out broken are added to `unreadable`."""
    own = [sample for sample in samples if sample.size == size]
    shown = []
    for i in range(min(count, len(own))):
        sample = own[i * len(own) // min(count, len(own))]
        try:
            (image,) = to_images(to_pixels(decode(rows.image_bytes(sample.row)), *size)[None])
        except OSError as error:
            unreadable.append(BadRow(sample.row, rows.name(sample.row), str(error)))
            continue
        before = sample.own_size or size
        shown.append(
            {
                "uri": data_uri(image),
                "caption": sample.cleaned,
                "name": _short_name(rows, sample),
                "before": f"{before[1]}×{before[0]}",
                "is_enlarged": sample.is_enlarged,
            }
        )
    return {"title": f"{size[1]}×{size[0]}", "count": len(own), "images": shown, "aspect": size[1] / size[0]}


def _lengths(samples: Sequence[Sample], most: int) -> dict[str, Any]:
    """Captions by tokens, in bars up to the longest."""
    longest = max(most, max(sample.tokens for sample in samples))
    step = -(-longest // BARS)
    counts = [0] * (longest // step + 1)
    for sample in samples:
        counts[sample.tokens // step] += 1
    return {
        "bars": [(i * step, count, count / max(counts), i * step >= most) for i, count in enumerate(counts)],
        "longest": max(sample.tokens for sample in samples),
    }


def _changed(samples: Sequence[Sample], rows: ImageRows) -> list[Caption]:
    found = {sample.prompt: sample for sample in samples if sample.has_changed_caption}.values()
    return [Caption(_short_name(rows, s), s.prompt, s.cleaned) for s in list(found)[:LISTED]]


def _short_name(rows: ImageRows, sample: Sample) -> str:
    return Path(rows.name(sample.row)).name


def _cut(samples: Sequence[Sample], rows: ImageRows, tokenizer: Any) -> list[Caption]:
    """The longest first."""
    most = tokenizer.model_max_length
    found = sorted((sample for sample in samples if sample.tokens > most), key=lambda sample: -sample.tokens)[:LISTED]
    captions = []
    for sample in found:
        ids = tokenizer(sample.cleaned, truncation=False, verbose=False)["input_ids"]
        kept, lost = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[: most - 1], ids[most - 1 :]))
        captions.append(Caption(_short_name(rows, sample), sample.prompt, kept, _shortened(lost)))
    return captions


def _shortened(text: str) -> str:
    words = text.split()
    more = len(words) - WORDS
    return text if more <= 0 else f"{' '.join(words[:WORDS])} … and {more:,} more words"
