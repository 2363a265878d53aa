"""Load and emit PRX pipelines: a folder that stock diffusers loads, in and out."""

import copy
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from prx_post.base.errors import PrxPostError
from prx_post.base.files import replacing
from prx_post.model.config import EMBEDDED
from prx_post.model.inference import FILE, INDEX, Inference, pipeline_in
from prx_post.model.merging import merge_adapter
from prx_post.model.published import published

COMPONENTS = {
    "transformer": ("PRXTransformer2DModel",),
    "scheduler": ("FlowMatchEulerDiscreteScheduler",),
    "text_encoder": ("T5GemmaEncoder",),
    "tokenizer": ("GemmaTokenizerFast", "GemmaTokenizer", "T5TokenizerFast", "AutoTokenizer"),
    "vae": ("AutoencoderKL", "AutoencoderDC"),
}
"""Each component of a latent PRX pipeline and the classes it may have."""

CONFIG_FILES = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
WEIGHTED = ("transformer", "text_encoder", "vae")
MAX_PROMPT_TOKENS = 8192
"""Above this a model_max_length is a placeholder (transformers writes 1e30 where none was set)."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class CheckpointError(PrxPostError):
    """A checkpoint that is missing, incomplete or not a PRX pipeline."""


@dataclass(frozen=True)
class PipelineFolder:
    """A complete PRX pipeline on disk, known from its JSON files alone; nothing is loaded."""

    path: Path
    source: str
    """What the user wrote: a path, a Hub id, or `tiny`."""
    index: dict[str, Any]
    configs: dict[str, dict[str, Any]]
    inference: Inference | None = None
    """How it is meant to be sampled, if it says so."""
    adapter: Path | None = None
    """A LoRA adapter that is merged into the transformer when it is loaded."""

    @property
    def transformer_files(self) -> list[Path]:
        """The folders that the transformer is made of."""
        return [self.path / "transformer", *([self.adapter] if self.adapter is not None else [])]

    @property
    def sampler(self) -> str:
        """Of its scheduler, one of SAMPLERS."""
        return "renoise" if self.configs["scheduler"].get("stochastic_sampling") else "euler"

    @property
    def is_from_hub(self) -> bool:
        return self.source != "tiny" and not Path(self.source).expanduser().exists()

    @property
    def licence(self) -> str | None:
        """The licence named at the head of the pipeline's model card, if it has one."""
        card = self.path / "README.md"
        if not card.is_file():
            return None
        head = re.match(r"---\n.*?^license: *(\S+)$.*?^---", card.read_text(encoding="utf-8"), re.S | re.M)
        return head[1] if head else None

    @property
    def variant(self) -> str:
        """`flux-kl` (AutoencoderKL latents) or `dc-ae` (AutoencoderDC latents)."""
        return {"AutoencoderKL": "flux-kl", "AutoencoderDC": "dc-ae"}[self.index["vae"][1]]

    @property
    def latent_channels(self) -> int:
        return self.configs["vae"]["latent_channels"]

    @property
    def vae_factor(self) -> int:
        """Pixels a latent, along one side."""
        blocks = self.configs["vae"].get("block_out_channels") or self.configs["vae"]["decoder_block_out_channels"]
        return 2 ** (len(blocks) - 1)

    @property
    def size_multiple(self) -> int:
        """Height and width must divide by this many pixels."""
        return self.vae_factor * self.configs["transformer"]["patch_size"]

    @property
    def max_prompt_tokens(self) -> int:
        """The tokenizer's model_max_length, to which the pipeline pads every prompt."""
        return self.configs["tokenizer"]["model_max_length"]

    @property
    def default_sample_size(self) -> int | None:
        return self.index.get("default_sample_size")

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self.latent_channels, height // self.vae_factor, width // self.vae_factor

    def check_size(self, height: int, width: int) -> None:
        for name, value in (("height", height), ("width", width)):
            if value % self.size_multiple:
                lower = max(value // self.size_multiple, 1) * self.size_multiple
                raise PrxPostError(
                    f"{name} is {value}, but must be a multiple of {self.size_multiple} because the VAE reduces by "
                    f"{self.vae_factor} and the transformer's patches by {self.size_multiple // self.vae_factor}. "
                    f"Use {lower} or {lower + self.size_multiple}."
                )

    def resolve_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) to generate at: what is given, else default_sample_size. Raises if the model cannot."""
        default = self.default_sample_size or 512
        size = (height or default, width or default)
        self.check_size(*size)
        return size

    def load_scheduler(self) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler.from_config(self.configs["scheduler"])

    def load_transformer(self, dtype: torch.dtype = torch.float32) -> Any:
        from diffusers import PRXTransformer2DModel

        with self._readable("transformer"):
            transformer = PRXTransformer2DModel.from_pretrained(self.path / "transformer", torch_dtype=dtype)
        if self.adapter is None:
            return transformer
        return merge_adapter(transformer, self.adapter)

    def load_tokenizer(self) -> Any:
        import transformers

        name = self.index["tokenizer"][1]
        return getattr(transformers, name).from_pretrained(self.path / "tokenizer")

    def load_text_encoder(self, dtype: torch.dtype = torch.float32) -> Any:
        from diffusers.pipelines.prx import T5GemmaEncoder

        with self._readable("text_encoder"):
            return T5GemmaEncoder.from_pretrained(self.path / "text_encoder", dtype=dtype).eval().requires_grad_(False)

    def load_vae(self, dtype: torch.dtype = torch.float32) -> Any:
        import diffusers

        vae_class = getattr(diffusers, self.index["vae"][1])
        with self._readable("vae"):
            return vae_class.from_pretrained(self.path / "vae", torch_dtype=dtype).eval().requires_grad_(False)

    @contextmanager
    def _readable(self, component: str) -> Iterator[None]:
        """Raise CheckpointError for weights that are truncated or no safetensors files."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.path / component} has weights that cannot be read: {str(error).strip().splitlines()[0]}. "
                f"Copy the checkpoint again."
            ) from error


