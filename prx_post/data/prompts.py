"""Prompt files, and how they are read."""

import json
from pathlib import Path
from typing import Any

from prx_post.base.errors import PrxPostError
from prx_post.data.config import CAPTION_COLUMNS, caption_column
from prx_post.data.text_files import SEPARATORS, csv_rows, lines_of


def read_prompt_file(path: Path) -> list[dict[str, Any]]:
    """Rows with a `prompt` each: of JSON, of a .csv or .tsv with such a column, or else of text with one a line.

    Raises:
        PrxPostError: it is not UTF-8, or an entry is no prompt; the first is named.
    """
    suffix = path.suffix.lower()
    if suffix in SEPARATORS:
        return _read_prompt_table(path)
    return read_prompt_rows(path) if suffix in (".json", ".jsonl") else read_prompt_lines(path)


def _read_prompt_table(path: Path) -> list[dict[str, Any]]:
    """Rows of a table, its captions as `prompt`; rows whose prompt is empty are none."""
    rows = list(csv_rows(path))
    column = caption_column(rows[0]) if rows else None
    if rows and column is None:
        raise PrxPostError(
            f"{path} has the columns {', '.join(rows[0])}, none of which is called {', '.join(CAPTION_COLUMNS)}. Name "
            f"the one with the prompts so in its first line."
        )
    return [{**row, "prompt": row[str(column)].strip()} for row in rows if row[str(column)].strip()]


def read_prompt_rows(path: Path) -> list[dict[str, Any]]:
    """Objects with a `prompt` each: JSON lines, or one JSON list (.json) of them or of strings.

    Raises:
        PrxPostError: the file is not UTF-8, or an entry is no prompt; the first is named.
    """
    if path.suffix.lower() == ".json":
        try:
            entries = json.loads("".join(lines_of(path)))
        except json.JSONDecodeError as error:
            raise PrxPostError(f"{path} is not valid JSON: {error}. Correct it.") from error
        if not isinstance(entries, list):
            raise PrxPostError(f'{path} must be a list such as ["a red cube", "a blue ball"]. Correct it.')
        rows = [{"prompt": entry} if isinstance(entry, str) else entry for entry in entries]
        return [_checked(row, f"{path}, entry {number}") for number, row in enumerate(rows, start=1)]
    lines = enumerate(lines_of(path), start=1)
    return [_checked(_parsed(line), f"{path}, line {number}") for number, line in lines if line.strip()]


def read_prompt_lines(path: Path) -> list[dict[str, Any]]:
    """Rows with the `prompt` of each line that is not blank. Raises PrxPostError if the file is not UTF-8."""
    return [{"prompt": line.strip()} for line in lines_of(path) if line.strip()]


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
