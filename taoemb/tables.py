"""Tables on disk: parquet, jsonl and csv in, parquet out, with errors that name file, row and column."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq


class SchemaError(ValueError):
    """A table cannot be used; ``row`` is 1 for the first row after a header."""

    def __init__(self, source: str, row: int | None, column: str, problem: str) -> None:
        where = "".join([source, f", row {row}" if row else "", f", column {column!r}" if column else ""])
        super().__init__(f"{where}: {problem}")
        self.source, self.row, self.column = source, row, column


@dataclass(frozen=True)
class TableSpec:
    """Columns of a table; ``extra_numbers`` keeps any further numeric column (quality signals) and drops the rest."""

    name: str
    required: Mapping[str, pa.DataType]
    optional: Mapping[str, pa.DataType]
    extra_numbers: bool = False

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """Every named column with its type."""
        return {**self.required, **self.optional}


def read_table(path: Path, spec: TableSpec) -> pa.Table:
    """The raw table of a ``.parquet``, ``.jsonl`` or ``.csv`` file; `normalize_table` makes it fit the spec."""
    readers = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".csv": _read_csv}
    reader = readers.get(path.suffix)
    if reader is None:
        raise SchemaError(path.name, None, "", f"cannot read {path.suffix!r} files; use .parquet, .jsonl or .csv")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    return reader(path, spec)


def write_table(table: pa.Table, path: Path) -> None:
    """Write parquet beside ``path`` and rename it there, so that a reader never sees half a file."""
    beside = path.with_name(path.name + ".tmp")
    pq.write_table(table.replace_schema_metadata(None), beside, compression="zstd")
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)


def normalize_table(table: pa.Table, spec: TableSpec, source: str) -> pa.Table:
    """Check the columns of a table and cast them to the types of the spec; raises SchemaError."""
    for name in spec.required:
        if name not in table.column_names:
            near = difflib.get_close_matches(name, table.column_names, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise SchemaError(source, None, name, f"is missing; the columns are {table.column_names}{hint}")
    columns: dict[str, pa.ChunkedArray] = {}
    for name in table.column_names:
        if table.column_names.count(name) > 1:
            raise SchemaError(source, None, name, "appears more than once; keep one of them")
        if name in spec.columns:
            columns[name] = _cast(table.column(name), spec.columns[name], source, name)
        elif spec.extra_numbers:
            number = _extra_number(table.column(name), source, name)
            if number is not None:
                columns[name] = number
    return pa.table(columns)


def _cast(column: pa.ChunkedArray, wanted: pa.DataType, source: str, name: str) -> pa.ChunkedArray:
    if pa.types.is_string(wanted):
        if pa.types.is_struct(column.type) or pa.types.is_map(column.type):  # attributes given as objects
            return pa.chunked_array([pa.array([_json(v) for v in column.to_pylist()], pa.string())])
        if pa.types.is_nested(column.type):
            raise SchemaError(
                source, None, name, f"holds {column.type}; give text, and an object as JSON, struct or map"
            )
        if pa.types.is_floating(column.type):
            raise SchemaError(
                source, None, name, f"holds {column.type}; a float loses digits of an id: store it as text"
            )
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            column = _decode(column, source, name)
        return column.cast(pa.string())
    values = column.cast(pa.string()) if pa.types.is_large_string(column.type) else column
    if pa.types.is_string(values.type):
        values = pc.utf8_trim_whitespace(values)
        values = pc.if_else(pc.equal(values, ""), None, values)
    try:
        numbers = values.cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        kind = "a whole number" if pa.types.is_integer(wanted) else "a number"
        row, value = _first_uncastable(values, wanted)
        raise SchemaError(source, row, name, f"{value!r} is not {kind}") from None
    if pa.types.is_floating(wanted):
        _check_finite(numbers, source, name)
    return numbers


def _extra_number(column: pa.ChunkedArray, source: str, name: str) -> pa.ChunkedArray | None:
    kind = column.type
    if pa.types.is_string(kind):  # a csv cell has no type: numbers are what parses as numbers throughout
        try:
            return _cast(column, pa.float64(), source, name)
        except SchemaError as error:
            if "is not a number" in str(error):
                return None
            raise
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return _cast(column, pa.float64(), source, name)
    return None


def _check_finite(numbers: pa.ChunkedArray, source: str, name: str) -> None:
    array = numbers.combine_chunks() if numbers.num_chunks != 1 else numbers.chunk(0)
    bad = np.asarray(pc.fill_null(pc.invert(pc.is_finite(array)), False))
    if bad.any():
        row = int(bad.argmax())
        raise SchemaError(
            source, row + 1, name, f"is {array[row].as_py()}; leave the cell empty where the value is unknown"
        )


def _first_uncastable(values: pa.ChunkedArray, wanted: pa.DataType) -> tuple[int | None, Any]:
    for row, value in enumerate(values.to_pylist(), start=1):
        try:
            pa.array([value], values.type).cast(wanted)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            return row, value
    return None, str(values.type)


def _json(value: Any) -> str | None:
    if isinstance(value, list):  # pyarrow maps come as pairs
        value = dict(value)
    if value is None:
        return None
    return json.dumps({k: v for k, v in value.items() if v is not None}, default=str)  # str: dates, decimals


def _decode(column: pa.ChunkedArray, source: str, name: str) -> pa.Array:
    texts: list[str | None] = []
    for row, value in enumerate(column.to_pylist(), start=1):
        try:
            texts.append(None if value is None else value.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise SchemaError(source, row, name, f"is not UTF-8 ({error.reason} at byte {error.start})") from None
    return pa.chunked_array([pa.array(texts, pa.string())])


def _read_parquet(path: Path, spec: TableSpec) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise SchemaError(path.name, None, "", f"is not a readable parquet file: {error}") from None


def _read_jsonl(path: Path, spec: TableSpec) -> pa.Table:
    rows: list[dict[str, Any]] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise SchemaError(
                    path.name, number, "", f"is not UTF-8 ({error.reason} at byte {error.start})"
                ) from None
            except json.JSONDecodeError as error:
                raise SchemaError(path.name, number, "", f"is not JSON: {error}") from None
            if not isinstance(value, dict):
                raise SchemaError(path.name, number, "", "must be a JSON object")
            rows.append(value)
    if not rows:
        raise SchemaError(path.name, None, "", "is empty; every line must be a JSON object")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: _jsonl_column([row.get(name) for row in rows], name, path.name, spec) for name in names})


def _jsonl_column(values: list[Any], name: str, source: str, spec: TableSpec) -> pa.Array:
    if pa.types.is_string(spec.columns.get(name, pa.null())):
        return pa.array([_jsonl_text(v, i, name, source) for i, v in enumerate(values, start=1)], pa.string())
    try:
        return pa.array(values)
    except OverflowError:  # a whole number beyond 64 bits
        return pa.array([float(v) if isinstance(v, int) else v for v in values])
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        if name not in spec.columns:  # an extra column of mixed types is no number
            return pa.array([None] * len(values), pa.null())
        kinds = [type(v) for v in values if v is not None]
        odd = next(i for i, v in enumerate(values, start=1) if v is not None and type(v) is not kinds[0])
        raise SchemaError(
            source, odd, name, f"{values[odd - 1]!r} is not of the same kind as the rows before"
        ) from None


def _jsonl_text(value: Any, row: int, name: str, source: str) -> str | None:
    if isinstance(value, float):
        raise SchemaError(source, row, name, f"is the float {value}; a float loses digits of an id: store it as text")
    text = json.dumps(value) if isinstance(value, dict | list) else None if value is None else str(value)
    if text is not None and not text.isascii() and any("\ud800" <= sign <= "\udfff" for sign in text):
        raise SchemaError(source, row, name, f"holds half of a surrogate pair, which is no text: {text[:60]!r}")
    return text


def _read_csv(path: Path, spec: TableSpec) -> pa.Table:
    return read_delimited(path)


def read_delimited(path: Path, delimiter: str = ",", encoding: str = "utf-8-sig") -> pa.Table:
    """A csv file with every cell as text: an id such as 0012 must not become a number.

    Raises SchemaError for a file without a header, in another encoding, or with rows of different lengths.
    """
    content = path.read_bytes()
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        row = content[: error.start].count(b"\n")
        problem = f"is not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
        raise SchemaError(path.name, row or None, "", problem) from None
    if not content.strip():
        raise SchemaError(path.name, None, "", "is empty; the first line must name the columns")
    if encoding == "utf-8-sig":
        source = pa.py_buffer(content.removeprefix(b"\xef\xbb\xbf"))
    else:
        source = pa.py_buffer(text.encode("utf-8"))
    del content, text
    parse = pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    try:
        header = pa_csv.open_csv(pa.BufferReader(source), parse_options=parse).schema.names
        convert = pa_csv.ConvertOptions(column_types={n: pa.string() for n in header}, strings_can_be_null=False)
        return pa_csv.read_csv(pa.BufferReader(source), parse_options=parse, convert_options=convert)
    except pa.ArrowInvalid as error:
        raise SchemaError(path.name, None, "", f"is not a readable csv file: {error}") from None
