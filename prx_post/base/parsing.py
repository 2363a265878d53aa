"""Reads a command's settings: a YAML file and the command line, with a hint where a name is misspelt."""

import copy
import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from prx_post.base.errors import ConfigError
from prx_post.base.settings import GROUP, RULES, alternatives

ELSEWHERE = {
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "gradient_accumulation": "gradient_accumulation_steps",
    "max_train_steps": "max_steps",
    "num_steps": "max_steps",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "lr_scheduler": "lr_scheduler_type",
    "lr_warmup_steps": "warmup_steps",
    "warmup": "warmup_steps",
    "checkpointing_steps": "save_steps",
    "checkpoints_total_limit": "save_total_limit",
    "resume": "resume_from_checkpoint",
    "pretrained_model_name_or_path": "model_name_or_path",
    "model": "model_name_or_path",
    "teacher": "teacher_model_name_or_path",
    "revision": "model_revision",
    "instance_data_dir": "dataset_name",
    "train_data_dir": "dataset_name",
    "dataset": "dataset_name",
    "caption_column": "prompt_column",
    "validation_prompts": "sample_prompts",
    "validation_prompt": "sample_prompts",
    "validation_steps": "sample_steps",
    "num_validation_steps": "sample_steps",
    "prompt": "prompts",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "steps": "num_inference_steps",
    "rank": "lora_r",
    "lora_rank": "lora_r",
    "alpha": "lora_alpha",
    "use_lora": "use_peft",
    "optimizer": "optim",
    "use_ema": "ema_decay",
    "max_grad_clip": "max_grad_norm",
    "log_with": "report_to",
    "logging_dir": "report_to",
}
"""What other trainers call a setting, and our name for it."""
SHOWN = ("help", "print_config", "print_schema")
"""Flags that show something instead of running."""
VARIABLE = re.compile(r"(^|[/=])\$\{?[A-Za-z_]\w*\}?(/|$)")
"""An environment variable as part of a path."""
INSTEAD = {
    "mixed_precision": "set bf16: true; fp16 is not supported",
    "fp16": "set bf16: true; fp16 is not supported",
    "resolution": "set height and width, or neither for aspect buckets",
    "size": "set height and width",
    "push_to_hub": "upload the emitted folder with `hf upload`",
}
"""Settings of other trainers that have no single counterpart here, and what to do."""


def parse(
    dataclass_types: Sequence[type],
    args: Sequence[str],
    prog: str,
    defaults: Mapping[str, Any] | None = None,
    summary: str | None = None,
) -> tuple[Any, ...]:
    """Read `--config FILE` and overrides into one instance of each dataclass.

    Args:
        defaults: by name, in place of the dataclasses' own.
        summary: what `prog` does; None: the first dataclass's docstring.

    Raises:
        SystemExit: help, a configuration or its schema was asked for, and has been printed.
        ConfigError: the file is missing or no mapping, has a key twice, keys are unknown (each is named, with a hint),
            or a value is of the wrong type or out of range.
    """
    known = [f.name for kind in dataclass_types for f in dataclasses.fields(kind)]
    args = separate(args)
    check_known({**_keys_of_file(args), **_keys_of_flags(args)}, known)
    shown = _shown(dataclass_types, args, prog, defaults, summary)
    if shown is not None:
        print(shown)
        raise SystemExit(0)
    from trl import TrlParser

    class Parser(TrlParser):
        @staticmethod
        def _parse_dataclass_field(parser: Any, field: Any) -> None:
            plain = copy.copy(field)  # argparse would take our rules for arguments of its own
            plain.metadata = {key: value for key, value in field.metadata.items() if key not in (RULES, GROUP)}
            TrlParser._parse_dataclass_field(parser, plain)
            if bool in alternatives(field.type) and field.default is None:
                action = parser._option_string_actions[f"--{field.name}"]
                action.nargs, action.const = "?", True  # as of those that are false unless set

        def error(self, message: str) -> NoReturn:
            flag = re.match(r"argument --(\w+)[^:]*: (.*)", message, re.DOTALL)
            raise ConfigError(f"{flag[1]}: {flag[2]}. See --help." if flag else f"{message}. See --help.")

    parser = Parser(dataclass_types=list(dataclass_types), prog=prog, allow_abbrev=False)
    parser.set_defaults(**(defaults or {}))
    *parts, unused = parser.parse_args_and_config(args=args, return_remaining_strings=True)
    if unused:
        raise ConfigError(f"{unused[0]!r} on the command line belongs to no setting. See --help.")
    return tuple(parts)


