"""Which index suits a store: recall, speed, latency, build time, size and refresh, measured on the user's own vectors."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from taoemb.index.exact import ExactIndex
from taoemb.index.faiss_index import VectorIndex, import_faiss
from taoemb.index.results import as_queries, check_k, check_vectors
from taoemb.index.tuning import NOISE, Truth, draw_queries
from taoemb.store import EmbeddingStore, unit_rows
from taoemb.types import FloatArray

Positions: TypeAlias = npt.NDArray[np.int64]
Progress: TypeAlias = Callable[[str], None]

_QUERIES, _SINGLE = 1000, 200
"""Queries that are drawn where none are given, and those of them that are also timed one by one; our choice."""
_TRAIN_ROWS, _LIST_ROWS = 262_144, 39
"""What `VectorIndex` trains on at most, and the vectors per list under which FAISS warns."""
_PROBES, _BEAMS = (1, 4, 16, 64, 256), (16, 32, 64, 128, 256)
_LINKS, _BUILD_BEAM = 32, 40
"""Of a graph by hnswlib and usearch: those of FAISS's ``HNSW32``, so that like is compared with like."""
LIBRARIES = {"hnswlib": "hnswlib", "usearch": "usearch.index"}
HOW = (
    "recall@k: share of the k items found whose exact score is at least that of the exact k-th best, less 1e-6 (ties count); "
    "the reference is exact search (ExactIndex). recall@100 is of a search of its own with k = 100.",
    "Queries per second: all queries in batches, with all threads. Latency: up to 200 queries one at a time on one thread, "
    "p50 and p99. Both include the way from positions to string ids. Every visit begins with an untimed batch; the indexes take turns (A B C A B C ...), "
    "and each figure is the median over the repeats. Differences under a fifth are within what timings vary by.",
    "Build: once, training included, with all threads. MB: 10^6 bytes of the serialised index (FAISS: write_index; exact: its "
    "float32 vectors; hnswlib, usearch: the saved file), without ids, which are the same for all.",
    "Refresh: seconds to overwrite 1 % of the vectors by update (median over the repeats, after all searches); a dash where "
    "the index cannot be changed and must be built again.",
)
"""How the figures are measured, for people."""


@dataclass(frozen=True)
class Candidate:
    """An index to measure: built once, searched with each of ``values`` of one search parameter.

    ``factory`` is ``exact`` (`ExactIndex`), ``hnswlib``, ``usearch`` or a FAISS factory string.
    """

    factory: str
    parameter: str = ""
    """``nprobe`` or ``efSearch``; empty where there is nothing to set."""
    values: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.parameter not in ("", "nprobe", "efSearch"):
            raise ValueError(f"parameter={self.parameter!r}: give nprobe or efSearch, or leave it out")
        if bool(self.parameter) != bool(self.values):
            raise ValueError(f"{self.factory}: give a search parameter and its values, or neither")
        known = {"exact": ("",), **dict.fromkeys(LIBRARIES, ("", "efSearch"))}.get(self.factory)
        if known and self.parameter not in known:
            raise ValueError(f"{self.factory} has no search setting {self.parameter}")
        if any(value < 1 for value in self.values):
            raise ValueError(f"{self.parameter}={min(self.values)}: give at least 1")

    @property
    def settings(self) -> list[dict[str, int]]:
        """The search settings, one empty one where there is nothing to set."""
        return [{self.parameter: value} for value in self.values] or [{}]


