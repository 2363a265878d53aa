"""Prompt lists: how they are read, and a recipe that makes one of a table."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prx_post.config import PrxPostError, doc, make_folder, require, require_positive
from prx_post.data.files import write_jsonl
from prx_post.data.tables import TableConfig, open_table


def read_prompt_rows(path: Path) -> list[dict[str, Any]]:
    """Objects with a `prompt` each: JSON lines, or one JSON list (.json) of them or of strings.

    Raises:
        PrxPostError: the file is not UTF-8, or an entry is no prompt; the first is named.
    """
    text = _read_text(path)
    if path.suffix == ".json":
        try:
            entries = json.loads(text)
        except json.JSONDecodeError as error:
            raise PrxPostError(f"{path} is not valid JSON: {error}. Correct it.") from error
        if not isinstance(entries, list):
            raise PrxPostError(f'{path} must be a list such as ["a red cube", "a blue ball"]. Correct it.')
        rows = [{"prompt": entry} if isinstance(entry, str) else entry for entry in entries]
        return [_checked(row, f"{path}, entry {number}") for number, row in enumerate(rows, start=1)]
    lines = enumerate(text.split("\n"), start=1)
    return [_checked(_parsed(line), f"{path}, line {number}") for number, line in lines if line.strip()]


def read_prompt_lines(path: Path) -> list[dict[str, Any]]:
    """Rows with the `prompt` of each line that is not blank. Raises PrxPostError if the file is not UTF-8."""
    return [{"prompt": line.strip()} for line in _read_text(path).split("\n") if line.strip()]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PrxPostError(f"{path} must be UTF-8, which byte {error.start} is not. Save it as UTF-8.") from error


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _checked(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise PrxPostError(f'{where} is no prompt, but must be JSON such as {{"prompt": "a red cube"}}. Correct it.')
    if not row["prompt"].isascii() and any("\ud800" <= letter <= "\udfff" for letter in row["prompt"]):
        raise PrxPostError(f"{where} holds half of a character, a lone surrogate. Correct it.")
    return row


@dataclass
class PromptListConfig(TableConfig):
    """JSON lines with a `prompt` each, as `generate` and `eval` read them."""

    prompt_column: str = doc("Column with the prompts; a text file has none, but a prompt a line.", "prompt")
    keep_columns: list[str] = doc("Further columns to keep, such as a language.", [])
    group_column: str | None = doc("Column that becomes `group`, by which `eval` reports.", None)
    source_files: list[str] = doc("Files in the folder `source`, each a group named after its file.", [])
    max_prompts: int | None = doc("Only the first prompts; null: all.", None)
    output_file: str | None = doc("The .jsonl file to write.", None)
    overwrite: bool = doc("Replace an output_file that is there.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_set("prompt_column", "output_file")
        if self.max_prompts is not None:
            require_positive(self, "max_prompts")
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
