"""Exact search by blockwise inner products: the oracle of every recall figure."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from taoemb.index.results import SearchResult, as_queries, as_result, check_k, check_unique, check_vectors, known_ids
from taoemb.store import EmbeddingStore
from taoemb.types import FloatArray

_BLOCK_BYTES = 256 << 20
"""Scores that are held at a time; a GPU holds eight times as many."""
_ROWS = 2048
"""Half-precision vectors that a CPU makes float32 at a time: few enough to stay in its cache."""
_FEW = 16
"""Queries up to which FAISS's scan is faster on a CPU than a matrix product, which reads the memory at a third of its rate
then (benchmarks/speed.py)."""
_SPARE = 32
"""Candidates beyond ``2 k`` that a GPU's half-precision scores hand on to float32."""
ExactType = Literal["float32", "float16", "bfloat16"]


@cache
def _faiss() -> Any:
    """The faiss module where it is installed, else None."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss


class ExactIndex:
    """Brute-force inner-product search over ``N`` vectors with torch, on the CPU or a GPU; on a CPU a few queries are
    scanned by FAISS where it is installed.

    Args:
        ids: one per vector.
        vectors: ``[N, D]``; float32 on a CPU is searched where it lies, also in a memory map.
        fingerprint: of the encoder that made the vectors.
        device: torch device.
        dtype: numbers in which the vectors are held. ``float16`` and ``bfloat16`` halve the memory, and on a GPU the time
            of a scan; scores are float32 inner products with the vectors so rounded. On a GPU the product is rounded too and
            proposes twice as many as are asked for; with ``bfloat16`` and a large ``k`` that misses a few.

    Equal scores are listed in catalog order. Raises ValueError for unfit ids or vectors.
    """

    def __init__(
        self,
        ids: list[str],
        vectors: npt.ArrayLike,
        fingerprint: str = "",
        device: str = "cpu",
        dtype: ExactType = "float32",
    ) -> None:
        if dtype not in get_args(ExactType):
            raise ValueError(f"dtype={dtype!r}: give one of {', '.join(get_args(ExactType))}")
        self.fingerprint, self.device, self.dtype = fingerprint, device, dtype
        self._hold(ids, _tensor(check_vectors(vectors, ids)))

    def _hold(self, ids: list[str], vectors: Tensor) -> None:
        self.ids, self._ids = ids, np.asarray(ids, dtype=object)
        self._vectors = vectors.to(self.device, getattr(torch, self.dtype))

    @classmethod
    def build(cls, store: EmbeddingStore, device: str = "cpu", dtype: ExactType = "float32") -> ExactIndex:
        """An index over an embedding store; beside it a block of the store is in memory at a time."""
        if device == "cpu" and dtype == store.dtype == "float32" and len(store.shards) <= 1:
            return cls(store.ids, store.vectors, store.fingerprint)
        index = cls([], np.zeros((0, store.dimension)), store.fingerprint, device, dtype)
        check_unique(store.ids)
        vectors = torch.empty(len(store), store.dimension, dtype=getattr(torch, dtype), device=device)
        start = 0
        for block in store.blocks():
            stop = start + len(block)
            vectors[start:stop] = _tensor(check_vectors(block, store.ids[start:stop]))
            start = stop
        index._hold(store.ids, vectors)
        return index

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dimension(self) -> int:
        """Number of dimensions ``D``."""
        return int(self._vectors.shape[1])

    @property
    def vectors(self) -> FloatArray:
        """The vectors as float32 ``[N, D]``: the memory they lie in where that is float32 on the CPU, else a copy."""
        vectors: FloatArray = self._vectors.float().cpu().numpy()
        return vectors

    def search(self, vectors: npt.ArrayLike, k: int) -> SearchResult:
        """The Top-``k`` of ``B`` query vectors ``[B, D]``: ids ``[B, k]`` and scores ``[B, k]``, best first.

        Where the index holds fewer than ``k`` items, a row is padded with id "" and score -inf.
        """
        return as_result(*self.search_positions(vectors, k), self._ids, k)

    def search_positions(self, vectors: npt.ArrayLike, k: int) -> tuple[npt.NDArray[np.int64], FloatArray]:
        """Like `search` without padding and with catalog positions: ``[B, min(k, N)]`` each."""
        queries = as_queries(vectors, self.dimension)
        k = min(check_k(k), len(self))
        block = _BLOCK_BYTES if self.device == "cpu" else 8 * _BLOCK_BYTES
        width = (
            len(self)
            if self.dtype == "float32" or self.device == "cpu"
            else max(len(self), self.dimension * (2 * k + _SPARE))
        )
        rows = max(1, block // (4 * max(1, width)))
        found = [self._topk(queries[start : start + rows], k) for start in range(0, len(queries), rows)]
        if not found:
            return np.zeros((0, k), np.int64), np.zeros((0, k), np.float32)
        return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])

    def _topk(self, queries: FloatArray, k: int) -> tuple[npt.NDArray[np.int64], FloatArray]:
        few = self.device == "cpu" and self.dtype == "float32" and len(queries) <= _FEW
        faiss = _faiss() if few and k else None
        if faiss is None:
            top = self._best(torch.from_numpy(queries).to(self.device), k)
            values, positions = top[0].cpu().numpy(), top[1].cpu().numpy()
        else:
            values, positions = faiss.knn(queries, self.vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
        order = np.lexsort((positions, -values), axis=1)
        return np.take_along_axis(positions, order, 1), np.take_along_axis(values, order, 1)

    def _best(self, queries_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores and positions ``[B, k]`` of the best, with torch."""
        if self.dtype == "float32":
            return torch.topk(queries_BD @ self._vectors.T, k, dim=1)
        if self._vectors.device.type == "cpu":  # a CPU multiplies in half precision hundreds of times slower
            scores_BN = torch.empty(len(queries_BD), len(self))
            for start in range(0, len(self), _ROWS):
                block = self._vectors[start : start + _ROWS].float()
                torch.mm(queries_BD, block.T, out=scores_BN[:, start : start + len(block)])
            return torch.topk(scores_BN, k, dim=1)
        return self._best_of_half(queries_BD, k)

    def _best_of_half(self, queries_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """A product in half precision rounds the scores too, so that it proposes and float32 decides."""
        rough_BN = queries_BD.to(self._vectors.dtype) @ self._vectors.T
        places = torch.topk(rough_BN, min(len(self), 2 * k + _SPARE), dim=1).indices
        scores = torch.einsum("bd,bcd->bc", queries_BD, self._vectors[places].float())
        best = torch.topk(scores, k, dim=1)
        return best.values, places.gather(1, best.indices)

    def update(self, ids: Sequence[str], vectors: npt.ArrayLike) -> None:
        """Give these items the vectors ``[n, D]``; ids that are new are added at the end.

        What is found afterwards is what an index built afresh finds. Raises ValueError as `ExactIndex` does.
        """
        array = torch.from_numpy(check_vectors(vectors, ids, self.dimension)).to(self._vectors)
        place = {item_id: i for i, item_id in enumerate(self.ids)}
        known = torch.tensor([item_id in place for item_id in ids], dtype=torch.bool)
        changed = self._vectors.clone()  # the one in use may be a memory map, or belong to a store
        changed[[place[item_id] for item_id in ids if item_id in place]] = array[known]
        self._hold([*self.ids, *(i for i in ids if i not in place)], torch.cat([changed, array[~known]]))

    def remove(self, ids: Sequence[str]) -> None:
        """Take items out; the others keep their order. Raises KeyError naming an id that is not there."""
        gone = known_ids(ids, self.ids)
        stay = torch.tensor([item_id not in gone for item_id in self.ids], dtype=torch.bool)
        self._hold([item_id for item_id in self.ids if item_id not in gone], self._vectors[stay])

    def save(self, folder: str | Path) -> None:
        """Write the vectors as an `EmbeddingStore`, in float32."""
        EmbeddingStore(self.ids, [self.vectors], self.fingerprint).save(folder)

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu", dtype: ExactType = "float32") -> ExactIndex:
        """Open a saved index, checksums verified."""
        return cls.build(EmbeddingStore.open(folder), device, dtype)


def _tensor(vectors: FloatArray) -> Tensor:
    """A tensor over the same memory, which nobody writes to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(vectors)
