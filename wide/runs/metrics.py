"""Reading metrics.csv: a row for every epoch, of whole numbers, real ones, and none."""

import csv
import re
from pathlib import Path

from wide.runs.files import whole_lines

# As Python writes them; it would also read 1_0 and digits of other scripts.
_INTEGER, _REAL = re.compile(r"-?[0-9]+"), re.compile(r"-?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?|nan|-?inf")


def read_rows(path: Path) -> list[dict[str, float | None]]:
    """Its whole rows; a last one that was cut off in writing is left out.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or its rows are not those of epochs 1, 2, 3 and so on.
    """
    reader = csv.DictReader(whole_lines(path), strict=True)
    try:
        rows = [{key: _number(value) for key, value in row.items()} for row in reader]
        if len(set(reader.fieldnames or ())) != len(reader.fieldnames or ()):
            raise ValueError("two columns have one name")
        if [row["epoch"] for row in rows] != list(range(1, len(rows) + 1)):
            raise ValueError("its rows are not those of consecutive epochs")
        if not all(isinstance(row["train_loss"], int | float) for row in rows):
            raise ValueError("a row has no train_loss")
    except (KeyError, TypeError, AttributeError, csv.Error) as error:
        raise ValueError(error) from error
    return rows


def _number(text: str) -> float | None:
    if not text:
        if text is None:
            raise ValueError("a row is cut off")
        return None
    if _INTEGER.fullmatch(text):
        return int(text)
    if not _REAL.fullmatch(text):
        raise ValueError(f"{text[:20]!r} is no number")
    return float(text)
