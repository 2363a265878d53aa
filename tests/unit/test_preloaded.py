"""Children of the tests find everything imported; else each would take seconds, and nobody would know."""

from pathlib import Path

from tests.processes import Child

HEAVY = ("torch", "diffusers.pipelines.prx.pipeline_prx", "deepspeed", "peft", "prx_post.engine.trainer")


def print_what_is_there() -> None:
    import sys

    print("there:", " ".join(name for name in HEAVY if name in sys.modules))


def test_a_child_starts_with_everything_imported(tmp_path: Path):
    child = Child(["--version"], tmp_path / "log", print_what_is_there)
    assert child.wait(timeout=100) == 0
    assert f"there: {' '.join(HEAVY)}\n" in (tmp_path / "log").read_text()
