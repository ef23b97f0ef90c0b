"""Whether what lies in a folder is fit to serve: files, fingerprint, recall, latency under load."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from taoemb.index.bench import one_thread
from taoemb.index.refresh import AnyIndex, load_index
from taoemb.index.results import as_queries, check_fingerprint
from taoemb.index.snapshots import LiveIndex, Snapshots
from taoemb.index.tuning import Truth, draw_queries
from taoemb.store import EmbeddingStore


@dataclass(frozen=True)
class Check:
    """One thing that was checked."""

    name: str
    passed: bool
    text: str


def verify(folder: str | Path) -> list[str]:
    """What is wrong with the files of an index, an embedding store or a folder of snapshots; empty when all is well."""
    snapshots = Snapshots(folder)
    problems, embeddings = [], snapshots.folder / "embeddings"
    if (snapshots.folder / "CURRENT").exists() or snapshots.generations():
        problems = snapshots.verify()
    elif not embeddings.is_dir():
        problems = _problem(lambda: load_index(folder))
    if (embeddings / "manifest.json").exists():  # of `taoemb index refresh`
        problems += _problem(lambda: EmbeddingStore.open(embeddings))
    return problems


def _problem(opening: Callable[[], object]) -> list[str]:
    try:
        opening()
    except ValueError as error:
        return [str(error)]
    return []


def open_index(folder: str | Path, device: str = "cpu") -> AnyIndex | LiveIndex:
    """An index folder, or the current generation of a folder of snapshots; raises ValueError naming a damaged file."""
    snapshots = Snapshots(folder)
    if (snapshots.folder / "CURRENT").exists() or snapshots.generations():
        return LiveIndex(snapshots, device)
    return load_index(folder, device)


def serve_check(
    folder: str | Path,
    *,
    fingerprint: str = "",
    store: EmbeddingStore | None = None,
    queries: npt.ArrayLike | None = None,
    k: int = 10,
    min_recall: float = 0.9,
    max_p99_ms: float | None = None,
    threads: int = 4,
    seconds: float = 5.0,
) -> list[Check]:
    """Check a folder as a server would find it, in the order in which things fail; later checks need the earlier ones.

    Args:
        folder: of an index, or of snapshots.
        fingerprint: of the encoder that will encode the queries; "" leaves that check out.
        store: the vectors that the index was built over; without it, or with one of another encoder or other items, the recall
            is not measured.
        queries: vectors ``[Q, D]``; without them 200 are drawn from the store, or at random.
        k: items per query.
        min_recall: share of the exact Top-``k`` that must be found.
        max_p99_ms: latency that 99 % of the searches under load must stay under, in milliseconds.
        threads: searching at once, each on one core with single queries.
        seconds: of load; in its middle a newer generation is taken up where there is one.

    Raises ValueError for fewer than one thread, or no time.
    """
    if threads < 1 or seconds <= 0:
        raise ValueError(f"threads={threads}, seconds={seconds}: give at least one thread and some time")
    problems = verify(folder)
    done = [Check("files", not problems, "; ".join(problems) or "every checksum is right")]
    try:
        index = open_index(folder)
    except ValueError:
        return done
    try:
        check_fingerprint(index, fingerprint)
    except ValueError as error:
        return [*done, Check("fingerprint", False, str(error))]
    done.append(
        Check("fingerprint", True, "that of the encoder" if fingerprint else "not compared: no model was given")
    )
    if queries is not None:
        queries_QD = as_queries(queries, index.dimension)
    elif store is not None and len(store):
        queries_QD = draw_queries(store, 200)
    else:
        queries_QD = np.random.default_rng(0).standard_normal((200, index.dimension), np.float32)
    unfit = _unfit(store, index)
    if store is None or unfit:
        done.append(Check("recall", True, f"not measured: {unfit}"))
    else:
        place = {item_id: i for i, item_id in enumerate(store.ids)} | {"": -1}
        found = np.array(
            [[place[item_id] for item_id in row] for row in index.search(queries_QD, k)[0]], dtype=np.int64
        )
        recall = Truth(store, queries_QD, k).recall(found.reshape(len(queries_QD), k), k)
        done.append(
            Check("recall", recall >= min_recall, f"recall@{k} {recall:.3f}, at least {min_recall:g} is wanted")
        )
    return [*done, _under_load(index, queries_QD, k, max_p99_ms, threads, seconds)]


def _unfit(store: EmbeddingStore | None, index: AnyIndex | LiveIndex) -> str:
    """Why a store is not what an index was built over; "" where it is."""
    if store is None:
        return "the embedding store was not given"
    if store.fingerprint != index.fingerprint:
        return "the embedding store is of another encoder than the index"
    held = index.index if isinstance(index, LiveIndex) else index
    return "" if set(held.ids) == set(store.ids) else "the embedding store has other items than the index"


def _under_load(
    index: AnyIndex | LiveIndex, queries_QD: npt.NDArray[np.float32], k: int, max_p99_ms: float | None, threads: int,
    seconds: float,
) -> Check:  # fmt: skip
    with one_thread():  # one by one, as below: a batch may list equal scores in another order
        wanted = [index.search(query[None], k)[0][0].tolist() for query in queries_QD]
    stop = threading.Event()

    def read(seed: int) -> tuple[list[float], int]:
        rng, taken, wrong = np.random.default_rng(seed), [], 0
        with one_thread():
            while not stop.is_set():
                row = int(rng.integers(len(queries_QD)))
                start = time.perf_counter()
                ids, _ = index.search(queries_QD[row : row + 1], k)
                taken.append(1e3 * (time.perf_counter() - start))
                wrong += ids[0].tolist() != wanted[row]
        return taken, wrong

    with ThreadPoolExecutor(threads) as pool:
        readers = [pool.submit(read, seed) for seed in range(threads)]
        try:
            time.sleep(seconds / 2)
            swapped = isinstance(index, LiveIndex) and index.reload()
            time.sleep(seconds / 2)
        finally:
            stop.set()  # else the pool waits for them for ever
        results = [reader.result() for reader in readers]
    taken = np.concatenate([times for times, _ in results])
    wrong = 0 if swapped else sum(count for _, count in results)
    p50, p99 = np.percentile(taken, [50, 99])
    slow = max_p99_ms is not None and p99 > max_p99_ms
    text = (f"{len(taken):,} searches by {threads} threads in {seconds:g} s: p50 {p50:.2f} ms, p99 {p99:.2f} ms"
            + (f", over {max_p99_ms:g} ms" if slow else "") + (f", {wrong:,} with other items than alone" if wrong else ""))  # fmt: skip
    return Check("load", not slow and not wrong, text)
