"""Prompts whose images can be checked object by object, in the manner of GenEval (Ghosh et al., arXiv:2310.11513).

The six tasks and the shape of the specification are GenEval's; objects, sentences and choices are this file's own.
Every list is a function of its seed alone, on any version of Python.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prx_post.base.settings import doc, require
from prx_post.recipes.prompts import new_list, write_list
from prx_post.recipes.tables import RecipeConfig

OBJECTS = (
    *("apple", "backpack", "ball", "banana", "bear", "bed", "bench", "bicycle", "bird", "boat", "book", "bottle"),
    *("bowl", "bus", "cake", "camera", "candle", "car", "cat", "chair", "clock", "cow", "cup", "dog", "drum", "duck"),
    *("elephant", "fork", "giraffe", "guitar", "hat", "horse", "key", "kite", "ladder", "lamp", "lemon", "motorcycle"),
    *("pear", "pillow", "pizza", "rabbit", "sandwich", "scarf", "shoe", "sofa", "spoon", "suitcase", "table", "teapot"),
    *("tie", "toothbrush", "train", "truck", "umbrella", "vase"),
)
PLURALS = {
    "bench": "benches",
    "bus": "buses",
    "sandwich": "sandwiches",
    "scarf": "scarves",
    "toothbrush": "toothbrushes",
}
"""Those that do not just get an s."""
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
RELATIONS = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
"""The specification's words, and the sentence's."""
PARTNER = 23
"""How far behind an object its partner comes. Not half their number: couples would come again the other way round."""
OPENINGS = ("a photo of {}", "a photograph showing {}", "{}, photographed in daylight")

Objects = Sequence[str]
Spec = list[dict[str, Any]]
"""Objects that must be there: `class`, `count`, and where it matters `color`, or `position`: [relation, index of the
object in this list that it relates to]."""


@dataclass
class GenevalStyleConfig(RecipeConfig):
    """Prompts of six tasks with what their images must hold."""

    prompts_per_task: int = doc(f"Prompts of each of the six tasks; {len(OBJECTS)} at most.", 40, above=0)
    seed: int = doc("Which prompts; 0 is the list to compare by.", 0, at_least=0)
    output_file: str | None = doc("The .jsonl file to write.", None)
    overwrite: bool = doc("Replace an output_file that is there.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_set("output_file")
        count, limit = self.prompts_per_task, len(OBJECTS)
        reason, action = "each object leads one prompt of a task", "Set a smaller number"
        require(count <= limit, "prompts_per_task", count, f"{limit} or less", reason, action)


def run(config: GenevalStyleConfig) -> None:
    """Write the list. Raises PrxPostError if output_file is there already or is no .jsonl file."""
    output = new_list(config.output_file, config.overwrite)
    rows = make_prompts(config.prompts_per_task, config.seed)
    write_list(output, rows)
    print(f"{len(rows)} prompts in {output}, {config.prompts_per_task} of each of {', '.join(TASKS)}")


def make_prompts(per_task: int, seed: int) -> list[dict[str, Any]]:
    """Rows with `prompt`, `group` (the task), `include` and, where too many are wrong, `exclude`.

    Numbers, colours and relations take turns, so that each is asked for as often as another; objects come in an order
    drawn for the task.
    """
    rows = []
    for task, make in TASKS.items():
        objects = _shuffled(OBJECTS, f"{seed} {task}")
        for i in range(per_task):
            phrase, include = make(objects, i)
            row = {"prompt": OPENINGS[i % len(OPENINGS)].format(phrase), "group": task, "include": include}
            if task == "counting":
                (wanted,) = include
                row["exclude"] = [{"class": wanted["class"], "count": wanted["count"] + 1}]
            rows.append(row)
    return rows


def _shuffled(items: Sequence[str], salt: str) -> list[str]:
    """In the order of their digests, which unlike `random` is the same on every Python."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{salt} {item}".encode()).digest())


def _single_object(objects: Objects, i: int) -> tuple[str, Spec]:
    return _a(objects[i]), [{"class": objects[i], "count": 1}]


def _two_objects(objects: Objects, i: int) -> tuple[str, Spec]:
    first, second = _couple(objects, i)
    return f"{_a(first)} and {_a(second)}", [{"class": first, "count": 1}, {"class": second, "count": 1}]


def _counting(objects: Objects, i: int) -> tuple[str, Spec]:
    count = list(NUMBERS)[i % len(NUMBERS)]
    plural = PLURALS.get(objects[i], objects[i] + "s")
    return f"{NUMBERS[count]} {plural}", [{"class": objects[i], "count": count}]


def _colors(objects: Objects, i: int) -> tuple[str, Spec]:
    color = COLORS[i % len(COLORS)]
    return _a(f"{color} {objects[i]}"), [{"class": objects[i], "count": 1, "color": color}]


def _position(objects: Objects, i: int) -> tuple[str, Spec]:
    first, second = _couple(objects, i)
    relation = list(RELATIONS)[i % len(RELATIONS)]
    placed = {"class": first, "count": 1, "position": [relation, 0]}
    return f"{_a(first)} {RELATIONS[relation]} {_a(second)}", [{"class": second, "count": 1}, placed]


def _color_attribution(objects: Objects, i: int) -> tuple[str, Spec]:
    turn = i // len(COLORS)  # so that a colour's second turn has another partner than its first
    colors = (COLORS[i % len(COLORS)], COLORS[(i + 3 + turn) % len(COLORS)])
    couple = [f"{color} {name}" for color, name in zip(colors, _couple(objects, i), strict=True)]
    spec = [
        {"class": name, "count": 1, "color": color} for color, name in zip(colors, _couple(objects, i), strict=True)
    ]
    return " and ".join(_a(colored) for colored in couple), spec


def _couple(objects: Objects, i: int) -> tuple[str, str]:
    """The i-th object and another one; no two couples of a task are the same two, in either order."""
    return objects[i], objects[(i + PARTNER) % len(objects)]


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


TASKS: dict[str, Callable[[Objects, int], tuple[str, Spec]]] = {
    "single_object": _single_object,
    "two_objects": _two_objects,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attribution": _color_attribution,
}
