"""Settings of images with captions. Imports nothing heavy."""

from dataclasses import dataclass

from prx_post.base.settings import check_fields, doc, require


@dataclass
class DataConfig:
    """Images with captions, and how they become latents and embeddings."""

    dataset_name: str | None = doc(
        "An image folder, a parquet file or a folder of them, or a Hub id.",
        None,
        required=("a folder, a parquet file or a Hub id", "there is nothing to train on"),
    )
    dataset_split: str = doc("Split to read.", "train")
    image_column: str = doc("Column with the images.", "image")
    prompt_column: str = doc("Column with the captions.", "prompt")
    height: int | None = doc(
        "Train at this height, pixels; null: aspect buckets of the checkpoint's size.", None, above=0
    )
    width: int | None = doc("Train at this width, pixels; set both or neither.", None, above=0)
    skip_text_cleaning: bool = doc(
        "Only light prompt cleaning, as the pipeline's flag of this name; use the same value at inference.", False
    )
    cache: str = doc(
        "`disk`: encode once, reuse across runs and stages; `none`: encode on the fly.",
        "disk",
        one_of=("disk", "none"),
    )
    cache_dir: str = doc("Folder of the latent and embedding cache.", "~/.cache/prx-post", resume="free")
    max_bad_fraction: float = doc("Stop when more than this fraction of the rows cannot be used.", 0.01, between=(0, 1))

    def __post_init__(self) -> None:
        check_fields(self)
        check_size(self.height, self.width)


@dataclass
class PairConfig:
    """Preference pairs: two images of one prompt, the first preferred; TRL's columns."""

    dataset_name: str | None = doc(
        "Preference pairs: a parquet file or a folder of them, an image folder, or a Hub id.",
        None,
        required=("a folder, a parquet file or a Hub id", "there is nothing to train on"),
    )
    dataset_split: str = doc("Split to read.", "train")
    prompt_column: str = doc("Column with the prompts.", "prompt")
    chosen_column: str = doc("Column with the preferred images.", "chosen")
    rejected_column: str = doc("Column with the other images.", "rejected")
    height: int | None = doc(
        "Train at this height, pixels; null: aspect buckets of the checkpoint's size, by the chosen image.",
        None,
        above=0,
    )
    width: int | None = doc("Train at this width, pixels; set both or neither.", None, above=0)
    skip_text_cleaning: bool = doc(
        "Only light prompt cleaning, as the pipeline's flag of this name; use the same value at inference.", False
    )
    cache_dir: str = doc("Folder of the latent and embedding cache.", "~/.cache/prx-post", resume="free")
    max_bad_fraction: float = doc(
        "Stop when more than this fraction of the pairs cannot be used.", 0.01, between=(0, 1)
    )

    def __post_init__(self) -> None:
        check_fields(self)
        check_size(self.height, self.width)


def check_size(height: int | None, width: int | None) -> None:
    """Raise ConfigError unless both are set, or neither."""
    reason, action = f"width is {width!r}", "Set both for one fixed size, or neither for aspect buckets"
    require((height is None) == (width is None), "height", height, "set together with width", reason, action)