@dataclass(frozen=True)
class BenchRow:
    """One index at one search setting. A field that belongs to the index is the same in all its rows."""

    factory: str
    k: int
    recall_at_k: float
    recall_at_100: float | None
    """None where the store holds fewer than 100 vectors."""
    queries_per_second: float
    """In batches, at Top-``k``."""
    p50_ms: float
    """Latency of a single query, milliseconds."""
    p99_ms: float
    build_seconds: float
    size_mb: float
    """10^6 bytes of the serialised index, without ids."""
    refresh_seconds: float | None
    """To overwrite 1 % of the vectors; None where the index cannot be changed."""
    setting: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Factory and setting."""
        return " ".join([self.factory, *(f"{key}={value}" for key, value in self.setting.items())])


# ------------------------------------------------------------------------------------------------------- candidates


def list_count(count: int) -> int:
    """Lists of an inverted file over ``count`` vectors: the largest power of two that is at most 8 sqrt(N), so at least
    4 sqrt(N), and leaves 39 training vectors to a list (less than 4 sqrt(N) lists then, under 23,000 and over 2.8 million).

    >>> list_count(2_000), list_count(50_000), list_count(1_000_000)
    (32, 1024, 4096)
    """
    most = min(8 * math.sqrt(count), min(count, _TRAIN_ROWS) / _LIST_ROWS)
    return 1 << max(0, math.floor(math.log2(max(1.0, most))))


def sweep(factory: str) -> Candidate:
    """A factory string with the usual values of its search parameter.

    >>> sweep("IVF64,SQ8").values, sweep("HNSW32").parameter, sweep("Flat").parameter
    ((1, 4, 16, 64), 'efSearch', '')
    """
    before, is_list, after = factory.partition("IVF")
    if is_list and "RFlat" not in after and "Refine" not in after:
        digits = after[: len(after) - len(after.lstrip("0123456789"))]
        return Candidate(factory, "nprobe", tuple(p for p in _PROBES if p <= int(digits or 1)))
    if factory in LIBRARIES or before.startswith("HNSW"):
        return Candidate(factory, "efSearch", _BEAMS)
    return Candidate(factory)


def default_candidates(count: int) -> tuple[list[Candidate], list[str]]:
    """What is measured on ``count`` vectors with the libraries that are installed, and a note on each that is not."""
    lists = list_count(count)
    names = {
        "faiss": ["Flat", f"IVF{lists},Flat", f"IVF{lists},SQ8", "HNSW32"],
        "hnswlib": ["hnswlib"],
        "usearch": ["usearch"],
    }
    found, notes = ["exact"], []
    for library, factories in names.items():
        try:
            import_module(LIBRARIES.get(library, library))
        except ImportError:
            notes.append(f"{library} is not installed; left out: {', '.join(factories)}")
        else:
            found += factories
    return [sweep(factory) for factory in found], notes


# ---------------------------------------------------------------------------------------------------------- engines


class _Engine:
    """An index behind what is measured of it; positions are places in the store, -1 where nothing was found."""

    def __init__(self, store: EmbeddingStore) -> None:
        self.ids: npt.NDArray[np.object_] = np.asarray(store.ids, dtype=object)

    def set(self, setting: Mapping[str, int]) -> None:
        """Use a search setting from now on; exact search has none."""

    def positions(self, queries: FloatArray, k: int) -> Positions:
        """Places of the Top-``k``, ``[B, k]``."""
        raise NotImplementedError

    def search(self, queries: FloatArray, k: int) -> npt.NDArray[np.object_]:
        """Ids of the Top-``k``, ``[B, k]``: what is timed."""
        return np.asarray(self.ids[self.positions(queries, k)])

    def update(self, rows: Positions, vectors: FloatArray) -> bool:
        """Overwrite vectors; False where that cannot be done."""
        raise NotImplementedError

    def size(self) -> int:
        """Bytes of the serialised index, without ids."""
        raise NotImplementedError


class _Exact(_Engine):
    def __init__(self, store: EmbeddingStore) -> None:
        super().__init__(store)
        self.index = ExactIndex.build(store)

    def positions(self, queries: FloatArray, k: int) -> Positions:
        return self.index.search_positions(queries, k)[0]

    def search(self, queries: FloatArray, k: int) -> npt.NDArray[np.object_]:
        return self.index.search(queries, k)[0]

    def update(self, rows: Positions, vectors: FloatArray) -> bool:
        self.index.update(self.ids[rows].tolist(), vectors)
        return True

    def size(self) -> int:
        return self.index.vectors.nbytes


class _Faiss(_Engine):
    def __init__(self, store: EmbeddingStore, factory: str, seed: int) -> None:
        super().__init__(store)
        self.index = VectorIndex.build(store, factory, seed=seed)

    def set(self, setting: Mapping[str, int]) -> None:
        for name, value in setting.items():
            try:
                import_faiss().ParameterSpace().set_index_parameter(self.index.faiss_index, name, value)
            except RuntimeError:
                raise ValueError(f"an index of factory {self.index.factory!r} has no search setting {name}") from None

    def positions(self, queries: FloatArray, k: int) -> Positions:
        return self.index.search_positions(queries, k)[0]

    def search(self, queries: FloatArray, k: int) -> npt.NDArray[np.object_]:
        return self.index.search(queries, k)[0]

    def update(self, rows: Positions, vectors: FloatArray) -> bool:
        try:
            self.index.update(self.ids[rows].tolist(), vectors)
        except ValueError as error:
            if "cannot be changed" not in str(error):
                raise
            return False
        return True

    def size(self) -> int:
        sizes: list[int] = []

        def count(block: bytes) -> int:
            sizes.append(len(block))
            return len(block)

        faiss = import_faiss()
        faiss.write_index(self.index.faiss_index, faiss.PyCallbackIOWriter(count))  # needs neither disk nor memory
        return sum(sizes)


class _Hnswlib(_Engine):
    def __init__(self, store: EmbeddingStore, seed: int) -> None:
        super().__init__(store)
        self.index = import_module("hnswlib").Index(space="ip", dim=store.dimension)
        self.index.init_index(len(store), M=_LINKS, ef_construction=_BUILD_BEAM, random_seed=seed)
        self.index.set_num_threads(torch.get_num_threads())
        self.index.add_items(store.vectors, np.arange(len(store)))

    def set(self, setting: Mapping[str, int]) -> None:
        if setting:
            self.index.set_ef(setting["efSearch"])

    def positions(self, queries: FloatArray, k: int) -> Positions:
        return np.asarray(self.index.knn_query(queries, k)[0], dtype=np.int64)

    def update(self, rows: Positions, vectors: FloatArray) -> bool:
        self.index.add_items(vectors, rows)  # a label that is there is moved
        return True

    def size(self) -> int:
        return int(self.index.index_file_size())


class _Usearch(_Engine):
    def __init__(self, store: EmbeddingStore) -> None:
        super().__init__(store)
        self.threads = torch.get_num_threads()
        self.index = import_module("usearch.index").Index(
            ndim=store.dimension, metric="ip", dtype="f32", connectivity=_LINKS, expansion_add=_BUILD_BEAM
        )
        self.index.add(np.arange(len(store)), store.vectors, threads=self.threads)

    def set(self, setting: Mapping[str, int]) -> None:
        if setting:
            self.index.expansion_search = setting["efSearch"]

    def positions(self, queries: FloatArray, k: int) -> Positions:
        keys = np.asarray(self.index.search(queries, k, threads=self.threads).keys)
        return keys.astype(np.int64).reshape(len(queries), -1)

    def update(self, rows: Positions, vectors: FloatArray) -> bool:
        self.index.remove(rows)
        self.index.add(rows, vectors, threads=self.threads)
        return True

    def size(self) -> int:
        return int(self.index.serialized_length)


def _engine(factory: str, store: EmbeddingStore, seed: int) -> _Engine:
    if factory == "exact":
        return _Exact(store)
    if factory in LIBRARIES:
        try:
            return _Hnswlib(store, seed) if factory == "hnswlib" else _Usearch(store)
        except ImportError as error:
            raise ImportError(f"the candidate {factory} needs its library: pip install {factory}") from error
    return _Faiss(store, factory, seed)


# -------------------------------------------------------------------------------------------------------- measuring


def bench(
    store: EmbeddingStore,
    queries: npt.ArrayLike | None = None,
    *,
    candidates: Sequence[Candidate | str] | None = None,
    k: int = 10,
    batch: int = 100,
    repeats: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[BenchRow]:
    """Measure indexes on the ``N`` vectors of a store; `HOW` says how. All of them are in memory at the same time.

    Args:
        store: the vectors ``[N, D]``.
        queries: held-out query vectors ``[Q, D]``; without them 1,000 rows of the store with noise (`draw_queries`).
        candidates: what to measure, a string with its usual `sweep`; without it `default_candidates`.
        k: items to find.
        batch: queries searched at once for the throughput.
        repeats: timings whose median is taken.
        seed: of drawn queries, training samples and the vectors that the refresh overwrites.
        progress: takes a line of text at each stage.

    Raises ValueError for an empty store, ``k`` over ``N``, ``batch`` or ``repeats`` under 1, queries of another dimension
    or with NaN, an index that cannot be built on these vectors, a setting that it does not have; ImportError where a
    named candidate's library is not installed.
    """
    say = progress or (lambda _: None)
    queries_QD = _checked(store, queries, k, batch, repeats, seed)
    check_vectors(store.vectors, store.ids)  # before the long part
    if candidates is None:
        candidates, notes = default_candidates(len(store))
        for note in notes:
            say(note)
    plan = [sweep(c) if isinstance(c, str) else c for c in candidates]
    if not plan:
        raise ValueError("no candidates; give at least one")
    depths = sorted({k, *([100] if len(store) >= 100 else [])})
    truth = Truth(store, queries_QD, max(depths))
    engines: list[_Engine] = []
    build_seconds: list[float] = []
    for candidate in plan:
        say(f"build {candidate.factory}")
        start = time.perf_counter()
        engines.append(_engine(candidate.factory, store, seed))
        build_seconds.append(time.perf_counter() - start)
        for setting in candidate.settings:  # a wrong one is found before the next index is built
            engines[-1].set(setting)
    sizes = [engine.size() for engine in engines]
    places = [(at, setting) for at, candidate in enumerate(plan) for setting in candidate.settings]
    recalls = []
    for at, setting in places:
        engines[at].set(setting)
        recalls.append({depth: truth.recall(engines[at].positions(queries_QD, depth), depth) for depth in depths})
    times = np.empty((repeats, len(places), 3))
    for repeat in range(repeats):
        say(f"search, repeat {repeat + 1} of {repeats}")
        for row, (at, setting) in enumerate(places):
            engines[at].set(setting)
            times[repeat, row] = _timed(engines[at], queries_QD, k, batch)
    refreshes = _refresh_seconds(engines, store, repeats, seed, say)
    rate, p50, p99 = np.median(times, axis=0).T
    return [
        BenchRow(plan[at].factory, k, recalls[row][k], recalls[row].get(100), float(rate[row]), float(p50[row]),
                 float(p99[row]), build_seconds[at], sizes[at] / 1e6, refreshes[at], setting)
        for row, (at, setting) in enumerate(places)
    ]  # fmt: skip


def _checked(
    store: EmbeddingStore, queries: npt.ArrayLike | None, k: int, batch: int, repeats: int, seed: int
) -> FloatArray:
    """The queries ``[Q, D]``, drawn where none are given; raises ValueError on what `bench` cannot work with."""
    if not len(store):
        raise ValueError("the store is empty; encode a catalog first")
    if check_k(k) > len(store):
        raise ValueError(f"k={k} but the store holds {len(store)} vectors; ask for fewer items")
    for name, value in (("batch", batch), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name}={value}: give at least 1")
    if queries is None:
        return draw_queries(store, _QUERIES, seed)
    array = as_queries(queries, store.dimension)
    if not len(array):
        raise ValueError("there are no queries; give at least one, or none at all to draw them from the store")
    return array


def _timed(engine: _Engine, queries_QD: FloatArray, k: int, batch: int) -> tuple[float, float, float]:
    """Queries per second in full batches, and the p50 and p99 of single queries in milliseconds."""
    count = -(-len(queries_QD) // batch)
    batches = [queries_QD[np.arange(i * batch, (i + 1) * batch) % len(queries_QD)] for i in range(count)]
    engine.search(batches[0], k)  # brings the index into the caches
    start = time.perf_counter()
    for block in batches:
        engine.search(block, k)
    seconds = time.perf_counter() - start
    singles = []
    with one_thread():
        engine.search(queries_QD[:1], k)
        for query in range(min(_SINGLE, len(queries_QD))):
            start = time.perf_counter()
            engine.search(queries_QD[query : query + 1], k)
            singles.append(1e3 * (time.perf_counter() - start))
    p50, p99 = np.percentile(singles, [50, 99])
    return count * batch / seconds, float(p50), float(p99)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread in torch and FAISS: on busy cores a single query waits up to 100 times as long for its other threads as it
    takes, and a server gives each of many queries one thread."""
    torch_threads = torch.get_num_threads()
    try:
        faiss = import_faiss()
    except ImportError:
        faiss = None
    faiss_threads = faiss.omp_get_max_threads() if faiss else 0
    try:
        torch.set_num_threads(1)
        if faiss:
            faiss.omp_set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(torch_threads)
        if faiss:
            faiss.omp_set_num_threads(faiss_threads)


