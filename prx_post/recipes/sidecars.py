"""An own folder of images, each with its caption in a file of the same name -> metadata.jsonl beside them."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prx_post.base.errors import PrxPostError
from prx_post.base.files import write_jsonl
from prx_post.base.progress import Progress
from prx_post.base.settings import doc, require
from prx_post.data.folders import IMAGES, BesideImages, files_of
from prx_post.data.images import decode
from prx_post.recipes.tables import RecipeConfig

METADATA, PROBLEMS = "metadata.jsonl", "caption_problems.jsonl"


@dataclass
class SidecarConfig(RecipeConfig):
    """metadata.jsonl for images with sidecar captions."""

    image_dir: str | None = doc("Folder with the images and captions; folders in it are read too.", None)
    caption_extensions: list[str] = doc(
        "Extensions of caption files; the first that an image has counts.", [".txt", ".caption", ".json"]
    )
    caption_field: str = doc("Where a .json file holds the caption.", "caption")
    max_bad_fraction: float = doc(
        "Write nothing when more than this fraction of the images cannot be used.", 0.05, between=(0, 1)
    )
    overwrite: bool = doc("Replace a metadata.jsonl that is there.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_set("image_dir", "caption_extensions", "caption_field")
        for extension in self.caption_extensions:
            ok = extension.startswith(".") and extension.lower() not in IMAGES
            reason = "it is compared with the ends of file names"
            require(ok, "caption_extensions", extension, "like .txt", reason, "Write it with its dot")


def run(config: SidecarConfig) -> None:
    """Write metadata.jsonl. Raises PrxPostError if one is there, or too few images can be used."""
    folder = Path(str(config.image_dir)).expanduser()
    if not folder.is_dir():
        raise PrxPostError(f"image_dir is {config.image_dir!r}, but there is no such folder. Check the path.")
    metadata = folder / METADATA
    if metadata.exists() and not config.overwrite:
        raise PrxPostError(f"{metadata} is there already. Move it away, or set overwrite: true to replace it.")
    rows, problems, images = scan(folder, config)
    if not images:
        raise PrxPostError(f"image_dir is {config.image_dir!r}, which holds no image ({', '.join(IMAGES)}).")
    for name, count in Counter(problem["problem"] for problem in problems).most_common():
        first = next(p["file"] for p in problems if p["problem"] == name)
        print(f"{count:6}  {name}, such as {first}")
    write_jsonl(folder / PROBLEMS, problems)
    if problems:
        print(f"all of these are listed in {folder / PROBLEMS}")
    bad = images - len(rows)
    if not rows or bad > config.max_bad_fraction * images:
        raise PrxPostError(
            f"{bad} of {images} images cannot be used, but max_bad_fraction is {config.max_bad_fraction}. "
            f"Nothing was written to {metadata}. Fix them, or raise max_bad_fraction."
        )
    write_jsonl(metadata, rows)
    print(f"{len(rows)} of {images} images are in {metadata}")


def scan(folder: Path, config: SidecarConfig) -> tuple[list[dict[str, str]], list[dict[str, str]], int]:
    """Rows for metadata.jsonl, problems ({file, problem}), and the number of images."""
    files, extensions = files_of(folder), [extension.lower() for extension in config.caption_extensions]
    images, captions = files.ending(IMAGES), files.ending(extensions)
    beside = BesideImages(captions)
    rows, problems, used = [], [], set()
    for image in Progress(images, desc="reading", unit="image", leave=False, disable=None):
        name = image.relative_to(folder).as_posix()
        sidecar = beside(image, extensions)
        used.add(sidecar)
        try:
            caption = read_caption(sidecar, config.caption_field)
            decode(image.read_bytes())
        except CaptionError as error:
            problems.append({"file": name, "problem": str(error)})
        except OSError as error:
            problems.append({"file": name, "problem": "the image cannot be decoded", "detail": str(error)})
        else:
            rows.append({"file_name": name, "prompt": caption})
    for caption_file in sorted(set(captions) - used):
        name = caption_file.relative_to(folder).as_posix()
        problems.append({"file": name, "problem": "a caption without an image"})
    return rows, problems, len(images)


class CaptionError(Exception):
    """An image whose caption cannot be used."""


def read_caption(path: Path | None, json_field: str) -> str:
    """The caption in a text or JSON file, white space at its ends removed. Raises CaptionError if there is none."""
    if path is None:
        raise CaptionError("an image without a caption")
    try:
        text = path.read_text(encoding="utf-8-sig")
        value: Any = json.loads(text)[json_field] if path.suffix.lower() == ".json" else text
        str(value).encode()  # JSON may hold one half of a character
    except UnicodeError as error:
        raise CaptionError("the caption is not UTF-8") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CaptionError(f"the caption's JSON holds no {json_field!r}") from error
    if not isinstance(value, str) or not value.strip():
        raise CaptionError("the caption is empty")
    return value.strip()
