import hashlib
import json
import re
from collections import Counter

import pytest

from prx_post.base.errors import PrxPostError
from prx_post.data.prompts import read_prompt_rows
from prx_post.recipes.geneval_style import (
    COLORS,
    NUMBERS,
    OBJECTS,
    RELATIONS,
    TASKS,
    GenevalStyleConfig,
    make_prompts,
    run,
)


def of(task, per_task=40, seed=0):
    return [row for row in make_prompts(per_task, seed) if row["group"] == task]


def test_there_are_as_many_of_each_task_and_no_prompt_twice():
    rows = make_prompts(len(OBJECTS), 0)
    assert Counter(row["group"] for row in rows) == dict.fromkeys(TASKS, len(OBJECTS))
    assert len({row["prompt"] for row in rows}) == 6 * len(OBJECTS)


def test_the_list_of_a_seed_never_changes():
    # scores on seed 0 are compared across versions; a change of the list is a change of the yardstick
    digest = hashlib.sha256(json.dumps(make_prompts(40, 0)).encode()).hexdigest()
    assert digest == "dcbaa9ba5093c3154258aa7cd1313a013a599feaf5dc456cd60deb5fc6c78ddc"
    assert make_prompts(40, 0) != make_prompts(40, 1)


def test_the_prompt_says_what_the_specification_asks_for():
    for row in make_prompts(len(OBJECTS), 0):
        for wanted in row["include"]:
            words = f"{wanted['color']} {wanted['class']}" if "color" in wanted else wanted["class"]
            if wanted["count"] > 1:  # a plural begins like its singular, but for the last letter of scarf
                words = f"{NUMBERS[wanted['count']]} {wanted['class']}".removesuffix("f")
            assert words in row["prompt"]
            assert "position" not in wanted or RELATIONS[wanted["position"][0]] in row["prompt"]
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", row["prompt"])


def test_a_count_is_exact():
    for row in of("counting"):
        (wanted,), (too_many,) = row["include"], row["exclude"]
        assert too_many == {"class": wanted["class"], "count": wanted["count"] + 1}


def test_numbers_colours_and_relations_are_asked_for_equally_often():
    assert Counter(row["include"][0]["count"] for row in of("counting")) == dict.fromkeys((2, 3, 4, 5), 10)
    assert Counter(row["include"][0]["color"] for row in of("colors")) == dict.fromkeys(COLORS, 4)
    relations = Counter(row["include"][1]["position"][0] for row in of("position"))
    assert relations == dict.fromkeys(("left of", "right of", "above", "below"), 10)


def test_the_placed_object_comes_first_in_the_sentence():
    for row in of("position"):
        anchor, placed = row["include"]
        assert placed["position"][1] == 0
        assert row["prompt"].index(placed["class"]) < row["prompt"].index(f" {anchor['class']}", 12)


@pytest.mark.parametrize("task", ["two_objects", "position", "color_attribution"])
def test_two_objects_differ_and_are_not_paired_again(task):
    couples = [frozenset(wanted["class"] for wanted in row["include"]) for row in of(task, len(OBJECTS))]
    assert all(len(couple) == 2 for couple in couples)
    assert len(set(couples)) == len(OBJECTS)


def test_two_colours_differ():
    for row in of("color_attribution", len(OBJECTS)):
        first, second = row["include"]
        assert first["color"] != second["color"]


def test_a_list_is_written_as_eval_reads_it(tmp_path):
    output = tmp_path / "out" / "p.jsonl"
    run(GenevalStyleConfig(prompts_per_task=2, output_file=str(output)))
    assert read_prompt_rows(output) == make_prompts(2, 0)
    with pytest.raises(PrxPostError, match="is there already"):
        run(GenevalStyleConfig(output_file=str(output)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompts_per_task": 57}, "prompts_per_task is 57, but must be 56 or less"),
        ({"prompts_per_task": 0}, "must be above 0"),
        ({"seed": -1}, "seed is -1"),
        ({"output_file": None}, "output_file is None, but must be set"),
    ],
)
def test_a_list_that_cannot_be_made_is_refused(values, message):
    with pytest.raises(PrxPostError, match=message):
        GenevalStyleConfig(**{"output_file": "p.jsonl", **values})
