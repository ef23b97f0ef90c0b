"""Any systems side by side on a catalog: what takes part, what it costs, and the files of ``taoemb benchmark``."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from taoemb.catalog import Catalog, Items, ItemTemplate, QuerySet
from taoemb.comparison import METRICS, Comparison
from taoemb.encoder import Encoder
from taoemb.files import read_json, write_json
from taoemb.health import hubness
from taoemb.index.channels import BM25Channel
from taoemb.index.exact import ExactIndex
from taoemb.index.runs import RunChannel
from taoemb.report_charts import front
from taoemb.store import EmbeddingStore, StoreError, encode_corpus
from taoemb.tables import write_table
from taoemb.types import GOOD_GRADE

CURVE = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""Cut-offs of the recall curve."""
TABLE = ("ndcg@10", "recall@10", "recall@100", "recall@1000", "hit_rate@100", *METRICS[3:], "incremental_recall@100")
"""Metrics of the table: what `compare` reports, recall at more cut-offs, and what it gains beside the channels."""
COST_FIELDS = ("item_encodings", "prepare_seconds", "query_ms", "index_mb")
RRF_K = 60
"""Constant of reciprocal rank fusion; the value of its authors (Cormack et al., SIGIR 2009)."""
TIMED_QUERIES = 100
"""Queries that are timed, one at a time; our choice."""
BM25, COSTS, NO_SLICE = "bm25", "costs.json", "(no slice)"

Cost = dict[str, float | None]
"""`COST_FIELDS` -> figure, None where it is not known."""


def metrics_to(depth: int) -> tuple[str, ...]:
    """The metrics of a benchmark whose lists are this long: `TABLE` and the recall curve."""
    wanted = dict.fromkeys((*TABLE, *(f"recall@{k}" for k in CURVE)))
    return tuple(m for m in wanted if int(m.partition("@")[2]) <= depth)


# ------------------------------------------------------------------------------------------------ what takes part


@dataclass
class Systems:
    """What is compared, ready to be searched: models with their indexes, run files, BM25."""

    encoders: dict[str, tuple[Encoder, ExactIndex]] = field(default_factory=dict)
    runs: dict[str, RunChannel] = field(default_factory=dict)
    bm25: BM25Channel = field(default_factory=lambda: BM25Channel.build([], []))
    costs: dict[str, Cost] = field(default_factory=dict)
    """What was measured, where it was."""

    def tops(self, texts: Sequence[str], k: int) -> dict[str, list[list[str]]]:
        """system -> query -> ids of its Top-k, best first."""
        dense = {name: _top(*parts, texts, k) for name, parts in self.encoders.items()}
        return {BM25: self.bm25.top(texts, k), **dense, **{name: run.top(texts, k) for name, run in self.runs.items()}}


def _top(encoder: Encoder, index: ExactIndex, texts: Sequence[str], k: int) -> list[list[str]]:
    return [[item for item in row if item] for row in index.search(encoder.encode_query(texts), k)[0].tolist()]


