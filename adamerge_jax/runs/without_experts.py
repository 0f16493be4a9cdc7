"""The file that keeps a merge's scores without each of its experts."""

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from adamerge_jax.errors import InputError, in_one_line
from adamerge_jax.files.json_object import read_object_if_there
from adamerge_jax.files.writing import write_whole
from adamerge_jax.runs.rows import Row

_ROWS: TypeAdapter[list[dict[str, object]]] = TypeAdapter(list[dict[str, object]])


def write_without_experts(rows: Sequence[Row], file: Path) -> None:
    """Writes the scores as JSON, `{"rows": [...]}`.

    Args:
        rows: A row for each expert that was left out, by its name, as `Row.as_json` gives it.
        file: The file.
    """
    fields = {"rows": [row.as_json() for row in rows]}
    write_whole(file, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")


def read_without_experts(file: Path, merge: Row | None) -> list[Row]:
    """Reads what `write_without_experts` wrote; without a file there are no rows.

    Args:
        file: The file.
        merge: The row of the merge with all experts; None where it has none.

    Raises:
        InputError: The file holds something else, or scores of other tasks or by another metric
            than the merge's.
    """
    fields = read_object_if_there(file)
    try:
        rows = [Row.from_json(row) for row in _ROWS.validate_python(fields.get("rows", []))]
    except (KeyError, TypeError, ValidationError) as error:
        reason = in_one_line(error) if isinstance(error, ValidationError) else f"{error!r:.200}"
        raise InputError(
            f"{file}: {reason}; expected the scores of a merge without each expert"
        ) from error
    for row in rows:
        if merge is None or row.tasks.keys() != merge.tasks.keys() or row.metric != merge.metric:
            raise InputError(
                f"{file}: the row {row.method!r:.80} has other tasks or another metric than the "
                "merge in the table of results; the file was changed: take it from the run again"
            )
    return rows
