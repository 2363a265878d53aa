"""Scores on disk, keyed by (image, prompt, reward), so that none is computed twice."""

import hashlib
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from prx_post.base.files import cannot_write, make_folder
from prx_post.rewards.reward import Reward, check_counts, checked


def image_digest(image: Image.Image) -> str:
    """Of an image's mode, size and pixels."""
    digest = hashlib.sha256(f"{image.mode} {image.width}x{image.height} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


class ScoreCache:
    """Scores by key in a folder of JSON-lines files, one per process that ever wrote; readable while being written.

    A line is written as soon as its score is known. A line torn by a kill is ignored, and its score computed again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = make_folder(folder)
        self._scores: dict[str, float] = {}
        self._own = folder / f"{socket.gethostname()}-{os.getpid()}.jsonl"
        self.refresh()

    def refresh(self) -> None:
        """Read what other processes have written meanwhile."""
        for path in sorted(self._folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    self._scores[entry["key"]] = float(entry["score"])
                except (ValueError, KeyError, TypeError):
                    continue  # torn

    def get(self, key: str) -> float | None:
        return self._scores.get(key)

    def put(self, scores: dict[str, float]) -> None:
        """Add scores by key. Raises PrxPostError if the disk is full or not writable."""
        self._scores.update(scores)
        lines = "".join(json.dumps({"key": key, "score": score}) + "\n" for key, score in scores.items())
        try:
            with self._own.open("a+b") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(0, end - 1))
                torn = file.read(1) not in (b"", b"\n")
                file.write(b"\n" * torn + lines.encode())
        except OSError as error:
            raise cannot_write(self._own, error) from error


class CachedReward:
    """A reward that asks the cache first; the cache's scores are those of the same `identity`."""

    def __init__(self, reward: Reward, name: str, cache: ScoreCache) -> None:
        self._reward, self._name, self._cache = reward, name, cache

    @property
    def identity(self) -> str:
        return self._reward.identity

    def check(self, prompts: Sequence[str]) -> None:
        self._reward.check(prompts)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        check_counts(images, prompts)
        keys = [self._key(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        missing = list({key: i for i, key in enumerate(keys) if self._cache.get(key) is None}.values())
        if missing:
            scores = self._reward([images[i] for i in missing], [prompts[i] for i in missing])
            scores = checked(scores, self._name, len(missing))
            self._cache.put({keys[i]: score for i, score in zip(missing, scores.tolist(), strict=True)})
        return torch.tensor([self._cache.get(key) for key in keys], dtype=torch.float32)

    def _key(self, image: Image.Image, prompt: str) -> str:
        return hashlib.sha256(
            "\0".join((image_digest(image), prompt, self.identity)).encode("utf-8", "surrogatepass")
        ).hexdigest()