def sources_of(systems: Sequence[str]) -> dict[str, str]:
    """Short, distinct name -> model folder, hub id or run file of each system as a user gives it.

    A run folder of ``taoemb train`` stands for its model. Where two would be called alike both keep what was given.

    Raises:
        FileNotFoundError: a name that looks like a file and is none.
        ValueError: no system, one twice, or a run folder without a model.
    """
    if not systems:
        raise ValueError("give at least one system: a model folder, a hub id, a run folder, or a TREC run file")
    given = [(one, *_name_and_source(one)) for one in systems]
    sources = [source for _, _, source in given]
    twice = [one for one, _, source in given if sources.count(source) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given twice; give each system once")
    names = [name for _, name, _ in given]
    return {
        one if name == BM25 or names.count(name) > 1 else name: source
        for (one, _, source), name in zip(given, names, strict=True)
    }


def _name_and_source(given: str) -> tuple[str, str]:
    path = Path(given)
    if path.is_file():
        return path.name.removesuffix(".gz").rpartition(".")[0] or path.name, given
    if not path.is_dir():
        if path.suffix in (".trec", ".run", ".txt", ".gz"):
            raise FileNotFoundError(
                f"{given} is no file; a system is a model folder, a hub id, a run folder, or a TREC run file"
            )
        return given, given
    if (path / "model" / "modules.json").exists():
        return path.resolve().name, str(path / "model")
    if (path / "config.yaml").exists() and not (path / "modules.json").exists():
        raise ValueError(f"{given} is a run folder without a model/; the same `taoemb train` goes on with it")
    return (path.resolve().parent if path.name == "model" else path.resolve()).name, given


def prepare(
    sources: Mapping[str, str],
    catalog: Catalog,
    queries: QuerySet,
    folder: Path | None = None,
    *,
    progress: bool = False,
) -> Systems:
    """Load and encode what `sources_of` names, and build BM25 over what the first model reads.

    With ``folder`` the encodings are kept there, and a second call uses them again; costs are measured and kept with them.

    Raises StoreError where the folder's encodings are of another catalog, and what `RunChannel` and `Encoder` raise.
    """
    systems = Systems()
    for name, source in sources.items():
        if Path(source).is_file():
            systems.runs[name] = RunChannel.load(source, catalog.queries, catalog.items.ids, name=name)
            systems.runs[name].top(queries.texts, 1)  # it must hold every query: better said before anything is encoded
    costs = _Costs(folder)
    for name, source in sources.items():
        if name not in systems.runs:
            encoder = Encoder(source)
            store = _encoded(encoder, catalog.items, folder, costs, progress)
            systems.encoders[name] = encoder, ExactIndex.build(store)
    template = next((encoder.template for encoder, _ in systems.encoders.values()), ItemTemplate())
    BM25Channel.build(["warm"], ["warm"])  # its library loads late, which is no cost of the catalog
    start = time.perf_counter()
    texts = template.texts(catalog.items)
    systems.bm25 = BM25Channel.build(catalog.items.ids, texts)
    spent = time.perf_counter() - start
    if folder is not None:
        key = f"{BM25}-{hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]}"
        if key not in costs.values:
            costs.put(key, prepare_seconds=spent)
        systems.costs = _measure(systems, queries.texts, costs, key)
    return systems


class _Costs:
    """Figures of each system, kept in a file: what is measured once stays."""

    def __init__(self, folder: Path | None) -> None:
        self._file = folder / COSTS if folder else None
        self.values: dict[str, Cost] = read_json(self._file) if self._file and self._file.exists() else {}

    def put(self, key: str, **figures: float | None) -> None:
        """Add or replace figures of a system."""
        if self._file is not None:
            self.values[key] = self.values.get(key, {}) | figures
            write_json(self._file, self.values)


def _encoded(encoder: Encoder, items: Items, folder: Path | None, costs: _Costs, progress: bool) -> EmbeddingStore:
    """The items' embeddings, in ``folder/FINGERPRINT`` where there is one; goes on after a kill and adds the times up."""
    if folder is None:
        return encode_corpus(encoder, items, progress=progress)
    key = encoder.fingerprint[:16]
    out = folder / key
    done = (out / "manifest.json").exists()
    before = costs.values[key].get("prepare_seconds") if key in costs.values else None if out.exists() else 0.0
    if not done:
        costs.put(key, prepare_seconds=None)  # what a kill leaves: nobody knows how long it was at work
    start = time.perf_counter()
    try:
        return encode_corpus(encoder, items, out, progress=progress)
    except StoreError as error:
        raise StoreError(f"{out} cannot be used for this catalog ({error}); give another --out, or delete {folder}") from None  # fmt: skip
    finally:
        if not done and before is not None:
            costs.put(key, prepare_seconds=before + time.perf_counter() - start)


def _measure(systems: Systems, texts: Sequence[str], costs: _Costs, bm25: str) -> dict[str, Cost]:
    """Cost of each system; a run file's is not known. ``bm25`` is the key of what is known of BM25."""
    if "query_ms" not in costs.values[bm25]:
        costs.put(bm25, query_ms=_query_ms(lambda text: systems.bm25.search([text], 100), texts))
    found: dict[str, Cost] = {BM25: {"item_encodings": 0, "index_mb": systems.bm25.nbytes / 1e6, **costs.values[bm25]}}
    for name, (encoder, index) in systems.encoders.items():
        key = encoder.fingerprint[:16]
        if "query_ms" not in costs.values.get(key, {}):
            encoder.forget_tokens()
            ask = partial(_ask, encoder, index)
            costs.put(key, query_ms=_query_ms(ask, texts))
        found[name] = {
            "item_encodings": len(index),
            "index_mb": len(index) * index.dimension * 4 / 1e6,
            **costs.values[key],
        }
    return found | {name: dict.fromkeys(COST_FIELDS) for name in systems.runs}


def _ask(encoder: Encoder, index: ExactIndex, text: str) -> object:
    return index.search(encoder.encode_query([text]), 100)


def _query_ms(ask: Callable[[str], object], texts: Sequence[str]) -> float:
    """Median time of one query at a time, encoding and exact search for 100 items, in milliseconds."""
    chosen = [texts[i] for i in np.unique(np.linspace(0, len(texts) - 1, TIMED_QUERIES).astype(int)).tolist()]
    ask(chosen[0])  # warm
    times = []
    for text in chosen:
        start = time.perf_counter()
        ask(text)
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times))


