"""One small loop for every stage: accumulate, clip, step, average, log, sample, save."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from prx_post.base.errors import PrxPostError
from prx_post.engine.checkpointing import CheckpointWriter, SavedState
from prx_post.engine.config import TrainConfig
from prx_post.engine.ema import EMA
from prx_post.engine.metrics import Window
from prx_post.engine.optim import build_optimizer, learning_rate_factor
from prx_post.engine.partition import Partition, join
from prx_post.engine.processes import any_rank, autocast, on_main, output_folder, ranks_of, uses_deepspeed
from prx_post.engine.protocols import Batch, to_device
from prx_post.engine.resume import collect, restore, set_random_state
from prx_post.engine.signals import StopRequested, StopSignals
from prx_post.engine.tracking import RunLog

EMITTED = "transformer."
"""How the names of the weights begin that are averaged and emitted; an objective may train others besides."""
WRITE_FAILED = 1000
"""Told to other ranks in the place of a signal's number."""


class Trainer:
    """Fits an objective, an nn.Module whose `forward(batch) -> (loss, metrics)`, to batches of a source.

    Args:
        sample: called with the step, with the averaged weights in place, at the start, every `sample_steps` and at
            the end; on the main process, or on all when ZeRO-3 has split the weights.
        evaluate: called in the same way every `eval_every` steps; its metrics are logged. A PrxPostError that it raises
            ends the run, with its state saved.
        watch: called on every process with the step and each line of metrics; may end the run likewise.
        identity: what a checkpoint must say of the run: its settings and the digest of its data.

    Attributes:
        ema: the average of the trained weights; `ema.swapped_in()` to use them.
        step: optimizer steps done.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        objective: nn.Module,
        source: Any,
        log: RunLog,
        sample: Callable[[int], None],
        identity: dict[str, Any],
        *,
        evaluate: Callable[[int], dict[str, float]] | None = None,
        eval_every: int = 0,
        watch: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        self._evaluate, self._eval_every, self._watch = evaluate, eval_every, watch
        self.config, self.accelerator, self.source, self.log, self._sample = config, accelerator, source, log, sample
        named = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        optimizer = build_optimizer(list(named.items()), config)
        self._base_rates = [group["lr"] for group in optimizer.param_groups]
        self._prefixes = [group["prefix"] for group in optimizer.param_groups]
        self._rate_factor = learning_rate_factor(config)
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        self.partition = Partition(named, self.optimizer)
        self._emitted = {name: p for name, p in named.items() if name.startswith(EMITTED)}
        self.ema = EMA(self._emitted.values(), config.ema_decay, config.ema_update_steps)
        self.step = self._updates = self._nonfinite_in_a_row = 0
        self._window = Window()
        self._identity = identity
        self._writer = CheckpointWriter(
            output_folder(config),
            accelerator.process_index,
            accelerator.num_processes,
            config.save_total_limit,
            config.ddp_timeout,
        )

    def resume(self, saved: SavedState) -> None:
        """Go on from a checkpoint as if the run had never stopped."""
        restore(self.partition, self.ema, saved)
        self.step = saved.step
        self._updates = sum("" not in self.config.waiting(step) for step in range(saved.step))
        self.source.load_state_dict(saved.info["source"])
        state = saved.info["trainer"]
        self._nonfinite_in_a_row, self.ema.num_updates = state["nonfinite_in_a_row"], state["ema_updates"]
        rank = self.accelerator.process_index
        self._window.grad_norm = math.nan if state["grad_norm"] is None else state["grad_norm"]
        same_world = saved.world_size == self.accelerator.num_processes
        if same_world:
            set_random_state(saved, rank)
        if same_world and state["micro_batches_a_step"] == self.config.gradient_accumulation_steps:
            sums = dict(saved.of_rank(rank).under("sums"))
            self._window.resume(sums, state["window_counts"], state["window_images"])
        else:  # each new process stands for the average of the old ones
            ranks = [dict(saved.of_rank(r).under("sums")) for r in range(saved.world_size)]
            micro_batches = saved.info["trainer"]["micro_batches_a_step"]
            scale = self.config.gradient_accumulation_steps / micro_batches
            sums = {name: scale * sum(r[name] for r in ranks) / len(ranks) for name in ranks[0]}
            counts = {name: round(count * scale) for name, count in state["window_counts"].items()}
            self._window.resume(sums, counts, state["window_images"])

    def fit(self) -> dict[str, Any]:
        """Run up to `max_steps` optimizer steps. Returns the last logged metrics.

        Raises:
            StopRequested: a signal asked for it; a checkpoint was saved.
            PrxPostError: too many steps in a row were not finite, or a checkpoint could not be written.
        """
        config = self.config
        if self.accelerator.is_main_process:
            self._writer.clean()
            self._writer.set_aside_after(self.step)
        self.accelerator.wait_for_everyone()
        last = self.log.keep_until(self.step, "nonfinite.jsonl", "evaluations.jsonl", "metrics.jsonl")
        self._window.start()
        if self.step == 0:
            self._sample_if(0)
            self._evaluate_if(0)
        self.objective.train()
        batches = iter(self.source)
        with StopSignals() as signals, self._writer:
            while self.step < config.max_steps:
                self._train_step(batches)
                self.log.advance()
                if self.step % config.logging_steps == 0 or self.step == config.max_steps:
                    last = self._write_metrics()
                self._sample_if(self.step)
                self._evaluate_if(self.step)
                stop = self._agree(signals.received)
                if stop or (
                    config.save_steps and (self.step % config.save_steps == 0 or self.step == config.max_steps)
                ):
                    self.save()
                if stop:
                    self._stop(stop)
            self._finish_saving()
        return last

    def _agree(self, received: int) -> int:
        """The signal that any rank received, or 0. Raises on all ranks if one could not write its checkpoint."""
        stop = any_rank(self.accelerator, WRITE_FAILED if self._writer.has_failed else received)
        if stop == WRITE_FAILED:
            self._writer.check()
            raise PrxPostError("another rank could not write its share; it says why").raised_by_all(is_main=False)
        return stop

    def _finish_saving(self) -> None:
        """Until every rank's share of the last checkpoint is written. Raises on all ranks if one is not."""
        self._writer.join()
        self._agree(0)

    def save(self) -> None:
        """Copy the state to the host and begin to write it; training need not wait for the disk."""
        began = time.perf_counter()
        self._finish_saving()
        window = self._window
        share = collect(
            self.partition, self.ema, window.sums, self.accelerator.process_index, self.accelerator.num_processes
        )
        accumulation = self.config.gradient_accumulation_steps
        state = {
            "nonfinite_in_a_row": self._nonfinite_in_a_row,
            "grad_norm": None if math.isnan(window.grad_norm) else window.grad_norm,
            "ema_updates": self.ema.num_updates,
            "window_counts": dict(window.counts),  # it is written while training goes on
            "window_images": window.images,
            "micro_batches_a_step": accumulation,
        }
        batch = self.config.per_device_train_batch_size * self.accelerator.num_processes * accumulation
        info = {"step": self.step, "global_batch_size": batch, "source": self.source.state_dict(), "trainer": state}
        self._writer.save(share, {**info, **self._identity})
        window.excluded_s += time.perf_counter() - began

    def averaged_weights(self) -> dict[str, Tensor]:
        """The weights to emit, whole, by name, on the main process's CPU; empty elsewhere. A collective under ZeRO."""
        found = {}
        for name, parameter in self._emitted.items():
            average = self.ema.of(parameter)
            whole = self.partition.weight(name) if average is None else join(parameter, average)
            if self.accelerator.is_main_process:
                found[name] = whole.cpu()
        return found

    def _train_step(self, batches: Iterator[Batch]) -> None:
        window, config = self._window, self.config
        factor, waiting = self._rate_factor(self.step), config.waiting(self.step)
        for group, rate, prefix in zip(self.optimizer.param_groups, self._base_rates, self._prefixes, strict=True):
            group["lr"] = 0.0 if prefix in waiting else rate * factor
        window.learning_rate = self._base_rates[0] * factor
        with self.partition.unmoved(waiting):
            seen, grad_norm, norms = self._gradients(batches)
        self.step += 1
        self._updates += "" not in waiting
        if not math.isfinite(grad_norm):  # every process has the same norm, so all skip together
            self.optimizer.zero_grad()
            self._record_nonfinite(seen)
            return
        self.partition.drop_gradients(waiting)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._nonfinite_in_a_row = 0
        if "" not in waiting:
            self.ema.update(self._updates)
        window.grad_norm = grad_norm
        norms = {prefix: norm for prefix, norm in norms.items() if prefix not in waiting}
        of_groups = {f"grad_norm/{prefix.rstrip('.') or 'student'}": torch.tensor(n) for prefix, n in norms.items()}
        for batch, loss, metrics in seen:
            window.add({"loss": loss, **metrics, **of_groups}, images=len(batch["seeds"]))

    def _gradients(
        self, batches: Iterator[Batch]
    ) -> tuple[list[tuple[Batch, Tensor, dict[str, Tensor]]], float, dict[str, float]]:
        """Of a step's micro-batches: what was seen, the norm before clipping, and the same by group.

        With DeepSpeed the optimizer has stepped as well.
        """
        accelerator, config = self.accelerator, self.config
        seen, grad_norm = [], math.nan
        norms: dict[str, float] = {}
        for _ in range(config.gradient_accumulation_steps):
            began = time.perf_counter()
            batch = to_device(next(batches), accelerator.device)
            self._window.waited_s += time.perf_counter() - began
            with accelerator.accumulate(self.objective):
                with autocast(config, accelerator):
                    loss, metrics = self.objective(batch)
                seen.append((batch, loss.detach(), metrics))
                accelerator.backward(loss)  # with DeepSpeed also clips, steps and zeroes
                if accelerator.sync_gradients:
                    weights, limit = list(self.partition.parameters.values()), config.max_grad_norm or math.inf
                    norms = self.partition.gradient_norms()
                    grad_norm = float(accelerator.clip_grad_norm_(weights, limit))
        return seen, grad_norm, norms

    def _record_nonfinite(self, seen: list[tuple[Batch, Tensor, dict[str, Tensor]]]) -> None:
        """Write every process's samples of a skipped step to nonfinite.jsonl; stop after too many such steps."""
        self._nonfinite_in_a_row += 1
        rank = self.accelerator.process_index
        lines = [
            {"step": self.step, "rank": rank, "loss": str(float(loss)), "rows": b["rows"], "seeds": b["seeds"]}
            for b, loss, _ in seen
        ]
        lines = ranks_of(self.accelerator).gather(lines)
        path = output_folder(self.config) / "nonfinite.jsonl"
        if self.accelerator.is_main_process:
            with path.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        self.log.say(f"step {self.step} skipped: its gradient is not finite. Rows and seeds are in {path}")
        if self._nonfinite_in_a_row >= self.config.max_nonfinite_steps:
            raise PrxPostError(
                f"the gradient was not finite for {self._nonfinite_in_a_row} steps in a row (max_nonfinite_steps), the "
                f"last of them {self.step}. Their rows and seeds are in {path}. If they look sound, lower "
                f"learning_rate, and go on from the last checkpoint with resume_from_checkpoint: latest."
            ).raised_by_all(rank == 0)

    def _write_metrics(self) -> dict[str, float]:
        metrics = self._window.close(self.accelerator)
        self.log.write(self.step, metrics)
        self._window.start()
        if (watch := self._watch) is not None:
            self._saving_if_stopped(lambda: watch(self.step, metrics))
        return metrics

    def _sample_if(self, step: int) -> None:
        if not self._is_due(self.config.sample_steps, step):
            return
        weights_are_split = uses_deepspeed(self.accelerator) and self.accelerator.deepspeed_plugin.zero_stage == 3
        takes_part = self.accelerator.is_main_process or weights_are_split
        self._with_averages(lambda: self._sample(step) if takes_part else None)

    def _evaluate_if(self, step: int) -> None:
        evaluate = self._evaluate
        if evaluate is None or not self._is_due(self._eval_every, step):
            return

        def work() -> None:
            metrics = self._with_averages(lambda: on_main(self.accelerator, lambda: evaluate(step)))
            self.accelerator.log(metrics, step=step)

        self._saving_if_stopped(work)

    def _is_due(self, every: int, step: int) -> bool:
        return bool(every) and (step % every == 0 or step == self.config.max_steps)

    def _with_averages(self, work: Callable[[], Any]) -> Any:
        """Do `work` with the averaged weights in place."""
        began = time.perf_counter()
        self.objective.eval()
        with self.ema.swapped_in():
            result = work()
        self.objective.train()
        self.accelerator.wait_for_everyone()
        self._window.excluded_s += time.perf_counter() - began
        return result

    def _saving_if_stopped(self, work: Callable[[], None]) -> None:
        """Do `work`, which every process does alike; if it ends the run by a PrxPostError, save before."""
        try:
            work()
        except PrxPostError as error:
            if self.step:
                self.save()
                self._finish_saving()
            raise error.raised_by_all(self.accelerator.is_main_process) from None

    def _stop(self, number: int) -> None:
        self._finish_saving()
        raise StopRequested(
            f"stopped by {signal.Signals(number).name} after step {self.step}, which is saved. "
            f"Go on with resume_from_checkpoint: latest."
        ).raised_by_all(self.accelerator.is_main_process)
