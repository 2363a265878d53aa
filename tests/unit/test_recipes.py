"""Every shipped recipe can be read, is described, and is part of what is installed."""

import json
import sys
import tomllib
import unicodedata
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from prx_post.base.errors import ConfigError
from prx_post.base.parsing import parse
from prx_post.data.prompts import read_prompt_rows
from prx_post.model.text import PromptCleaner
from prx_post.recipes import commands as recipes
from prx_post.recipes.commands import KINDS, find_recipe, known_recipes, run

ROOT = Path(__file__).parents[2]
NEEDED = {
    "image-folder": ["--image_dir", "images"],
    "prompts": ["--source", "p.txt", "--output_file", "p.jsonl"],
}
"""What a recipe cannot know."""


def test_every_folder_with_a_recipe_is_found():
    images = {"alchemist", "pick-a-pic", "hpd-v2", "image-folder"}
    prompts = {"prompts", "hpsv2-benchmark", "parti-prompts", "drawbench", "geneval-style", "multilingual"}
    assert set(known_recipes()) == images | prompts


@pytest.mark.parametrize("name", sorted(known_recipes()))
def test_a_recipe_loads_as_it_is_and_says_what_it_is(name):
    path = known_recipes()[name]
    values = yaml.safe_load(path.read_text())
    config_type, _ = KINDS[values["kind"]]
    (config,) = parse([config_type], ["--config", str(path), *NEEDED.get(name, [])], "prx-post data")
    for key, value in values.items():
        if f"--{key}" not in NEEDED.get(name, []):
            assert getattr(config, key) == value
    assert values["description"]
    assert len((path.parent / "README.md").read_text()) > 500


def test_every_recipe_is_installed_with_the_package():
    files = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    assert files == {
        f"share/prx-post/data_recipes/{name}": [f"data_recipes/{name}/*"] for name in sorted(known_recipes())
    }


def test_installed_recipes_are_found_where_there_is_no_checkout(tmp_path, monkeypatch):
    folder = tmp_path / "share/prx-post/data_recipes/mine"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("kind: image-folder\n")
    monkeypatch.setattr(recipes, "__file__", str(tmp_path / "site-packages/prx_post/data/recipes.py"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert find_recipe("mine") == folder / "recipe.yaml"
    assert find_recipe(str(folder / "recipe.yaml")) == folder / "recipe.yaml"
    with pytest.raises(ConfigError, match="'alchemist' is no recipe and no file. There are mine."):
        find_recipe("alchemist")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: image-folders\n", "Did you mean 'image-folder'"),
        ("source: x\n", "is 'None', but must be one of images-from-urls"),
        (
            "kind: image-folder\nimage_dri: x\n",
            "image_dri in .* is not a setting .* Did you mean image_dir?",
        ),
        ("- a\n", "must hold `key: value` lines"),
        ("kind: [\n", "is not valid YAML"),
        ("kind: image-folder\n", "image_dir is None, but must be set"),
    ],
)
def test_a_recipe_of_ones_own_is_checked(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        run([str(path)])


HPSV2 = {
    "anime": ["a fox spirit", "a mecha"],
    "concept-art": ["a gate"],
    "paintings": ["a harbour"],
    "photo": ["a man"],
}


def write_published(folder, name):
    """A little of a published set, in its format. Returns the recipe's settings to read it."""
    if name == "hpsv2-benchmark":
        for style, listed in {**HPSV2, "drawbench": ["not of the benchmark"]}.items():
            (folder / f"{style}.json").write_text(json.dumps(listed))
        return ["--source", str(folder)]
    if name == "parti-prompts":
        rows = [
            ("bond", "Abstract", "Basic", "Biology-inspired concepts with multiple meanings"),
            ("42", "Abstract", "Basic", "Simple numbers but challenging"),
            ('a sign that says "Fly"', "Outdoor Scenes", "Writing & Symbols", ""),
        ]
        lines = ["\t".join(row) for row in [("Prompt", "Category", "Challenge", "Note"), *rows]]
        (folder / "PartiPrompts.tsv").write_text("\n".join(lines) + "\n")
        return ["--source", str(folder / "PartiPrompts.tsv")]
    columns = {"prompts": ["A red car.", "Tcennis rpacket."], "category": ["Colors", "Misspellings"]}
    pq.write_table(pa.table(columns), folder / "test-00000-of-00001.parquet")
    return ["--source", str(folder)]


PUBLISHED = {
    "hpsv2-benchmark": [{"prompt": text, "group": style} for style, listed in HPSV2.items() for text in listed],
    "parti-prompts": [
        {"prompt": "bond", "Challenge": "Basic", "group": "Abstract"},
        {"prompt": "42", "Challenge": "Basic", "group": "Abstract"},
        {"prompt": 'a sign that says "Fly"', "Challenge": "Writing & Symbols", "group": "Outdoor Scenes"},
    ],
    "drawbench": [
        {"prompt": "A red car.", "group": "Colors"},
        {"prompt": "Tcennis rpacket.", "group": "Misspellings"},
    ],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_prompts_become_a_list_with_groups(tmp_path, name):
    (tmp_path / "in").mkdir()
    output = tmp_path / "p.jsonl"
    run([name, *write_published(tmp_path / "in", name), "--output_file", str(output)])
    assert read_prompt_rows(output) == PUBLISHED[name]


def test_drawbenchs_spreadsheet_is_read_with_its_own_column_names(tmp_path):
    (tmp_path / "d.csv").write_text('Prompts,Category\n"A red car, parked.",Colors\n')
    columns = ["--source", str(tmp_path / "d.csv"), "--prompt_column", "Prompts", "--group_column", "Category"]
    run(["drawbench", *columns, "--output_file", str(tmp_path / "p.jsonl")])
    assert read_prompt_rows(tmp_path / "p.jsonl") == [{"prompt": "A red car, parked.", "group": "Colors"}]


LANGUAGES = {
    **{"en": "English", "fr": "French", "de": "German", "es": "Spanish", "it": "Italian"},
    **{"pt": "Portuguese", "nl": "Dutch", "pl": "Polish", "ja": "Japanese", "zh": "Chinese"},
}


def test_the_multilingual_set_has_every_scene_in_every_language(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the list is the recipe's own, wherever one stands
    run(["multilingual", "--output_file", "p.jsonl"])
    rows = read_prompt_rows(tmp_path / "p.jsonl")
    assert len(rows) == 240
    assert {(row["language"], row["group"]) for row in rows} == set(LANGUAGES.items())
    scenes = {row["scene"] for row in rows}
    assert len(scenes) == 24
    assert {(row["scene"], row["language"]) for row in rows} == {(s, code) for s in scenes for code in LANGUAGES}
    assert all(row["target"] == row["scene"] for row in rows)
    assert all(unicodedata.is_normalized("NFC", row["prompt"]) for row in rows)


def test_prompt_cleaning_takes_chinese_away_as_the_multilingual_readme_says():
    rows = read_prompt_rows(known_recipes()["multilingual"].parent / "prompts.jsonl")
    cleaner, light = PromptCleaner(), PromptCleaner(skip_text_cleaning=True)
    lost = Counter(row["language"] for row in rows if cleaner.is_lost(row["prompt"]))
    assert lost == {"zh": 23}
    mangled = {row["language"] for row in rows if cleaner(row["prompt"]) != row["prompt"].lower()}
    assert mangled == {"zh", "ja"}
    assert all(light(row["prompt"]) == row["prompt"].replace("，", ",") for row in rows)
