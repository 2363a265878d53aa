"""Short runs of `prx-post grpo`."""

from pathlib import Path

REWARD = "jpeg_compressibility"
LORA = {"use_peft": "true", "lora_r": 4, "learning_rate": 1e-3}


def grpo_arguments(prompts: Path, cache: Path, output_dir: Path, **changes: object) -> list[str]:
    """Two rollouts of four groups of four, each gone through twice in two optimizer steps: eight steps of eight
    images."""
    values = {
        **{"method": "grpo", "model_name_or_path": "tiny", "prompts_file": prompts, "height": 32, "width": 64},
        **{"cache_dir": cache, "output_dir": output_dir, "max_steps": 8, "learning_rate": 1e-4},
        **{"prompts_per_rollout": 4, "num_generations": 4, "steps_per_generation": 2, "num_iterations": 2},
        **{"rollout_num_inference_steps": 3, "per_device_train_batch_size": 8, "reward_funcs": REWARD},
        **{"guard": "off", "logging_steps": 1, "save_steps": 2, "save_total_limit": 9, "sample_steps": 0},
        **{"report_to": "none", "ema_decay": 0.5, "num_inference_steps": 2, "guidance_scale": 1, "ddp_timeout": 60},
        **{"resume_from_checkpoint": "latest"},
        **changes,
    }
    given = {name: value for name, value in values.items() if value is not None}
    lists = {name: value if isinstance(value, list | tuple) else [value] for name, value in given.items()}
    return ["grpo", *(str(part) for name, value in lists.items() for part in (f"--{name}", *value))]
