"""A shop's items, queries, grades and clicks: read, checked and written.

Everything is columnar (pyarrow), so that a catalog of a million items costs its bytes and no Python objects;
`Item` and `Query` are made when asked for. A row that cannot be used raises `SchemaError` with file, row and column.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from taoemb.tables import SchemaError, TableSpec, normalize_table, read_table, write_table
from taoemb.types import MAX_GRADE

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Catalog", "Item", "ItemTemplate", "Items", "Query", "QuerySet", "SchemaError"]

ITEMS = TableSpec("items", {"id": pa.string(), "title": pa.string()},
                  {"description": pa.string(), "category": pa.string(), "brand": pa.string(),
                   "attributes": pa.string(), "price": pa.float64()}, extra_numbers=True)  # fmt: skip
QUERIES = TableSpec("queries", {"id": pa.string(), "query": pa.string()},
                    {"split": pa.string(), "slice": pa.string(), "frequency": pa.float64(),
                     "intent": pa.string()})  # fmt: skip
QRELS = TableSpec("qrels", {"query_id": pa.string(), "item_id": pa.string(), "grade": pa.int64()}, {})
CLICKS = TableSpec("clicks", {"query_id": pa.string(), "item_id": pa.string()},
                   {"position": pa.int64(), "clicks": pa.int64()})  # fmt: skip
SPLITS = ("", "train", "validation", "test")
_ITEM_CACHE = 65_536


@dataclass(frozen=True, slots=True)
class Item:
    """One sellable thing; everything but ``id`` and ``title`` may be missing."""

    id: str
    title: str
    description: str = ""
    category: str = ""
    brand: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    price: float | None = None


@dataclass(frozen=True, slots=True)
class Query:
    """One search query; ``intent`` is its structured meaning where the writer of the query knows it."""

    id: str
    text: str
    split: str = ""
    slice: str = ""
    frequency: float = 1.0
    intent: Mapping[str, Any] | None = None


class Items(Sequence[Item]):
    """The items of a catalog: a read-only sequence of `Item` over a pyarrow table."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table.combine_chunks()
        self._cache: dict[int, Item] = {}

    @classmethod
    def load(cls, folder: str | Path) -> Items:
        """The items of a catalog folder without its queries, grades and clicks; raises as `Catalog.load` does."""
        file = _items_file(Path(folder))
        return cls(_checked_items(read_table(file, ITEMS), file.name))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Items: ...
    def __getitem__(self, index: int | slice) -> Item | Items:
        if isinstance(index, slice):
            return Items(self.table.take(pa.array(range(*index.indices(len(self))), pa.int64())))
        index = range(len(self))[index]
        if index not in self._cache:
            if len(self._cache) >= _ITEM_CACHE:
                self._cache.clear()
            self._cache[index] = self._item(index)
        return self._cache[index]

    def __iter__(self) -> Iterator[Item]:
        return (self._item(i) for i in range(len(self)))

    def _item(self, index: int) -> Item:
        get = self._getters
        text = {name: get[name](index) or "" for name in ("description", "category", "brand") if name in get}
        price = get["price"](index) if "price" in get else None
        return Item(get["id"](index), get["title"](index), attributes=self.attributes(index), price=price, **text)

    @cached_property
    def _getters(self) -> dict[str, Any]:
        def getter(column: pa.ChunkedArray) -> Any:
            array = column.chunk(0) if column.num_chunks == 1 else column  # text beyond 2 GiB stays in chunks
            return lambda i: array[i].as_py()

        return {name: getter(self.table.column(name)) for name in self.table.column_names}

    @cached_property
    def ids(self) -> list[str]:
        """Item ids in catalog order."""
        return [str(i) for i in self.table.column("id").to_pylist()]

    @cached_property
    def _position(self) -> dict[str, int]:
        return {item_id: i for i, item_id in enumerate(self.ids)}

    def positions(self, ids: Iterable[str]) -> npt.NDArray[np.int64]:
        """Catalog positions of item ids, int64; raises KeyError that names an id the catalog does not hold."""
        try:
            return np.fromiter((self._position[i] for i in ids), dtype=np.int64)
        except KeyError as error:
            raise KeyError(f"item id {error.args[0]!r} is not in the catalog of {len(self)} items") from None

    def column(self, name: str) -> npt.NDArray[np.float64] | None:
        """A numeric column as float64 with NaN where empty, or None when the catalog has no such column."""
        if name not in self.table.column_names:
            return None
        column = self.table.column(name)
        if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
            raise TypeError(f"item column {name!r} holds {column.type}, not numbers")
        return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)

    def attributes(self, index: int) -> dict[str, str]:
        """The attributes of one item, values as text (``true`` / ``false`` for JSON booleans)."""
        raw = self._getters["attributes"](index) if "attributes" in self._getters else None
        if not raw:
            return {}
        return {str(name): _value_text(value) for name, value in json.loads(raw).items() if value is not None}


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value if isinstance(value, str) else json.dumps(value) if isinstance(value, dict | list) else str(value)


