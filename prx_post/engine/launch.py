"""`prx-post sft --accelerate_config zero2 --num_processes 8 ...`: the same command under `accelerate launch`."""

import os
import subprocess
import sys
from collections.abc import Sequence

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from prx_post.base.errors import ConfigError
from prx_post.engine.processes import EXPECTED_PROCESSES
from prx_post.engine.signals import StopRequested

SHUTDOWN_TIMEOUT_S = "600"
"""Seconds that processes have to finish their step and save after a signal to the launcher."""


def launch(command: Sequence[str], args: Sequence[str], flags: dict[str, str]) -> int:
    """Run `prx-post <command>` in `num_processes` processes. Returns an exit code.

    Args:
        args: the command's own, checked already.
        flags: the launcher's, by name.

    Raises:
        PrxPostError: the accelerate config cannot be used.
    """
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    if "WORLD_SIZE" in os.environ:
        raise ConfigError(
            f"{', '.join(flags)} cannot be used under another launcher (WORLD_SIZE is set). Leave the launching to one."
        )
    flags = dict(flags)
    config_name = flags.pop("accelerate_config", "multi_gpu")
    try:
        launcher = resolve_accelerate_config_argument(["--accelerate_config", config_name])
        for name, value in flags.items():
            launcher += [f"--{name}", value]
        parsed = launch_command_parser().parse_args([*launcher, "--module", "prx_post.cli", *command, *args])
    except ValueError as error:
        raise ConfigError(f"accelerate_config is {config_name!r}: {error}") from error
    if parsed.use_fsdp or config_name.startswith("fsdp"):
        raise ConfigError(f"accelerate_config is {config_name!r}, but FSDP is not supported. Use zero2 or zero3.")
    if "num_processes" in flags:
        os.environ[EXPECTED_PROCESSES] = flags["num_processes"]
    # torchrun's own: which signals it hands on, and how long it lets processes save before it kills them
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_TIMEOUT_S)
    if not torch.accelerator.is_available():
        os.environ.setdefault(
            "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(flags.get("num_processes", 1))))
        )
    try:
        launch_command(parsed)
    except ChildFailedError as error:
        code = next((failure.exitcode for failure in error.failures.values() if failure.exitcode > 0), 1)
        print(f"a process ended with code {code}; its own message is above", file=sys.stderr)
        return code
    except subprocess.CalledProcessError as error:  # of one process, which accelerate starts without torchrun
        return error.returncode if error.returncode > 0 else 1
    except SignalException as error:
        raise StopRequested(
            f"stopped by {error.sigval.name}, as were the processes, which save if they are in training. "
            f"Resume with resume_from_checkpoint: latest."
        ) from error
    return 0
