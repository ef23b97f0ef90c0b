"""Latency of searching threads while the index below them is swapped.

    python benchmarks/swaps.py --out runs/swaps

Threads search a `LiveIndex` with single queries, first undisturbed, then while generations are published (in a process of its
own, as in production) and reloaded 50 times. Every result must come from one generation.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import torch

from taoemb.files import write_json
from taoemb.index.exact import ExactIndex
from taoemb.index.snapshots import LiveIndex, Snapshots
from taoemb.store import EmbeddingStore


def index_of(generation: int, count: int, dimension: int) -> ExactIndex:
    """An index whose ids tell its generation."""
    vectors = np.random.default_rng(generation).standard_normal((count, dimension), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return ExactIndex.build(EmbeddingStore([f"{generation}-{i}" for i in range(count)], [vectors], str(generation)))


def publish(folder: Path, swaps: int, count: int, dimension: int, seen: multiprocessing.Value) -> None:
    """Publish generations; the next one when the last is in use, so that none is passed over."""
    torch.set_num_threads(1)
    snapshots = Snapshots(folder)
    for _ in range(swaps):
        number = snapshots.publish(index_of(max(snapshots.generations()) + 1, count, dimension))
        while seen.value < number:
            time.sleep(0.005)


def main() -> None:
    """Measure both phases and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--dimension", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.out / "served"
    shutil.rmtree(folder, ignore_errors=True)
    snapshots = Snapshots(folder)
    snapshots.publish(index_of(1, arguments.items, arguments.dimension))
    live = LiveIndex(snapshots)
    taken: dict[str, list[float]] = {"undisturbed": [], "swapping": []}
    mixed, phase, stop = [0], ["undisturbed"], threading.Event()

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not stop.is_set():
            query = rng.standard_normal((1, arguments.dimension), np.float32)
            start, now = time.perf_counter(), phase[0]
            ids, _ = live.search(query, 10)
            taken[now].append(time.perf_counter() - start)
            mixed[0] += len({item.split("-")[0] for item in ids[0].tolist()}) != 1

    readers = [threading.Thread(target=read, args=(i,)) for i in range(arguments.threads)]
    for reader in readers:
        reader.start()
    time.sleep(10)
    phase[0] = "swapping"
    context = multiprocessing.get_context("spawn")
    seen = context.Value("i", live.generation)
    work = (folder, arguments.swaps, arguments.items, arguments.dimension, seen)
    publisher = context.Process(target=publish, args=work)
    publisher.start()
    swaps, start = 0, time.perf_counter()
    while publisher.is_alive() or snapshots.current != live.generation:
        swaps += live.reload()
        seen.value = live.generation
        time.sleep(0.005)
    stop.set()
    for reader in readers:
        reader.join()
    found = {"swaps": swaps, "seconds": time.perf_counter() - start, "mixed results": mixed[0],
             **{f"{name}: {what}": value for name, values in taken.items()
                for what, value in (("searches", len(values)), ("p50 ms", 1e3 * np.median(values)),
                                    ("p99 ms", 1e3 * np.percentile(values, 99)), ("max ms", 1e3 * max(values)))}}  # fmt: skip
    write_json(arguments.out / "swaps.json", found)
    for name, value in found.items():
        print(name, value)


if __name__ == "__main__":
    main()
