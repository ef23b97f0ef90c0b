"""TREC run files: what another system found, as a channel, and what a channel finds, frozen."""

from __future__ import annotations

import gzip
import math
import re
import warnings
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from taoemb.files import write_text
from taoemb.index.channels import Channel, Int32Array, RankedChannel

if TYPE_CHECKING:
    from taoemb.catalog import Query

_NO_ITEM = "-"  # item of the one line that a run file has for a query that found nothing
_ASCII_SPACE = re.compile(r"[ \t\n\r\f\v]")  # what separates the columns of a run file


class RunChannel(RankedChannel):
    """What another system found, as texts and item ids; usually read from a TREC run file with ``RunChannel.load``.

    Args:
        name: name of the channel.
        tops: query text -> item ids, best first and each once; an empty list where the system found nothing.
        source: what an error about a query without an entry calls it; the name where it is empty.

    Asked for a query that it lacks it raises ``ValueError``: to take it as "found nothing" would make every item exclusive.

    >>> channel = RunChannel("other", {"red shoe": ["b", "a"]})
    >>> channel.ranks(["red shoe"], np.array([["a", "b", "c"]], dtype=object), n=10).tolist()
    [[2, 1, 0]]
    """

    def __init__(self, name: str, tops: Mapping[str, Sequence[str]], *, source: str = "") -> None:
        super().__init__(name)
        self._tops = {query: self._number(top) for query, top in tops.items()}
        self._source = source or f"channel {name!r}"

    @classmethod
    def load(
        cls, path: str | Path, queries: Iterable[Query], items: Iterable[str], *, name: str | None = None
    ) -> RunChannel:
        """Read a TREC run file, also gzipped (``.gz``): lines ``query_id Q0 item_id rank score tag``, in any order.

        Items are ranked by score, highest first, and equal scores by item id in descending order, as trec_eval and
        `taoemb.evaluation` do; the columns Q0, rank and tag are not read. A query that found nothing has one line with
        the item ``-``. What the catalog does not have is left out with a warning that counts it: a query is not asked
        for, and an item that is not sold cannot be shown, so that the items below it move up. A file that was cut at fewer
        items than the Top-n asked for makes more of them exclusive than are: write it as long as N.

        Args:
            path: the file.
            queries: the catalog's queries, such as ``catalog.queries``: a channel is asked by text.
            items: all item ids of the catalog, such as ``catalog.items.ids``.
            name: name of the channel; without it the file's name without its endings.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: naming file and line: not 6 columns, a score that is no finite number, an item twice for a
                query. Naming the file: no line, no query or no item of the catalog, two queries of the same text with
                other results, a damaged gzip file.
        """
        path = Path(path)
        texts = {query.id: query.text for query in queries}
        tops: dict[str, list[str]] = {}
        for query_id, top in read_run(path, texts, items).items():
            if tops.setdefault(texts[query_id], top) != top:
                raise ValueError(f"{path}: query {query_id!r} has the text {texts[query_id]!r} of another query and other "
                                 "results; a channel is asked by text, so give one of them")  # fmt: skip
        return cls(name or path.name.removesuffix(".gz").rpartition(".")[0] or path.name, tops, source=str(path))

    def _find(self, queries: list[str], n: int) -> list[Int32Array]:
        absent = [query for query in queries if query not in self._tops]
        if absent:
            raise ValueError(f"{self._source} has no entry for {len(absent)} of the queries asked for, the first is "
                             f"{absent[0]!r}; it must hold every query that is trained or compared on, and one that found "
                             f"nothing as the line `QUERY_ID Q0 {_NO_ITEM} 0 0 TAG`")  # fmt: skip
        return [self._tops[query][:n] for query in queries]


def write_run(channel: Channel, queries: Iterable[Query], n: int, path: str | Path) -> None:
    """Write a channel's Top-n of these queries as a TREC run file, which ``RunChannel.load`` reads back to the same lists.

    So a channel that may change, such as a live index, is kept for later runs. The scores are n, n - 1, ...: the ranks
    are what counts. The file is written beside and renamed.

    Raises ``ValueError`` for n < 1, an id that the format cannot hold (empty, with a space, or the item ``-``), or a path
    that ends in ``.gz``.
    """
    path, queries = Path(path), list(queries)
    if path.suffix == ".gz":
        raise ValueError(f"{path}: run files are written as text; leave out .gz and compress the file afterwards")
    tag = _ASCII_SPACE.sub("_", channel.name) or "channel"
    lines = []
    for query, top in zip(queries, channel.top([query.text for query in queries], n), strict=True):
        for place, one in enumerate((query.id, *top)):
            if not one or _ASCII_SPACE.search(one) or (place and one == _NO_ITEM):
                raise ValueError(f"query {query.id!r}: the id {one!r} cannot be written in a TREC run file (it is empty, "
                                 f"has a space, or is the item {_NO_ITEM!r}, which means that nothing was found)")  # fmt: skip
        lines += [f"{query.id} Q0 {item} {rank} {n + 1 - rank} {tag}\n" for rank, item in enumerate(top, start=1)]
        if not top:
            lines.append(f"{query.id} Q0 {_NO_ITEM} 0 0 {tag}\n")
    write_text(path, "".join(lines))