@dataclass
class Checkpoint:
    """A pipeline folder with its transformer and scheduler loaded: what a stage trains and emits."""

    pipeline: PipelineFolder
    transformer: Any
    scheduler: Any
    card: str | None = field(default=None, repr=False)
    """README.md of the emitted folder; None copies the base's."""
    inference: Inference | None = None
    """How it is to be sampled; None: as the base."""


def load(
    path_or_id: str | PipelineFolder, dtype: torch.dtype = torch.float32, revision: str | None = None
) -> Checkpoint:
    """Load any latent PRX pipeline, from a folder or the Hub, or one that is open already.

    Raises:
        CheckpointError: missing, or not a PRX pipeline, or with weights that are not finite; says which component is
            wrong.
    """
    pipeline = open_pipeline(path_or_id, revision) if isinstance(path_or_id, str) else path_or_id
    transformer = pipeline.load_transformer(dtype)
    for name, value in transformer.named_parameters():
        if not torch.isfinite(value).all():
            raise CheckpointError(
                f"{pipeline.source} has a transformer whose {name} is not finite, so its images would be black. Take "
                f"an earlier checkpoint."
            )
    return Checkpoint(pipeline, transformer, pipeline.load_scheduler())


def open_pipeline(path_or_id: str, revision: str | None = None, weights: bool = True) -> PipelineFolder:
    """Find a pipeline and check every component by its JSON files, without loading weights.

    Args:
        path_or_id: a folder, that of a run meaning the pipeline in it; a Hub id; or `tiny`.
        weights: whether they must be there too; without, the Hub is asked for the small files alone, and of PRX's own
            checkpoints not even for those: their shapes are known.
    """
    if path_or_id == "tiny":
        return inspect(EMBEDDED / "base", path_or_id)
    local = Path(path_or_id).expanduser()
    if local.exists():
        return inspect(pipeline_in(local), path_or_id, weights)
    if path_or_id.startswith((".", "/", "~")) or path_or_id.count("/") != 1:
        raise CheckpointError(
            f"model_name_or_path is {path_or_id!r}, but there is no such folder, and it is not a Hub id "
            f"(owner/name). Check the path."
        )
    shapes = None if weights or revision else published(path_or_id)
    if shapes is not None:
        return PipelineFolder(Path(path_or_id), path_or_id, *shapes)
    return inspect(_download(path_or_id, revision, weights), path_or_id, weights)


def _download(repo_id: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    endings = (".json", ".model", ".txt", *([".safetensors"] if weights else []))
    files = [f"{name}/*{ending}" for name in COMPONENTS for ending in endings]
    try:
        folder = snapshot_download(repo_id, revision=revision, allow_patterns=[INDEX, "README.md", FILE, *files])
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"model_name_or_path is {repo_id!r}, which is neither a local folder nor could be fetched from the Hub: "
            f"{reason} Check the name, your access and the network."
        ) from error
    return Path(folder)