def _refresh_seconds(
    engines: Sequence[_Engine], store: EmbeddingStore, repeats: int, seed: int, say: Progress
) -> list[float | None]:
    """Seconds to overwrite 1 % of the vectors (at least one) by moved ones, per engine; the engines are changed."""
    rng = np.random.default_rng(seed)
    seconds: list[list[float]] = [[] for _ in engines]
    for repeat in range(repeats):
        say(f"refresh, repeat {repeat + 1} of {repeats}")
        rows = np.sort(rng.choice(len(store), max(1, round(len(store) / 100)), replace=False))
        moved = unit_rows(
            store.vectors[rows] + rng.normal(0, 0.1 / math.sqrt(store.dimension), (len(rows), store.dimension))
        )
        for engine, taken in zip(engines, seconds, strict=True):
            start = time.perf_counter()
            if engine.update(rows, moved):
                taken.append(time.perf_counter() - start)
    return [float(np.median(taken)) if taken else None for taken in seconds]


def describe(
    store: EmbeddingStore,
    queries: npt.ArrayLike | None = None,
    *,
    candidates: Sequence[Candidate | str] | None = None,
    k: int = 10,
    batch: int = 100,
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """The conditions of a `bench` with these arguments, as JSON values: the data, the machine, how it is measured."""
    drawn = (
        f"Queries: {_QUERIES:,} rows of the store plus Gaussian noise of expected length {NOISE:g}, normalised again. Real "
        "queries are better: they lie elsewhere than items."
    )
    versions = {"numpy": np.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for name in ("faiss", "hnswlib", "usearch"):
        try:
            versions[name] = str(getattr(import_module(name), "__version__", "version not known"))
        except ImportError:
            continue
    return {
        "vectors": len(store), "dimensions": store.dimension, "fingerprint": store.fingerprint,
        "queries": f"{_QUERIES:,} drawn from the store" if queries is None else f"{len(np.asarray(queries)):,} given",
        "k": k, "batch": batch, "repeats": repeats, "seed": seed,
        "threads": torch.get_num_threads(), "cores": os.cpu_count(), "machine": platform.platform(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "notes": [
            *([drawn] if queries is None else []), *HOW,
            *(default_candidates(len(store))[1] if candidates is None else []),
        ],
    }  # fmt: skip