class _RunLine(NamedTuple):
    number: int
    query: bytes
    item: bytes
    score: float


def read_run(path: Path, queries: Iterable[str], items: Iterable[str]) -> dict[str, list[str]]:
    """query id -> item ids, best first, of what is known of a run file; raises as ``RunChannel.load`` says."""
    known_queries = {query.encode(): query for query in queries}
    known_items = {item.encode(): item for item in items if item != _NO_ITEM}
    query_codes: dict[bytes, int] = {}  # in order of appearance, as are the item codes
    item_codes: dict[bytes, int] = {}
    strange_queries: dict[bytes, None] = {}
    strange_items: dict[bytes, None] = {}
    numbers_L, queries_L, items_L, scores_L = array("q"), array("q"), array("q"), array("d")  # 32 bytes a line
    for line in _run_lines(path):
        if line.query not in known_queries:
            strange_queries[line.query] = None
            continue
        query = query_codes.setdefault(line.query, len(query_codes))
        if line.item in known_items:
            numbers_L.append(line.number)
            queries_L.append(query)
            items_L.append(item_codes.setdefault(line.item, len(item_codes)))
            scores_L.append(line.score)
        elif line.item != _NO_ITEM.encode():
            strange_items[line.item] = None
    _check_known(path, "queries", len(query_codes), list(strange_queries))
    _check_known(path, "items", len(item_codes), list(strange_items))

    number, query_code, item_code = (np.array(column, dtype=np.int64) for column in (numbers_L, queries_L, items_L))
    _check_once(path, number, query_code, item_code, list(query_codes), list(item_codes))
    by_id = {item: place for place, item in enumerate(sorted(item_codes))}
    place = np.array([by_id[item] for item in item_codes], dtype=np.int64)[item_code]
    order = np.lexsort((-place, -np.array(scores_L, dtype=np.float64), query_code))
    names = [known_items[item] for item in item_codes]
    starts = np.searchsorted(query_code[order], np.arange(len(query_codes) + 1)).tolist()
    ranked = item_code[order].tolist()
    return {
        known_queries[query]: [names[code] for code in ranked[starts[i] : starts[i + 1]]]
        for query, i in query_codes.items()
    }


def _run_lines(path: Path) -> Iterator[_RunLine]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; give a TREC run file")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                columns = line.split()  # bytes split at ASCII spaces alone, as trec_eval does
                if not columns:
                    continue
                if len(columns) != 6:
                    raise ValueError(f"{path}, line {number}: {len(columns)} columns; a TREC run file has 6, "
                                     "`query_id Q0 item_id rank score tag`, and ids have no spaces")  # fmt: skip
                try:
                    score = float(columns[4])
                except ValueError:
                    score = math.nan
                if not math.isfinite(score):
                    raise ValueError(f"{path}, line {number}: the score {_shown(columns[4])} is no finite number; the "
                                     "columns are `query_id Q0 item_id rank score tag`")  # fmt: skip
                yield _RunLine(number, columns[0], columns[2], score)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no whole gzip file: {error}") from error


def _check_known(path: Path, what: str, known: int, strange: list[bytes]) -> None:
    if strange and not known:
        raise ValueError(f"{path} has none of the catalog's {what} (its first is {_shown(strange[0])}); it is of another "
                         "catalog")  # fmt: skip
    if what == "queries" and not known:
        raise ValueError(f"{path} is empty; a TREC run file has lines `query_id Q0 item_id rank score tag`")
    if strange:
        warnings.warn(f"{path}: left out {len(strange)} {what} that the catalog does not have, the first is "
                      f"{_shown(strange[0])}", stacklevel=4)  # fmt: skip


def _check_once(
    path: Path,
    number: npt.NDArray[np.int64],
    query: npt.NDArray[np.int64],
    item: npt.NDArray[np.int64],
    queries: list[bytes],
    items: list[bytes],
) -> None:
    """No item twice for a query: lines are compared with the next one after sorting by query and item."""
    order = np.lexsort((number, item, query))
    again = order[1:][(np.diff(query[order]) == 0) & (np.diff(item[order]) == 0)]
    if len(again):
        line = again[np.argmin(number[again])]
        raise ValueError(f"{path}, line {number[line]}: item {_shown(items[item[line]])} comes twice for query "
                         f"{_shown(queries[query[line]])}; give each item once")  # fmt: skip


def _shown(field: bytes) -> str:
    return repr(field.decode("utf-8", "replace"))
