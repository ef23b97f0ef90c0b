"""How an index is made, opened again, and kept in step with an encoder that changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from taoemb.files import read_manifest
from taoemb.index.exact import ExactIndex
from taoemb.index.faiss_index import VectorIndex, auto_factory
from taoemb.index.results import overlap
from taoemb.index.tuning import Truth, tune
from taoemb.store import EmbeddingStore
from taoemb.types import FloatArray

AnyIndex: TypeAlias = ExactIndex | VectorIndex
Positions: TypeAlias = npt.NDArray[np.int64]
Encode: TypeAlias = Callable[[Positions], FloatArray]
RefreshMode = Literal["full", "touched", "rolling", "procrustes"]
_CELLS, _CELL_SIZE = 256, 64
"""Groups of the catalog whose drift is estimated apart: at most so many, of about so many items; our choice."""
_BLOCK = 65_536
_LOOKS, _DEPTH = 64, 4
"""Probe queries of a look at staleness, and how many times K candidates of each are encoded once more; our choice."""
_SHOWN = 16_384
"""Items that a refresh encodes between two moves of its bar."""


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


@dataclass(frozen=True)
class RefreshConfig:
    """How the index follows the encoder. R-GRPO refreshes all of it and says no more; the rest is ours."""

    mode: RefreshMode = "full"
    """``full`` re-encodes everything. ``touched`` takes the vectors that training made anyway and encodes nothing.
    ``rolling`` does that and re-encodes ``share`` of the catalog, first what is retrieved often and has drifted most.
    ``procrustes`` does both and turns the vectors that were not re-encoded by the rotation that fits the others."""
    steps: int = 100
    """Steps between refreshes; 0: never because of their number."""
    share: float = 0.1
    """Share of the catalog that ``rolling`` and ``procrustes`` re-encode at a refresh."""
    asynchronous: bool = False
    """Encode in the background from a copy of the encoder; training goes on with the old index until the new one is
    ready, but waits for one that is not ready when the next is due. What a step retrieves then depends on the machine's
    speed, so that a resumed run need not repeat itself."""
    probe_steps: int = 0
    """Steps between looks at how stale the index is: the candidates of a few probe queries are encoded once more. 0: none."""
    min_overlap: float = 0.9
    """Where a look finds less overlap@K of the index's Top-K with the re-encoded one, the index is refreshed at once."""
    min_recall: float = 0.95
    """Share of the exact Top-K that an approximate index must find for the probe queries: as many lists or nodes are searched
    as that takes, and an index that cannot does not replace the one before it. 0: FAISS is left as it is built."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(RefreshMode):
            raise ValueError(f"mode={self.mode!r}: give one of {', '.join(get_args(RefreshMode))}")
        if self.steps < 0:
            raise ValueError(f"steps={self.steps}: give 0 (never) or more")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: give a share of the catalog, more than 0 and at most 1")
        if self.probe_steps < 0:
            raise ValueError(f"probe_steps={self.probe_steps}: give 0 (never) or more")
        for name in ("min_overlap", "min_recall"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 0 to 1")


class IndexRefresher:
    """Owns when and how an index follows a changing encoder.

    Args:
        encoder: gives the encoder of this moment: a function from catalog positions to their vectors ``[n, D]``. In
            asynchronous mode it is called in the training thread and what it gives in another one, so that it must hand
            out a copy.
        build: makes an index of a store; the new index is complete before it takes the old one's place.
        store: the catalog's vectors by the encoder at the start.
        config: when and how.
        probe: gives the vectors ``[Q, D]`` of some queries by the encoder of this moment; without it nothing is measured, and
            neither ``probe_steps`` nor ``min_recall`` has an effect.
        k: K of overlap@K and of the recall.
        progress: show a bar while a refresh encodes.

    Raises ValueError when the first index finds less than ``min_recall``.
    """

    def __init__(
        self,
        encoder: Callable[[], Encode],
        build: Callable[[EmbeddingStore], AnyIndex],
        store: EmbeddingStore,
        config: RefreshConfig | None = None,
        *,
        probe: Callable[[], FloatArray] | None = None,
        k: int = 10,
        progress: bool = False,
    ) -> None:
        self.config = config or RefreshConfig()
        self._encoder, self._build, self._ids, self._probe = encoder, build, store.ids, probe
        self._k, self._progress = min(k, max(1, len(store))), progress
        self._indexed_ND: FloatArray = np.ascontiguousarray(store.vectors)
        self._encoded_at_N = np.zeros(len(store), dtype=np.int64)
        self._hits_N = np.zeros(len(store), dtype=np.int64)
        self._cell_N = _cells(self._indexed_ND)
        self._touched: dict[int, FloatArray] = {}
        self._handed: dict[int, FloatArray] = {}  # what a refresh that is not published yet has taken
        self._worker: ThreadPoolExecutor | None = None
        self._running: Future[_Refreshed] | None = None
        self.index, self.recall = self._made(self._indexed_ND, None if probe is None else probe())
        """The index in use, and its recall@K on the probe queries: 1 for exact search, NaN where it is not measured."""
        if self.recall < self.config.min_recall:
            raise ValueError(f"the index finds {self.recall:.1%} of the exact Top-{self._k}, less than min_recall="
                             f"{self.config.min_recall}; use another factory string, such as Flat")  # fmt: skip
        self.started_at = self.built_at = self.probed_at = self.refreshes = 0
        self.encoded = 0
        """Vectors that refreshes and looks at staleness have encoded so far."""
        self.overlap = self.drift = float("nan")
        """overlap@K when it was last measured, of the index then in use; mean ``1 - cosine`` of the vectors last touched to
        those in the index."""

    def __len__(self) -> int:
        return len(self._ids)

    def touch(self, positions: Positions, vectors: FloatArray) -> None:
        """Vectors that training has just made of the items at ``positions``; mode ``full`` only measures drift by them."""
        if len(positions):
            self.drift = float(1.0 - (self._indexed_ND[positions] * vectors).sum(1).mean())
        if self.config.mode != "full":
            self._touched.update(zip(positions.tolist(), vectors, strict=True))

    def note_retrieved(self, positions: Positions) -> None:
        """Count items as retrieved: what is retrieved often is re-encoded first."""
        if self.config.mode in ("rolling", "procrustes"):
            self._hits_N += np.bincount(positions.ravel(), minlength=len(self))

    def refresh_if_due(self, step: int) -> bool:
        """Refresh when ``steps`` have passed since the last one began, or the index has become too stale; returns whether a
        new index is in place."""
        if self._running is not None:
            late = self.config.steps and step - self.started_at >= self.config.steps
            if not self._running.done() and not late:
                return False
            done, self._running = self._running, None
            return self._publish(done.result())
        due = bool(self.config.steps) and step - self.started_at >= self.config.steps
        if not due and not self._too_stale(step):
            return False
        queries = None if self._probe is None else self._probe()
        work = partial(self._refreshed, step, self._encoder(), self._choose(step), self._touched, queries)
        if self.config.asynchronous:
            self._worker = self._worker or ThreadPoolExecutor(1, "taoemb-refresh")
            self._running = self._worker.submit(work)
            self.started_at, self._handed, self._touched = step, self._touched, {}
            return False
        refreshed = work()
        self.started_at, self._handed, self._touched = step, self._touched, {}
        return self._publish(refreshed)

    def _too_stale(self, step: int) -> bool:
        """Every ``probe_steps``: the candidates of some probe queries, encoded once more, say whether the Top-K has changed."""
        if not self.config.probe_steps or self._probe is None:
            return False
        if step - max(self.probed_at, self.built_at) < self.config.probe_steps:
            return False
        self.probed_at = step
        queries = self._probe()[:_LOOKS]
        proposed = self.index.search_positions(queries, _DEPTH * self._k)[0]
        positions = np.unique(proposed[proposed >= 0])
        vectors = self._encoder()(positions)
        self.encoded += len(positions)
        self.touch(positions, vectors)
        best = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, : self._k]
        self.overlap = overlap(proposed[:, : self._k], positions[best])
        return self.overlap < self.config.min_overlap

    @property
    def refreshing(self) -> bool:
        """Whether a refresh runs in the background at this moment."""
        return self._running is not None and not self._running.done()

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
        looks = f", or when overlap@K is under {config.min_overlap}" if config.probe_steps and self._probe else ""
        if not config.steps or steps <= config.steps:
            return f"index: no refresh in {steps:,} steps{looks}"
        times = (steps - 1) // config.steps
        share = {"full": 1.0, "touched": 0.0}.get(config.mode, config.share)
        seconds = share * full_seconds
        return (f"index: {config.mode} refresh every {config.steps} steps{looks}, {times} times, {share:.0%} of {len(self):,} items "
                f"encoded each time, about {seconds:.1f} s, {times * seconds:.0f} s in all")  # fmt: skip

    def state(self) -> dict[str, np.ndarray]:
        """All that a resumed run needs; see `restore`."""
        known = {**self._handed, **self._touched}  # a refresh in the background is lost with the process
        touched = np.array(sorted(known), dtype=np.int64)
        vectors = [known[i] for i in touched.tolist()]
        return {
            "indexed": self._indexed_ND,
            "encoded_at": self._encoded_at_N,
            "hits": self._hits_N,
            "touched": touched,
            "touched_vectors": np.array(vectors, np.float32).reshape(len(touched), self._indexed_ND.shape[1]),
            "counters": np.array([self.started_at, self.built_at, self.probed_at, self.refreshes, self.encoded]),
            "measures": np.array([self.overlap, self.recall, self.drift]),
            "search": np.array(list(_parameters(self.index).values()), dtype=np.int64),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from what `state` gave; the index is built again from its vectors."""
        self._indexed_ND, self._encoded_at_N, self._hits_N = (state[k] for k in ("indexed", "encoded_at", "hits"))
        self._touched = dict(zip(state["touched"].tolist(), state["touched_vectors"], strict=True))
        self.started_at, self.built_at, self.probed_at, self.refreshes, self.encoded = state["counters"].tolist()
        self.overlap, self.recall, self.drift = state["measures"].tolist()
        self._handed, self._running = {}, None  # what runs in the background is of another past
        self.index = self._build(self._store(self._indexed_ND))
        if isinstance(self.index, VectorIndex):
            self.index.set_parameters(**dict(zip(self.index.parameters, state["search"].tolist(), strict=True)))

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

    def _refreshed(
        self,
        step: int,
        encode: Encode,
        chosen: Positions,
        touched: Mapping[int, FloatArray],
        queries: FloatArray | None,
    ) -> _Refreshed:
        vectors_ND, encoded_at_N = self._indexed_ND.copy(), self._encoded_at_N.copy()
        if touched:
            rows = np.array(list(touched))
            vectors_ND[rows], encoded_at_N[rows] = np.array(list(touched.values())), step
        show = self._progress and not self.config.asynchronous and len(chosen) > _SHOWN
        with tqdm(
            total=len(chosen), desc="refresh index", unit="item", leave=False, disable=None if show else True
        ) as bar:
            for start in range(0, len(chosen), _SHOWN):
                some = chosen[start : start + _SHOWN]
                vectors_ND[some], encoded_at_N[some] = encode(some), step
                bar.update(len(some))
        if self.config.mode == "procrustes":
            fresh_N = encoded_at_N == step
            vectors_ND[~fresh_N] = vectors_ND[~fresh_N] @ rotation(self._indexed_ND[fresh_N], vectors_ND[fresh_N])
        index, recall = self._made(vectors_ND, queries)
        return _Refreshed(step, index, recall, vectors_ND, encoded_at_N, len(chosen))

    def _made(self, vectors_ND: FloatArray, queries: FloatArray | None) -> tuple[AnyIndex, float]:
        """An index over these vectors and its recall, searched as deeply as ``min_recall`` asks."""
        store = self._store(vectors_ND)
        index = self._build(store)
        if isinstance(index, ExactIndex):
            return index, 1.0
        if queries is None or not self.config.min_recall:
            return index, float("nan")
        return index, tune(index, Truth(store, queries, self._k), self._k, self.config.min_recall)

    def _publish(self, refreshed: _Refreshed) -> bool:
        self.encoded += refreshed.encoded
        if refreshed.recall < self.config.min_recall:
            warnings.warn(f"step {refreshed.step}: the refreshed index finds {refreshed.recall:.1%} of the exact Top-{self._k}, "
                          f"less than min_recall={self.config.min_recall}; the one before stays in use", stacklevel=3)  # fmt: skip
            self._touched, self._handed = {**self._handed, **self._touched}, {}
            return False
        if self._probe is not None:
            queries, before = self._probe(), self.index
            self.overlap = overlap(*(one.search_positions(queries, self._k)[0] for one in (before, refreshed.index)))
        self._handed = {}
        self._hits_N //= 2  # what was hot once cools down
        self._indexed_ND, self._encoded_at_N = refreshed.vectors_ND, refreshed.encoded_at_N
        self.index, self.recall, self.built_at = refreshed.index, refreshed.recall, refreshed.step
        self.refreshes += 1
        return True

    def _store(self, vectors_ND: FloatArray) -> EmbeddingStore:
        return EmbeddingStore(self._ids, [vectors_ND], "")


@dataclass(frozen=True)
class _Refreshed:
    """What a refresh has made: an index, and its vectors with the step that each was encoded at."""

    step: int
    index: AnyIndex
    recall: float
    vectors_ND: FloatArray
    encoded_at_N: Positions
    encoded: int


def _parameters(index: AnyIndex) -> dict[str, int]:
    return index.parameters if isinstance(index, VectorIndex) else {}


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
