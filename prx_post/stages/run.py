"""Runs any stage: opens it, prepares its data, resumes, fits, emits."""

import dataclasses
from pathlib import Path
from typing import Any

from prx_post.base.settings import rules_of
from prx_post.engine.run import Run, open_run
from prx_post.engine.tracking import RunLog, check_trackers
from prx_post.engine.trainer import Trainer
from prx_post.stages.registry import Stage, find


def run(name: str, configs: tuple[Any, ...]) -> Path:
    """Run the stage `name` with its settings. Returns the folder of the emitted pipeline.

    Raises:
        PrxPostError: something cannot be used; before any model is loaded, where that can be known.
    """
    stage = find(name).stage()(*configs)
    check_trackers(stage.config.report_to)
    settings = {key: value for part in configs for key, value in dataclasses.asdict(part).items()}
    with open_run(stage.config, settings, rules_of(stage.configs)) as opened:
        if not opened.is_finished:
            _train(stage, opened)
        opened.accelerator.print(f"pipeline in {opened.final}")
        return opened.final


def _train(stage: Stage, run: Run) -> None:
    data = stage.data(run)
    identity = {"stage": stage.name, **stage.identity(run, data)}
    run.seed()
    objective = stage.objective(run, data)
    run.seed(run.ranks.rank)
    source = stage.source(run, data, objective)
    with RunLog(run) as run.log:
        trainer = Trainer(run, objective, source, stage.monitor(run, data, objective), run.log, identity)
        if run.saved:
            trainer.resume(run.saved)
        metrics = trainer.fit()
        weights = trainer.emitted_weights()
        run.ranks.on_main(lambda: stage.emit(run, data, weights, metrics))
