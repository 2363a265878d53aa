"""What happened since the last logged step."""

import math
import resource
import time
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor


class Window:
    """Sums stay on the device until they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}
        self.images = 0
        self._pending: list[tuple[Mapping[str, Tensor], int]] = []
        self._resumed = False
        self.start()

    def start(self) -> None:
        """Begin anew; right after `resume`, begin with what was resumed."""
        if not self._resumed:
            self.sums, self.counts, self.images, self.grad_norm = {}, {}, 0, math.nan
        self._resumed = False
        self.waited_s = self.excluded_s = self.learning_rate = 0.0
        self._timed_from = self.images
        self._began = time.perf_counter()

    def resume(self, sums: dict[str, Tensor], counts: dict[str, float], images: int) -> None:
        self.sums, self.counts, self.images = sums, dict(counts), images
        self._resumed = True

    def add(self, metrics: Mapping[str, Tensor], images: int) -> None:
        """Metrics of one micro-batch, which count once its step is done; a name need not be in every one."""
        self._pending.append((metrics, images))

    def commit(self, grad_norm: float, group_norms: Mapping[str, Tensor]) -> None:
        """The step is done. The norms are of its gradients before clipping."""
        self.grad_norm = grad_norm
        norms = {f"grad_norm/{name}": norm for name, norm in group_norms.items()}
        for metrics, images in self._pending:
            self.images += images
            for name, value in (*metrics.items(), *norms.items()):
                self.sums[name] = self.sums[name].to(value.device) + value if name in self.sums else value.clone()
                self.counts[name] = self.counts.get(name, 0) + 1
        self._pending = []

    def discard(self) -> None:
        """The step was skipped."""
        self._pending = []

    def close(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over the micro-batches, of all processes, that had a metric; nan if every step was skipped."""
        means = {name: total / count for name, (total, count) in self._totals(accelerator).items()}
        # after the sums were read, so that a GPU has caught up
        elapsed = time.perf_counter() - self._began - self.excluded_s
        return {
            "loss": math.nan,
            **means,
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "images_per_second": (self.images - self._timed_from) * accelerator.num_processes / elapsed,
            "data_wait_fraction": self.waited_s / elapsed,
            "peak_memory_gib": peak_memory_gib(),
        }

    def _totals(self, accelerator: Accelerator) -> dict[str, tuple[float, float]]:
        """Sum and count of each metric on all processes, not every one of which needs to have had it."""
        names, device = list(dict.fromkeys(gather_object(list(self.sums)))), accelerator.device
        if not names:
            return {}
        absent = torch.zeros((), device=device)
        sums = torch.stack([self.sums.get(name, absent).to(device, torch.float32) for name in names])
        counts = torch.tensor([self.counts.get(name, 0.0) for name in names], device=device)
        totals, numbers = accelerator.reduce(torch.stack([sums, counts]), "sum").tolist()
        return {name: (totals[i], numbers[i]) for i, name in enumerate(names)}


def peak_memory_gib() -> float:
    """The most memory this process has held so far: of its GPU if it has one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes on Linux
