"""What `prx-post plan` says against what a training process takes: the benchmark's own measurement, small."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "plan_memory.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("plan_memory", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("case", ["full", "full, checkpointing"])
def test_the_planned_peak_is_within_15_percent_of_the_measured_one(benchmark, tmp_path, case):
    batch = 24
    benchmark.make_pipeline(tmp_path / "pipeline", hidden=256, depth=4)
    benchmark.make_data(tmp_path / "data", count=batch, words=24)
    settings = {**benchmark.settings_of(tmp_path, benchmark.CASES[case], batch, "run"), "max_steps": 2}
    (found,) = benchmark.start(tmp_path, settings, count=1)
    planned = benchmark.estimate(settings, count=1).peak
    assert planned == pytest.approx(found["peak"] - found["baseline"], rel=0.15)
