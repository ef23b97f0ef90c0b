"""When to stop training: a probe of graded queries, two figures that pull apart, and patience."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from taoemb.evaluation import evaluate
from taoemb.index.exact import ExactIndex
from taoemb.store import encode_corpus

if TYPE_CHECKING:
    from taoemb.catalog import Catalog, QuerySet
    from taoemb.encoder import Encoder

METRICS = ("recall@100", "goodrate@10")
"""How much is found, and how good the first ones are: training against a judge easily trades one for the other."""


def probe(encoder: Encoder, catalog: Catalog, queries: QuerySet) -> tuple[float, ...]:
    """`METRICS` of an encoder on graded queries, over the whole catalog, which is encoded for it."""
    index = ExactIndex.build(encode_corpus(encoder, catalog.items))
    ids, scores = index.search(encoder.encode_query(queries.texts), 100)
    rows = zip(queries.ids, ids.tolist(), scores.tolist(), strict=True)
    run = {query: {i: s for i, s in zip(found, values, strict=True) if i} for query, found, values in rows}
    grades = {query: catalog.qrels[query] for query in queries.ids}
    mean = evaluate(run, grades, metrics=METRICS, unjudged=catalog.unjudged).mean()
    return tuple(mean[metric] for metric in METRICS)


def dominated(point: Sequence[float], others: Iterable[Sequence[float]]) -> bool:
    """Whether one of the others is at least as good in every figure, higher being better.

    >>> dominated((0.5, 0.2), [(0.5, 0.3)]), dominated((0.5, 0.2), [(0.4, 0.3), (0.6, 0.1)])
    (True, False)
    """
    return any(all(other >= own for other, own in zip(known, point, strict=True)) for known in others)


@dataclass
class EarlyStopping:
    """Says whether a point is on the Pareto front of those before it, and when ``patience`` points in a row were not."""

    patience: int
    points: list[tuple[float, ...]] = field(default_factory=list)
    waited: int = 0

    def improves(self, point: tuple[float, ...]) -> bool:
        """Add a point, higher is better: False where an earlier one is at least as good in every figure."""
        improves = not dominated(point, self.points)
        self.points.append(point)
        self.waited = 0 if improves else self.waited + 1
        return improves

    @property
    def over(self) -> bool:
        """Whether patience has run out."""
        return self.waited >= self.patience
