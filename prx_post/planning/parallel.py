"""How a run would be split among processes: from `deepspeed`, an accelerate config, `num_processes`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prx_post.base.errors import ConfigError
from prx_post.engine.config import TrainConfig
from prx_post.engine.processes import read_deepspeed_json


@dataclass(frozen=True)
class Parallel:
    """Processes and DeepSpeed's settings; sizes are in elements, and the defaults DeepSpeed's own."""

    num_processes: int = 1
    zero_stage: int = 0
    offload: bool = False
    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool | None = None
    sub_group_size: int = 1_000_000_000
    max_live_parameters: int = 1_000_000_000

    @property
    def name(self) -> str:
        if self.zero_stage:
            return f"ZeRO-{self.zero_stage}" + (", optimizer on the host" if self.offload else "")
        return "data parallel" if self.num_processes > 1 else "alone"


def read_parallel(config: TrainConfig, accelerate_config: str | None, num_processes: int | None) -> Parallel:
    """What the launch settings mean. `deepspeed` and `num_processes`, where they are set, win over the file.

    Raises:
        ConfigError: a file cannot be read, or asks for something that the training loop does not do.
    """
    file = _read_accelerate_config(accelerate_config) if accelerate_config else {}
    processes = num_processes or int(file.get("num_processes") or 1)
    if config.deepspeed is not None and config.deepspeed.endswith(".json"):
        return _of_zero(processes, read_deepspeed_json(config.deepspeed)["zero_optimization"])
    if config.deepspeed is not None:
        return Parallel(processes, int(config.deepspeed[4]), config.deepspeed.endswith("_offload"))
    kind = str(file.get("distributed_type", "NO"))
    if kind == "DEEPSPEED":
        return _of_deepspeed_section(processes, file.get("deepspeed_config") or {})
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise ConfigError(
            f"accelerate_config is {accelerate_config!r}, but must be one for DeepSpeed, MULTI_GPU or NO because "
            f"training with {kind} is not implemented. Choose zero2 or zero3."
        )
    return Parallel(processes)


def _of_deepspeed_section(processes: int, section: dict[str, Any]) -> Parallel:
    if "deepspeed_config_file" in section:
        return _of_zero(processes, read_deepspeed_json(section["deepspeed_config_file"])["zero_optimization"])
    offload = section.get("offload_optimizer_device", "none") != "none"
    return Parallel(processes, int(section.get("zero_stage", 2)), offload)


def _of_zero(processes: int, zero: dict[str, Any]) -> Parallel:
    """Of DeepSpeed's "zero_optimization" section. Sizes of "auto" are left at DeepSpeed's defaults."""
    names = {
        "reduce_bucket_size": "reduce_bucket_size",
        "sub_group_size": "sub_group_size",
        "stage3_max_live_parameters": "max_live_parameters",
    }
    sizes = {ours: int(zero[name]) for name, ours in names.items() if zero.get(name, "auto") != "auto"}
    overlap = zero.get("overlap_comm")
    return Parallel(
        processes,
        int(zero.get("stage", 0)),
        (zero.get("offload_optimizer") or {}).get("device", "none") != "none",
        overlap_comm=overlap if isinstance(overlap, bool) else None,
        **sizes,
    )


def _read_accelerate_config(name: str) -> dict[str, Any]:
    import yaml
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    try:
        _, path = resolve_accelerate_config_argument(["--accelerate_config", name])
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise ConfigError(f"accelerate_config is {name!r}, which cannot be read: {error} Check the name.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"accelerate_config is {name!r}, but must hold `key: value` lines. Correct the file.")
    return content
