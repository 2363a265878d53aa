"""The command line: `prx-post <command> --config FILE [--key value ...]`. Heavy imports happen in the command.

A stage's settings are read and checked before torch is imported, so `--help` and every typo are answered at once.
"""

import difflib
import importlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from prx_post import __version__
from prx_post.base.errors import ConfigError, PrxPostError
from prx_post.base.parsing import parse, separate, setting
from prx_post.stages.inherited import inherited
from prx_post.stages.registry import REGISTRY, meant


@dataclass(frozen=True)
class Command:
    """A command that is no stage.

    Attributes:
        function: called with the command's arguments; or with its settings, if `configs` says what they are.
        configs: the stage whose settings it takes.
        is_launched: whether it may run on several processes.
        listed: whether the overview shows it.
    """

    module: str
    summary: str
    function: str = "run"
    configs: str | None = None
    is_launched: bool = False
    listed: bool = True


COMMANDS = {
    "generate": Command("prx_post.generate", "images from a checkpoint"),
    "eval": Command(
        "prx_post.evaluation.evaluate",
        "score checkpoints on the same prompts and seeds; JSON and HTML report",
        is_launched=True,
    ),
    "export": Command("prx_post.stages.export", "the pipeline of a checkpoint that a run saved on its way"),
    "plan": Command("prx_post.planning.plan", "what a stage would take, memory and disk, without training"),
    "data": Command("prx_post.recipes.commands", "real data sets from recipes: Alchemist, preference pairs, prompts"),
    "data teacher-latents": Command(
        "prx_post.stages.distill.ahead", "a distillation's latents", configs="distill", is_launched=True, listed=False
    ),
    "data preview": Command("prx_post.data.preview", "a data set as it would be trained on", listed=False),
    "data make-pairs": Command(
        "prx_post.stages.dpo.make_pairs",
        "preference pairs of a checkpoint's own images",
        is_launched=True,
        listed=False,
    ),
    "reward-serve": Command(
        "prx_post.rewards.service.server", "score images over HTTP, for runs on other GPUs or machines"
    ),
    "tiny": Command(
        "prx_post.tiny.commands", "the embedded world: `tiny data` writes its data sets, `tiny build` remakes it"
    ),
}

LAUNCH_FLAGS = (
    *("--accelerate_config", "--num_processes", "--num_machines", "--machine_rank"),
    *("--main_process_ip", "--main_process_port"),
)

SILENT_S = 30.0
"""How long a rank stays whose error another prints: torchrun kills all ranks, that one too, when the first exits."""

USAGE = """\
usage: prx-post <command> [--config FILE] [--key value ...]

Post-training and alignment for PRX text-to-image checkpoints.

commands:
{commands}

`prx-post <command> --help` explains a command's settings, --print_config writes a file with all of them. Every
setting may stand in the YAML file or on the command line.
On several processes ({launched}): add
--num_processes N and --accelerate_config multi_gpu|zero1|zero2|zero3|FILE (and for several machines --num_machines,
--machine_rank, --main_process_ip, --main_process_port); torchrun works as well.
"""


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    args = [arg for arg in given if not arg.startswith("--local_rank=")]  # of the DeepSpeed launcher
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if args[0] == "--version":
        print(f"prx-post {__version__}")
        return 0
    if args[0] == "help":
        args = [*args[1:], "--help"]
        if len(args) == 1:
            print(_usage())
            return 0
    args = separate(args)
    name, *rest = [" ".join(args[:2]), *args[2:]] if " ".join(args[:2]) in COMMANDS else args
    if name not in REGISTRY and name not in COMMANDS:
        close = difflib.get_close_matches(name, _listed(), n=1, cutoff=0.75)
        hint = f"Did you mean {close[0]!r}" if close else f"Choose from {', '.join(_listed())}"
        print(f"error: {name!r} is not a command. {hint}.", file=sys.stderr)
        return 2
    try:
        flags, own = split_launch_flags(rest) if _is_launched(name) else ({}, list(rest))
        call = _stage(name, own) if name in REGISTRY else _command(name, own, check_only=bool(flags))
        if flags:
            return importlib.import_module("prx_post.engine.launch").launch(name.split(), own, flags)
        call()
    except PrxPostError as error:
        line = error.report()
        if line is not None:
            print(line, file=sys.stderr)
        elif "TORCHELASTIC_RUN_ID" in os.environ and error.exit_code != os.EX_TEMPFAIL:
            time.sleep(SILENT_S)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: no pipeline was written by this command", file=sys.stderr)
        return 130
    return 0


def _stage(name: str, args: Sequence[str]) -> Callable[[], Any]:
    """A stage, its settings read and checked."""
    asked, name = name, meant(name, setting(args, "method"))
    if asked != name and int(os.environ.get("RANK", "0")) == 0:
        print(f"the settings are those of prx-post {name}, which is run")
    configs = _settings(name, args, f"prx-post {name}")
    return partial(importlib.import_module("prx_post.stages.run").run, name, configs)


def _settings(stage: str, args: Sequence[str], prog: str) -> tuple[Any, ...]:
    kinds = REGISTRY[stage].configs()
    return parse(kinds, args, prog, inherited(kinds, partial(setting, args)), REGISTRY[stage].summary)


def _command(name: str, args: Sequence[str], check_only: bool) -> Callable[[], Any]:
    command = COMMANDS[name]
    configs = _settings(command.configs, args, f"prx-post {name}") if command.configs else None
    module = importlib.import_module(command.module)
    if check_only and configs is None:
        module.check(args)
    return partial(getattr(module, command.function), args if configs is None else configs)


def split_launch_flags(args: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The launcher's flags by name, and the command's own arguments. Raises ConfigError for a flag without a value."""
    flags: dict[str, str] = {}
    own: list[str] = []
    rest = iter(args)
    for arg in rest:
        flag, _, value = arg.partition("=")
        if flag not in LAUNCH_FLAGS:
            own.append(arg)
            continue
        value = value or next(rest, "")
        if not value or value.startswith("--"):
            raise ConfigError(f"{flag} is without a value. See --help.")
        flags[flag.removeprefix("--")] = value
    return flags, own


def _is_launched(name: str) -> bool:
    return name in REGISTRY or COMMANDS[name].is_launched


def _listed() -> dict[str, str]:
    stages = {name: entry.summary for name, entry in REGISTRY.items()}
    return stages | {name: command.summary for name, command in COMMANDS.items() if command.listed}


def _usage() -> str:
    launched = ", ".join(name for name in (*REGISTRY, *COMMANDS) if _is_launched(name))
    lines = "\n".join(f"  {name:14}{summary}" for name, summary in _listed().items())
    return USAGE.format(commands=lines, launched=launched)


def quieten_libraries() -> None:
    """Off a terminal no bars of theirs, which fill a log; and not a word of DeepSpeed's that there is no GPU."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def entry_point() -> None:
    quieten_libraries()
    try:
        code = main()
    except BrokenPipeError:  # of whoever reads what is printed, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        traceback.print_exc()  # and leave like any other of several processes
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if "prx_post.engine.run" in sys.modules:
        sys.modules["prx_post.engine.run"].leave_processes(code)
    sys.exit(code)


if __name__ == "__main__":
    entry_point()
