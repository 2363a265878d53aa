"""Imports flow one way; read from the syntax trees, nothing is run."""

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "prx_post"
GROUND = {"base"}
MATHEMATICS = {"flow", "sampling", "objectives"}
ALLOWED = {
    "base": set(),
    "flow": set(),
    "sampling": set(),
    "objectives": set(),
    "engine": GROUND,
    "model": GROUND | MATHEMATICS | {"engine"},
    "data": GROUND | MATHEMATICS | {"engine", "model"},
    "recipes": GROUND | {"data"},
    "rewards": GROUND | {"model", "data"},
    "generate": GROUND | {"model", "data"},
    "evaluation": GROUND | MATHEMATICS | {"engine", "model", "data", "rewards"},
    "stages": GROUND | MATHEMATICS | {"engine", "model", "data", "rewards", "evaluation"},
    "planning": GROUND | MATHEMATICS | {"engine", "model", "data", "stages"},
    "tiny": GROUND | {"engine", "model", "data", "rewards", "stages"},
    "cli": GROUND | {"stages"},
    "api": GROUND | {"stages"},
    "__init__": set(),
}
"""Top-level parts of prx_post that each part may import, besides itself. Every part has a row."""

HEAVY = {"accelerate", "deepspeed"}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_flow_one_way(path):
    part = part_of(path)
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("prx_post.") and name.count(".")}
    ours -= {"__version__", part}
    assert ours <= ALLOWED[part]
    if part == "stages":
        shared = {"anchor", "banner", "base", "captioned", "compatibility", "inherited", "prompted", "references"}
        shared |= {"registry", "reward_gradient", "run", "trajectories", "windows"}
        own = path.relative_to(PACKAGE / "stages").parts[0].removesuffix(".py")
        stages = {name.split(".")[2] for name in imports(path) if name.startswith("prx_post.stages.")}
        assert stages <= shared | {own}, "a stage never imports a stage"


def test_every_part_has_a_row_and_the_allowed_graph_has_no_circle():
    assert {part_of(path) for path in FILES} == set(ALLOWED)
    graphlib.TopologicalSorter(ALLOWED).prepare()  # raises CycleError


def module_of(path: Path) -> str:
    parts = ("prx_post", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_files_import_each_other_in_a_circle():
    known = {module_of(path) for path in FILES}
    graph = {module_of(path): imports(path) & known - {module_of(path)} for path in FILES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_engine_imports_accelerate_or_deepspeed(path):
    if part_of(path) != "engine":
        assert not {name.split(".")[0] for name in imports(path)} & HEAVY


LIGHT = {
    *("base/errors.py", "base/settings.py", "base/parsing.py", "base/files.py", "base/ranks.py", "base/net.py"),
    *("cli.py", "engine/config.py", "model/config.py", "model/inference.py", "data/config.py", "rewards/registry.py"),
    *(
        "stages/registry.py",
        "stages/inherited.py",
        "stages/anchor/config.py",
        "stages/draft/config.py",
        "stages/sft/config.py",
        "stages/distill/config.py",
        "stages/dpo/config.py",
        "stages/grpo/config.py",
        "stages/grpo/settings.py",
        "evaluation/monitor_config.py",
    ),
    *("rewards/judges/config.py", "rewards/judges/judge_answers.py"),
}
"""Files that are read before a command knows what it needs: at their top they import nothing that takes a second."""


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_settings_import_neither_torch_nor_what_brings_it(name):
    body = ast.parse((PACKAGE / name).read_text()).body
    top = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    top |= {str(node.module) for node in body if isinstance(node, ast.ImportFrom)}
    assert not {module.split(".")[0] for module in top} & {
        "torch",
        "diffusers",
        "transformers",
        "numpy",
        "accelerate",
        "httpx2",
    }
    ours = {module.removeprefix("prx_post.").replace(".", "/") + ".py" for module in top if "prx_post." in module}
    assert ours <= LIGHT


@pytest.mark.parametrize("part", ["flow", "sampling", "objectives"])
def test_the_mathematics_imports_torch_alone(part):
    standard = {"collections", "typing", "dataclasses", "math", "prx_post"}
    for path in FILES:
        if part_of(path) == part:
            assert {name.split(".")[0] for name in imports(path)} <= {"torch", *standard}


def test_no_file_is_longer_than_400_lines():
    assert [p.name for p in FILES if len(p.read_text().splitlines()) > 400] == []
