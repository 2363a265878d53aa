"""Settings of what is trained on, and how it becomes latents and embeddings. Imports nothing heavy."""

from collections.abc import Iterable
from dataclasses import dataclass

from prx_post.base.settings import check_fields, doc, require

DATASET = (
    "A folder of images with a metadata.jsonl, metadata.csv or a text file beside each; a parquet file or a folder of "
    "them; a folder of `save_to_disk` or of MDS shards; or a Hub id"
)
CAPTION_COLUMNS = ("prompt", "text", "caption")
"""Where captions are looked for, in this order."""


def caption_column(names: Iterable[str]) -> str | None:
    """The column with the captions, of these; None if none has a known name."""
    known = set(names)
    return next((name for name in CAPTION_COLUMNS if name in known), None)


@dataclass
class EncodersConfig:
    """How prompts, and images if there are any, are encoded, and where the result is kept."""

    group = "data"

    skip_text_cleaning: bool = doc(
        "Only light prompt cleaning, as the pipeline's flag of this name; use the same value at inference.", False
    )
    cache_dir: str = doc("Folder of the latent and embedding cache.", "~/.cache/prx-post", resume="free")
    encode_batch_size: int = doc(
        "Images of one size, or prompts of about one length, that are encoded at a time. 1 gives what the pipeline "
        "gives, to the bit; more differs by rounding.",
        1,
        above=0,
        resume="free",
    )
    dataloader_num_workers: int = doc(
        "Processes that read, decode and resize images to encode; 0: none but this.", 0, at_least=0, resume="free"
    )


@dataclass
class EncodingConfig(EncodersConfig):
    """Of images of one size, or of aspect buckets."""

    group = "data"

    height: int | None = doc(
        "Train at this height, pixels; null: aspect buckets of the checkpoint's size.", None, above=0
    )
    width: int | None = doc("Train at this width, pixels; set both or neither.", None, above=0)

    def __post_init__(self) -> None:
        check_fields(self)
        reason, action = f"width is {self.width!r}", "Set both for one fixed size, or neither for aspect buckets"
        ok = (self.height is None) == (self.width is None)
        require(ok, "height", self.height, "set together with width", reason, action)

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """Height and width, pixels; None: aspect buckets."""
        return None if self.height is None or self.width is None else (self.height, self.width)


@dataclass
class PromptConfig(EncodingConfig):
    """Prompts of images that the policy generates."""

    group = "data"

    prompts_file: str | None = doc(
        "Prompts: text with one on each line, or .jsonl, .json, .csv, .tsv with a `prompt` each; rewards may read the "
        "other columns.",
        None,
        required=("a file", "images are generated of prompts"),
    )
    height: int | None = doc("Height of images, pixels; null: the checkpoint's default_sample_size.", None, above=0)
    width: int | None = doc("Width of images, pixels; set both or neither.", None, above=0)


@dataclass
class EncodedData(EncodingConfig):
    """Images of prompts, encoded once."""

    group = "data"

    dataset_name: str | None = doc(f"{DATASET}.", None)
    dataset_split: str | None = doc(
        "Split to read: of local files those whose name, or whose folder's, begins so. null: all; of the Hub train.",
        None,
    )
    prompt_column: str | None = doc("Column with the prompts; null: `prompt`, else `text`, else `caption`.", None)
    max_bad_fraction: float = doc("Stop when more than this fraction of the rows cannot be used.", 0.01, between=(0, 1))


@dataclass
class DataConfig(EncodedData):
    """Images with captions."""

    group = "data"

    dataset_name: str | None = doc(
        f"{DATASET}.",
        None,
        required=("a folder, a parquet file or a Hub id", "there is nothing to train on"),
    )
    prompt_column: str | None = doc("Column with the captions; null: `prompt`, else `text`, else `caption`.", None)
    image_column: str = doc("Column with the images.", "image")
    cache: str = doc(
        "`disk`: encode once, reuse across runs and stages; `none`: encode on the fly.",
        "disk",
        one_of=("disk", "none"),
    )


@dataclass
class PreferenceConfig(EncodedData):
    """What is preferred to what: pairs of images of one prompt, or images labelled good or bad. TRL's columns.

    Both images of a pair are trained at the chosen one's size.
    """

    group = "data"

    dataset_name: str | None = doc(f"{DATASET}; null where the policy makes its own pairs.", None)
    chosen_column: str = doc("Column with the preferred images.", "chosen")
    rejected_column: str = doc("Column with the other images.", "rejected")
    completion_column: str = doc("Column with the images that are labelled one by one (loss_type kto).", "completion")
    label_column: str = doc("Column that is true for good images, false for bad ones (loss_type kto).", "label")

    @property
    def seed_columns(self) -> tuple[str, str]:
        """Of the noise of both images, as `prx-post data make-pairs` writes them."""
        return f"{self.chosen_column}_seed", f"{self.rejected_column}_seed"

    @property
    def score_columns(self) -> tuple[str, str]:
        """Of both images, as `prx-post data make-pairs` writes them."""
        return f"{self.chosen_column}_score", f"{self.rejected_column}_score"


@dataclass
class TimestepConfig:
    """The density of training timesteps: logit-normal, a fraction of them uniform, then shifted."""

    group = "training"

    timestep_mean: float = doc("Mean of the normal variable whose sigmoid is t.", 0.0)
    timestep_std: float = doc("Standard deviation of that variable.", 1.0, above=0)
    timestep_shift: float = doc("t -> shift·t / (1 + (shift - 1)·t); above 1 favours noise.", 1.0, above=0)
    timestep_uniform_fraction: float = doc("Fraction of draws whose t is uniform instead.", 0.0, between=(0, 1))

    @property
    def timestep_density(self) -> dict[str, float]:
        """Arguments of `flow.sample_timesteps`."""
        return {
            "mean": self.timestep_mean,
            "std": self.timestep_std,
            "shift": self.timestep_shift,
            "uniform_fraction": self.timestep_uniform_fraction,
        }
