"""How much of an index must be searched to find enough: recall against exact search, on a few probe queries."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from taoemb.index.exact import ExactIndex
from taoemb.index.faiss_index import VectorIndex
from taoemb.index.results import overlap
from taoemb.store import EmbeddingStore, unit_rows
from taoemb.types import FloatArray

NOISE = 0.5
"""Expected length of the noise on a drawn unit vector: a cosine of about .89 to it; our choice."""
_MOST = {"nprobe": 1 << 20, "efSearch": 1 << 12}
"""Search settings beyond which another index is the better idea; our choice."""


def draw_queries(store: EmbeddingStore, count: int = 1000, seed: int = 0) -> FloatArray:
    """Stand-ins for queries ``[count, D]``: unit vectors of the store plus Gaussian noise, normalised again.

    The noise has an expected length of .5, so that the cosine to the row is about .89. Real queries are better: they lie
    elsewhere than items.
    """
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(len(store), count, replace=len(store) < count))
    noise = rng.normal(0, NOISE / math.sqrt(store.dimension), (count, store.dimension))
    return unit_rows(unit_rows(store.rows(rows)) + noise)


def exact_top(store: EmbeddingStore, queries: FloatArray, k: int) -> npt.NDArray[np.int64]:
    """Positions of the exact Top-``k`` of queries ``[B, D]``, ``[B, min(k, N)]``; a block of the store is in memory at a time."""
    positions = np.zeros((len(queries), 0), np.int64)
    scores = np.zeros((len(queries), 0), np.float32)
    start = 0
    for block in store.blocks():
        found = ExactIndex([str(i) for i in range(len(block))], block).search_positions(queries, k)
        positions = np.concatenate([positions, found[0] + start], axis=1)
        scores = np.concatenate([scores, found[1]], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        positions, scores = np.take_along_axis(positions, best, 1), np.take_along_axis(scores, best, 1)
        start += len(block)
    return positions


def tune(index: VectorIndex, queries: FloatArray, wanted: npt.NDArray[np.int64], min_recall: float) -> float:
    """Set ``nprobe`` or ``efSearch`` to the smallest power of two that finds ``min_recall`` of the positions ``wanted``
    ``[B, k]`` (`exact_top`), the largest where none does; returns the recall. Other kinds of index are only measured.
    """
    k = max(1, wanted.shape[1])
    recall, values = 0.0, [{}] if not index.parameters else _values(index)
    for value in values:
        index.set_parameters(**value)
        recall = overlap(index.search_positions(queries, k)[0], wanted)
        if recall >= min_recall:
            break
    return recall


def _values(index: VectorIndex) -> list[dict[str, int]]:
    name = next(iter(index.parameters))
    most = min(index.lists, _MOST[name]) if name == "nprobe" else min(max(16, len(index)), _MOST[name])
    powers = [1 << power for power in range(0 if name == "nprobe" else 4, most.bit_length())]
    return [{name: value} for value in (powers if powers[-1] == most else [*powers, most])]
