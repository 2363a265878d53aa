"""Text files line by line: what cannot be read is named by file and line. Cells of a CSV file are text as written."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prx_post.data.rows import DataError

SEPARATORS = {".csv": ",", ".tsv": "\t"}


def lines_of(path: Path) -> Iterator[str]:
    """Lines with their ends. Raises DataError for the first that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {number} is not UTF-8. Save the file as UTF-8.") from error


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of each line of JSON lines. Raises DataError for a line that is none."""
    for number, line in enumerate(lines_of(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number} is no JSON: {error.msg}. Correct it.") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} is no JSON object. Correct it.")
        yield number, row


def csv_rows(path: Path) -> Iterator[dict[str, str]]:
    """Rows by the names of the first line; cells as written: guessing would turn 007 into 7, and None into nothing.

    Raises:
        DataError: a row has another number of cells, or quotes that are not closed.
    """
    reader = csv.reader(lines_of(path), delimiter=SEPARATORS[path.suffix.lower()], strict=True)
    try:
        header = next(reader, [])
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num} has {len(cells)} cells, but must have {len(header)} as its first "
                    f"line has. Put text with commas in quotes."
                )
            yield {name: cell for name, cell in zip(header, cells, strict=True) if name}
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num} is no CSV: {error}. Correct it.") from error
