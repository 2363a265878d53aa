"""What a command's settings are: as help, as a commented YAML file, as a JSON schema for editors."""

import dataclasses
import inspect
import json
import shutil
import textwrap
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from prx_post.base.settings import GROUP, RULES, Rules, alternatives

OWN = "own"
"""Group of the settings of classes that name none: the command's."""
ORDER = ("model", "data", OWN, "training", "validation", "saving", "processes")
WIDTH, INDENT = 100, 6
WORDS = {str: "TEXT", int: "N", float: "X", bool: "true|false"}
SCHEMA = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A field of a settings dataclass."""

    name: str
    hint: Any
    default: Any
    help: str
    rules: Rules
    group: str

    @property
    def is_required(self) -> bool:
        return self.rules.required is not None

    def value_of(self, texts: Sequence[str]) -> Any:
        """Of what stands after its flag, unchecked: numbers and the like as YAML has them, text as it is."""
        is_list, is_text = self.kind.endswith("..."), self.kind.startswith(WORDS[str])
        values = [text if is_text and text != "null" else yaml.safe_load(text) for text in texts]
        return values if is_list else values[0] if values else True

    @property
    def kind(self) -> str:
        """As it is written on the command line."""
        return _kind(self.hint)

    @property
    def limits(self) -> str:
        """What its value must be, besides its type."""
        rules = self.rules
        found = [f"above {rules.above:g}"] if rules.above is not None else []
        found += [f"{rules.at_least:g} or more"] if rules.at_least is not None else []
        found += [f"below {rules.below:g}"] if rules.below is not None else []
        found += [f"from {rules.between[0]:g} to {rules.between[1]:g}"] if rules.between is not None else []
        found += [f"one of {', '.join(rules.one_of)}"] if rules.one_of is not None else []
        return ", ".join(found)


def settings_of(kinds: Sequence[type], defaults: Mapping[str, Any] | None = None) -> list[Setting]:
    """Every setting of these dataclasses, in their order.

    Args:
        defaults: by name, in place of the dataclasses' own.
    """
    found = []
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        for f in dataclasses.fields(kind):
            owner = next(c for c in reversed(kind.__mro__) if f.name in inspect.get_annotations(c))
            own = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            default = (defaults or {}).get(f.name, own)
            group = f.metadata.get(GROUP) or owner.__dict__.get("group", OWN)
            rules, text = f.metadata.get(RULES, Rules()), f.metadata.get("help", "")
            found.append(Setting(f.name, hints[f.name], default, text, rules, group))
    return found


def grouped(settings: Sequence[Setting]) -> dict[str, list[Setting]]:
    """By group, those that are required before the others."""
    names = dict.fromkeys([*ORDER, *(s.group for s in settings)])
    found = {name: sorted((s for s in settings if s.group == name), key=lambda s: not s.is_required) for name in names}
    return {name: members for name, members in found.items() if members}


def render_help(prog: str, summary: str, settings: Sequence[Setting]) -> str:
    """The text of `--help`."""
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    required = " ".join(f"--{s.name} {s.kind}" for s in settings if s.is_required)
    lines = [f"{prog}: {summary}" if summary else prog, "", f"  {prog} --config FILE", f"  {prog} {required}", ""]
    lines += textwrap.wrap(
        "Every setting may stand in the YAML file or on the command line, which wins. --print_config writes such a "
        "file with what is given and every default, --print_schema its JSON schema.",
        width,
    )
    for group, members in grouped(settings).items():
        lines += ["", f"{_title(group, prog)}:"]
        for s in members:
            notes = "; ".join(part for part in (_default(s), s.limits) if part)
            lines.append(f"  --{s.name} {s.kind}")
            text = f"{s.help} ({notes})" if notes else s.help
            lines += textwrap.wrap(text, width, initial_indent=" " * INDENT, subsequent_indent=" " * INDENT)
    return "\n".join(lines)


def _title(group: str, prog: str) -> str:
    return prog.removeprefix("prx-post ") if group == OWN else group


def _default(s: Setting) -> str:
    if s.is_required:
        return "required"
    return "" if s.default is None or s.default == [] else f"default {_shown(s.default)}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return " ".join(map(str, value)) if isinstance(value, list) else f"{value}"


def _kind(hint: Any) -> str:
    for kind in alternatives(hint):
        if typing.get_origin(kind) is list:
            return f"{_kind(typing.get_args(kind)[0])} ..."
        if kind in WORDS:
            return WORDS[kind]
    return "TEXT"


def render_config(prog: str, settings: Sequence[Setting], values: Mapping[str, Any]) -> str:
    """A YAML file of all settings: those in `values`, the others at their defaults, each with what it is."""
    lines = [f"# Settings of {prog}"]
    for group, members in grouped(settings).items():
        lines += ["", f"# --- {_title(group, prog)}"]
        for s in members:
            notes = "; ".join(part for part in ("required" if s.is_required else "", s.limits) if part)
            text = f"{s.help} ({notes})" if notes else s.help
            lines += textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ")
            value = values.get(s.name, s.default)
            written = yaml.safe_dump([value], allow_unicode=True, default_flow_style=True, width=10_000).strip()
            lines.append(f"{s.name}: {written[1:-1]}")
    if "env" in values:
        lines += ["", "# Environment variables", yaml.safe_dump({"env": values["env"]}, allow_unicode=True).strip()]
    return "\n".join(lines) + "\n"


def render_schema(prog: str, settings: Sequence[Setting]) -> str:
    """The JSON schema of a configuration file, by which editors complete and check it."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": prog,
        "type": "object",
        "properties": {s.name: _schema_of(s) for s in settings} | {"env": {"type": "object"}},
        "additionalProperties": False,
    }
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _schema_of(s: Setting) -> dict[str, Any]:
    rules, kinds = s.rules, [_schema_type(kind) for kind in alternatives(s.hint)]
    limits: dict[str, Any] = {
        "exclusiveMinimum": rules.above,
        "minimum": rules.at_least if rules.between is None else rules.between[0],
        "exclusiveMaximum": rules.below,
        "maximum": None if rules.between is None else rules.between[1],
        "enum": None if rules.one_of is None else list(rules.one_of),
    }
    limits = {name: value for name, value in limits.items() if value is not None}
    for kind in kinds:
        if kind["type"] != "null":
            kind.get("items", kind).update(limits)
    found = {"description": s.help, **(kinds[0] if len(kinds) == 1 else {"anyOf": kinds})}
    return found if s.is_required else found | {"default": s.default}


def _schema_type(kind: Any) -> dict[str, Any]:
    if typing.get_origin(kind) is list:
        return {"type": "array", "items": _schema_type(typing.get_args(kind)[0])}
    return {"type": SCHEMA[kind]}
