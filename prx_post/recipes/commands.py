"""`prx-post data <recipe>`: makes a data set as a recipe says, a YAML file in data_recipes/ or of one's own."""

import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prx_post.base.errors import ConfigError
from prx_post.base.parsing import parse, read_yaml
from prx_post.base.settings import require_one_of
from prx_post.recipes import geneval_style, pairs, prompts, sidecars, url_list
from prx_post.recipes.tables import RECIPE_FOLDER, RecipeConfig, TableConfig

KINDS: dict[str, tuple[type[RecipeConfig], Callable[[Any], None]]] = {
    "images-from-urls": (url_list.UrlListConfig, url_list.run),
    "preference-pairs": (pairs.PairsConfig, pairs.run),
    "image-folder": (sidecars.SidecarConfig, sidecars.run),
    "prompt-list": (prompts.PromptListConfig, prompts.run),
    "geneval-style": (geneval_style.GenevalStyleConfig, geneval_style.run),
}
"""What a recipe may be: its settings, and what makes it."""

USAGE = """\
usage: prx-post data <recipe> [--key value ...]

Makes a data set. <recipe> is one of these, or the path of a YAML file of your own.

{recipes}

`prx-post data preview DATASET --model_name_or_path CHECKPOINT` shows a data set as it would be trained on, as a page.
`prx-post data teacher-latents --config FILE`, with a distillation's settings, makes the teacher's latents ahead of it.
`prx-post data make-pairs --config FILE` makes preference pairs of a checkpoint's own images, ranked by a reward.
`prx-post data <recipe> --help` lists a recipe's settings; its folder's README says what it is.
"""


def run(args: Sequence[str]) -> None:
    """`prx-post data`"""
    if not args or args[0] in ("-h", "--help"):
        listed = [
            f"  {name:18}{read_yaml(path).get('description', '')}" for name, path in sorted(known_recipes().items())
        ]
        print(USAGE.format(recipes="\n".join(listed)))
        return
    name, *rest = args
    if any(arg.split("=")[0] == "--config" for arg in rest):
        raise ConfigError("--config is not for recipes. Give the file's path in place of the recipe's name.")
    path = find_recipe(name)
    kind = read_yaml(path).get("kind")
    require_one_of(f"kind in {path}", str(kind), tuple(KINDS))
    config_type, make = KINDS[str(kind)]
    (config,) = parse([config_type], ["--config", str(path), *rest], f"prx-post data {name}")
    if config.kind != kind:
        raise ConfigError(f"kind is {config.kind!r}, but must stay {kind!r} because the recipe says so. Leave it out.")
    if isinstance(config, TableConfig) and config.source:
        config.source = config.source.replace(RECIPE_FOLDER, str(path.parent))
    make(config)


def known_recipes() -> dict[str, Path]:
    """The recipe files by name: those of the source checkout, else those that were installed."""
    for folder in (Path(__file__).parents[2] / "data_recipes", Path(sys.prefix) / "share/prx-post/data_recipes"):
        found = {path.parent.name: path for path in folder.glob("*/recipe.yaml")}
        if found:
            return found
    return {}


def find_recipe(name: str) -> Path:
    """The recipe's file. Raises ConfigError if there is none of that name or path."""
    recipes = known_recipes()
    if name in recipes:
        return recipes[name]
    path = Path(name).expanduser()
    if path.is_file():
        return path
    close = difflib.get_close_matches(name, recipes, n=1)
    hint = f"Did you mean {close[0]}?" if close else f"There are {', '.join(sorted(recipes))}."
    raise ConfigError(f"{name!r} is no recipe and no file. {hint}")
