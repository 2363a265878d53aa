"""A run's folder and processes: claimed, resumed or found finished, and let go of at the end."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from accelerate import Accelerator
from tqdm import tqdm

from prx_post.base.errors import PrxPostError
from prx_post.base.files import CONFIG, FINAL, LOCK, FolderLock, make_folder, require_empty
from prx_post.base.ranks import Ranks
from prx_post.base.settings import Rules
from prx_post.engine.checkpointing import LATEST, SavedState, checkpoints, open_checkpoint, select_checkpoint
from prx_post.engine.config import TrainConfig
from prx_post.engine.processes import agreement, build_accelerator, ranks_of, split_frozen
from prx_post.engine.resume import check_settings, keep_global_batch
from prx_post.engine.signals import StopSignals

PEER_LOST = ("closed by peer", "reset by peer", "timed out", "broken pipe", "waiting for clients")
"""Words in torch's errors when another process is gone or does not answer."""


class PeerLost(PrxPostError):
    """Another process of the run died or stopped answering."""


@dataclass
class Run:
    """One process's view of a run.

    Attributes:
        settings: everything configured, by name; kept in checkpoints, config.yaml and the model card.
        saved: the checkpoint to resume from, verified; None for a fresh start.
        ranks: its processes; they wait for each other for hours, so work that takes as long is gathered here.
        agree: the largest of all processes' values; they wait for ddp_timeout.
    """

    config: Any
    accelerator: Accelerator
    settings: dict[str, Any]
    saved: SavedState | None
    is_finished: bool
    signals: StopSignals
    ranks: Ranks
    agree: Callable[[int], int]
    log: Any = None
    """Where images go; set once training begins."""
    is_planned: ClassVar[bool] = False

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def output_dir(self) -> Path:
        return self.config.folder

    @property
    def final(self) -> Path:
        """Where the pipeline is emitted."""
        return self.output_dir / FINAL

    def set_final_aside(self) -> None:
        """Keep what a finished run, which is resumed, has emitted, by another name; on the main process."""
        if not self.final.exists():
            return
        kept = f"{FINAL}-{self.saved.info['settings']['max_steps']:06d}" if self.saved else f"{FINAL}-earlier"
        while (self.output_dir / kept).exists():
            kept += "-again"
        tqdm.write(f"the run had finished; its pipeline is kept as {kept}")
        for name in (f"{FINAL}-adapter", FINAL):  # this last: by it a finished run is known
            if (self.output_dir / name).exists():
                (self.output_dir / name).rename(self.output_dir / name.replace(FINAL, kept))

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step, on all processes."""
        config = self.config
        return config.per_device_train_batch_size * self.ranks.world * config.gradient_accumulation_steps

    def set_length(self, steps_per_epoch: float) -> None:
        """Have num_train_epochs, if it is given, say how many steps the run has."""
        config = self.config
        if config.num_train_epochs is not None:
            config.max_steps = max(1, math.ceil(config.num_train_epochs * steps_per_epoch - 1e-6))
        self.settings["max_steps"] = config.max_steps

    def transformer(self, pipeline: Any, dtype: torch.dtype = torch.float32) -> Any:
        """The network of a `PipelineFolder`, loaded; `prx-post plan` gives one without values in its place."""
        return pipeline.load_transformer(dtype)

    def vae(self, pipeline: Any) -> Any:
        """The frozen autoencoder of a `PipelineFolder`, loaded; in a plan without values, too."""
        return self.place(pipeline.load_vae())

    def frozen(self, module: Any) -> Any:
        """A network that is only asked, on this process's device; under ZeRO-3 split among the processes."""
        return split_frozen(module.eval().requires_grad_(False), self.accelerator)

    def place(self, module: Any) -> Any:
        """The module on this process's device."""
        return module.to(self.device)

    def seed(self, rank: int = 0) -> None:
        """Seed torch's global generator (adapter init, dropout); data, noise and timesteps have seeds of their own."""
        torch.manual_seed(self.config.seed + rank)

    def stop_signal(self) -> int:
        """The stop signal that any process has received, or 0. A collective."""
        return self.agree(self.signals.received)


