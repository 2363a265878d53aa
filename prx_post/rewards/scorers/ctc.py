"""Reading text from CTC output (Graves et al. 2006), shared by the OCR reward and the embedded judge."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Score = Callable[[Tensor, str, Sequence[str]], float]
"""(log_probs [T, 1 + A] with blank first, text asked for, alphabet of A characters) -> score"""

LOG_FLOOR = -23.025850929940457
"""ln 1e-10, per character: a text that the columns cannot spell scores this rather than minus infinity."""


def greedy_text(log_probs: Tensor, alphabet: Sequence[str]) -> str:
    """The best path's text: repeats merged, blanks dropped."""
    best = log_probs.argmax(-1).tolist()
    kept = [c for i, c in enumerate(best) if c and (i == 0 or c != best[i - 1])]
    return "".join(alphabet[c - 1] for c in kept)


def exact(log_probs: Tensor, text: str, alphabet: Sequence[str]) -> float:
    """1 if the best path reads exactly `text`, else 0."""
    return float(greedy_text(log_probs, alphabet) == text)


def similarity(log_probs: Tensor, text: str, alphabet: Sequence[str]) -> float:
    """1 - Levenshtein distance between the best path's text and `text` / characters of `text`, at least 0."""
    read = greedy_text(log_probs, alphabet)
    row = list(range(len(text) + 1))  # distances of read[:i] to every prefix of `text`
    for i, letter in enumerate(read, start=1):
        diagonal, row[0] = row[0], i
        for j, wanted in enumerate(text, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != wanted))
    return max(0.0, 1 - row[-1] / len(text))


def log_prob(log_probs: Tensor, text: str, alphabet: Sequence[str]) -> float:
    """`log_likelihood`, between LOG_FLOOR and 0."""
    return max(float(log_likelihood(log_probs, text, alphabet)), LOG_FLOOR)


def log_likelihood(log_probs: Tensor, text: str, alphabet: Sequence[str]) -> Tensor:
    """ln P(text), summed over all alignments, per character of `text`; a scalar with a graph to log_probs."""
    targets = torch.tensor([[alphabet.index(c) + 1 for c in text]], device=log_probs.device)
    lengths = torch.tensor([log_probs.shape[0]])
    nll = torch.nn.functional.ctc_loss(
        log_probs[:, None], targets, lengths, torch.tensor([len(text)]), reduction="none", zero_infinity=False
    )
    return -nll[0] / len(text)


def probability(log_probs: Tensor, text: str, alphabet: Sequence[str]) -> float:
    """exp of `log_prob`: the geometric mean of the characters' probabilities."""
    return math.exp(log_prob(log_probs, text, alphabet))
