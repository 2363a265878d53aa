"""The command line: `prx-post <command> --config FILE [--key value ...]`. Heavy imports happen in the command."""

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from prx_post import __version__
from prx_post.base.errors import PrxPostError

COMMANDS = {
    "sft": ("prx_post.stages.sft", "supervised fine-tuning: full or LoRA, flow matching"),
    "distill": ("prx_post.stages.distill", "few-step students: trajectory regression, LADD, DMD2"),
    "generate": ("prx_post.generate", "pictures from a checkpoint"),
    "eval": ("prx_post.evaluation.evaluate", "score checkpoints on the same prompts and seeds; JSON and HTML report"),
    "plan": ("prx_post.planning.plan", "what a stage would take, memory and disk, without training"),
    "data": (
        "prx_post.recipes.commands",
        "real data sets from recipes: Alchemist, preference pairs, own folders, prompts",
    ),
    "reward-serve": ("prx_post.rewards.service.server", "score pictures over HTTP, for runs on other GPUs or machines"),
    "tiny": ("prx_post.tiny.commands", "the embedded world: `tiny data` writes its data sets, `tiny build` remakes it"),
}

TEACHER_LATENTS = "data teacher-latents"
ENTRY_POINTS = {name: (module, "run") for name, (module, _) in COMMANDS.items()} | {
    TEACHER_LATENTS: ("prx_post.stages.distill", "make_latents")
}
"""Each command's module and function."""

LAUNCHED = ("sft", "distill", "eval", TEACHER_LATENTS)
"""Commands that may run on several processes."""
LAUNCH_FLAGS = (
    *("--accelerate_config", "--num_processes", "--num_machines", "--machine_rank"),
    *("--main_process_ip", "--main_process_port"),
)

USAGE = """\
usage: prx-post <command> [--config FILE] [--key value ...]

Post-training and alignment for PRX text-to-image checkpoints.

commands:
{commands}

`prx-post <command> --help` lists a command's settings. Every setting may stand in the YAML file or on the command line.
On several processes (sft, distill, data teacher-latents, eval): add --num_processes N and --accelerate_config
multi_gpu|zero1|zero2|zero3|FILE (and for several machines --num_machines, --machine_rank, --main_process_ip,
--main_process_port); torchrun works as well.
"""


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    args = [arg for arg in given if not arg.startswith("--local_rank=")]  # of the DeepSpeed launcher
    if not args or args[0] in ("-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:14}{text}" for name, (_, text) in COMMANDS.items())))
        return 0
    if args[0] == "--version":
        print(f"prx-post {__version__}")
        return 0
    command, *rest = [TEACHER_LATENTS, *args[2:]] if args[:2] == TEACHER_LATENTS.split() else args
    if command not in ENTRY_POINTS:
        print(f"error: {command!r} is not a command. Choose from {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    try:
        module_name, function = ENTRY_POINTS[command]
        module = importlib.import_module(module_name)
        if command in LAUNCHED and any(arg.split("=")[0] in LAUNCH_FLAGS for arg in rest):
            launch = importlib.import_module("prx_post.engine.launch").launch
            return launch(command.split(), rest, LAUNCH_FLAGS, module.check)
        getattr(module, function)(rest)
    except PrxPostError as error:
        line = error.report()
        if line is not None:
            print(line, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: no pipeline was written by this command", file=sys.stderr)
        return 130
    return 0


def entry_point() -> None:
    try:
        code = main()
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
