"""A recipe that makes a prompt list of a table."""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prx_post.base.errors import PrxPostError
from prx_post.base.files import make_folder, write_jsonl
from prx_post.base.settings import doc, require
from prx_post.data.prompts import read_prompt_lines, read_prompt_rows
from prx_post.recipes.tables import TableConfig, open_table


@dataclass
class PromptListConfig(TableConfig):
    """JSON lines with a `prompt` each, as `generate` and `eval` read them."""

    prompt_column: str = doc("Column with the prompts; a text file has none, but a prompt a line.", "prompt")
    keep_columns: list[str] = doc("Further columns to keep, such as a language.", [])
    group_column: str | None = doc("Column that becomes `group`, by which `eval` reports.", None)
    source_files: list[str] = doc("Files in the folder `source`, each a group named after its file.", [])
    max_prompts: int | None = doc("Only the first prompts; null: all.", None, above=0)
    output_file: str | None = doc("The .jsonl file to write.", None)
    overwrite: bool = doc("Replace an output_file that is there.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_set("prompt_column", "output_file")
        if self.source_files:
            reason, action = "the files' names are the groups", "Leave out one of them"
            require(self.group_column is None, "group_column", self.group_column, "null", reason, action)
        if self.group_column or self.source_files:
            reason, action = "group is made of something else", "Leave it out"
            require(
                "group" not in self.keep_columns, "keep_columns", self.keep_columns, "without group", reason, action
            )

    @property
    def makes_groups(self) -> bool:
        return bool(self.group_column or self.source_files)


def run(config: PromptListConfig) -> None:
    """Write the prompts, each once (and once in each group). Raises PrxPostError if there are none or nowhere to."""
    output = new_list(config.output_file, config.overwrite)
    rows: dict[tuple[str, Any], dict[str, Any]] = {}
    read = empty = 0
    for row in _source_rows(config):
        if len(rows) == config.max_prompts:
            break
        read += 1
        prompt = " ".join(str(row["prompt"] or "").split())
        empty += not prompt
        if prompt:
            rows.setdefault((prompt, row.get("group") if config.makes_groups else None), {**row, "prompt": prompt})
    if not rows:
        raise PrxPostError(f"source is {config.source!r}, which holds no prompt. Check prompt_column.")
    write_list(output, rows.values())
    print(f"{len(rows)} prompts in {output}, of {read} rows; {empty} were empty, {read - empty - len(rows)} repeated")


def new_list(output_file: str | None, overwrite: bool) -> Path:
    """Where to write. Raises PrxPostError if it is no .jsonl file, or is there and not to be replaced."""
    output = Path(str(output_file)).expanduser()
    if output.suffix != ".jsonl":
        raise PrxPostError(f"output_file is {output_file!r}, but must end in .jsonl. Rename it.")
    if output.exists() and not overwrite:
        raise PrxPostError(f"{output} is there already. Move it away, or set overwrite: true to replace it.")
    return output


def write_list(output: Path, rows: Iterable[dict[str, Any]]) -> None:
    make_folder(output.parent)
    write_jsonl(output, rows)


def _source_rows(config: PromptListConfig) -> Iterator[dict[str, Any]]:
    """Rows with `prompt`, the kept columns, and `group` if the configuration makes it (where it is not empty)."""
    if not config.source_files:
        return _rows_of(config)
    folder = Path(str(config.source)).expanduser()
    paths = [folder / name for name in config.source_files]
    for path in paths:
        if not path.is_file():
            raise PrxPostError(f"source_files has {path.name!r}, which is not in {folder}. Check source.")
    return (
        {**row, "group": path.stem}
        for path in paths
        for row in _rows_of(dataclasses.replace(config, source=str(path), source_files=[]))
    )


def _rows_of(config: PromptListConfig) -> Iterator[dict[str, Any]]:
    """Of one file, folder of parquet or Hub data set."""
    path = Path(str(config.source)).expanduser()
    wanted = [*config.keep_columns, *([config.group_column] if config.group_column else [])]
    if path.is_file() and path.suffix in (".txt", ".json"):
        rows = read_prompt_lines(path) if path.suffix == ".txt" else read_prompt_rows(path)
        for number, row in enumerate(rows, start=1):
            missing = [name for name in wanted if name not in row]
            if missing:
                setting = "keep_columns" if missing[0] in config.keep_columns else "group_column"
                raise PrxPostError(f"{path}, prompt {number} has no {missing[0]!r}. Leave it out of {setting}.")
        return (_listed(row, row["prompt"], config) for row in rows)
    columns = list(dict.fromkeys([config.prompt_column, *wanted]))
    table = open_table(config, columns, streaming=True).select_columns(columns)
    return (_listed(row, row[config.prompt_column], config) for row in table)


def _listed(row: dict[str, Any], prompt: Any, config: PromptListConfig) -> dict[str, Any]:
    kept = {"prompt": prompt, **{name: _plain(row[name]) for name in config.keep_columns}}
    if config.group_column and (group := str(_plain(row[config.group_column]) or "").strip()):
        kept["group"] = group
    return kept


def _plain(value: Any) -> Any:
    """What JSON can hold; a date, for one, as text."""
    return value if value is None or isinstance(value, str | int | float | list | dict) else str(value)