def inspect(folder: Path, source: str | None = None, weights: bool = True) -> PipelineFolder:
    """Read a pipeline folder's JSON files and check that its components are PRX's and fit together.

    Args:
        weights: whether the components' weights must be there.

    Raises:
        CheckpointError: naming the first component that is missing or wrong.
    """
    index = _read_json(folder, INDEX, "a diffusers pipeline folder has it")
    kind = index.get("_class_name")
    if kind == "PRXPixelPipeline":
        raise CheckpointError(f"{folder} is a PRXPixelPipeline, but only latent PRX pipelines can be used so far.")
    if kind != "PRXPipeline":
        raise CheckpointError(f"{folder} is a {kind}, but must be a PRXPipeline. Check model_name_or_path.")
    configs = {}
    for name, classes in COMPONENTS.items():
        found = (index.get(name) or [None, None])[1]
        if found not in classes:
            raise CheckpointError(
                f"{folder}: {name} is {found}, but must be {' or '.join(classes)}. Check {name} in model_index.json."
            )
        file = CONFIG_FILES.get(name, "config.json")
        configs[name] = _read_json(folder, f"{name}/{file}", f"it describes the {name}")
        if weights and name in WEIGHTED and not any((folder / name).glob("*.safetensors")):
            raise CheckpointError(f"{folder}: {name} has no *.safetensors weights. Copy the checkpoint again.")
    pipeline = PipelineFolder(folder, source or str(folder), index, configs, Inference.read(folder))
    _check_components_fit(pipeline)
    return pipeline


def _check_components_fit(pipeline: PipelineFolder) -> None:
    transformer, text = pipeline.configs["transformer"], pipeline.configs["text_encoder"]
    if transformer["in_channels"] != pipeline.latent_channels:
        raise CheckpointError(
            f"{pipeline.path}: transformer takes {transformer['in_channels']} channels, but the vae makes "
            f"{pipeline.latent_channels}. These two are not of one pipeline."
        )
    if "encoder" not in text:
        raise CheckpointError(
            f"{pipeline.path}: text_encoder/config.json describes an encoder alone, which diffusers cannot load "
            f"(T5GemmaEncoder.save_pretrained writes such files). Take text_encoder/ from the checkpoint it began with."
        )
    if not 0 < pipeline.configs["tokenizer"].get("model_max_length", 0) <= MAX_PROMPT_TOKENS:
        raise CheckpointError(
            f"{pipeline.path}: tokenizer has no usable model_max_length, to which the pipeline pads every prompt. "
            f"Set it in tokenizer/tokenizer_config.json; PRX's own is 256."
        )
    width = text["encoder"]["hidden_size"]
    if transformer["context_in_dim"] != width:
        raise CheckpointError(
            f"{pipeline.path}: transformer reads text of width {transformer['context_in_dim']}, but text_encoder makes "
            f"{width}. These two are not of one pipeline."
        )


def _read_json(folder: Path, name: str, reason: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {name}, but must because {reason}. Check model_name_or_path.")
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}. Copy the checkpoint again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object. Copy the checkpoint again.")
    return content


def emit(checkpoint: Checkpoint, folder: str | Path, dtype: str = "float32") -> Path:
    """Write a complete pipeline folder that `DiffusionPipeline.from_pretrained` loads without prx_post.

    The transformer is saved in `dtype`; scheduler, text encoder, tokenizer and VAE are copied byte for byte from the
    pipeline it came from, because re-saving them is not lossless. The folder appears at once, complete, or not at all.

    Raises:
        CheckpointError: `folder` exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(
            f"{folder} is not empty, but must be because nothing is overwritten. Choose another folder."
        )
    try:
        with replacing(folder) as partial:
            _write_pipeline(checkpoint, partial, dtype)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}. Free some space, or choose another.") from error
    return folder


def _write_pipeline(checkpoint: Checkpoint, partial: Path, dtype: str) -> None:
    base = checkpoint.pipeline
    partial.mkdir(parents=True)
    for name in ("text_encoder", "tokenizer", "vae"):
        shutil.copytree(base.path / name, partial / name)
    checkpoint.scheduler.save_pretrained(partial / "scheduler")
    if dict(checkpoint.scheduler.config) == dict(base.load_scheduler().config):
        shutil.copytree(base.path / "scheduler", partial / "scheduler", dirs_exist_ok=True)
    _save_transformer(checkpoint.transformer, DTYPES[dtype], partial / "transformer")
    index = {**base.index, "text_encoder": ["prx", "T5GemmaEncoder"]}
    (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    if checkpoint.card is not None:
        (partial / "README.md").write_text(checkpoint.card)
    elif (base.path / "README.md").is_file():
        shutil.copyfile(base.path / "README.md", partial / "README.md")
    inference = checkpoint.inference or base.inference
    if inference is not None:
        inference.write(partial)


def _save_transformer(transformer: Any, dtype: torch.dtype, folder: Path) -> None:
    """Save `transformer`, or a converted copy of it (the fp32 masters stay), without the path it was loaded from."""
    converted = transformer if transformer.dtype == dtype else copy.deepcopy(transformer).to(dtype)
    converted.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
