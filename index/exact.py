"""Exact search by blockwise inner products: the oracle of every recall figure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from taoemb.index.results import SearchResult, as_queries, as_result, check_k, check_vectors
from taoemb.store import EmbeddingStore
from taoemb.types import FloatArray

_BLOCK_BYTES = 64 << 20


@dataclass
class ExactIndex:
    """Brute-force inner-product search over ``N`` vectors with torch, on the CPU or a GPU.

    Equal scores are listed in catalog order.
    """

    ids: list[str]
    vectors: FloatArray
    fingerprint: str = ""
    device: str = "cpu"

    def __post_init__(self) -> None:
        self.vectors = check_vectors(self.vectors, self.ids)
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
        scores = torch.from_numpy(queries).to(self.device) @ self._vectors.T
        top = torch.topk(scores, k, dim=1, sorted=True)
        values, positions = top.values.cpu().numpy(), top.indices.cpu().numpy()
        order = np.lexsort((positions, -values), axis=1)
        return np.take_along_axis(positions, order, 1), np.take_along_axis(values, order, 1)

    def save(self, folder: str | Path) -> None:
        """Write the vectors as an `EmbeddingStore`."""
        EmbeddingStore(self.ids, [self.vectors], self.fingerprint).save(folder)

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> ExactIndex:
        """Open a saved index, checksums verified."""
        return cls.build(EmbeddingStore.open(folder), device)
