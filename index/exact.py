"""Exact search by blockwise inner products: the oracle of every recall figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from taoemb.index.results import SearchResult, as_queries, as_result, check_k, check_vectors, known_ids
from taoemb.store import EmbeddingStore
from taoemb.types import FloatArray

_BLOCK_BYTES = 256 << 20
_FEW = 16
"""Queries up to which FAISS's scan is faster on a CPU than a matrix product, which reads the memory at a third of its rate
then (benchmarks/speed.py)."""


@cache
def _faiss() -> Any:
    """The faiss module where it is installed, else None."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss


@dataclass
class ExactIndex:
    """Brute-force inner-product search over ``N`` vectors with torch, on the CPU or a GPU; on a CPU a few queries are
    scanned by FAISS where it is installed.

    Equal scores are listed in catalog order.
    """

    ids: list[str]
    vectors: FloatArray
    fingerprint: str = ""
    device: str = "cpu"

    def __post_init__(self) -> None:
        self._hold(self.ids, check_vectors(self.vectors, self.ids))

    def _hold(self, ids: list[str], vectors: FloatArray) -> None:
        self.ids, self.vectors = ids, vectors
        self._ids = np.asarray(self.ids, dtype=object)
        tensor = torch.from_numpy(self.vectors if self.vectors.flags.writeable else self.vectors.copy())
        self._vectors = tensor.to(self.device)

    @classmethod
    def build(cls, store: EmbeddingStore, device: str = "cpu") -> ExactIndex:
        """An index over an embedding store."""
        return cls(store.ids, store.vectors, store.fingerprint, device)

    def __len__(self) -> int:
        return len(self.ids)

    def search(self, vectors: npt.ArrayLike, k: int) -> SearchResult:
        """The Top-``k`` of ``B`` query vectors ``[B, D]``: ids ``[B, k]`` and scores ``[B, k]``, best first.

        Where the index holds fewer than ``k`` items, a row is padded with id "" and score -inf.
        """
        return as_result(*self.search_positions(vectors, k), self._ids, k)

    def search_positions(self, vectors: npt.ArrayLike, k: int) -> tuple[npt.NDArray[np.int64], FloatArray]:
        """Like `search` without padding and with catalog positions: ``[B, min(k, N)]`` each."""
        queries = as_queries(vectors, self.vectors.shape[1])
        k = min(check_k(k), len(self))
        rows = max(1, _BLOCK_BYTES // (4 * max(1, len(self))))
        found = [self._topk(queries[start : start + rows], k) for start in range(0, len(queries), rows)]
        if not found:
            return np.zeros((0, k), np.int64), np.zeros((0, k), np.float32)
        return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])

    def _topk(self, queries: FloatArray, k: int) -> tuple[npt.NDArray[np.int64], FloatArray]:
        faiss = _faiss() if self.device == "cpu" and len(queries) <= _FEW and k else None
        if faiss is None:
            scores = torch.from_numpy(queries).to(self.device) @ self._vectors.T
            top = torch.topk(scores, k, dim=1, sorted=True)
            values, positions = top.values.cpu().numpy(), top.indices.cpu().numpy()
        else:
            values, positions = faiss.knn(queries, self.vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
        order = np.lexsort((positions, -values), axis=1)
        return np.take_along_axis(positions, order, 1), np.take_along_axis(values, order, 1)

    def update(self, ids: Sequence[str], vectors: npt.ArrayLike) -> None:
        """Give these items the vectors ``[n, D]``; ids that are new are added at the end.

        What is found afterwards is what an index built afresh finds. Raises ValueError as `ExactIndex` does.
        """
        array = check_vectors(vectors, ids, self.vectors.shape[1])
        place = {item_id: i for i, item_id in enumerate(self.ids)}
        known = np.array([item_id in place for item_id in ids], dtype=bool)
        changed = np.array(self.vectors)  # the one in use may be a memory map, or belong to a store
        changed[[place[item_id] for item_id in ids if item_id in place]] = array[known]
        self._hold([*self.ids, *(i for i in ids if i not in place)], np.concatenate([changed, array[~known]]))

    def remove(self, ids: Sequence[str]) -> None:
        """Take items out; the others keep their order. Raises KeyError naming an id that is not there."""
        gone = known_ids(ids, self.ids)
        stay = np.array([item_id not in gone for item_id in self.ids], dtype=bool)
        self._hold([item_id for item_id in self.ids if item_id not in gone], self.vectors[stay])

    def save(self, folder: str | Path) -> None:
        """Write the vectors as an `EmbeddingStore`."""
        EmbeddingStore(self.ids, [self.vectors], self.fingerprint).save(folder)

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> ExactIndex:
        """Open a saved index, checksums verified."""
        return cls.build(EmbeddingStore.open(folder), device)