def _shown(
    kinds: Sequence[type], args: Sequence[str], prog: str, defaults: Mapping[str, Any] | None, summary: str | None
) -> str | None:
    """What is asked for instead of a run: help, a configuration, its schema; None if it is none of them."""
    from prx_post.base import help

    settings = help.settings_of(kinds, defaults)
    if "--help" in args or "-h" in args:
        first = (kinds[0].__doc__ or "").split("\n\n")[0]
        return help.render_help(prog, summary or " ".join(first.split()), settings)
    if "--print_schema" in args:
        return help.render_schema(prog, settings).rstrip()
    if "--print_config" in args:
        given = _values_of_flags(args)
        file = Path(given.pop("config")[0]) if given.get("config") else None
        values = {} if file is None else read_yaml(file)
        values |= {s.name: s.value_of(given[s.name]) for s in settings if s.name in given}
        values |= {s.name: False for s in settings if f"no_{s.name}" in given}
        return help.render_config(prog, settings, values).rstrip()
    return None


def separate(args: Sequence[str]) -> list[str]:
    """Flags apart from their values, and in our spelling: `--max-steps=3` is `--max_steps`, `3`."""
    found = []
    for arg in args:
        flag, has_value, value = arg.partition("=") if arg.startswith("--") else (arg, "", "")
        found += [f"--{flag[2:].replace('-', '_')}" if arg.startswith("--") else arg, *([value] if has_value else [])]
    return found


def _values_of_flags(args: Sequence[str]) -> dict[str, list[str]]:
    """The texts after each flag."""
    found: dict[str, list[str]] = {}
    last = ""
    for arg in args:
        if arg.startswith("--"):
            last = arg[2:]
            found[last] = []
        elif last:
            found[last].append(arg)
    return {name: values for name, values in found.items() if name not in SHOWN}


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError if it is not valid, no mapping, or has a key twice."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _NoDuplicates)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not valid YAML: {reason}. Correct the file.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `key: value` lines. Correct the file.")
    return values


class _NoDuplicates(yaml.SafeLoader):
    """Safe YAML, in which a key that stands twice is an error; the last would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if isinstance(key, str) and key in seen:
                raise yaml.MarkedYAMLError(problem=f"{key} stands there twice", problem_mark=key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def _keys_of_file(args: Sequence[str]) -> dict[str, str]:
    """Each key of the --config file, and where it stands."""
    if "--config" not in args:
        return {}
    position = list(args).index("--config") + 1
    if position == len(args):
        raise ConfigError("--config is without a file. Give it the path of a YAML file.")
    path = Path(args[position])
    if not path.is_file():
        raise ConfigError(f"--config is {str(path)!r}, but there is no such file. Check the path.")
    values = read_yaml(path)
    if not isinstance(values.get("env", {}), dict):
        raise ConfigError(f"env in {path} must hold `NAME: value` lines. Correct the file.")
    for key, value in values.items():
        _refuse_variables(key, value, path)
    return {str(key): f"in {path}" for key in values if key != "env"}


def _refuse_variables(key: str, value: Any, path: Path) -> None:
    """A folder called `$HOME` would be made instead."""
    texts = value if isinstance(value, list) else [value]
    found = next((text for text in texts if isinstance(text, str) and VARIABLE.search(text)), None)
    if found is not None:
        raise ConfigError(
            f"{key} in {path} is {found!r}, but variables are not expanded in a file. Write it out (`~` is your home "
            f"folder), or give --{key} on the command line."
        )


def setting(args: Sequence[str], name: str) -> Any:
    """What the command line, or else its file, says of one setting, unchecked; None if neither has it."""
    flat = separate(args)
    places = [i for i, arg in enumerate(flat[:-1]) if arg == f"--{name}"]
    if places:
        return flat[places[-1] + 1]
    file = Path(flat[flat.index("--config") + 1]) if "--config" in flat[:-1] else None
    return read_yaml(file).get(name) if file is not None and file.is_file() else None


def _keys_of_flags(args: Sequence[str]) -> dict[str, str]:
    flags = (arg[2:].split("=")[0].replace("-", "_") for arg in args if arg.startswith("--"))
    return {flag: "on the command line" for flag in flags if flag not in ("config", *SHOWN, "")}


def check_known(keys: dict[str, str], known: Sequence[str]) -> None:
    """Raise ConfigError for all that are unknown at once."""
    names = {*known, *(f"no_{name}" for name in known)}
    unknown = [
        f"{key} {where} is not a setting of this command. {_hint(key, known)}"
        for key, where in keys.items()
        if key not in names
    ]
    if unknown:
        raise ConfigError(" ".join(unknown))


def _hint(key: str, known: Sequence[str]) -> str:
    if ELSEWHERE.get(key) in known:
        return f"Here it is {ELSEWHERE[key]}."
    if key in INSTEAD:
        return f"Instead: {INSTEAD[key]}."
    close = difflib.get_close_matches(key, known, n=1)
    return f"Did you mean {close[0]}?" if close else "See --help for the settings there are."