@dataclass(frozen=True)
class ItemTemplate:
    """Renders an item to the text that the encoder reads; part of every index fingerprint."""

    fields: tuple[str, ...] = ("title", "brand", "category", "description", "attributes")
    """Order of the parts; a brand or category that the text already contains is not repeated."""
    attributes: tuple[str, ...] | None = None
    """Names of the attributes to show; None shows the first ``max_attributes`` that carry a word."""
    max_attributes: int = 12
    """How many attributes are shown when ``attributes`` names none."""
    max_chars: int = 400
    """Length limit of the whole text; cut at a word boundary."""

    def __post_init__(self) -> None:
        known = ("title", "brand", "category", "description", "attributes")
        unknown = [name for name in self.fields if name not in known]
        if unknown or "title" not in self.fields:
            raise ValueError(f"fields={self.fields!r}: use some of {known}, with 'title' among them")
        if self.max_chars < 1 or self.max_attributes < 0:
            raise ValueError("max_chars must be at least 1 and max_attributes at least 0")

    def render(self, item: Item) -> str:
        """The text of one item.

        >>> ItemTemplate().render(Item("1", "Acme mug", brand="Acme", attributes={"colour": "red", "handle": "true"}))
        'Acme mug | colour: red'
        """
        parts: list[str] = []
        for name in self.fields:
            if name == "attributes":
                part = ", ".join(self._attributes(item.attributes))
            else:
                part = " ".join(str(getattr(item, name)).split())
                if name in ("brand", "category") and part.lower() in " | ".join(parts).lower():
                    continue
            if part:
                parts.append(part)
        text = " | ".join(parts)
        return text if len(text) <= self.max_chars else text[: self.max_chars + 1].rsplit(" ", 1)[0][: self.max_chars]

    def _attributes(self, attributes: Mapping[str, str]) -> Iterator[str]:
        if self.attributes is not None:
            chosen = [(name, attributes[name]) for name in self.attributes if attributes.get(name)]
        else:  # switches and bare counts carry no word that a query would use
            worded = [
                (name, value)
                for name, value in attributes.items()
                if value not in ("true", "false") and any(c.isalpha() for c in value)
            ]
            chosen = worded[: self.max_attributes]
        return (f"{name}: {' '.join(value.split())}" for name, value in chosen)

    def texts(self, items: Iterable[Item]) -> list[str]:
        """The texts of many items, in order."""
        return [self.render(item) for item in items]


