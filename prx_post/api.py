"""The Python interface: what the command line does, as functions."""

import dataclasses
from pathlib import Path
from typing import Any

from prx_post.base.parsing import check_known
from prx_post.stages.inherited import inherited, read_settings
from prx_post.stages.registry import find


def train(stage: str, config: str | Path | None = None, **settings: Any) -> Path:
    """Run a stage: `prx_post.train("sft", "configs/tiny/sft.yaml", max_steps=100)`.

    Args:
        config: a YAML file, as `--config`; None: settings alone.
        settings: by name; they win over the file's.

    Returns:
        The folder of the emitted pipeline.

    Raises:
        PrxPostError: as the command says it.
    """
    from prx_post.stages.run import run

    kinds = find(stage).configs()
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    fields = {kind: [f.name for f in dataclasses.fields(kind)] for kind in kinds}
    check_known(dict.fromkeys(settings, "in train()"), [name for names in fields.values() for name in names])
    if config is None:
        values = inherited(kinds, settings.get) | settings
        given = [{name: values[name] for name in fields[kind] if name in values} for kind in kinds]
        return run(stage, tuple(kind(**own) for kind, own in zip(kinds, given, strict=True)))
    configs = read_settings(kinds, config, settings, f"train({stage!r})")
    return run(stage, configs)
