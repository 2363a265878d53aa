"""Does the picture say what the prompt asks for? Read by the PP-OCR recogniser that ships inside rapidocr.

The text asked for is what stands in double quotes in the prompt, or else the number that the prompt names (in digits
or in words, see prx_post.tiny). If it is all digits, only digits are read.
"""

import importlib.util
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from prx_post.config import PrxPostError
from prx_post.rewards.base import check_counts

HEIGHT = 48
BATCH_SIZE = 64
DIGITS = "0123456789"


def wanted_text(prompt: str) -> str:
    """The text that `prompt` asks for. Raises PrxPostError if it neither quotes a text nor names a number."""
    if quoted := re.search(r'"([^"]+)"', prompt):
        return quoted[1]
    from prx_post.tiny.world import number_of

    number = number_of(prompt)
    if number is None:
        raise PrxPostError(
            f"the prompt {prompt!r} has no text to read, but must because an OCR reward compares with it. "
            f'Put the text in double quotes, as in: a sign that says "open".'
        )
    return str(number)


def greedy_text(log_probs: torch.Tensor, alphabet: str) -> str:
    """Best path of CTC output [T, 1 + len(alphabet)], blank first: repeats merged, blanks dropped."""
    best = log_probs.argmax(-1).tolist()
    kept = [c for i, c in enumerate(best) if c and (i == 0 or c != best[i - 1])]
    return "".join(alphabet[c - 1] for c in kept)


def ctc_log_prob(log_probs: torch.Tensor, text: str, alphabet: str) -> float:
    """log P(text) under CTC, summed over all alignments, per character of `text`; at most 0."""
    targets = torch.tensor([[alphabet.index(c) + 1 for c in text]])
    lengths = torch.tensor([log_probs.shape[0]])
    nll = torch.nn.functional.ctc_loss(
        log_probs[:, None], targets, lengths, torch.tensor([len(text)]), reduction="none", zero_infinity=False
    )
    return -float(nll) / len(text)


class Recogniser:
    """PP-OCR text recognition: pictures -> CTC log-probabilities over a chosen alphabet."""

    def __init__(self, num_threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise PrxPostError(
                "OCR rewards need onnxruntime. Install the extra: pip install prx-post[demo]."
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or torch.get_num_threads()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(_weights()), options, providers=["CPUExecutionProvider"])
        characters = self._session.get_modelmeta().custom_metadata_map["character"].splitlines()
        self._column = {character: i + 1 for i, character in enumerate(characters)}  # column 0 is CTC's blank
        self._column[" "] = len(characters) + 1

    def log_probs(self, images: Sequence[Image.Image], alphabet: str) -> torch.Tensor:
        """CTC log-probabilities [B, T, 1 + len(alphabet)] of pictures of one size, renormalised over the alphabet.

        Raises:
            PrxPostError: the recogniser does not know a character.
        """
        unknown = [c for c in alphabet if c not in self._column]
        if unknown:
            raise PrxPostError(f"the OCR recogniser cannot read {unknown[0]!r}. Use another text.")
        width = max(8, round(HEIGHT * images[0].width / images[0].height))
        resized = [i.convert("RGB").resize((width, HEIGHT), Image.Resampling.BILINEAR) for i in images]
        pixels = np.stack([np.asarray(image) for image in resized]).astype(np.float32) / 127.5 - 1
        (probabilities,) = self._session.run(None, {"x": pixels.transpose(0, 3, 1, 2)})
        kept = torch.from_numpy(probabilities[..., [0, *(self._column[c] for c in alphabet)]])
        kept = kept.clamp_min(1e-10)
        return (kept / kept.sum(-1, keepdim=True)).log()


def _weights() -> Path:
    spec = importlib.util.find_spec("rapidocr")
    if spec is None or spec.origin is None:
        raise PrxPostError("OCR rewards need rapidocr's weights. Install the extra: pip install prx-post[demo].")
    found = sorted((Path(spec.origin).parent / "models").glob("*rec*.onnx"))
    if not found:
        raise PrxPostError(
            f"{Path(spec.origin).parent} has no recogniser weights (*rec*.onnx). Install rapidocr again."
        )
    return found[0]


@lru_cache
def shared_recogniser() -> Recogniser:
    return Recogniser()


class OCRReward:
    """Scores pictures by what the recogniser reads; `score` maps (log_probs [T, A], text, alphabet) to a number."""

    def __init__(self, score: Callable[[torch.Tensor, str, str], float]) -> None:
        self._score = score

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        check_counts(images, prompts)
        texts = [wanted_text(prompt) for prompt in prompts]
        alphabet = "".join(sorted(set(DIGITS).union(*texts)))
        scores = [0.0] * len(images)
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(images):
            by_size.setdefault(image.size, []).append(i)
        for indices in by_size.values():
            for start in range(0, len(indices), BATCH_SIZE):
                part = indices[start : start + BATCH_SIZE]
                log_probs = shared_recogniser().log_probs([images[i] for i in part], alphabet)
                for i, row in zip(part, log_probs, strict=True):
                    scores[i] = self._score(row, texts[i], alphabet)
        return torch.tensor(scores)


def exact_match() -> OCRReward:
    """1 if the picture reads exactly as asked, else 0."""
    return OCRReward(lambda log_probs, text, alphabet: float(greedy_text(log_probs, alphabet) == text))


def graded() -> OCRReward:
    """Per-character log-probability of the text asked for (natural log, at most 0)."""
    return OCRReward(ctc_log_prob)