def fuse(lists: Iterable[Sequence[Sequence[str]]], depth: int) -> list[list[str]]:
    """Reciprocal rank fusion of several systems' lists per query: by ``sum_s 1 / (60 + rank_s)``, ties by item id.

    Source: Cormack, Clarke and Büttcher, SIGIR 2009.

    >>> fuse([[["a", "b"]], [["b", "c"]]], 2)
    [['b', 'a']]
    """
    fused = []
    for tops in zip(*lists, strict=True):
        worth: dict[str, float] = {}
        for top in tops:
            for rank, item in enumerate(top, start=1):
                worth[item] = worth.get(item, 0.0) + 1 / (RRF_K + rank)
        fused.append(sorted(worth, key=lambda item: (-worth[item], item))[:depth])
    return fused


def listed(systems: Systems, texts: Sequence[str], depth: int, fusion: bool = True) -> dict[str, list[list[str]]]:
    """system -> lists of the run files and, with ``fusion``, of BM25 fused with the first model, whose costs are their sums."""
    lists = {name: run.top(texts, depth) for name, run in systems.runs.items()}
    for model, parts in list(systems.encoders.items())[: int(fusion)]:
        name = fusion_name(model)
        lists[name] = fuse([systems.bm25.top(texts, depth), _top(*parts, texts, depth)], depth)
        both = systems.costs[BM25], systems.costs[model]
        systems.costs[name] = {f: _sum([cost.get(f) for cost in both]) for f in COST_FIELDS}
    return lists


def _sum(figures: Iterable[float | None]) -> float | None:
    known = list(figures)
    return None if None in known else sum(v for v in known if v is not None)


def fusion_name(model: str) -> str:
    """What the fusion of BM25 and a model is called."""
    return f"{BM25}+{model}"


# ------------------------------------------------------------------------------------------------------- results


def chosen_queries(catalog: Catalog, data: Path, split: str, judged: bool) -> QuerySet:
    """The queries of a split that have grades, or where a judge grades, all of them; raises ValueError where there are none."""
    usable = [q for q in catalog.queries if judged or q.id in catalog.qrels]
    ids = [q.id for q in usable if split in ("", q.split)]
    if not ids:
        have, what = sorted({q.split or "(none)" for q in usable}), "" if judged else "graded "
        raise ValueError(f"{data} has no {what}query of split {split!r}; its {what}queries are of "
                         f"{have or 'no split'}: use --split '' for all")  # fmt: skip
    return catalog.queries.select(ids=ids)


