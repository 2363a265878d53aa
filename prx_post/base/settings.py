"""Settings as dataclass fields, each with its documentation, its constraint and its rule for resuming beside it.

Names are those of TRL and of transformers' TrainingArguments wherever one exists.
"""

import dataclasses
import difflib
import importlib.util
import math
import types
import typing
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from prx_post.base.errors import ConfigError, PrxPostError

RULES, GROUP = "rules", "group"
"""Keys of a field's `Rules`, and of the group that help shows it in, in its metadata."""
Resume = Literal["mention", "fixed", "free"]
"""On resuming, a changed setting is mentioned; must not change, for the saved state means nothing without it; or may
change freely, for what is computed does not depend on it."""


@dataclass(frozen=True)
class Rules:
    """What a value must be, and what happens when it changes on resuming. A value of None satisfies every rule."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    between: tuple[float, float] | None = None
    one_of: Collection[str] | None = None
    required: tuple[str, str] | None = None
    """What it must be set to, and why."""
    reason: str | None = None
    action: str | None = None
    resume: Resume = "mention"


def doc(help: str, default: Any = dataclasses.MISSING, group: str | None = None, **rules: Any) -> Any:
    """A field with its documentation, which `--help` shows.

    Args:
        group: that it is shown in; None: its class's attribute `group`.
        rules: those of `Rules`; bounds hold for numbers, `one_of` for a text or for each of a list.
    """
    metadata = {"help": help, RULES: Rules(**rules), GROUP: group}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def rules_of(kinds: Iterable[type]) -> dict[str, Rules]:
    """Every setting's rules, by name."""
    return {f.name: f.metadata.get(RULES, Rules()) for kind in kinds for f in dataclasses.fields(kind)}


def require(ok: bool, name: str, value: Any, rule: str, reason: str, action: str) -> None:
    """Raise ConfigError `{name} is {value}, but must be {rule} because {reason}. {action}.` unless `ok`."""
    if not ok:
        raise ConfigError(f"{name} is {value!r}, but must be {rule} because {reason}. {action}.")


def require_one_of(name: str, value: str, choices: Collection[str]) -> None:
    close = difflib.get_close_matches(str(value), list(choices), n=1)
    hint = f"Did you mean {close[0]!r}" if close else "Choose one of these"
    listed = ", ".join(choices)
    require(value in choices, name, value, f"one of {listed}", "nothing else is implemented", hint)


def require_installed(module: str, what: str, extra: str) -> None:
    """Raise PrxPostError unless `module`, which `what` needs and the extra `extra` installs, can be imported."""
    if importlib.util.find_spec(module) is None:
        raise PrxPostError(f"{what} needs {module}. Install the extra: pip install 'prx-post[{extra}]'.")


def check_fields(config: Any) -> None:
    """Check every field's value against its annotation (YAML values reach a dataclass unchecked) and its rules.

    Integers are accepted, and converted, where a float is expected, also in a list. Every number must be finite.
    Raises ConfigError naming the first wrong field.
    """
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if isinstance(value, int) and not isinstance(value, bool) and float in alternatives(hints[f.name]):
            setattr(config, f.name, float(value))
        elif isinstance(value, list) and list[float] in alternatives(hints[f.name]):
            setattr(config, f.name, [float(v) if type(v) is int else v for v in value])
        _check_type(config, f.name, hints[f.name])
        _check_rules(f.name, getattr(config, f.name), f.metadata.get(RULES, Rules()))


def _check_rules(name: str, value: Any, rules: Rules) -> None:
    if rules.required is not None:
        require(value not in (None, "", []), name, value, *rules.required, rules.action or f"Set {name}")
    if value is None:
        return
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, float):
            require(math.isfinite(number), name, value, "finite", "it enters the computation", "Correct it")
    if isinstance(value, int | float):
        for ok, rule, reason, action in _bounds(name, value, rules):
            require(ok, name, value, rule, rules.reason or reason, rules.action or action)
    if rules.one_of is not None:
        for one in value if isinstance(value, list) else [value]:
            require_one_of(name, one, rules.one_of)


def _bounds(name: str, value: float, rules: Rules) -> Iterable[tuple[bool, str, str, str]]:
    """(whether it holds, rule, reason, action) of each bound."""
    if rules.above is not None:
        reason, action = "it counts or scales something", f"Set {name} to a larger number"
        if rules.above == 0:
            action = f"Set {name} to a positive number"
        yield value > rules.above, f"above {rules.above:g}", reason, action
    if rules.at_least is not None:
        reason, action = "less has no meaning", f"Set {name} to {rules.at_least:g} or more"
        if rules.at_least == 0:
            reason, action = "a negative value has no meaning", f"Set {name} to 0 to switch it off"
        yield value >= rules.at_least, f"{rules.at_least:g} or more", reason, action
    if rules.below is not None:
        yield value < rules.below, f"below {rules.below:g}", "more has no meaning", f"Lower {name}"
    if rules.between is not None:
        low, high = rules.between
        reason, action = "it is a fraction", f"Set {name} to a fraction such as 0.1"
        yield low <= value <= high, f"between {low:g} and {high:g}", reason, action


def _check_type(config: Any, name: str, hint: Any) -> None:
    value = getattr(config, name)
    if any(_is_a(value, kind) for kind in alternatives(hint)):
        return
    expected = _describe(hint)
    wrong = f"it was given as {type(value).__name__}"
    if elements := _wrong_elements(value, hint):
        wrong = f"its element {elements[0]!r} is {type(elements[0]).__name__}"
    require(False, name, value, expected, wrong, f"Write {name} as {expected}")


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one there is."""
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def _is_a(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is list:
        (item,) = typing.get_args(kind)
        return isinstance(value, list) and all(_is_a(v, item) for v in value)
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, kind)


def _wrong_elements(value: Any, hint: Any) -> list[Any]:
    """The elements that keep `value` from being the kind of list in the annotation, if both are lists."""
    for kind in alternatives(hint):
        if typing.get_origin(kind) is list and isinstance(value, list):
            (item,) = typing.get_args(kind)
            return [element for element in value if not _is_a(element, item)]
    return []


def _describe(hint: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    described = []
    for kind in alternatives(hint):
        if typing.get_origin(kind) is list:
            described.append(f"a list, each {_describe(typing.get_args(kind)[0])}")
        else:
            described.append(names[kind])
    return " or ".join(described)
