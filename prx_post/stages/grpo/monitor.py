"""Validation of online alignment: what every stage has, the guard, and a report with a film strip."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from prx_post.engine.signals import StopEarly
from prx_post.engine.tracking import EVALUATIONS, METRICS
from prx_post.evaluation.monitor import ImageMonitor, Job
from prx_post.evaluation.training_report import FILM, TrainingReport, write_training_report
from prx_post.stages.grpo.guard import Guard, HackingDetector

REPORT = "report.html"


@dataclass
class GuardedMonitor(ImageMonitor):
    """Acts, through `guard`, when the optimised reward rises while held-out judgement falls.

    Args:
        proxies: weights of the optimised rewards, by label.
    """

    guard: Guard = field(default_factory=Guard)
    proxies: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        config: Any = self.config
        self._detector = HackingDetector(config, self.proxies)
        self._stop_reason: str | None = None

    @property
    def keeps_best(self) -> bool:
        config: Any = self.config
        return super().keeps_best or config.guard == "stop"

    def watch(self, step: int, metrics: dict[str, float]) -> None:
        config: Any = self.config
        point = self._detector.point({**metrics, "step": step}) if config.guard != "off" else None
        reason = self._stop_reason  # of an evaluation after which the run was killed, if any
        if point is not None:
            reason = self._detector.add(point) or reason
        if point is not None:
            self._report()
        if reason is not None:
            self._act(reason)
        super().watch(step, metrics)

    def resume(self, evaluations: list[dict[str, Any]], logged: list[dict[str, Any]]) -> None:
        super().resume(evaluations, logged)
        config: Any = self.config
        for line in evaluations if config.guard != "off" else []:
            point = self._detector.point(line)
            reason = self._detector.add(point) if point is not None else None
            if reason is not None:
                self._note_action()
                self._stop_reason = reason if config.guard == "stop" else None

    def _act(self, reason: str) -> None:
        config: Any = self.config
        if config.guard == "stop":
            raise StopEarly(f"stopped by the guard: {reason}. The best weights by that judgement are emitted")
        was_regularizing = self.guard.regularizes
        self._note_action()
        done = {
            "warn": "nothing is done about it (guard: warn)",
            "lower_lr": f"the learning rate is now {self.guard.learning_rate_factor:.3g} of what it was set to",
            "regularize": f"suspicious images are {'still' if was_regularizing else 'now'} held to the reference",
        }
        if self.run.log is not None:
            self.run.log.say(f"warning: {reason}; {done[config.guard]}")

    def _note_action(self) -> None:
        config: Any = self.config
        if config.guard == "lower_lr":
            self.guard.learning_rate_factor *= config.guard_lr_factor
        self.guard.regularizes = self.guard.regularizes or config.guard == "regularize"

    def _save_sheet(
        self, step: int, name: str, columns: list[tuple[str, list[Image.Image]]], jobs: Sequence[Job]
    ) -> None:
        super()._save_sheet(step, name, columns, jobs)
        shown = dict(columns).get(f"{self.config.num_inference_steps} steps")
        if shown:
            self.run.ranks.on_main(lambda: self._save_frame(step, shown))

    def _save_frame(self, step: int, images: Sequence[Image.Image]) -> None:
        """The images of one evaluation below each other; a column of the film strip."""
        width, height = images[0].size
        frame = Image.new("RGB", (width, height * len(images)))
        for i, image in enumerate(images):
            frame.paste(image.convert("RGB"), (0, i * height))
        folder = self.run.output_dir / FILM
        folder.mkdir(exist_ok=True)
        info = PngInfo()
        info.add_text("rows", str(len(images)))
        frame.save(folder / f"{step:06d}.png", pnginfo=info)

    def _report(self) -> None:
        """Of the run so far, on the main process; if that fails, all know."""
        log, jobs, folder = self.run.log, self._jobs(), self.run.output_dir
        if log is None:
            return
        config: Any = self.config

        def write() -> None:
            report = TrainingReport(
                title=folder.name,
                points=[(p.step, self._detector.score(p), p.held_out) for p in self._detector.points],
                held_out=str(config.metric_for_best_model),
                acted=list(self._detector.acted),
                guard=config.guard,
                prompts=[f"{job.prompt}, seed {job.seed}" for job in jobs],
                evaluations=log.lines(EVALUATIONS),
                metrics=log.lines(METRICS),
            )
            write_training_report(folder, folder / REPORT, report)

        self.run.ranks.on_main(write)