def complete_if_all_good(catalog: Catalog, queries: QuerySet) -> Catalog:
    """The catalog with its unlisted pairs as irrelevant where every listed one is good, as is usual for such labels (BEIR).

    Figures that read the graded items alone (condensed nDCG, goodrate, AUC) would call every system perfect.
    """
    if catalog.unjudged is not None or any(
        g < GOOD_GRADE for q in queries.ids for g in catalog.qrels.get(q, {}).values()
    ):
        return catalog
    return replace(catalog, metadata={**catalog.metadata, "unjudged": 0})


def headline_of(metrics: Iterable[str]) -> str:
    """The metric that systems are ranked by: condensed nDCG@10 where pairs are unjudged, else nDCG@10."""
    return "condensed_ndcg@10" if "condensed_ndcg@10" in metrics else "ndcg@10"


def best_other(comparison: Comparison, against: str) -> str:
    """The system with the best headline metric beside ``against``."""
    table = comparison.table()
    metric = headline_of(comparison.evaluations[against].per_query)
    return max((name for name in table if name != against), key=lambda name: table[name].get(metric, -1.0))


def write_results(
    comparison: Comparison,
    costs: Mapping[str, Cost],
    folder: Path,
    *,
    against: str,
    shown: str,
    meta: Mapping[str, Any],
) -> None:
    """Write ``benchmark.json`` and ``per_query.parquet``; ``shown`` is the system whose lists stand beside ``against``'s."""
    order = [BM25, *(name for name in comparison.evaluations if name != BM25)]
    table = comparison.table()
    for name in order:
        shown_items = [item for top in comparison.lists[name][0] for item in top]
        table[name]["hubness@10"] = hubness(np.unique(np.array(shown_items, dtype=object), return_counts=True)[1]) if shown_items else 0.0  # fmt: skip
    curve = [m for k in CURVE if (m := f"recall@{k}") in comparison.evaluations[BM25].per_query]
    tested = [m for m in comparison.evaluations[BM25].per_query if m in TABLE or not m.startswith("recall@")]
    tests = {
        metric: {name: test for name in order if name != against and (test := comparison.test(metric, name, against))}
        for metric in tested
    }
    objectives = [m for m in (headline_of(tested), "quality@10", "exclusive_goodrate@10") if all(m in row for row in table.values())]  # fmt: skip
    ahead = front([tuple(table[name][m] for m in objectives) for name in order])
    sizes: dict[str, int] = {}
    for query in comparison.queries:
        sizes[query.slice or NO_SLICE] = sizes.get(query.slice or NO_SLICE, 0) + 1
    slices = {
        name: comparison.evaluations[name].by_slice({q.id: q.slice or NO_SLICE for q in comparison.queries})
        for name in order
    }
    write_json(folder / "benchmark.json", {
        "kind": "benchmark", "format": 1, "order": order, "against": against, "meta": dict(meta),
        "systems": {name: {m: v for m, v in table[name].items() if m not in curve or m in TABLE} for name in order},
        "tests": {metric: found for metric, found in tests.items() if found},
        "cost": {name: {f: costs.get(name, {}).get(f) for f in COST_FIELDS} for name in order},
        "recall_curve": {name: {m.partition("@")[2]: table[name][m] for m in curve if m in table[name]} for name in order},
        "pareto": {"objectives": objectives, "front": [name for name, first in zip(order, ahead, strict=True) if first]},
        "slices": {part: {"queries": n, "systems": {name: _known(slices[name][part]) for name in order}} for part, n in sizes.items()},
        "examples": comparison.examples(against, shown),
    })  # fmt: skip
    write_table(comparison.per_query(), folder / "per_query.parquet")


def _known(row: Mapping[str, float]) -> dict[str, float]:
    return {metric: value for metric, value in row.items() if np.isfinite(value)}


def read_results(folder: Path) -> dict[str, Any]:
    """``benchmark.json`` of a folder; raises FileNotFoundError or ValueError where there is none."""
    file = folder / "benchmark.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; run `taoemb benchmark` with --out {folder} first")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raw = None
    if not isinstance(raw, dict) or raw.get("kind") != "benchmark" or raw.get("format") != 1:
        raise ValueError(f"{file} is not what `taoemb benchmark` of this version writes; run it again")
    return raw
