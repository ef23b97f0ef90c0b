"""Systems side by side on the same test queries: metrics, significance, examples; what ``metrics.json`` holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from taoemb.catalog import Catalog, QuerySet
from taoemb.encoder import Encoder
from taoemb.evaluation import Evaluation, evaluate, paired_bootstrap
from taoemb.files import write_json
from taoemb.index.channels import BM25Channel, Channel, ranked_channels
from taoemb.index.exact import ExactIndex
from taoemb.index.results import SearchResult
from taoemb.tables import write_table
from taoemb.types import FloatArray

DEPTH = 100
"""Ranks of a run that are evaluated."""
METRICS = (
    "ndcg@10", "recall@100", "hit_rate@100", "mrr@10", "goodrate@10", "quality@10", "good_quality@10", "overlap@10",
    "exclusive_goodrate@10",
)  # fmt: skip
OURS, BASELINE = "retrieval_grpo", "stage1"
EXAMPLES = 12

Lists = tuple[list[list[str]], list[list[float]]]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: an evaluation, and the Top-10 with scores, per system."""

    catalog: Catalog
    queries: QuerySet
    evaluations: dict[str, Evaluation]
    lists: dict[str, Lists]
    channel_top: dict[str, set[str]]
    """query id -> items that the Top-N of any channel holds."""
    quality: dict[str, float]

    def table(self) -> dict[str, dict[str, float]]:
        """system -> metric -> mean over the queries that have it; a metric that no query has is left out."""
        means = {name: evaluation.mean() for name, evaluation in self.evaluations.items()}
        return {name: {m: v for m, v in row.items() if np.isfinite(v)} for name, row in means.items()}

    def tests(self) -> dict[str, dict[str, dict[str, float]]]:
        """metric -> other system -> paired bootstrap of Retrieval-GRPO against it."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for metric in self.evaluations[OURS].per_query if OURS in self.evaluations else ():
            for name in self.evaluations:
                if name != OURS and (test := self.test(metric, OURS, name)):
                    found.setdefault(metric, {})[name] = test
        return found

    def test(self, metric: str, a: str, b: str) -> dict[str, float] | None:
        """Paired bootstrap of system ``a`` against ``b``; None where fewer than two queries have a value in both."""
        values, others = (self.evaluations[name].per_query[metric] for name in (a, b))
        if (np.isfinite(values) & np.isfinite(others)).sum() < 2:
            return None
        test = paired_bootstrap(values, others)
        return {
            "difference": test.difference,
            "ci_low": test.ci_low,
            "ci_high": test.ci_high,
            "p_value": test.p_value,
        }

    def text(self, phases: Mapping[str, Mapping[str, float]] | None = None) -> str:
        """The table as plain text, with the significance of Retrieval-GRPO's lead where it takes part."""
        table = self.table()
        metrics = list(dict.fromkeys(m for row in table.values() for m in row))
        width = max(len(name) for name in table)
        lines = [" ".join([" " * width, *metrics, *(["item encodings"] if phases else [])])]
        for name, row in table.items():
            cells = [f"{row[m]:{len(m)}.3f}" if m in row else " " * (len(m) - 1) + "-" for m in metrics]
            if phases:
                cells.append(f"{int(phases.get(name, {}).get('item_encodings', 0)):14,d}")
            lines.append(" ".join([name.ljust(width), *cells]))
        for metric, others in self.tests().items() if OURS in table else ():
            if metric.split("@")[0] in ("ndcg", "condensed_ndcg", "goodrate"):
                found = [f"{o} {t['difference']:+.3f} ({_p(t['p_value'])})" for o, t in others.items()]
                lines.append(f"{OURS} against, {metric}: " + ", ".join(found))
        return "\n".join(lines)

    def save(self, run_dir: Path, meta: Mapping[str, Any], phases: Mapping[str, Mapping[str, float]]) -> None:
        """Write ``per_query.parquet``, ``examples.json`` and ``metrics.json`` into a run folder."""
        write_table(self.per_query(), run_dir / "per_query.parquet")
        write_json(run_dir / "examples.json", self.examples())
        metrics = {
            "systems": self.table(),
            "tests": self.tests(),
            "item_encodings": {name: int(values["item_encodings"]) for name, values in phases.items()},
            "seconds": {name: round(values["seconds"], 1) for name, values in phases.items()},
            "meta": dict(meta),
        }
        write_json(run_dir / "metrics.json", metrics)

    def per_query(self) -> pa.Table:
        """A row per system and query: ``system``, ``query_id``, ``slice`` and every metric, null where it has no meaning."""
        slices = [query.slice for query in self.queries]
        rows: dict[str, list[Any]] = {"system": [], "query_id": [], "slice": []}
        for name, evaluation in self.evaluations.items():
            rows["system"] += [name] * len(evaluation.query_ids)
            rows["query_id"] += evaluation.query_ids
            rows["slice"] += slices
            for metric, values in evaluation.per_query.items():
                rows.setdefault(metric, []).extend(None if np.isnan(v) else v for v in values.tolist())
        return pa.table(rows)

    def examples(self, before: str = BASELINE, after: str = OURS) -> list[dict[str, Any]]:
        """Two systems' lists of a dozen queries: each slice's in turn, spread over gains and losses of nDCG@10."""
        worth = [self.evaluations[system].per_query["ndcg@10"] for system in (before, after)]
        gain = np.nan_to_num(worth[1] - worth[0])
        by_slice: dict[str, list[int]] = {}
        for i in np.argsort(-gain, kind="stable").tolist():
            by_slice.setdefault(self.queries[i].slice, []).append(i)
        share = max(1, EXAMPLES // len(by_slice))
        chosen: list[int] = []
        for places in by_slice.values():
            spread = np.linspace(0, len(places) - 1, min(share, len(places))).round().astype(int)
            chosen += [places[s] for s in dict.fromkeys(spread.tolist())]
        return [
            {
                "query_id": self.queries[i].id,
                "query": self.queries[i].text,
                "slice": self.queries[i].slice,
                "before": self._example(before, i),
                "after": self._example(after, i),
            }
            for i in chosen[:EXAMPLES]
        ]

    def _example(self, system: str, i: int) -> dict[str, Any]:
        query = self.queries[i]
        ids, scores = self.lists[system][0][i], self.lists[system][1][i]
        grades, items = self.catalog.qrels.get(query.id, {}), self.catalog.items
        known = self.channel_top[query.id]
        ndcg = float(self.evaluations[system].per_query["ndcg@10"][i])
        return {
            "system": system,
            "ndcg@10": None if np.isnan(ndcg) else ndcg,
            "items": [
                {
                    "id": item_id,
                    "title": items[int(items.positions([item_id])[0])].title,
                    "grade": grades.get(item_id, self.catalog.unjudged),
                    "score": round(score, 4),
                    "quality": self.quality.get(item_id),
                    "in_channel": item_id in known,
                }
                for item_id, score in zip(ids, scores, strict=True)
            ],
        }


def _p(value: float) -> str:
    """Below what the number of resamples can tell, no figure.

    >>> _p(1 / 10_001), _p(0.0213)
    ('p<.0001', 'p=0.021')
    """
    return "p<.0001" if value < 1e-4 else f"p={value:.2g}"


def compare(
    catalog: Catalog,
    queries: QuerySet,
    encoders: Mapping[str, tuple[Encoder, ExactIndex]],
    bm25: BM25Channel | None,
    *,
    channels: Sequence[Channel],
    quality_N: npt.NDArray[np.float64],
    top_n: int,
    runs: Mapping[str, Sequence[Sequence[str]]] | None = None,
    metrics: Sequence[str] = METRICS,
    depth: int = DEPTH,
) -> Comparison:
    """Search the test queries with every system by exact search and evaluate the runs against the catalog's grades.

    Where most pairs are unjudged the plain figures favour the system that filled the pool: ``judged@10``,
    ``condensed_ndcg@10`` and ``auc`` are reported too. ``channels`` are the recall channels for overlap (several: with any,
    and with each) and exclusive good rate, with their Top-``top_n``. ``runs`` are further systems: item ids per query, best
    first; what they do not list has score 0 in the AUC. ``depth`` ranks of each system are evaluated.

    Raises ValueError for no channel, two of the same name, or one that cannot answer for a query.
    """
    pooled = catalog.unjudged is None
    metrics = (*metrics, "judged@10") if pooled else metrics
    tops = {
        name: dict(zip(queries.ids, channel.top(queries.texts, top_n), strict=True))
        for name, channel in ranked_channels(channels).items()
    }
    quality = {i: float(q) for i, q in zip(catalog.items.ids, quality_N, strict=True) if np.isfinite(q)}
    grades = {query: catalog.qrels.get(query, {}) for query in queries.ids}
    places = [catalog.items.positions(list(graded)) for graded in grades.values()]
    evaluations: dict[str, Evaluation] = {}
    lists: dict[str, Lists] = {}

    def add(name: str, found: SearchResult, graded_scores: Iterable[FloatArray], floor: float) -> None:
        rows = zip(queries.ids, found[0].tolist(), found[1].tolist(), strict=True)
        run = {query: {i: s for i, s in zip(ids, scores, strict=True) if i} for query, ids, scores in rows}
        lists[name] = [list(run[q])[:10] for q in queries.ids], [list(run[q].values())[:10] for q in queries.ids]
        result = evaluate(
            run,
            grades,
            metrics=metrics,
            unjudged=catalog.unjudged,
            quality=quality,
            channels=tops,
            queries=queries.ids,
        )
        if pooled:  # these read the graded items alone, however far down they are
            pool = {
                q: dict(zip(grades[q], s.tolist(), strict=True)) for q, s in zip(grades, graded_scores, strict=True)
            }
            ranked = {q: {i: s for i, s in scores.items() if s > floor} for q, scores in pool.items()}
            for metric, whole in (("condensed_ndcg@10", ranked), ("auc", pool)):
                more = evaluate(whole, grades, metrics=[metric], unjudged=None, queries=queries.ids)
                result.per_query[metric] = more.per_query[metric]
        evaluations[name] = result

    if bm25 is not None:  # an item without a common term has score 0: it is no result, and below all others in the AUC
        rows = zip(queries.texts, places, strict=True)
        add("bm25", bm25.search(queries.texts, depth), (bm25.scores(text, graded) for text, graded in rows), 0.0)
    for name, (encoder, index) in encoders.items():
        query_QD = encoder.encode_query(queries.texts)
        scores = (index.vectors[graded] @ vector for vector, graded in zip(query_QD, places, strict=True))
        add(name, index.search(query_QD, depth), scores, -np.inf)
    for name, tops_Q in (runs or {}).items():
        ids, ranks = _padded(tops_Q, depth)
        worth = (
            {item: score for item, score in zip(*row, strict=True) if item}
            for row in zip(ids.tolist(), ranks.tolist(), strict=True)
        )
        listed = (
            np.array([of.get(i, 0.0) for i in graded], np.float32)
            for of, graded in zip(worth, grades.values(), strict=True)
        )
        add(name, (ids, ranks), listed, 0.0)
    found = {query: {item for top in tops.values() for item in top[query]} for query in queries.ids}
    return Comparison(catalog, queries, evaluations, lists, found, quality)


def _padded(tops: Sequence[Sequence[str]], depth: int) -> SearchResult:
    """Lists of items as a search result, with scores that fall from the number of ranks to 1."""
    ids = np.full((len(tops), depth), "", dtype=object)
    scores = np.full((len(tops), depth), -np.inf, dtype=np.float32)
    for row, top in enumerate(tops):
        found = list(top[:depth])
        ids[row, : len(found)] = found
        scores[row, : len(found)] = depth - np.arange(len(found))
    return ids, scores
