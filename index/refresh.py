"""How an index is made, opened again, and kept in step with an encoder that changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from taoemb.files import read_manifest
from taoemb.index.exact import ExactIndex
from taoemb.index.faiss_index import VectorIndex, auto_factory
from taoemb.store import EmbeddingStore
from taoemb.types import FloatArray

AnyIndex: TypeAlias = ExactIndex | VectorIndex
Positions: TypeAlias = npt.NDArray[np.int64]
Encode: TypeAlias = Callable[[Positions], FloatArray]
RefreshMode = Literal["full", "touched", "rolling", "procrustes"]
_CELLS, _CELL_SIZE = 256, 64
"""Groups of the catalog whose drift is estimated apart: at most so many, of about so many items; our choice."""
_BLOCK = 65_536


def build_index(store: EmbeddingStore, factory: str = "Flat", device: str = "cpu") -> AnyIndex:
    """An index by factory string: ``Flat`` is exact search (no faiss needed), anything else is FAISS, built so that it
    comes out the same every time; ``auto`` chooses (`auto_factory`)."""
    if factory == "auto":
        factory, _ = auto_factory(len(store), store.dimension)
    if factory == "Flat":
        return ExactIndex.build(store, device)
    return VectorIndex.build(store, factory, deterministic=True)


def load_index(folder: str | Path, device: str = "cpu") -> AnyIndex:
    """Open what `build_index` made and its ``save`` wrote; raises ValueError naming a missing or corrupt file."""
    file = Path(folder) / "manifest.json"
    if not file.exists():
        raise ValueError(f"{folder} is no saved index (no manifest.json)")
    if "factory" in read_manifest(file):
        return VectorIndex.load(folder)
    return ExactIndex.load(folder, device)


def overlap(stale: np.ndarray, fresh: np.ndarray) -> float:
    """overlap@K: the share of the fresh Top-K positions ``[B, K]`` that the stale Top-K holds too.

    A position of -1 is an empty place and counts on neither side; without any fresh position it is 1.
    """
    found = fresh >= 0
    shared = [np.isin(b[b >= 0], a).sum() for a, b in zip(stale, fresh, strict=True)]
    return float(np.sum(shared) / found.sum()) if found.any() else 1.0


@dataclass(frozen=True)
class RefreshConfig:
    """How the index follows the encoder. R-GRPO refreshes all of it and says no more; the rest is ours."""

    mode: RefreshMode = "full"
    """``full`` re-encodes everything. ``touched`` takes the vectors that training made anyway and encodes nothing.
    ``rolling`` does that and re-encodes ``share`` of the catalog, first what is retrieved often and has drifted most.
    ``procrustes`` does both and turns the vectors that were not re-encoded by the rotation that fits the others."""
    steps: int = 100
    """Steps between refreshes; 0 never refreshes."""
    share: float = 0.1
    """Share of the catalog that ``rolling`` and ``procrustes`` re-encode at a refresh."""
    asynchronous: bool = False
    """Encode in the background from a copy of the encoder; training goes on with the old index until the new one is
    ready. What a step retrieves then depends on the machine's speed, so that a resumed run need not repeat itself."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(RefreshMode):
            raise ValueError(f"mode={self.mode!r}: give one of {', '.join(get_args(RefreshMode))}")
        if self.steps < 0:
            raise ValueError(f"steps={self.steps}: give 0 (never) or more")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: give a share of the catalog, more than 0 and at most 1")


