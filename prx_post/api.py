"""The Python interface: what the command line does, as functions."""

import dataclasses
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from prx_post.base.errors import ConfigError
from prx_post.base.parsing import check_known, parse, read_yaml
from prx_post.stages.inherited import inherited
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
    path = Path(config).expanduser()
    if not path.is_file():
        raise ConfigError(f"config is {str(config)!r}, but there is no such file. Check the path.")
    values = read_yaml(path)
    check_known({key: f"in {path}" for key in values if key != "env"}, [n for names in fields.values() for n in names])
    # what the file lacks may be among the settings, so they are completed before anything is checked
    with TemporaryDirectory() as folder:
        whole = Path(folder) / path.name
        whole.write_text(yaml.safe_dump({**values, **settings}, allow_unicode=True), encoding="utf-8")
        own = inherited(kinds, (values | settings).get)
        configs = parse(kinds, ["--config", str(whole)], f"train({stage!r})", own)
    return run(stage, configs)
