"""One small loop for every stage: accumulate, clip, step, average, log, sample."""

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import Tensor, nn

from prx_post.config import PrxPostError, TrainConfig
from prx_post.data.source import Batch, BatchSource, to_device
from prx_post.engine.ema import EMA
from prx_post.engine.optim import build_optimizer, build_schedule
from prx_post.engine.tracking import RunLog


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate's object for this run. Raises PrxPostError if it does not see the processes that were launched."""
    accelerator = Accelerator(
        mixed_precision="bf16" if config.bf16 else "no",
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=list(config.report_to) or None,  # type: ignore[arg-type]
        project_config=ProjectConfiguration(
            str(output_folder(config)), logging_dir=str(output_folder(config) / "logs")
        ),
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise PrxPostError(
            f"WORLD_SIZE is {launched}, but accelerate runs {accelerator.num_processes} process, so that each would "
            f"train alone and write over the others. Without GPUs, set ACCELERATE_USE_CPU=true."
        )
    return accelerator


class Trainer:
    """Fits an objective, an nn.Module whose `forward(batch) -> (loss, metrics)`, to batches of a source.

    Args:
        sample: called with the step, with the averaged weights in place, at the start, every `sample_steps` and at
            the end.

    Attributes:
        ema: the average of the trained weights; `ema.swapped_in()` to use or emit it.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        objective: nn.Module,
        source: BatchSource,
        log: RunLog,
        sample: Callable[[int], None],
    ) -> None:
        self.config, self.accelerator, self.source, self.log, self._sample = config, accelerator, source, log, sample
        named = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        optimizer = build_optimizer(named, config)
        self.schedule = build_schedule(optimizer, config)
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        self.ema = EMA(self.parameters, config.ema_decay, config.ema_update_steps)
        self._window = _Window()

    def fit(self) -> dict[str, float]:
        """Run `max_steps` optimizer steps. Returns the last logged metrics.

        Raises:
            PrxPostError: the loss or the gradient is no longer finite.
        """
        config = self.config
        last: dict[str, float] = {}
        self._window.start()
        self._sample_if(0)
        self.objective.train()
        batches = iter(self.source)
        for step in range(1, config.max_steps + 1):
            self._train_step(batches)
            self.ema.update(step)
            self.log.advance()
            if step % config.logging_steps == 0 or step == config.max_steps:
                last = self._write_metrics(step)
            self._sample_if(step)
        return last

    def _train_step(self, batches: Iterator[Batch]) -> None:
        window, accelerator = self._window, self.accelerator
        for _ in range(self.config.gradient_accumulation_steps):
            waiting = time.perf_counter()
            batch = to_device(next(batches), accelerator.device)
            window.waited_s += time.perf_counter() - waiting
            with accelerator.accumulate(self.objective):
                loss, metrics = self.objective(batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    limit = self.config.max_grad_norm or math.inf
                    window.grad_norm = accelerator.clip_grad_norm_(self.parameters, limit)
                self.optimizer.step()
                self.optimizer.zero_grad()
            window.add(loss, metrics, images=len(batch["seeds"]))
        window.learning_rate = self.schedule.get_last_lr()[0]
        self.schedule.step()

    def _write_metrics(self, step: int) -> dict[str, float]:
        metrics = self._window.close(self.accelerator)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                raise PrxPostError(
                    f"{name} is {metrics[name]} at step {step}, but must be finite. "
                    f"Lower learning_rate, lengthen warmup_steps, or look at the data of the last "
                    f"{self.config.logging_steps} steps."
                )
        self.log.write(step, metrics)
        self._window.start()
        return metrics

    def _sample_if(self, step: int) -> None:
        every = self.config.sample_steps
        if not every or (step % every and step != self.config.max_steps):
            return
        began = time.perf_counter()
        if self.accelerator.is_main_process:
            self.objective.eval()
            with self.ema.swapped_in():
                self._sample(step)
            self.objective.train()
        self.accelerator.wait_for_everyone()
        self._window.excluded_s += time.perf_counter() - began


class _Window:
    """What happened since the last logged step. Sums stay on the device until they are read."""

    def start(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = self._images = 0
        self.waited_s = self.excluded_s = self.learning_rate = 0.0
        self.grad_norm: Any = None
        self._began = time.perf_counter()

    def add(self, loss: Tensor, metrics: dict[str, Tensor], images: int) -> None:
        self._count += 1
        self._images += images
        for name, value in {"loss": loss.detach(), **metrics}.items():
            self._sums[name] = self._sums.get(name, 0) + value

    def close(self, accelerator: Accelerator) -> dict[str, float]:
        means = {name: float(accelerator.reduce(total / self._count, "mean")) for name, total in self._sums.items()}
        # after the sums were read, so that a GPU has caught up
        elapsed = time.perf_counter() - self._began - self.excluded_s
        return {
            **means,
            "grad_norm": float(self.grad_norm),
            "learning_rate": self.learning_rate,
            "images_per_second": self._images * accelerator.num_processes / elapsed,
            "data_wait_fraction": self.waited_s / elapsed,
        }


def output_folder(config: TrainConfig) -> Path:
    return Path(str(config.output_dir)).expanduser()


def seed_everything(config: TrainConfig) -> None:
    """Seed torch's global generator (adapter init, dropout); data, noise and timesteps have seeds of their own."""
    torch.manual_seed(config.seed)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