class IndexRefresher:
    """Owns when and how an index follows a changing encoder.

    Args:
        encoder: gives the encoder of this moment: a function from catalog positions to their vectors ``[n, D]``. In
            asynchronous mode it is called in the training thread and what it gives in another one, so that it must hand
            out a copy.
        build: makes an index of a store; the new index is complete before it takes the old one's place.
        store: the catalog's vectors by the encoder at the start.
        config: mode, interval and share.
    """

    def __init__(
        self,
        encoder: Callable[[], Encode],
        build: Callable[[EmbeddingStore], AnyIndex],
        store: EmbeddingStore,
        config: RefreshConfig | None = None,
    ) -> None:
        self.config = config or RefreshConfig()
        self._encoder, self._build, self._ids = encoder, build, store.ids
        self._indexed_ND: FloatArray = np.ascontiguousarray(store.vectors)
        self._encoded_at_N = np.zeros(len(store), dtype=np.int64)
        self._hits_N = np.zeros(len(store), dtype=np.int64)
        self._cell_N = _cells(self._indexed_ND)
        self._touched: dict[int, FloatArray] = {}
        self._worker: ThreadPoolExecutor | None = None
        self._running: Future[_Refreshed] | None = None
        self.index = build(self._store(self._indexed_ND))
        self.started_at = self.built_at = 0
        self.encoded = 0
        """Vectors that refreshes have encoded so far."""

    def __len__(self) -> int:
        return len(self._ids)

    def touch(self, positions: Positions, vectors: FloatArray) -> None:
        """Vectors that training has just made of the items at ``positions``; mode ``full`` has no use for them."""
        if self.config.mode != "full":
            self._touched.update(zip(positions.tolist(), vectors, strict=True))

    def note_retrieved(self, positions: Positions) -> None:
        """Count items as retrieved: what is retrieved often is re-encoded first."""
        if self.config.mode in ("rolling", "procrustes"):
            self._hits_N += np.bincount(positions.ravel(), minlength=len(self))

    def refresh_if_due(self, step: int) -> bool:
        """Refresh when ``steps`` have passed since the last one began; returns whether a new index is in place."""
        if self._running is not None:
            if not self._running.done():
                return False
            done, self._running = self._running, None
            self._publish(done.result())
            return True
        if not self.config.steps or step - self.started_at < self.config.steps:
            return False
        work = partial(self._refreshed, step, self._encoder(), self._choose(step), self._touched)
        if not self.config.asynchronous:
            self._publish(work())
            self.started_at, self._touched = step, {}
            return True
        self._worker = self._worker or ThreadPoolExecutor(1, "taoemb-refresh")
        self._running = self._worker.submit(work)
        self.started_at, self._touched = step, {}
        return False

    def close(self) -> None:
        """Wait for a refresh in the background and throw it away."""
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)

    def age(self, step: int) -> float:
        """Mean number of steps since the vectors in the index were encoded."""
        return float(step - self._encoded_at_N.mean()) if len(self) else 0.0

    def forecast(self, steps: int, full_seconds: float) -> str:
        """One line on what the refreshes of ``steps`` steps will cost, where encoding everything takes ``full_seconds``."""
        config = self.config
        if not config.steps or steps <= config.steps:
            return f"index: no refresh in {steps:,} steps"
        times = (steps - 1) // config.steps
        share = {"full": 1.0, "touched": 0.0}.get(config.mode, config.share)
        seconds = share * full_seconds
        return (f"index: {config.mode} refresh every {config.steps} steps, {times} times, {share:.0%} of {len(self):,} items "
                f"encoded each time, about {seconds:.1f} s, {times * seconds:.0f} s in all")  # fmt: skip

    def state(self) -> dict[str, np.ndarray]:
        """All that a resumed run needs; see `restore`."""
        touched = np.array(sorted(self._touched), dtype=np.int64)
        vectors = [self._touched[i] for i in touched.tolist()]
        return {
            "indexed": self._indexed_ND,
            "encoded_at": self._encoded_at_N,
            "hits": self._hits_N,
            "touched": touched,
            "touched_vectors": np.array(vectors, np.float32).reshape(len(touched), self._indexed_ND.shape[1]),
            "counters": np.array([self.started_at, self.built_at, self.encoded]),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from what `state` gave; the index is built again from its vectors."""
        self._indexed_ND, self._encoded_at_N, self._hits_N = (state[k] for k in ("indexed", "encoded_at", "hits"))
        self._touched = dict(zip(state["touched"].tolist(), state["touched_vectors"], strict=True))
        self.started_at, self.built_at, self.encoded = state["counters"].tolist()
        self.index = self._build(self._store(self._indexed_ND))

    # -- one refresh ---------------------------------------------------------------------------------------------------

    def _choose(self, step: int) -> Positions:
        """Positions to re-encode."""
        if self.config.mode == "full":
            return np.arange(len(self))
        if self.config.mode == "touched":
            return np.zeros(0, np.int64)
        count = min(len(self), max(1, round(self.config.share * len(self))))
        age_N = step - self._encoded_at_N
        drift_N = self._drift_of_cells()[self._cell_N] * age_N
        priority_N = (1.0 + self._hits_N) * drift_N
        priority_N[list(self._touched)] = -1.0  # they are fresh
        return np.sort(np.argpartition(-priority_N, count - 1)[:count])

    def _drift_of_cells(self) -> FloatArray:
        """Mean ``1 - cosine`` between the indexed and the touched vectors per cell; the mean of all where none is known."""
        cells = np.full(int(self._cell_N.max(initial=0)) + 1, 1.0, np.float32)
        if self._touched:
            rows = np.array(list(self._touched))
            moved = 1.0 - (self._indexed_ND[rows] * np.array(list(self._touched.values()))).sum(1)
            known = np.bincount(self._cell_N[rows], minlength=len(cells))
            summed = np.bincount(self._cell_N[rows], moved, len(cells))
            cells = np.where(known > 0, summed / np.maximum(known, 1), moved.mean()).astype(np.float32)
        return np.maximum(cells, 1e-6)

    def _refreshed(self, step: int, encode: Encode, chosen: Positions, touched: Mapping[int, FloatArray]) -> _Refreshed:
        vectors_ND, encoded_at_N = self._indexed_ND.copy(), self._encoded_at_N.copy()
        if touched:
            rows = np.array(list(touched))
            vectors_ND[rows], encoded_at_N[rows] = np.array(list(touched.values())), step
        if len(chosen):
            vectors_ND[chosen], encoded_at_N[chosen] = encode(chosen), step
        if self.config.mode == "procrustes":
            fresh_N = encoded_at_N == step
            vectors_ND[~fresh_N] = vectors_ND[~fresh_N] @ rotation(self._indexed_ND[fresh_N], vectors_ND[fresh_N])
        return _Refreshed(step, self._build(self._store(vectors_ND)), vectors_ND, encoded_at_N, len(chosen))

    def _publish(self, refreshed: _Refreshed) -> None:
        self._hits_N //= 2  # what was hot once cools down
        self._indexed_ND, self._encoded_at_N = refreshed.vectors_ND, refreshed.encoded_at_N
        self.index, self.built_at = refreshed.index, refreshed.step
        self.encoded += refreshed.encoded

    def _store(self, vectors_ND: FloatArray) -> EmbeddingStore:
        return EmbeddingStore(self._ids, [vectors_ND], "")


@dataclass(frozen=True)
class _Refreshed:
    """What a refresh has made: an index, and its vectors with the step that each was encoded at."""

    step: int
    index: AnyIndex
    vectors_ND: FloatArray
    encoded_at_N: Positions
    encoded: int


def rotation(old_ND: FloatArray, new_ND: FloatArray) -> FloatArray:
    """The orthogonal ``R`` [D, D] that minimises ``|| old R - new ||`` (orthogonal Procrustes; Schönemann, 1966).

    With fewer rows than dimensions the rest of the space is free, and ``R`` leaves it as near as it can to where it was.

    >>> turn = np.array([[0.0, 1.0], [-1.0, 0.0]], dtype=np.float32)
    >>> np.allclose(rotation(np.eye(2, dtype=np.float32), turn), turn, atol=1e-2)
    True
    """
    covariance = old_ND.T.astype(np.float64) @ new_ND
    ridge = 1e-3 * np.trace(old_ND.T @ old_ND) / max(1, len(covariance))
    left, _, right = np.linalg.svd(covariance + ridge * np.eye(len(covariance)))
    return np.asarray(left @ right, dtype=np.float32)


def _cells(vectors_ND: FloatArray) -> Positions:
    """Cell of every vector: the nearest of some of the vectors themselves, spread evenly over the catalog."""
    count = min(_CELLS, -(-len(vectors_ND) // _CELL_SIZE))
    if not count:
        return np.zeros(0, np.int64)
    centres = vectors_ND[np.linspace(0, len(vectors_ND) - 1, count).astype(int)]
    blocks = [vectors_ND[i : i + _BLOCK] @ centres.T for i in range(0, len(vectors_ND), _BLOCK)]
    return np.concatenate([block.argmax(1) for block in blocks])
