"""Every shipped YAML loads, and says every setting by its right name."""

import importlib
from pathlib import Path

import pytest
import yaml

from prx_post.base.parsing import parse
from prx_post.evaluation.config import EvalConfig
from prx_post.rewards.judges.config import VisionJudgeConfig
from prx_post.stages.dpo.make_pairs import MakePairsConfig
from prx_post.stages.registry import REGISTRY

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))
KINDS = {
    **{name: entry.configs() for name, entry in REGISTRY.items()},
    **{"eval": [EvalConfig], "make": [MakePairsConfig, VisionJudgeConfig]},
}


def test_there_are_configs():
    assert {f"{p.parent.name}/{p.name}" for p in CONFIGS} >= {
        "tiny/sft.yaml",
        "tiny/sft-lora.yaml",
        "tiny/eval.yaml",
        "tiny/make-pairs.yaml",
        "tiny/dpo.yaml",
        "tiny/eval-dpo.yaml",
        "tiny/dpo-lora.yaml",
        "tiny/dpo-iterated.yaml",
        "tiny/eval-dpo-iterated.yaml",
        "tiny/grpo.yaml",
        "tiny/grpo-flow.yaml",
        "tiny/grpo-pref.yaml",
        "tiny/grpo-nft.yaml",
        "tiny/grpo-awm.yaml",
        "tiny/eval-grpo.yaml",
        "prx-512/grpo-hps-clip.yaml",
        "prx-512/grpo-ocr.yaml",
        "prx-512/grpo-pref.yaml",
        "tiny/distill.yaml",
        "tiny/distill-4.yaml",
        "tiny/distill-2.yaml",
        "tiny/distill-ladd.yaml",
        "tiny/distill-ladd-8.yaml",
        "tiny/distill-ladd-4.yaml",
        "tiny/distill-renoise-8.yaml",
        "tiny/distill-renoise-4.yaml",
        "tiny/distill-ladd-2.yaml",
        "tiny/eval-ladd.yaml",
        "tiny/dpo-student-8.yaml",
        "tiny/grpo-student-8.yaml",
        "tiny/grpo-student-8-anchor.yaml",
        "tiny/grpo-student-2.yaml",
        "tiny/grpo-student-2-legible.yaml",
        "tiny/eval-students.yaml",
        "tiny/draft.yaml",
        "prx-512/draft-hps.yaml",
        "prx-512/distill.yaml",
        "prx-512/distill-dc-ae.yaml",
        "prx-1024/distill.yaml",
        "prx-512/dpo-pickapic.yaml",
        "prx-512/dpo-pickapic-lora.yaml",
        "prx-512/eval.yaml",
        "prx-512/sft-alchemist.yaml",
        "prx-512/sft-alchemist-lora.yaml",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_shipped_config_loads_as_it_stands(path):
    parts = parse(KINDS[path.stem.split("-")[0]], ["--config", str(path)], "test")
    written = yaml.safe_load(path.read_text())
    values = {name: value for part in parts for name, value in vars(part).items()}
    assert {name: values[name] for name in written} == written
    assert path.read_text().startswith("# ")


def test_every_variant_of_the_students_benchmark_is_a_run_that_its_stage_would_take(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    students = importlib.import_module("students")
    for name, variant in students.VARIANTS.items():
        path = tmp_path / "config.yaml"
        written = students.settings_of(name, 3, tmp_path / "run")
        path.write_text(yaml.safe_dump(written))
        parts = parse(KINDS[variant.command], ["--config", str(path)], "test")
        values = {field: value for part in parts for field, value in vars(part).items()}
        of_run = {"seed": 3, "num_inference_steps": variant.steps, "report_to": []}
        assert {field: values[field] for field in written} == written | of_run, name
