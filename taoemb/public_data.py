"""Public relevance sets that you have as files, read into a `Catalog` in their published formats.

========= ================================= ============================== ==========================================
format    set                               queries and splits             grades 3 / 2 / 1 / 0
========= ================================= ============================== ==========================================
esci      Amazon Shopping Queries           as published (train, test)     Exact / Substitute / Complement / Irrelevant
wands     Wayfair Annotation Dataset        all test                       Exact / none / Partial / Irrelevant
homedepot Home Depot, Kaggle 2016           80 / 10 / 10 % by query (ours) mean relevance from 2.6 / 2.2 / 1.5 / 1 (ours)
beir      any folder in the format of BEIR  train, dev = validation, test  by the highest score of the set, or yours
========= ================================= ============================== ==========================================

All of them are pools: a pair without a grade is unknown (``unjudged`` is None), also where the publishers count it as
irrelevant. Everything stays in arrow columns, but for attributes that are lists of pairs. The texts are as published.
An item without a title gets its description as title, and without that its id; none is left out, because the corpus
is part of the task. Left out: downloads, and columns that nothing here reads (``query_class`` of WANDS).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from taoemb.catalog import Catalog
from taoemb.tables import SchemaError, TableSpec, normalize_table, read_delimited, read_table
from taoemb.types import MAX_GRADE

__all__ = ["KIND", "READERS", "read_beir", "read_esci", "read_homedepot", "read_wands"]

KIND = "imported catalog"
"""``kind`` in the ``catalog.json`` of what is read here."""
Column: TypeAlias = "pa.ChunkedArray"

ESCI_GRADES = {"E": 3, "S": 2, "C": 1, "I": 0}
WANDS_GRADES = {"Exact": 3, "Partial": 1, "Irrelevant": 0}
HOMEDEPOT_BOUNDS = (1.5, 2.2, 2.6)
"""Mean relevance from which a pair has grade 1, 2, 3."""
BEIR_GRADES = {0: {0: 0}, 1: {0: 0, 1: 3}, 2: {0: 0, 1: 1, 2: 3}, 3: {0: 0, 1: 1, 2: 2, 3: 3}}
"""Highest score of the set -> score -> grade."""
BEIR_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
PRIOR_RATINGS = 10.0
"""So many ratings at the mean of the shop are added to those of an item (`read_wands`)."""


def _texts(*names: str) -> dict[str, pa.DataType]:
    return dict.fromkeys(names, pa.string())


EXAMPLES = TableSpec("examples", {
    **_texts("query", "query_id", "product_id", "product_locale", "esci_label", "split"),
    "small_version": pa.int64(), "large_version": pa.int64()}, {})  # fmt: skip
PRODUCTS = TableSpec("products", _texts(
    "product_id", "product_title", "product_description", "product_bullet_point", "product_brand", "product_color",
    "product_locale"), {})  # fmt: skip
WANDS_PRODUCT = TableSpec("product", {
    **_texts("product_id", "product_name", "product_class", "category hierarchy", "product_description",
             "product_features"),
    "rating_count": pa.float64(), "average_rating": pa.float64(), "review_count": pa.float64()}, {})  # fmt: skip
WANDS_QUERY = TableSpec("query", _texts("query_id", "query"), {})
WANDS_LABEL = TableSpec("label", _texts("query_id", "product_id", "label"), {})
TRAIN = TableSpec("train", {
    **_texts("product_uid", "product_title", "search_term"), "relevance": pa.float64()}, {})  # fmt: skip
TITLES = TableSpec("test", _texts("product_uid", "product_title"), {})
DESCRIPTIONS = TableSpec("product_descriptions", _texts("product_uid", "product_description"), {})
ATTRIBUTES = TableSpec("attributes", _texts("product_uid", "name", "value"), {})
CORPUS = TableSpec("corpus", _texts("_id", "text"), _texts("title"))
BEIR_QUERIES = TableSpec("queries", _texts("_id", "text"), {})
BEIR_QRELS = TableSpec("qrels", {**_texts("query-id", "corpus-id"), "score": pa.int64()}, {})


def read_esci(folder: str | Path, locale: str = "us", version: str = "small") -> Catalog:
    """Amazon ESCI, the Shopping Queries Dataset (Reddy et al., arXiv:2206.06588; github.com/amazon-science/esci-data).

    The queries of a locale with their published split; ``version`` is the published reduced set of harder queries
    (``small``, the set of its ranking task) or all (``large``). The items are all products of the locale, of both
    versions, judged or not: search runs over the full corpus. The published ranking task is another one, to order the
    judged products of each query, with gains of 1, .1, .01 and 0; its figures are not comparable. Published are two
    splits; nothing is cut off train for validation. Bullet points stand before the description, the colour is an
    attribute.

    Raises FileNotFoundError for a missing file, ValueError for an unknown version or locale and SchemaError for rows
    that are not in the format.
    """
    if version not in ("small", "large"):
        raise ValueError(f"version={version!r}: use small or large")
    source = "the folder shopping_queries_dataset of github.com/amazon-science/esci-data"
    file = _file(folder, "shopping_queries_dataset_examples.parquet", source)
    corpus = _file(folder, "shopping_queries_dataset_products.parquet", source)
    examples = pa.concat_tables(_parquet_parts(file, EXAMPLES))
    grades = _mapped(examples, "esci_label", ESCI_GRADES, file.name)
    _check(
        examples, "split", pc.is_in(examples["split"], pa.array(["train", "test"])), "is none of train, test", file.name
    )
    _check_text(examples, "query", file.name)
    _check_constant(examples, "query_id", "query", file.name)
    _check_constant(examples, "query_id", "split", file.name)
    _check_one_grade(examples.append_column("grade", grades), ("query_id", "product_id"), "esci_label", file.name)
    locales = examples["product_locale"].unique().to_pylist()
    if locale not in locales:
        raise ValueError(f"locale={locale!r}: {file.name} has {', '.join(map(str, locales))}")
    wanted = pc.and_(pc.equal(examples["product_locale"], locale), pc.equal(examples[f"{version}_version"], 1))
    wanted = pc.fill_null(wanted, False)
    items = _esci_items(corpus, locale)
    known = pc.is_in(examples["product_id"], items["id"].combine_chunks())
    _check(examples, "product_id", pc.or_(pc.invert(wanted), known),
           f"is no product of locale {locale} in {corpus.name}; get both files of the same release", file.name)  # fmt: skip
    chosen = examples.append_column("grade", grades).filter(wanted)
    queries = chosen.take(_first_rows(chosen["query_id"]))
    return _catalog(
        items,
        {"id": queries["query_id"], "query": queries["query"], "split": queries["split"]},
        {"query_id": chosen["query_id"], "item_id": chosen["product_id"], "grade": chosen["grade"]},
        {"name": "esci", "locale": locale, "version": version},
    )


def _esci_items(path: Path, locale: str) -> pa.Table:
    """The products of a locale, made in parts: with all at once there are several copies of gigabytes of text."""
    parts = []
    for products in _parquet_parts(path, PRODUCTS):
        products = products.filter(pc.equal(products["product_locale"], locale))
        description = _joined(products["product_bullet_point"], products["product_description"])
        columns = _items(products["product_id"], products["product_title"], description)
        columns["brand"] = _text(products["product_brand"])
        columns["attributes"] = _one_attribute("color", products["product_color"])
        parts.append(pa.table(columns))
    items = pa.concat_tables(parts)
    _check_unique(pa.table({"product_id": items["id"]}), "product_id", f"{path.name} (rows of locale {locale})")
    return items


def read_wands(folder: str | Path) -> Catalog:
    """WANDS, the Wayfair Annotation Dataset (Chen et al., ECIR 2022; github.com/wayfair/WANDS, folder ``dataset``).

    It has no splits: all queries are ``test``. ``Partial`` is grade 1, not good: it is what most judged pairs have
    (63 %). Of two labels of a pair the lower one counts. ``product_features`` become attributes, several values of a
    name joined. Numeric columns ``average_rating``, ``rating_count``, ``review_count`` are kept, and make ``quality``
    (our choice): the mean rating, ``PRIOR_RATINGS`` ratings at the mean of the shop added, over 5.

    Raises FileNotFoundError for a missing file and SchemaError for rows that are not in the format.
    """
    source = "the folder dataset of github.com/wayfair/WANDS"
    specs = {f"{spec.name}.csv": spec for spec in (WANDS_PRODUCT, WANDS_QUERY, WANDS_LABEL)}
    products, queries, labels = (
        normalize_table(read_delimited(_file(folder, name, source), "\t"), spec, name) for name, spec in specs.items()
    )
    _check_unique(products, "product_id", "product.csv")
    _check_unique(queries, "query_id", "query.csv")
    _check_text(queries, "query", "query.csv")
    for table, column, name in ((queries, "query_id", "query.csv"), (products, "product_id", "product.csv")):
        known = pc.is_in(labels[column], table[column].combine_chunks())
        _check(labels, column, known, f"is not in {name}; get the files of the same release", "label.csv")
    in_scale = pc.and_(pc.greater_equal(products["average_rating"], 0), pc.less_equal(products["average_rating"], 5))
    _check(products, "average_rating", pc.fill_null(in_scale, True), "is no rating of 0 to 5", "product.csv")
    paths = _text(products["category hierarchy"])
    items = _items(products["product_id"], products["product_name"], products["product_description"]) | {
        "category": pc.if_else(pc.equal(paths, ""), _text(products["product_class"]), paths),
        "attributes": pa.array([_features(text) for text in _text(products["product_features"]).to_pylist()]),
        "quality": _quality(products["average_rating"], products["rating_count"]),
        **{name: products[name] for name in ("average_rating", "rating_count", "review_count")},
    }
    graded = labels.append_column("grade", _mapped(labels, "label", WANDS_GRADES, "label.csv"))
    pairs = graded.group_by(["query_id", "product_id"], use_threads=False).aggregate([("grade", "min")])
    return _catalog(
        items,
        {"id": queries["query_id"], "query": queries["query"], "split": pa.array(["test"] * queries.num_rows)},
        {"query_id": pairs["query_id"], "item_id": pairs["product_id"], "grade": pairs["grade_min"]},
        {"name": "wands"},
    )


def read_homedepot(folder: str | Path) -> Catalog:
    """Home Depot product search relevance (Kaggle 2016): train.csv, product_descriptions.csv, and where they are there
    attributes.csv and test.csv (whose grades are not published; it has the titles of other products).

    The files are Latin-1. Relevance is a mean of raters between 1 (irrelevant) and 3 (perfect); of repeated pairs the
    mean is taken. The rest is our choice: grade 3 from 2.6 (most raters say perfect), 2 from 2.2 (some do), 1 from 1.5
    (partially relevant), else 0; the split by a hash of the query's words in lower case, 80 % train, 10 % validation, 10 %
    test; query ids are hashes of the query too. "MFG Brand Name" is the brand, attributes named Bullet01 and so on
    stand behind the description.

    Raises FileNotFoundError for a missing file and SchemaError for rows that are not in the format.
    """
    source = "the unpacked files of kaggle.com/c/home-depot-product-search-relevance"
    train = _read_latin(_file(folder, "train.csv", source), TRAIN)
    texts = _read_latin(_file(folder, "product_descriptions.csv", source), DESCRIPTIONS)
    _check_unique(texts, "product_uid", "product_descriptions.csv")
    _check_filled(train, "product_uid", "train.csv")
    _check_text(train, "search_term", "train.csv")
    in_scale = pc.and_(pc.greater_equal(train["relevance"], 1), pc.less_equal(train["relevance"], 3))
    _check(train, "relevance", in_scale, "is no relevance of 1 to 3", "train.csv")
    titles = [train.select(["product_uid", "product_title"])]
    if (Path(folder) / "test.csv").exists():
        titles.append(_read_latin(Path(folder) / "test.csv", TITLES))
        _check_filled(titles[1], "product_uid", "test.csv")
    titled = pa.concat_tables(titles)
    ids = pa.chunked_array([*texts["product_uid"].chunks, *titled["product_uid"].chunks]).unique()
    brands, points, attributes = _homedepot_attributes(Path(folder) / "attributes.csv", ids)
    description = _looked_up(ids, texts["product_uid"], texts["product_description"])
    title = _looked_up(ids, titled["product_uid"], titled["product_title"])
    items = _items(ids, title, _joined(description, points)) | {"brand": brands, "attributes": attributes}
    terms = pc.utf8_trim_whitespace(train["search_term"])
    query_ids = {term: hashlib.sha256(term.encode()).hexdigest()[:12] for term in terms.unique().to_pylist()}
    pairs = pa.table({"query_id": _looked_up(terms, list(query_ids), list(query_ids.values())),
                      "item_id": train["product_uid"], "relevance": train["relevance"]})  # fmt: skip
    pairs = pairs.group_by(["query_id", "item_id"], use_threads=False).aggregate([("relevance", "mean")])
    grades = np.digitize(np.round(pairs["relevance_mean"].to_numpy(), 6), HOMEDEPOT_BOUNDS)
    return _catalog(
        items,
        {"id": list(query_ids.values()), "query": list(query_ids), "split": list(map(_split, query_ids))},
        {"query_id": pairs["query_id"], "item_id": pairs["item_id"], "grade": grades},
        {"name": "homedepot"},
    )


def read_beir(folder: str | Path, grades: Mapping[int, int] | None = None) -> Catalog:
    """A folder in the format of BEIR (Thakur et al., NeurIPS 2021): corpus.jsonl, queries.jsonl and in ``qrels`` some of
    train.tsv, dev.tsv and test.tsv. Queries without a row in them have no split.

    ``grades`` says which grade a score has. Without it the highest score of the three files decides: of 3 the scores are
    the grades; of 2 they become 3 and 1 for 2 and 1; of 1 (relevant or not) 3 for 1.

    Raises FileNotFoundError for a missing file, ValueError for grades outside 0 to 3 and SchemaError for rows that are
    not in the format, other scores, and a query of two splits.
    """
    if grades is not None and not all(grade in range(MAX_GRADE + 1) for grade in grades.values()):
        raise ValueError(f"grades={dict(grades)!r}: give scores grades of 0 to {MAX_GRADE}")
    source = "a folder with corpus.jsonl, queries.jsonl and qrels/test.tsv"
    corpus = _read_jsonl(_file(folder, "corpus.jsonl", source), CORPUS)
    queries = _read_jsonl(_file(folder, "queries.jsonl", source), BEIR_QUERIES)
    _check_unique(corpus, "_id", "corpus.jsonl")
    _check_unique(queries, "_id", "queries.jsonl")
    _check_text(queries, "text", "queries.jsonl")
    tables = _beir_qrels(Path(folder) / "qrels", source)
    top = max((pc.max(table["score"]).as_py() or 0 for table in tables.values()), default=0)
    mapping = BEIR_GRADES.get(top, BEIR_GRADES[MAX_GRADE]) if grades is None else dict(grades)
    splits: dict[str, str] = {}
    parts = []
    for name, table in tables.items():
        file = f"qrels/{name}.tsv"
        for column, ids in (("query-id", queries["_id"]), ("corpus-id", corpus["_id"])):
            other = "queries.jsonl" if column == "query-id" else "corpus.jsonl"
            _check(table, column, pc.is_in(table[column], ids.combine_chunks()),
                   f"is not in {other}; add it there or remove the row", file)  # fmt: skip
        earlier = pc.is_in(table["query-id"], pa.array(list(splits), pa.string()))
        _check(table, "query-id", pc.invert(earlier), "is in another file of qrels too; a query has one split", file)
        splits.update(dict.fromkeys(table["query-id"].unique().to_pylist(), BEIR_SPLITS[name]))
        remedy = "; say which grade each score has, such as --grades 1=1,2=2,3=3,4=3"
        table = table.append_column("grade", _mapped(table, "score", mapping, file, remedy))
        _check_one_grade(table, ("query-id", "corpus-id"), "score", file)
        parts.append(table)
    pairs = pa.concat_tables(parts)
    title = corpus["title"] if "title" in corpus.column_names else pa.nulls(corpus.num_rows, pa.string())
    return _catalog(
        _items(corpus["_id"], title, corpus["text"]),
        {"id": queries["_id"], "query": queries["text"],
         "split": [splits.get(query, "") for query in queries["_id"].to_pylist()]},
        {"query_id": pairs["query-id"], "item_id": pairs["corpus-id"], "grade": pairs["grade"]},
        {"name": "beir", "grades": {str(score): grade for score, grade in mapping.items()}},
    )  # fmt: skip


READERS: Mapping[str, Callable[..., Catalog]] = {
    "esci": read_esci,
    "wands": read_wands,
    "homedepot": read_homedepot,
    "beir": read_beir,
}
"""Format -> its reader."""


def _catalog(
    items: Mapping[str, Any] | pa.Table, queries: Mapping[str, Any], qrels: Mapping[str, Any], metadata: dict[str, Any]
) -> Catalog:
    return Catalog.from_tables(
        items if isinstance(items, pa.Table) else pa.table(dict(items)),
        pa.table(dict(queries)),
        pa.table(dict(qrels)),
        metadata={"kind": KIND, "unjudged": None, **metadata},
    )


# Files ----------------------------------------------------------------------------------------------------------------


def _file(folder: str | Path, name: str, source: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; give {source}")
    return path


def _parquet_parts(path: Path, spec: TableSpec) -> Iterator[pa.Table]:
    """A parquet file in parts of at most 65,536 rows; the first one is empty, and says that all columns are there."""
    names = list(spec.columns)
    try:
        file = pq.ParquetFile(path)
        yield normalize_table(file.schema_arrow.empty_table(), spec, path.name).select(names)
        for batch in file.iter_batches(columns=names):
            yield normalize_table(pa.Table.from_batches([batch]), spec, path.name).select(names)
    except (pa.ArrowInvalid, OSError) as error:
        raise SchemaError(path.name, None, "", f"is not a readable parquet file: {error}") from None


def _read_latin(path: Path, spec: TableSpec) -> pa.Table:
    return normalize_table(read_delimited(path, encoding="latin-1"), spec, path.name)


def _read_jsonl(path: Path, spec: TableSpec) -> pa.Table:
    """Without Python objects where every line is as it should be; else line by line, which names the one that is not."""
    parse = pa_json.ParseOptions(explicit_schema=pa.schema(spec.columns), unexpected_field_behavior="ignore")
    try:
        table = pa_json.read_json(path, pa_json.ReadOptions(block_size=1 << 26), parse)
        columns = {name: table[name].cast(pa.binary()).cast(pa.string()) for name in table.column_names}  # is it UTF-8?
    except pa.ArrowInvalid:
        return normalize_table(read_table(path, spec), spec, path.name)
    return pa.table(columns)


def _beir_qrels(folder: Path, source: str) -> dict[str, pa.Table]:
    """Split -> its table."""
    files = {path.stem: path for path in sorted(folder.glob("*.tsv"))}
    if not files:
        raise FileNotFoundError(f"{folder} holds no train.tsv, dev.tsv or test.tsv; give {source}")
    for name in files:
        if name not in BEIR_SPLITS:
            raise ValueError(f"{files[name]} is none of train.tsv, dev.tsv, test.tsv; rename it or take it away")
    return {
        name: normalize_table(read_delimited(files[name], "\t"), BEIR_QRELS, f"qrels/{name}.tsv")
        for name in BEIR_SPLITS
        if name in files
    }


# Checks: each names the first row that fails --------------------------------------------------------------------------


def _check(table: pa.Table, column: str, good: Any, problem: str, source: str) -> None:
    """``good``: a bool for each row; an empty one is bad."""
    bad = np.flatnonzero(~np.asarray(pc.fill_null(good, False)))
    if len(bad):
        row = int(bad[0])
        raise SchemaError(source, row + 1, column, f"{table[column][row].as_py()!r} {problem}")


def _check_text(table: pa.Table, column: str, source: str) -> None:
    good = pc.not_equal(_text(table[column]), "")
    _check(table, column, good, "is empty; remove the row or give it a text", source)


def _check_filled(table: pa.Table, column: str, source: str) -> None:
    _check(table, column, pc.not_equal(pc.fill_null(table[column], ""), ""), "is empty; every row needs one", source)


def _check_unique(table: pa.Table, column: str, source: str) -> None:
    _check_filled(table, column, source)
    good = np.zeros(table.num_rows, dtype=bool)
    good[_first_rows(table[column])] = True
    _check(table, column, pa.array(good), "is in an earlier row too; ids must be unique", source)


def _check_constant(table: pa.Table, key: str, column: str, source: str) -> None:
    """The same value in every row of a key."""
    _check_filled(table, key, source)
    codes = _codes(table[key])
    first = table[column].take(_first_rows(table[key])[codes])
    _check(table, column, pc.equal(first, table[column]), f"is not what an earlier row of the same {key} has", source)


def _check_one_grade(table: pa.Table, pair: tuple[str, str], column: str, source: str) -> None:
    """No pair with two grades in the column ``grade``, which comes from ``column``."""
    for name in pair:
        _check_filled(table, name, source)
    codes = _codes(table[pair[0]]).astype(np.int64) * table.num_rows + _codes(table[pair[1]])
    first, inverse = np.unique(codes, return_index=True, return_inverse=True)[1:]
    grades = table["grade"].to_numpy()
    same = pa.array(grades == grades[first[inverse]])
    _check(table, column, same, "is not what an earlier row of the same pair has; keep one of them", source)


def _mapped(table: pa.Table, column: str, mapping: Mapping[Any, int], source: str, remedy: str = "") -> pa.Array:
    """The grade of every row; SchemaError where the value has none."""
    index = pc.index_in(table[column], pa.array(list(mapping), table[column].type))
    _check(table, column, pc.is_valid(index), f"is none of {', '.join(map(str, mapping))}{remedy}", source)
    return pa.array(list(mapping.values()), pa.int64()).take(_flat(index))


# Columns --------------------------------------------------------------------------------------------------------------


def _flat(column: Any) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _text(column: Any) -> Any:
    """The same without None and white space around."""
    return pc.utf8_trim_whitespace(pc.fill_null(column, ""))


def _codes(column: Column) -> npt.NDArray[np.int64]:
    """A number for each value, by the order of their first rows."""
    codes = pc.dictionary_encode(column)
    return np.asarray(_flat(codes).indices, dtype=np.int64)


def _first_rows(column: Column) -> npt.NDArray[np.int64]:
    """The first row of each value, in file order."""
    return np.unique(_codes(column), return_index=True)[1].astype(np.int64)


def _looked_up(values: Any, keys: Any, answers: Any) -> pa.Array:
    """The answer for each value: that of the first equal key, None without one."""
    keys, answers = (pa.array(c) if isinstance(c, list) else _flat(c) for c in (keys, answers))
    return answers.take(_flat(pc.index_in(values, keys)))


def _joined(first: Any, second: Any) -> Any:
    return pc.utf8_trim_whitespace(pc.binary_join_element_wise(_text(first), _text(second), "\n"))


def _items(ids: Any, title: Any, description: Any) -> dict[str, Any]:
    """The columns id, title and description, with a title everywhere."""
    title, description = _text(title), _text(description)
    untitled, empty = pc.equal(title, ""), pc.equal(description, "")
    return {
        "id": ids,
        "title": pc.if_else(untitled, pc.if_else(empty, ids, description), title),
        "description": pc.if_else(untitled, "", description),
    }


def _one_attribute(name: str, column: Column) -> pa.Array:
    """JSON objects with one attribute; each value is written once."""
    codes, values = _codes(_text(column)), _text(column).unique().to_pylist()
    written = [json.dumps({name: value}) if value else None for value in values]
    return pa.array(written, pa.string()).take(pa.array(codes))


def _features(text: str) -> str | None:
    """``name : value|name:value`` as JSON.

    >>> _features("color : red|color : blue|height:3| : wood|loose words")
    '{"color": "red, blue", "height": "3"}'
    """
    found: dict[str, dict[str, None]] = {}
    for part in text.split("|"):
        name, _, value = (piece.strip() for piece in part.partition(":"))
        if name and value:
            found.setdefault(name, {})[value] = None
    return json.dumps({name: ", ".join(values) for name, values in found.items()}) if found else None


def _quality(rating: Column, count: Column) -> npt.NDArray[np.float64]:
    """Mean ratings in [0, 1], those with few ratings near the mean of all."""
    counts = pc.if_else(pc.is_valid(rating), count, 0.0)
    ratings, counts = (pc.fill_null(c, 0.0).to_numpy() for c in (rating, counts))
    mean = (ratings * counts).sum() / counts.sum() if counts.sum() else 0.0
    quality: npt.NDArray[np.float64] = (ratings * counts + PRIOR_RATINGS * mean) / (counts + PRIOR_RATINGS) / 5
    return quality


def _homedepot_attributes(path: Path, ids: pa.Array) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Brand, bullet points and other attributes (JSON) of each id; None where there is none."""
    brands: dict[str, str] = {}
    points: dict[str, list[str]] = {}
    others: dict[str, dict[str, str]] = {}
    if path.exists():
        table = _read_latin(path, ATTRIBUTES)
        columns = (_text(table[name]).to_pylist() for name in ("product_uid", "name", "value"))
        for item, name, value in zip(*columns, strict=True):
            if not (item and name and value):  # the published file has such rows
                continue
            if name == "MFG Brand Name":
                brands.setdefault(item, value)
            elif name.lower().startswith("bullet"):
                points.setdefault(item, []).append(value)
            else:
                others.setdefault(item, {}).setdefault(name, value)
    order = ids.to_pylist()
    return (
        pa.array([brands.get(i) for i in order], pa.string()),
        pa.array(["\n".join(points[i]) if i in points else None for i in order], pa.string()),
        pa.array([json.dumps(others[i]) if i in others else None for i in order], pa.string()),
    )


def _split(query: str) -> str:
    """Train, validation or test by the words of a query alone: the same in every run."""
    words = " ".join(query.lower().split())
    place = int(hashlib.sha256(words.encode()).hexdigest()[:8], 16) / 16**8
    return "train" if place < 0.8 else "validation" if place < 0.9 else "test"
