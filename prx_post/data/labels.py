"""Images that are labelled good or bad one by one: TRL's columns prompt, completion, label."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from prx_post.data.config import PreferenceConfig
from prx_post.data.plan import Draw
from prx_post.data.readers import open_dataset
from prx_post.data.rows import DataError, ImageRows, Opened
from prx_post.data.source import LatentSource
from prx_post.engine.protocols import Batch

LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


class LabelledRows(ImageRows):
    """Images with a prompt and a label each.

    Raises:
        DataError: a label is outside LABELS, or all are alike.
    """

    def __init__(self, opened: Opened, config: PreferenceConfig) -> None:
        super().__init__(opened, config.completion_column)
        dataset = opened.dataset
        given, feature = list(dataset[config.label_column]), dataset.features[config.label_column]
        if hasattr(feature, "int2str"):  # a class label: by name, for its number depends on the order of the names
            given = [None if label is None else feature.int2str(label) for label in given]
        for row, label in enumerate(given):
            if _key(label) not in LABELS:
                raise DataError(
                    f"label_column is {config.label_column!r}, which holds {label!r} in row {row}, but must hold true "
                    f"or false (or 1 or 0). Correct it."
                )
        self.labels = [LABELS[_key(label)] for label in given]
        if len(set(self.labels)) == 1:
            raise DataError(
                f"label_column is {config.label_column!r}, which is {self.labels[0]} in all {len(given)} rows, so that "
                f"nothing is preferred. Add images of the other kind."
            )


def _key(label: Any) -> str:
    return str(label).strip().lower()


def read_labelled(config: PreferenceConfig) -> LabelledRows:
    """Open the labelled images of a configuration. Raises DataError: they do not exist, lack a column, or are empty."""
    return LabelledRows(open_dataset(config, ("completion_column",), ("label_column",)), config)


@dataclass
class LabelledSource(LatentSource):
    """Micro-batches of labelled images; batches have `desirable` [B] bool.

    Args:
        labels: of the rows, by their number.
    """

    labels: Sequence[bool] = field(default_factory=list)

    def batch(self, draws: Sequence[Draw], step: int) -> Batch:
        batch = super().batch(draws, step)
        return {**batch, "desirable": torch.tensor([self.labels[row] for row in batch["rows"]])}
