"""Does the image say what the prompt asks for? Read by the PP-OCR recogniser that ships inside rapidocr.

The text asked for is what stands in double quotes in the prompt, or else the number that the prompt names (in digits
or in words, see prx_post.tiny). For a text of digits the reading is restricted to digits.
"""

import importlib.util
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prx_post.base.errors import PrxPostError
from prx_post.base.files import file_sha256
from prx_post.base.settings import require_installed
from prx_post.rewards.reward import check_counts
from prx_post.rewards.scorers import ctc

HEIGHT = 48
BATCH_SIZE = 64
DIGITS = "0123456789"


def wanted_text(prompt: str) -> str:
    """The text that `prompt` asks for. Raises PrxPostError if it neither quotes a text nor names a number."""
    if quoted := re.search(r'"([^"]+)"', prompt):
        return quoted[1]
    require_installed("num2words", "a prompt that names a number", "demo")
    from prx_post.rewards.scorers.numbers import number_of

    number = number_of(prompt)
    if number is None:
        raise PrxPostError(
            f"the prompt {prompt!r} has no text to read, but must because this reward compares with it. "
            f'Put the text in double quotes, as in: a sign that says "open".'
        )
    return str(number)


class Recogniser:
    """PP-OCR text recognition: images -> CTC probabilities over `characters`."""

    def __init__(self) -> None:
        for module in ("onnxruntime", "rapidocr"):
            require_installed(module, "an OCR reward", "demo")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        weights = _weights()
        self.version = f"{weights.name} {file_sha256(weights)[:16]}"
        self._session = onnxruntime.InferenceSession(str(weights), options, providers=["CPUExecutionProvider"])
        listed = self._session.get_modelmeta().custom_metadata_map["character"].splitlines()
        self.characters = [*listed, " "]
        """Character i is column i + 1; column 0 is CTC's blank."""

    def probabilities(self, images: Sequence[Image.Image]) -> Tensor:
        """CTC probabilities [B, T, 1 + len(characters)] of images of one size, T being about width / height · 6."""
        width = max(8, round(HEIGHT * images[0].width / images[0].height))
        resized = [i.convert("RGB").resize((width, HEIGHT), Image.Resampling.BILINEAR) for i in images]
        pixels = np.stack([np.asarray(image) for image in resized]).astype(np.float32) / 127.5 - 1
        (probabilities,) = self._session.run(None, {"x": pixels.transpose(0, 3, 1, 2)})
        return torch.from_numpy(probabilities)

    def restrict(self, probabilities: Tensor, text: str) -> tuple[Tensor, Sequence[str]]:
        """Log-probabilities [T, 1 + A] and the alphabet they are over: digits for a text of digits, else everything."""
        if not set(text) <= set(DIGITS):
            return probabilities.clamp_min(1e-10).log(), self.characters
        columns = [0, *(self.characters.index(digit) + 1 for digit in DIGITS)]
        kept = probabilities[:, columns].clamp_min(1e-10)
        return (kept / kept.sum(-1, keepdim=True)).log(), DIGITS


def _weights() -> Path:
    spec = importlib.util.find_spec("rapidocr")
    assert spec is not None  # required above
    assert spec.origin is not None
    found = sorted((Path(spec.origin).parent / "models").glob("*rec*.onnx"))
    if not found:
        raise PrxPostError(
            f"{Path(spec.origin).parent} has no recogniser weights (*rec*.onnx). Install rapidocr again."
        )
    return found[0]


@cache
def shared_recogniser() -> Recogniser:
    return Recogniser()


class OCRReward:
    """Scores images by what the recogniser reads."""

    def __init__(self, score: ctc.Score) -> None:
        self._score, self._recogniser = score, shared_recogniser()
        self.identity = f"ocr {score.__name__}, {self._recogniser.version}"

    def check(self, prompts: Sequence[str]) -> None:
        known = set(self._recogniser.characters)
        for prompt in prompts:
            unknown = set(wanted_text(prompt)) - known
            if unknown:
                raise PrxPostError(f"the OCR recogniser cannot read {min(unknown)!r} of the prompt {prompt!r}.")

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        check_counts(images, prompts)
        self.check(prompts)
        scores = [0.0] * len(images)
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(images):
            by_size.setdefault(image.size, []).append(i)
        for indices in by_size.values():
            for start in range(0, len(indices), BATCH_SIZE):
                part = indices[start : start + BATCH_SIZE]
                for i, read in zip(part, self._recogniser.probabilities([images[i] for i in part]), strict=True):
                    text = wanted_text(prompts[i])
                    log_probs, alphabet = self._recogniser.restrict(read, text)
                    scores[i] = self._score(log_probs, text, alphabet)
        return torch.tensor(scores)


def similarity() -> OCRReward:
    """1 - edit distance / length of the text asked for, at least 0; Flow-GRPO's text-rendering reward."""
    return OCRReward(ctc.similarity)


def exact_match() -> OCRReward:
    """1 if the image reads exactly as asked, else 0."""
    return OCRReward(ctc.exact)


def graded() -> OCRReward:
    """Per-character log-probability of the text asked for (natural log, at most 0)."""
    return OCRReward(ctc.log_prob)


def probability() -> OCRReward:
    """Per-character probability of the text asked for, the exponential of `graded`: between 0 and 1.

    For optimisation: an illegible image, whose log-probability is far below, does not outweigh the rest of its group.
    """
    return OCRReward(ctc.probability)
