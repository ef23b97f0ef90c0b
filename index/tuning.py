"""How much of an index must be searched to find enough: recall against exact search, on a few probe queries."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from taoemb.index.exact import ExactIndex
from taoemb.index.faiss_index import VectorIndex
from taoemb.store import EmbeddingStore, unit_rows
from taoemb.types import FloatArray

NOISE = 0.5
"""Expected length of the noise on a drawn unit vector: a cosine of about .89 to it; our choice."""
_TIE = 1e-6
_MOST = {"nprobe": 1 << 20, "efSearch": 1 << 12}
"""Search settings beyond which another index is the better idea; our choice."""


def draw_queries(store: EmbeddingStore, count: int = 1000, seed: int = 0) -> FloatArray:
    """Stand-ins for queries ``[count, D]``: unit vectors of the store plus Gaussian noise, normalised again.

    The noise has an expected length of .5, so that the cosine to the row is about .89. Real queries are better: they lie
    elsewhere than items.
    """
    rng = np.random.default_rng(seed)
    if not len(store):
        return np.zeros((0, store.dimension), np.float32)
    rows = np.sort(rng.choice(len(store), count, replace=len(store) < count))
    noise = rng.normal(0, NOISE / math.sqrt(store.dimension), (count, store.dimension))
    return unit_rows(unit_rows(store.rows(rows)) + noise)


class Truth:
    """What exact search finds for queries ``[Q, D]`` in a store, and how much of it something else finds.

    A block of the store is in memory at a time. ``positions`` are those of the exact Top-``k``, ``[Q, min(k, N)]``.
    """

    def __init__(self, store: EmbeddingStore, queries: FloatArray, k: int) -> None:
        self.queries, self._store = queries, store
        positions, scores = np.zeros((len(queries), 0), np.int64), np.zeros((len(queries), 0), np.float32)
        start = 0
        for block in store.blocks():
            found = ExactIndex([str(i) for i in range(len(block))], block).search_positions(queries, k)
            positions = np.concatenate([positions, found[0] + start], axis=1)
            scores = np.concatenate([scores, found[1]], axis=1)
            best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            positions, scores = np.take_along_axis(positions, best, 1), np.take_along_axis(scores, best, 1)
            start += len(block)
        self.positions = positions
        self._scores = np.array([self._exact(query, row) for query, row in enumerate(positions)])

    def _exact(self, query: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        return np.asarray(self._store.rows(positions).astype(np.float64) @ self.queries[query].astype(np.float64))

    def recall(self, positions: npt.NDArray[np.int64], k: int) -> float:
        """recall@k of positions ``[Q, >= k]`` (-1: nothing): the share that score no less than the exact k-th best, less 1e-6, so
        that any of several equal items is right; an item that is named twice counts once. 1 where there is nothing to find."""
        k = min(k, self.positions.shape[1])
        if not k or not len(positions):
            return 1.0
        right = 0
        for query, found in enumerate(positions[:, :k]):
            worst = np.partition(self._scores[query], -k)[-k]
            right += int((self._exact(query, np.unique(found[found >= 0])) >= worst - _TIE).sum())
        return right / (k * len(positions))


def tune(index: VectorIndex, truth: Truth, k: int, min_recall: float, *, only_deeper: bool = False) -> float:
    """Set ``nprobe`` or ``efSearch`` to the smallest power of two with a recall@k of ``min_recall``, or to the largest where none
    has it; returns the recall. ``index`` is built over the truth's store. With ``min_recall`` 0, and for other kinds of index, it is
    only measured. ``only_deeper``: never less than what is set, for queries that are easier than real ones.
    """
    recall, values = 0.0, [{}] if not index.parameters or not min_recall else _values(index)
    if only_deeper and index.parameters:
        values = [index.parameters, *(v for v in values if max(v.values()) > max(index.parameters.values()))]
    for value in values:
        index.set_parameters(**value)
        recall = truth.recall(index.search_positions(truth.queries, k)[0], k)
        if recall >= min_recall:
            break
    return recall


def _values(index: VectorIndex) -> list[dict[str, int]]:
    name = next(iter(index.parameters))
    most = min(index.lists, _MOST[name]) if name == "nprobe" else min(max(16, len(index)), _MOST[name])
    powers = [1 << power for power in range(0 if name == "nprobe" else 4, most.bit_length())]
    return [{name: value} for value in (powers if powers[-1] == most else [*powers, most])]
