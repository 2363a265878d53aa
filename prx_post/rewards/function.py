"""A function of the user's as a reward: `path/to/module.py:function`."""

import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from prx_post.base.errors import PrxPostError
from prx_post.base.files import file_sha256
from prx_post.rewards.reward import check_counts, checked


class FunctionReward:
    """Calls `function(images, prompts)`, or `function(prompts, completions, **columns)` as TRL's reward functions.

    Which of the two is told by the names of its parameters. Either returns a score an image: a tensor, an array or a
    list. In TRL's form the completions are the images, and `columns` are the other columns of the prompt set, by
    name, a list each.
    """

    def __init__(self, function: Callable[..., Any], name: str, identity: str) -> None:
        self._function, self._name, self.identity = function, name, identity
        parameters = inspect.signature(function).parameters
        self.takes_columns = {"prompts", "completions"} <= set(parameters)
        """Whether it is of TRL's form."""
        if not self.takes_columns and list(parameters)[:2] != ["images", "prompts"]:
            raise PrxPostError(
                f"the reward {name} takes ({', '.join(parameters)}), but must take (images, prompts), or TRL's "
                f"(prompts, completions, **columns). Rename its parameters."
            )
        self._accepts_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._accepted = set(parameters) - {"prompts", "completions", "images"}
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self.required_columns = frozenset(
            name
            for name in self._accepted
            if parameters[name].kind in named and parameters[name].default is inspect.Parameter.empty
        )
        """Columns that it cannot do without."""

    def check(self, prompts: Sequence[str]) -> None:
        """Nothing is known of what the function can score."""

    def __call__(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Tensor:
        check_counts(images, prompts)
        if self.takes_columns:
            known = {k: list(v) for k, v in (columns or {}).items() if self._accepts_any or k in self._accepted}
            scores = self._function(prompts=list(prompts), completions=list(images), **known)
        else:
            scores = self._function(list(images), list(prompts))
        return checked(self._as_tensor(scores), self._name, len(images))

    def _as_tensor(self, scores: Any) -> Tensor:
        try:
            return torch.as_tensor(scores, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise PrxPostError(
                f"the reward {self._name} returned {type(scores).__name__}, which is not a list of numbers: {error}. "
                f"Fix the reward."
            ) from error


def load_function(target: str) -> FunctionReward:
    """The function of `path/to/module.py:function`. Its file is run, as `import` would.

    Raises:
        PrxPostError: there is no such file or function, or the file cannot be imported.
    """
    file_name, _, name = target.rpartition(":")
    path = Path(file_name).expanduser().resolve()
    if not path.is_file():
        raise PrxPostError(f"rewards has {target!r}, but there is no file {file_name}. Check the path.")
    spec = importlib.util.spec_from_file_location(f"prx_post_reward_{path.stem}", path)
    assert spec is not None  # the file ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise PrxPostError(f"rewards has {target!r}, whose file cannot be imported: {error}. Fix it.") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise PrxPostError(f"rewards has {target!r}, but {file_name} has no function {name}. Check the name.")
    return FunctionReward(function, name, f"function {name} of {file_sha256(path)[:16]}")
