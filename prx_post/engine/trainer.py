"""One loop for every stage: accumulate, clip, step, average, log, save, validate."""

import copy
import json
import math
import signal
import time
from collections.abc import Iterator
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from prx_post.base.errors import PrxPostError
from prx_post.base.files import replacing, write_json
from prx_post.engine.checkpointing import CheckpointWriter, SavedState
from prx_post.engine.ema import EMA
from prx_post.engine.metrics import Window
from prx_post.engine.optim import group_of
from prx_post.engine.partition import join
from prx_post.engine.prefetch import Prefetched, can_pin
from prx_post.engine.protocols import POLICY, Batch, Monitor, Objective, Source, to_device
from prx_post.engine.resume import collect, restore, set_random_state
from prx_post.engine.run import Run
from prx_post.engine.signals import StopEarly, StopRequested, StopTraining
from prx_post.engine.stepper import Stepper
from prx_post.engine.tracking import EVALUATIONS, METRICS, RunLog

WRITE_FAILED = 1000
"""Told to other ranks in the place of a signal's number."""
NONFINITE = "nonfinite.jsonl"
BEST, BEST_MARK = "best.safetensors", "best.json"
VALIDATED = "validated.json"
"""The last step whose validation is complete: one that was interrupted is made again."""
SourceState = tuple[dict[str, Any], dict[str, Tensor]]


