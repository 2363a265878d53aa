"""What the README and the docs say can be done: links lead somewhere, commands are right, blocks run as they stand."""

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from prx_post.base.parsing import parse, separate
from prx_post.cli import LAUNCH_FLAGS
from prx_post.data.preview import PreviewConfig
from prx_post.evaluation.config import EvalConfig
from prx_post.generate import GenerateConfig
from prx_post.planning.plan import PlanConfig
from prx_post.recipes.commands import KINDS, find_recipe
from prx_post.rewards.judges.config import VisionJudgeConfig
from prx_post.stages.dpo.make_pairs import MakePairsConfig
from prx_post.stages.export import ExportConfig
from prx_post.stages.registry import REGISTRY, meant

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")), *sorted((ROOT / "data_recipes").glob("**/*.md"))]
FOLDERS = ("benchmarks", "configs", "data_recipes", "docs", "prx_post", "tests")
NAMED = rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w./-]+\.\w+)"
INPUTS = (
    *("model_name_or_path", "teacher_model_name_or_path", "dataset_name", "prompts_file", "eval_prompts_file"),
    *("checkpoints", "reference_dir", "source", "adapter"),
)
OUTPUTS = ("output_dir", "output_file")
HUB_ID = re.compile(r"(?!data/|runs/|my/)[\w-]+/[\w.-]+")
IN_PAGES = [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES]


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as a forge makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", IN_PAGES)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(there), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", IN_PAGES)
def test_files_that_are_named_exist(page):
    for name in re.findall(NAMED, page.read_text()):
        assert (ROOT / name).exists() or (page.parent / name).exists(), f"{page.name} names {name}"


def commands(page: Path) -> list[list[str]]:
    """Of `prx-post` in blocks of code, each as its words."""
    text = page.read_text()
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", text, re.S)
    blocks += re.findall(r"(?:^ {4}.*\n?)+", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    found = []
    for block in blocks:
        for line in re.sub(r"\\\n", " ", block).splitlines():
            for part in line.split("&&"):
                line_start = re.match(r"\s*(?:\$ )?(?:[\w./]*/)?prx-post (.*)", part)
                words = shlex.split(line_start[1], comments=True) if line_start else []
                if words and not any(word in ("...", "|") for word in words):
                    found.append(words)
    return found


def kinds_of(words: list[str]) -> tuple[tuple[type, ...], list[str]] | None:
    """The settings of a command, and its arguments; None of one that has none."""
    name, *rest = words
    if name in REGISTRY:
        given = dict(itertools.pairwise(rest))
        return REGISTRY[meant(name, given.get("--method"))].configs(), rest
    if name == "plan":
        stage = rest[rest.index("--stage") + 1] if "--stage" in rest else "sft"
        return (*REGISTRY[stage].configs(), PlanConfig), rest
    if name == "data" and rest and rest[0] in ("preview", "make-pairs", "teacher-latents"):
        kinds = {
            "preview": (PreviewConfig,),
            "make-pairs": (MakePairsConfig, VisionJudgeConfig),
            "teacher-latents": REGISTRY["distill"].configs(),
        }[rest[0]]
        own = rest[1:] if rest[1].startswith("--") else ["--dataset_name", *rest[1:]]
        return kinds, own
    known = {"generate": (GenerateConfig,), "eval": (EvalConfig, VisionJudgeConfig), "export": (ExportConfig,)}
    if name in known:
        return known[name], rest
    if name == "data" and rest and not rest[0].startswith("-"):
        path = find_recipe(rest[0])
        return (KINDS[yaml.safe_load(path.read_text())["kind"]][0],), ["--config", str(path), *rest[1:]]
    return None


def settings_of(words: list[str]) -> dict[str, Any] | None:
    """Every setting of a command that stands in a page, by name. Raises ConfigError as the command would."""
    asked = kinds_of(words)
    if asked is None:
        return None
    kinds, rest = asked
    own, skip = [], False
    for word in separate(rest):
        skip = (word in LAUNCH_FLAGS and "plan" not in words) or (skip and not word.startswith("--"))
        own += [] if skip else [word]
    if "--config" in own and own[own.index("--config") + 1] in ("FILE", "sft.yaml"):
        return None
    return {name: value for part in parse(kinds, own, "test") for name, value in vars(part).items()}


SHOWN_MISTAKES = (["sft", "--config", "configs/tiny/sft.yaml", "--batch_size", "8"],)


@pytest.mark.parametrize("page", IN_PAGES)
def test_commands_in_pages_have_settings_that_there_are(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        if words not in SHOWN_MISTAKES and "--help" not in words:
            settings_of(words)


def made_by(words: list[str], settings: dict[str, Any]) -> list[str]:
    return [str(Path(settings[name])) for name in OUTPUTS if settings.get(name)]


def test_blocks_of_the_readme_use_only_what_was_made_before(monkeypatch):
    """In the order of the page; a run's folder stands for its pipeline. `my/...` is the reader's."""
    monkeypatch.chdir(ROOT)
    made: list[str] = []
    for words in commands(ROOT / "README.md"):
        settings = None if words in SHOWN_MISTAKES else settings_of(words)
        if settings is None:
            continue
        for name in INPUTS:
            given = settings.get(name) or []
            for text in [given] if isinstance(given, str) else given:
                value = text.partition("=")[2] if re.match(r"[\w-]+=", text) else text
                path = value.partition("?")[0]
                known = path == "tiny" or path.startswith("my/") or HUB_ID.fullmatch(path)
                assert known or any(path == one or Path(path).is_relative_to(one) for one in made), (
                    f"{' '.join(words)}: nothing before it made {path} ({name})"
                )
        made += made_by(words, settings)
    assert {"runs/mine", "data/alchemist", "runs/prx-512-sft-alchemist", "runs/prx-512-eval"} <= set(made)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