class QuerySet(Sequence[Query]):
    """Queries in file order."""

    def __init__(self, queries: Iterable[Query]) -> None:
        self._queries = tuple(queries)
        self.ids = [query.id for query in self._queries]
        self.texts = [query.text for query in self._queries]

    def __len__(self) -> int:
        return len(self._queries)

    @overload
    def __getitem__(self, index: int) -> Query: ...
    @overload
    def __getitem__(self, index: slice) -> QuerySet: ...
    def __getitem__(self, index: int | slice) -> Query | QuerySet:
        return QuerySet(self._queries[index]) if isinstance(index, slice) else self._queries[index]

    def select(self, split: str | None = None, ids: Iterable[str] | None = None) -> QuerySet:
        """The queries of a split, or those with the given ids (file order)."""
        wanted = None if ids is None else set(ids)
        return QuerySet(
            q for q in self._queries if (split is None or q.split == split) and (wanted is None or q.id in wanted)
        )

    def to_table(self) -> pa.Table:
        """The queries as a pyarrow table in the file schema."""
        rows = self._queries
        columns = {
            "id": [q.id for q in rows],
            "query": [q.text for q in rows],
            "split": [q.split for q in rows],
            "slice": [q.slice for q in rows],
            "frequency": [float(q.frequency) for q in rows],
            "intent": [None if q.intent is None else json.dumps(q.intent, sort_keys=True) for q in rows],
        }
        schema = pa.schema([(name, {**QUERIES.required, **QUERIES.optional}[name]) for name in columns])
        return pa.table(columns, schema=schema)

    @classmethod
    def from_table(cls, table: pa.Table, source: str = "queries") -> QuerySet:
        """Queries from a table in the file schema; raises SchemaError on a bad row."""
        table = normalize_table(table, QUERIES, source)
        _check_ids(table, source)
        _check_text(table, "query", source)
        return cls(cls._rows(table, source))

    @classmethod
    def load(cls, path: str | Path) -> QuerySet:
        """Queries from one parquet, jsonl or csv file, or those of a catalog folder, none where it has none."""
        file = _find(Path(path), "queries") if Path(path).is_dir() else Path(path)
        return cls([]) if file is None else cls.from_table(read_table(file, QUERIES), file.name)

    @staticmethod
    def _rows(table: pa.Table, source: str) -> Iterator[Query]:
        for number, row in enumerate(table.to_pylist(), start=1):
            split, intent, frequency = row.get("split") or "", row.get("intent"), row.get("frequency")
            if split not in SPLITS:
                raise SchemaError(source, number, "split", f"{split!r} is none of train, validation, test (or empty)")
            if frequency is not None and not frequency >= 0:
                raise SchemaError(source, number, "frequency", f"{frequency!r} is negative")
            parsed = _json_object(intent, source, number, "intent") if intent else None
            frequency = 1.0 if frequency is None else frequency
            yield Query(row["id"], row["query"], split, row.get("slice") or "", frequency, parsed)


