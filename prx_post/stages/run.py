"""Runs any stage: opens it, prepares its data, resumes, fits, emits."""

import dataclasses
from pathlib import Path
from typing import Any

from prx_post.base.errors import PrxPostError
from prx_post.base.settings import rules_of
from prx_post.engine.run import Run, open_run
from prx_post.engine.tracking import RunLog, check_trackers
from prx_post.engine.trainer import Trainer
from prx_post.stages.banner import banner
from prx_post.stages.registry import Stage, find


def run(name: str, configs: tuple[Any, ...]) -> Path:
    """Run the stage `name` with its settings. Returns the folder of the emitted pipeline.

    Raises:
        PrxPostError: something cannot be used; before any model is loaded, where that can be known.
    """
    stage = find(name).stage()(*configs)
    check_trackers(stage.config.report_to)
    settings = {key: value for part in configs for key, value in dataclasses.asdict(part).items()}
    with open_run(stage.config, settings, rules_of(stage.configs)) as run:
        if not run.is_finished:
            trainer, data = _prepare(stage, run)
            with run.log:
                if run.saved:
                    trainer.resume(run.saved)
                run.ranks.on_main(run.set_final_aside)
                metrics = trainer.fit()
                weights = trainer.emitted_weights()
                run.ranks.on_main(lambda: stage.emit(run, data, weights, metrics))
        run.accelerator.print(f"pipeline in {run.final}")
        return run.final


def _prepare(stage: Stage, run: Run) -> tuple[Trainer, Any]:
    """The trainer, and the data that it trains on.

    Raises:
        PrxPostError: the checkpoint is another stage's.
    """
    if run.saved is not None and run.saved.info["stage"] != stage.name:
        raise PrxPostError(
            f"{run.saved.folder} is of the stage {run.saved.info['stage']}, not {stage.name}. Choose another "
            f"output_dir, and start from the pipeline that the other stage emits."
        )
    data, anchor = stage.data(run), stage.anchor
    if anchor is not None:
        anchor.prepare(run)
    steps_per_epoch = stage.steps_per_epoch(run, data)
    run.set_length(steps_per_epoch)
    identity = {"stage": stage.name, **stage.identity(run, data)}
    if anchor is not None:
        identity["anchor"] = anchor.identity(run)
    run.seed()
    objective = stage.objective(run, data)
    run.seed(run.ranks.rank)
    source = stage.source(run, data, objective)
    monitor = stage.monitor(run, data, objective)
    if anchor is not None:
        objective, source = anchor.join(run, objective, source)
    run.log = RunLog(run)
    if run.ranks.is_main:
        run.log.say(banner(run, steps_per_epoch, objective))
    return Trainer(run, objective, source, monitor, run.log, identity), data
