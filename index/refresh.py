"""How an index is made, opened again, and kept in step with an encoder that changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from taoemb.files import read_json
from taoemb.index.exact import ExactIndex
from taoemb.index.faiss_index import VectorIndex
from taoemb.store import EmbeddingStore

AnyIndex: TypeAlias = ExactIndex | VectorIndex


def build_index(store: EmbeddingStore, factory: str = "Flat", device: str = "cpu") -> AnyIndex:
    """An index by factory string: ``Flat`` is exact search (no faiss needed), anything else is FAISS, built so that it
    comes out the same every time."""
    if factory == "Flat":
        return ExactIndex.build(store, device)
    return VectorIndex.build(store, factory, deterministic=True)


def load_index(folder: str | Path, device: str = "cpu") -> AnyIndex:
    """Open what `build_index` made and its ``save`` wrote; raises ValueError naming a missing or corrupt file."""
    file = Path(folder) / "manifest.json"
    if not file.exists():
        raise ValueError(f"{folder} is no saved index (no manifest.json)")
    if "factory" in read_json(file):
        return VectorIndex.load(folder)
    return ExactIndex.load(folder, device)


def overlap(stale: np.ndarray, fresh: np.ndarray) -> float:
    """overlap@K: the share of the fresh Top-K positions ``[B, K]`` that the stale Top-K holds too.

    A position of -1 is an empty place and counts on neither side; without any fresh position it is 1.
    """
    found = fresh >= 0
    shared = [np.isin(b[b >= 0], a).sum() for a, b in zip(stale, fresh, strict=True)]
    return float(np.sum(shared) / found.sum()) if found.any() else 1.0


@dataclass
class IndexRefresher:
    """Re-encodes and rebuilds an index every so many steps.

    ``encode`` gives the catalog's embeddings by the encoder of this moment, ``build`` makes the index; the new one is
    complete before it takes the old one's place. ``every=0`` never refreshes.
    """

    encode: Callable[[], EmbeddingStore]
    build: Callable[[EmbeddingStore], AnyIndex]
    every: int
    index: AnyIndex
    built_at: int = 0

    def refresh_if_due(self, step: int) -> bool:
        """Refresh when ``every`` steps have passed since the last time; returns whether it did."""
        if not self.every or step - self.built_at < self.every:
            return False
        self.index = self.build(self.encode())
        self.built_at = step
        return True