@dataclass(frozen=True)
class Catalog:
    """A shop: items, and where there are any, queries, grades (qrels) and clicks."""

    items: Items
    queries: QuerySet = field(default_factory=lambda: QuerySet([]))
    qrels: dict[str, dict[str, int]] = field(default_factory=dict)
    clicks: pa.Table | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def unjudged(self) -> int | None:
        """Grade of a pair that the qrels do not list: 0 when they are complete, None when it is unknown."""
        return self.metadata.get("unjudged")

    @classmethod
    def load(cls, folder: str | Path) -> Catalog:
        """Read ``items``, ``queries``, ``qrels`` and ``clicks`` (parquet, jsonl or csv) from a folder.

        Only ``items`` is required. Raises FileNotFoundError when the folder or the items are missing and
        SchemaError, naming file, row and column, when a table cannot be used.
        """
        folder = Path(folder)
        items = _items_file(folder)
        files = {"items": items} | {spec.name: _find(folder, spec.name) for spec in (QUERIES, QRELS, CLICKS)}
        metadata_file = folder / "catalog.json"
        metadata: dict[str, Any] = {}
        if metadata_file.exists():
            metadata = _json_object(metadata_file.read_text(encoding="utf-8"), metadata_file.name, None, "")
        specs = {spec.name: spec for spec in (QUERIES, QRELS, CLICKS)}
        others = {
            name: read_table(path, specs[name]) for name, path in files.items() if name in specs and path is not None
        }
        sources = {name: path.name for name, path in files.items() if path is not None}
        return cls.from_tables(read_table(items, ITEMS), **others, metadata=metadata, sources=sources)

    @classmethod
    def from_tables(
        cls,
        items: pa.Table,
        queries: pa.Table | None = None,
        qrels: pa.Table | None = None,
        clicks: pa.Table | None = None,
        metadata: Mapping[str, Any] | None = None,
        sources: Mapping[str, str] | None = None,
    ) -> Catalog:
        """Check tables in the file schemas and make a catalog of them; ``sources`` are file names for errors."""
        source = {name: (sources or {}).get(name, name) for name in ("items", "queries", "qrels", "clicks")}
        items = _checked_items(items, source["items"])
        query_set = QuerySet([]) if queries is None else QuerySet.from_table(queries, source["queries"])
        unjudged = (metadata or {}).get("unjudged")
        if unjudged is not None and unjudged not in range(MAX_GRADE + 1):
            raise SchemaError(
                "catalog.json", None, "unjudged", f"is {unjudged!r}; use 0 where the qrels are complete, else null"
            )
        known = set(query_set.ids), set(items.column("id").to_pylist())
        grades: dict[str, dict[str, int]] = {}
        if qrels is not None:
            grades = _read_qrels(normalize_table(qrels, QRELS, source["qrels"]), *known, source["qrels"])
        if clicks is not None:
            clicks = normalize_table(clicks, CLICKS, source["clicks"])
            _check_known(clicks, *known, source["clicks"])
        return cls(Items(items), query_set, grades, clicks, dict(metadata or {}))

    @classmethod
    def from_datasets(cls, items: Dataset, queries: Dataset | None = None, qrels: Dataset | None = None) -> Catalog:
        """A catalog from ``datasets.Dataset`` objects with the columns of the files (see `load`)."""

        def table(dataset: Dataset | None) -> pa.Table | None:
            return None if dataset is None else dataset.with_format("arrow")[:]

        item_table = table(items)
        return cls.from_tables(item_table, table(queries), table(qrels))

    def save(self, folder: str | Path) -> None:
        """Write the catalog as parquet; each file is written beside and renamed.

        Raises FileExistsError when the folder holds a table that would not be replaced: it would mix with this catalog.
        """
        folder = Path(folder)
        has = {"items": True, "queries": bool(len(self.queries)), "qrels": bool(self.qrels),
               "clicks": self.clicks is not None}  # fmt: skip
        stays = [folder / f"{name}.{suffix}" for name, written in has.items() for suffix in ("parquet", "jsonl", "csv")
                 if not (written and suffix == "parquet")]  # fmt: skip
        for path in stays:
            if path.exists():
                raise FileExistsError(f"{path} would mix with the saved catalog; delete it or give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_table(self.items.table, folder / "items.parquet")
        if len(self.queries):
            write_table(self.queries.to_table(), folder / "queries.parquet")
        if self.qrels:
            write_table(_qrels_table(self.qrels), folder / "qrels.parquet")
        if self.clicks is not None:
            write_table(self.clicks, folder / "clicks.parquet")
        if self.metadata:
            beside = folder / "catalog.json.tmp"
            beside.write_text(json.dumps(self.metadata, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            beside.replace(folder / "catalog.json")

    def with_queries(self, queries: QuerySet) -> Catalog:
        """The same shop with these queries added; raises ValueError when an id is taken."""
        taken = set(self.queries.ids).intersection(queries.ids)
        if taken:
            raise ValueError(f"query id {min(taken)!r} is already in the catalog")
        return replace(self, queries=QuerySet([*self.queries, *queries]))


def _items_file(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; a catalog is a folder with items.parquet, .jsonl or .csv")
    file = _find(folder, ITEMS.name)
    if file is None and (folder / "corpus.jsonl").exists():
        raise FileNotFoundError(f"{folder} is a BEIR folder (corpus.jsonl), no catalog; make one of it with "
                                f"`taoemb data import beir {folder} --out CATALOG` and give that")  # fmt: skip
    if file is None:
        raise FileNotFoundError(f"{folder} holds no items.parquet, items.jsonl or items.csv")
    return file


def _checked_items(table: pa.Table, source: str) -> pa.Table:
    table = normalize_table(table, ITEMS, source)
    if table.num_rows == 0:
        raise SchemaError(source, None, "", "there are no items")
    _check_ids(table, source)
    _check_text(table, "title", source)
    _check_attributes(table, source)
    return table


def _find(folder: Path, name: str) -> Path | None:
    found = [folder / f"{name}.{suffix}" for suffix in ("parquet", "jsonl", "csv")]
    found = [path for path in found if path.exists()]
    if len(found) > 1:
        raise SchemaError(found[0].name, None, "", f"{found[1].name} is there too; keep one of them")
    return found[0] if found else None


def _json_object(text: str, source: str, row: int | None, column: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise SchemaError(source, row, column, f"not JSON ({error}): {text[:60]!r}") from None
    if not isinstance(value, dict):
        raise SchemaError(source, row, column, f"must be a JSON object, but is {text[:60]!r}")
    return value


def _check_ids(table: pa.Table, source: str) -> None:
    seen: dict[str, int] = {}
    for row, value in enumerate(table.column("id").to_pylist(), start=1):
        if not value:
            raise SchemaError(source, row, "id", "is empty; every row needs an id")
        if value in seen:
            raise SchemaError(
                source, row, "id", f"{value!r} is already the id of row {seen[value]}; ids must be unique"
            )
        seen[value] = row


def _check_text(table: pa.Table, column: str, source: str) -> None:
    for row, value in enumerate(table.column(column).to_pylist(), start=1):
        if not value or not value.strip():
            raise SchemaError(source, row, column, "is empty; remove the row or give it a text")


def _check_attributes(table: pa.Table, source: str) -> None:
    if "attributes" in table.column_names:
        for row, value in enumerate(table.column("attributes").to_pylist(), start=1):
            if value:
                _json_object(value, source, row, "attributes")


def _check_known(table: pa.Table, queries: set[str], items: set[str], source: str) -> None:
    for column, known in (("query_id", queries), ("item_id", items)):
        values = table.column(column)
        for value in values.unique().to_pylist():
            if value not in known:
                row = values.to_pylist().index(value) + 1
                what = column.split("_")[0]
                raise SchemaError(source, row, column, f"{value!r} is no {what} of this catalog ({len(known)} known)")


def _read_qrels(table: pa.Table, queries: set[str], items: set[str], source: str) -> dict[str, dict[str, int]]:
    _check_known(table, queries, items, source)
    grades: dict[str, dict[str, int]] = {}
    columns = (table.column(name).to_pylist() for name in ("query_id", "item_id", "grade"))
    for row, (query, item, grade) in enumerate(zip(*columns, strict=True), start=1):
        if grade is None or not 0 <= grade <= MAX_GRADE:
            raise SchemaError(source, row, "grade", f"{grade!r} is no grade; use 0, 1, 2 or 3 (3 is best)")
        graded = grades.setdefault(query, {})
        if graded.setdefault(item, grade) != grade:
            raise SchemaError(
                source, row, "grade", f"{query!r}, {item!r} already has grade {graded[item]}, not {grade}"
            )
    return grades


def _qrels_table(qrels: Mapping[str, Mapping[str, int]]) -> pa.Table:
    pairs = [(q, i, g) for q, graded in qrels.items() for i, g in graded.items()]
    columns = {
        "query_id": pa.array([p[0] for p in pairs], pa.string()),
        "item_id": pa.array([p[1] for p in pairs], pa.string()),
        "grade": pa.array([p[2] for p in pairs], pa.int64()),
    }
    return pa.table(columns)