@contextmanager
def open_run(config: TrainConfig, settings: dict[str, Any], rules: dict[str, Rules]) -> Iterator[Run]:
    """Claim `output_dir`, alone, and find what to resume from.

    Args:
        rules: of every setting; they say which may change on resuming.

    Raises:
        PrxPostError: the folder is in use or holds something else; the checkpoint is missing, damaged or of other
            settings; inside, another process was lost.
    """
    config.settle(int(os.environ.get("WORLD_SIZE", "1")))
    changed_batch = _keep_global_batch(config)
    settings["gradient_accumulation_steps"] = config.gradient_accumulation_steps
    if config.num_train_epochs is not None:
        del settings["max_steps"]  # which is known when the data are
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    folder, lock = config.folder, None

    def claim() -> tuple[SavedState | None, bool]:
        nonlocal lock
        _check_folder(config, folder)
        make_folder(folder)
        lock = FolderLock(folder, leaves_file=True)
        if (folder / FINAL).exists() and not _goes_on(config, folder):
            tqdm.write(f"the run in {folder} has finished: there is nothing to do")
            return None, True
        saved = select_checkpoint(config.resume_from_checkpoint, folder, config.resume_past_damage)
        for line in check_settings(saved, settings, rules) if saved else []:
            tqdm.write(line)
        if config.resume_from_checkpoint:
            tqdm.write(f"resuming from {saved.folder}" if saved else f"{folder} has no checkpoint yet: starting afresh")
        return saved, False

    try:
        with StopSignals() as signals, _peers_may_be_lost(config, signals):
            accelerator = build_accelerator(config)
            ranks, agree = ranks_of(accelerator), agreement(accelerator, config.ddp_timeout)
            if changed_batch and ranks.is_main:
                tqdm.write(changed_batch)
            saved, is_finished = ranks.on_main(claim)
            _check_shared(config, ranks)
            yield Run(config, accelerator, settings, saved, is_finished, signals, ranks, agree)
    finally:
        if lock is not None:
            lock.release()


@contextmanager
def _peers_may_be_lost(config: TrainConfig, signals: StopSignals) -> Iterator[None]:
    """Raise PeerLost for torch's errors about other processes; or what stopped all of them, if that is known here."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        is_about_peers = isinstance(error, torch.distributed.DistError) or any(w in reason.lower() for w in PEER_LOST)
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not is_about_peers:
            raise
        if signals.received and not signals.is_training:
            raise signals.while_preparing() from error
        raise PeerLost(
            f"rank {os.environ['RANK']} stops, because another process died or did not answer within "
            f"{config.ddp_timeout} s (ddp_timeout): {reason[:300]}. Look at the other ranks' output for the cause; "
            f"resume with resume_from_checkpoint: latest."
        ) from error


def _goes_on(config: TrainConfig, folder: Path) -> bool:
    """Whether a finished run is asked for more steps than it has made.

    Raises:
        PrxPostError: it is asked to resume from an earlier checkpoint, or has none to resume from.
    """
    if config.resume_from_checkpoint != LATEST:
        raise PrxPostError(
            f"resume_from_checkpoint is {config.resume_from_checkpoint!r}, but the run in {folder} has finished, and "
            f"its pipeline is not overwritten. Move {folder / FINAL} away, or choose another output_dir."
        )
    name = "max_steps" if config.num_train_epochs is None else "num_train_epochs"
    asked, made = getattr(config, name), _settings_of(folder).get(name)
    if made is None or asked <= made:
        return False
    if not checkpoints(folder):
        raise PrxPostError(
            f"{name} is {asked}, but the run in {folder} has finished with {made} and has no checkpoint to resume from "
            f"(save_steps). Start a new run from its pipeline."
        )
    return True


def _settings_of(folder: Path) -> dict[str, Any]:
    """A run's, as far as it says."""
    path = folder / CONFIG
    return yaml.safe_load(path.read_text()) if path.is_file() else {}


def _check_shared(config: TrainConfig, ranks: Ranks, patience_s: float = 10.0) -> None:
    """Raise PrxPostError, on every process, unless all see the folder that the main process has locked."""
    deadline = time.monotonic() + patience_s
    lock = config.folder / LOCK
    while not lock.exists() and time.monotonic() < deadline:
        time.sleep(0.5)  # a network disk may show it late
    if ranks.gather([ranks.rank] if not lock.exists() else []):
        raise PrxPostError(
            f"output_dir is {str(config.folder)!r}, which not every process sees. "
            f"Choose one on a disk that every machine sees."
        ).raised_by_all(ranks.is_main)


def _check_folder(config: TrainConfig, folder: Path) -> None:
    """Raise PrxPostError unless `folder` is new or empty, or the very run that is resumed."""
    resume = config.resume_from_checkpoint
    is_a_run = (folder / LOCK).is_file() or bool(checkpoints(folder))  # the lock is the first thing a run writes
    goes_on = resume == LATEST or (resume and Path(resume).expanduser().resolve().parent == folder.resolve())
    if not (goes_on and is_a_run):
        require_empty(config.output_dir)


def _keep_global_batch(config: TrainConfig) -> str | None:
    """Look at the newest checkpoint before the processes meet, because they need to know the accumulation."""
    resume = config.resume_from_checkpoint
    if resume is None:
        return None
    folders = checkpoints(config.folder) if resume == LATEST else [Path(resume).expanduser()]
    for folder in folders[::-1]:
        try:
            saved = open_checkpoint(folder)
        except PrxPostError:
            continue  # reported, or passed over, when it is selected
        return keep_global_batch(config, saved, int(os.environ.get("WORLD_SIZE", "1")))
    return None


def leave_processes(code: int) -> None:
    """End a process of several at once. Their libraries' threads sometimes abort at a normal exit, after the work."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        if code == 0:
            torch.distributed.destroy_process_group()
        os._exit(code)