class Trainer:
    """Fits an objective to the batches of a source, and lets a monitor look at the averaged weights.

    Args:
        identity: what a checkpoint must say of the run besides its settings: its stage, the digests of its data.

    Attributes:
        ema: the average of the policy's weights; `ema.swapped_in()` to use them.
        step: optimizer steps done.
    """

    def __init__(
        self,
        run: Run,
        objective: Objective,
        source: Source,
        monitor: Monitor,
        log: RunLog,
        identity: dict[str, Any],
    ) -> None:
        self.run, self.config, self.monitor, self.log, self._identity = run, run.config, monitor, log, identity
        self.stepper = Stepper(run.accelerator, objective, self.config)
        self._unwrapped, self._buffers = objective, _buffers(objective)  # now that they are on their device
        self.objective, self.partition = self.stepper.objective, self.stepper.partition
        self._policy = {name: p for name, p in self.partition.parameters.items() if group_of(name) == POLICY}
        self.ema = EMA(self._policy.values(), self.config.ema_decay, self.config.ema_update_steps)
        self.source = source if source.online else Prefetched(source, self.config.max_steps, can_pin())
        self.step = self._nonfinite_in_a_row = 0
        self._saved_at = -1
        self._window = Window()
        self._writer = CheckpointWriter(
            run.output_dir, run.ranks.rank, run.ranks.world, self.config.save_total_limit, self.config.ddp_timeout
        )

    def resume(self, saved: SavedState) -> None:
        """Continue from a checkpoint as if the run had never stopped."""
        restore(self.partition, self.ema, self._buffers, saved)
        self.step = self._saved_at = saved.step
        state, ranks = saved.info["trainer"], self.run.ranks
        self._nonfinite_in_a_row, self.ema.num_updates = state["nonfinite_in_a_row"], state["ema_updates"]
        self.source.load_state(saved.info["source"], saved.joined("source"))
        self._window.grad_norm = math.nan if state["grad_norm"] is None else state["grad_norm"]
        same_world = saved.world_size == ranks.world
        if same_world:
            set_random_state(saved, ranks.rank)
        if same_world and state["micro_batches_per_step"] == self.config.gradient_accumulation_steps:
            sums = dict(saved.of_rank(ranks.rank).under("sums"))
            self._window.resume(sums, state["window_counts"], state["window_images"])
        else:  # each new process stands for the average of the old ones
            each = [dict(saved.of_rank(r).under("sums")) for r in range(saved.world_size)]
            scale = self.config.gradient_accumulation_steps / state["micro_batches_per_step"]
            sums = {name: scale * sum(of_one[name] for of_one in each) / len(each) for name in each[0]}
            counts = {name: count * scale for name, count in state["window_counts"].items()}
            self._window.resume(sums, counts, state["window_images"])

    def fit(self) -> dict[str, Any]:
        """Run up to `max_steps` optimizer steps, or until the monitor finds no more gain.

        Returns:
            The last logged metrics; `step`, how many were made; `best`, the step and metrics of the best that was kept.

        Raises:
            StopRequested: a signal asked for it; a checkpoint was saved.
            StopTraining: the monitor ended the run; a checkpoint was saved.
            PrxPostError: too many steps in a row were not finite, or a checkpoint could not be written.
        """
        config = self.config
        self.run.ranks.on_main(self._clean_up)
        is_validated = self.step > 0 and self.run.ranks.on_main(self._validated_at) == self.step
        self.log.keep_until(self.step if is_validated else self.step - 1, EVALUATIONS)
        last = self.log.keep_until(self.step, NONFINITE, METRICS)
        self.log.advance(self.step)
        self._resume_monitor()
        self.run.signals.note_only()
        self._window.start()
        with self._writer:
            try:
                if not is_validated:
                    self._validate_if_due()
                self.objective.train()
                while self.step < config.max_steps:
                    self._train_step()
                    self.log.advance()
                    if self.step % config.logging_steps == 0 or self.step == config.max_steps:
                        last = self._write_metrics()
                    self._save_if_due_or_stopped()
                    self._validate_if_due()
                self._finish_saving()
            except StopEarly as reason:
                self._finish_saving()
                self.log.say(str(reason))
            finally:
                if isinstance(self.source, Prefetched):
                    self.source.close()
        if self._nonfinite_in_a_row:
            self.log.say(f"warning: the last {self._nonfinite_in_a_row} steps were skipped: see nonfinite.jsonl")
        return {**last, "step": self.step, "best": self.run.ranks.on_main(self._best)}

    def save(self, of_source: SourceState | None = None) -> None:
        """Copy the state to the host and begin to write it; training need not wait for the disk.

        Args:
            of_source: its state, if it is not what it should be now.
        """
        began = time.perf_counter()
        self._finish_saving()
        window, ranks = self._window, self.run.ranks
        info, tensors = of_source or self.source.state()
        of_this_rank = {f"sums/{name}": value for name, value in window.sums.items()}
        of_this_rank |= {f"source/{name}": value for name, value in tensors.items()}
        part = collect(self.partition, self.ema, self._buffers, of_this_rank, ranks.rank, ranks.world)
        state = {
            "nonfinite_in_a_row": self._nonfinite_in_a_row,
            "grad_norm": None if math.isnan(window.grad_norm) else window.grad_norm,
            "ema_updates": self.ema.num_updates,
            "window_counts": dict(window.counts),  # it is written while training continues
            "window_images": window.images,
            "micro_batches_per_step": self.config.gradient_accumulation_steps,
        }
        batch = self.run.global_batch_size
        told = {"step": self.step, "global_batch_size": batch, "source": copy.deepcopy(info), "trainer": state}
        self._writer.save(part, {**told, "settings": self.run.settings, **self._identity})
        self._saved_at = self.step
        window.excluded_s += time.perf_counter() - began

    def emitted_weights(self) -> dict[str, Tensor]:
        """The policy's averaged weights, whole, or the best that were kept; by name, on the main process's CPU.

        Empty elsewhere. A collective under ZeRO.
        """
        if self.monitor.keeps_best and self.run.ranks.on_main(self._best):
            return load_file(self.run.output_dir / BEST) if self.run.ranks.is_main else {}
        return self.averaged_weights()

    def averaged_weights(self) -> dict[str, Tensor]:
        """As `emitted_weights`, the current average."""
        found = {}
        for name, parameter in self._policy.items():
            average = self.ema.of(parameter)
            whole = self.partition.weight(name) if average is None else join(parameter, average)
            if self.run.ranks.is_main:
                found[name.removeprefix(f"{POLICY}.")] = whole.cpu()
        return found

    def _weights(self) -> dict[str, Tensor]:
        """The policy's trained weights, whole, on every rank."""
        return {name.removeprefix(f"{POLICY}."): self.partition.weight(name) for name in self._policy}

    def _train_step(self) -> None:
        window, stepper = self._window, self.stepper
        factor = self._unwrapped.learning_rate_factor
        stepper.begin(self.step, factor)
        window.learning_rate = factor * stepper.schedule.rate(POLICY, self.step)
        seen: list[Batch] = []
        losses: list[Tensor] = []
        for batch in self._fetched():
            with stepper.micro_batch():
                with stepper.autocast():
                    loss, metrics = self.objective(batch)
                stepper.backward(loss)
            seen.append({"rows": batch["rows"], "seeds": batch["seeds"]})
            losses.append(loss.detach())
            images = len(batch["seeds"])
            window.add({"loss": losses[-1], **metrics, **batch.get("metrics", {})}, images=images)
        if len(seen) != self.config.gradient_accumulation_steps:
            raise ValueError(f"the source gave {len(seen)} micro-batches, but must give gradient_accumulation_steps")
        is_done = stepper.step()
        if is_done:
            if POLICY not in stepper.schedule.waiting(self.step):
                self.ema.update(stepper.schedule.updates_before(POLICY, self.step + 1))
            window.commit(stepper.grad_norm, stepper.group_norms)
            self._nonfinite_in_a_row = 0
        self._unwrapped.after_step(self.step, self._weights)
        self.step += 1
        if not is_done:
            window.discard()
            self._record_nonfinite(seen, losses)

    def _fetched(self) -> Iterator[Batch]:
        """The step's batches, each on the device; the time that the loop waits for them is noted.

        What goes wrong on one rank before the first of them is there ends the run on all, with the state saved; of the
        source that from before, for other ranks may be further.
        """
        before = self.source.state()
        batches, is_first = self.source.batches(self.step), True
        while True:
            began = time.perf_counter()
            batch, error = None, None
            try:
                batch = next(batches, None)
            except Exception as caught:  # raised again below, after the others know
                error = caught
            if is_first and self.run.agree(int(error is not None)):
                self._save_what_is_done(before)
                raise error or PrxPostError("another rank could not make its batch; it says why").raised_by_all(False)
            if error is not None:
                raise error
            if batch is None:
                return
            batch, is_first = to_device(batch, self.run.device), False
            self._window.waited_s += time.perf_counter() - began
            yield batch

    def _record_nonfinite(self, seen: list[Batch], losses: list[Tensor]) -> None:
        """Write every process's samples of a skipped step to nonfinite.jsonl; stop after too many such steps."""
        self._nonfinite_in_a_row += 1
        ranks, path = self.run.ranks, self.run.output_dir / NONFINITE
        mine = [
            {"step": self.step, "rank": ranks.rank, "loss": str(float(loss)), "rows": b["rows"], "seeds": b["seeds"]}
            for b, loss in zip(seen, losses, strict=True)
        ]
        lines = ranks.gather(mine)
        if ranks.is_main:
            with path.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        self.log.say(f"step {self.step} skipped: its gradient is not finite. Rows and seeds are in {path}")
        if self._nonfinite_in_a_row >= self.config.max_nonfinite_steps:
            raise PrxPostError(
                f"the gradient was not finite for {self._nonfinite_in_a_row} steps in a row (max_nonfinite_steps), the "
                f"last of them {self.step}. Their rows and seeds are in {path}. If they look sound, lower "
                f"learning_rate, and resume from the last checkpoint with resume_from_checkpoint: latest."
            ).raised_by_all(ranks.is_main)

    def _write_metrics(self) -> dict[str, float]:
        metrics = self._window.close(self.run.accelerator)
        self.log.write(self.step, metrics)
        self._window.start()
        self._saving_if_it_ends(lambda: self.monitor.watch(self.step, metrics))
        return metrics

    def _save_if_due_or_stopped(self) -> None:
        """Agree on signals and save: before anything is generated, which may fail or take long."""
        config, step = self.config, self.step
        stop = self._agree(self.run.signals.received)
        if stop or (config.save_steps and (step % config.save_steps == 0 or step == config.max_steps)):
            self.save()
        if stop:
            self._stop(stop)

    def _validate_if_due(self) -> None:
        if not self.monitor.is_due(self.step):
            return
        began = time.perf_counter()
        self._saving_if_it_ends(self._validate)
        self._window.excluded_s += time.perf_counter() - began

    def _validate(self) -> None:
        self.objective.eval()
        with self.ema.swapped_in():
            metrics = self.monitor.validate(self.step)
        self.objective.train()
        if metrics and self.monitor.is_best(metrics):
            self._keep_best(metrics)

        def note() -> None:
            if metrics:
                self.log.evaluation(self.step, metrics)
            write_json(self.run.output_dir / VALIDATED, {"step": self.step})

        self.run.ranks.on_main(note)
        if metrics:
            self.monitor.watch(self.step, metrics)

    def _keep_best(self, metrics: dict[str, float]) -> None:
        weights = self.averaged_weights()

        def write() -> None:
            with replacing(self.run.output_dir / BEST) as partial:
                save_file({name: value.contiguous() for name, value in weights.items()}, partial)
            write_json(self.run.output_dir / BEST_MARK, {"step": self.step, "metrics": metrics})

        self.run.ranks.on_main(write)

    def _saving_if_it_ends(self, work: Any) -> None:
        """Do `work`, which every process does alike; if it ends the run, whatever the reason, save before."""
        try:
            work()
        except Exception as error:
            self._save_what_is_done()
            if isinstance(error, StopRequested):
                self._stop(self.run.stop_signal())
            if isinstance(error, StopTraining):  # raised alike by all
                error.raised_by_all(self.run.ranks.is_main)
            raise

    def _save_what_is_done(self, of_source: SourceState | None = None) -> None:
        if self.step and self.step != self._saved_at:
            self.save(of_source)
            self._finish_saving()

    def _agree(self, received: int) -> int:
        """The signal that any rank received, or 0. Raises on all ranks if one could not write its checkpoint."""
        stop = self.run.agree(WRITE_FAILED if self._writer.has_failed else received)
        if stop == WRITE_FAILED:
            self._writer.check()
            raise PrxPostError("another rank could not write its part; it says why").raised_by_all(is_main=False)
        return stop

    def _finish_saving(self) -> None:
        """Until every rank's part of the last checkpoint is written. Raises on all ranks if one is not."""
        self._writer.join()
        self._agree(0)

    def _stop(self, number: int) -> None:
        self._finish_saving()
        done = f"after step {self.step}, which is saved" if self.step else "before the first step"
        raise StopRequested(
            f"stopped by {signal.Signals(number).name} {done}. Resume with resume_from_checkpoint: latest."
        ).raised_by_all(self.run.ranks.is_main)

    def _best(self) -> dict[str, Any] | None:
        """`step` and `metrics` of the best weights that were kept, on the main process."""
        mark = self.run.output_dir / BEST_MARK
        return json.loads(mark.read_text()) if mark.is_file() and (self.run.output_dir / BEST).is_file() else None

    def _validated_at(self) -> int:
        path = self.run.output_dir / VALIDATED
        return json.loads(path.read_text())["step"] if path.is_file() else -1

    def _resume_monitor(self) -> None:
        """A best of which the weights are lost is none."""
        best = self.run.ranks.on_main(self._best)  # for all ranks, once the main one has cut the files
        is_lost = self.monitor.keeps_best and best is None
        self.monitor.resume(self.log.lines(EVALUATIONS), self.log.lines(METRICS))
        if is_lost:
            self.monitor.forget_best()

    def _clean_up(self) -> None:
        """What a killed run left behind: half a save, later checkpoints, a best of steps that are run again."""
        self._writer.clean()
        self._writer.set_aside_after(self.step)
        mark = self.run.output_dir / BEST_MARK
        if mark.is_file() and json.loads(mark.read_text())["step"] > self.step:
            mark.unlink()
            (self.run.output_dir / BEST).unlink(missing_ok=True)


def _buffers(objective: Objective) -> dict[str, Tensor]:
    """Tensors besides the trained weights that a checkpoint holds, by name."""
    found = {
        f"{group.name}.{name}": buffer
        for group in objective.groups()
        for name, buffer in group.module.named_buffers()
        if name in group.module.state_dict()
    }
    return found | objective.kept()
