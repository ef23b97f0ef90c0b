"""Time and peak memory of encoding and indexing a large catalog, each part in a process of its own.

    python benchmarks/scale.py --run runs/demo --out runs/scale --items 1000000
    python benchmarks/scale.py --out runs/scale --vectors 10000000 --dimension 64    # random vectors, IVF from the memory map

Memory is the highest anonymous memory of the process (RssAnon), sampled every 20 ms: what it needs beside the memory maps.
The encoding is killed half way once and goes on, as a user's would.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SPAWN = multiprocessing.get_context("spawn")


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--run", type=Path, help="finished run folder: its model encodes")
    parser.add_argument("--items", type=int, help="items of a generated shop")
    parser.add_argument("--vectors", type=int, help="random vectors instead of items")
    parser.add_argument("--dimension", type=int, default=64)
    parser.add_argument("--factory", default="IVF4096,SQ8")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    store = arguments.out / "store.emb"
    if arguments.vectors:
        measured("write random vectors", random_store, store, arguments.vectors, arguments.dimension)
    else:
        shop, model = arguments.out / "shop", str(arguments.run / "model")
        if not (shop / "truth.parquet").exists():
            measured("generate the shop", make_shop, shop, arguments.items)
        measured("encode, killed half way", encode, model, shop, store, kill_at=arguments.items // 2)
        measured("encode, the rest", encode, model, shop, store)
    measured(f"index {arguments.factory}", build, store, arguments.out / "index", arguments.factory)
    measured("open and search 1,000 queries", search, store, arguments.out / "index")


def measured(name: str, part: Callable[..., None], *arguments: object, kill_at: int = 0) -> None:
    """Run one part in a fresh process; print its seconds and its peak of anonymous memory."""
    receiver, sender = SPAWN.Pipe(duplex=False)
    start = time.perf_counter()
    process = SPAWN.Process(target=_watched, args=(sender, part, arguments))
    process.start()
    if kill_at:
        folder, rows = Path(str(arguments[-1])), 0
        while process.is_alive() and rows < kill_at:
            time.sleep(0.05)
            rows = 16_384 * len(list(folder.glob("shard-*.npy")))
        os.kill(process.pid, signal.SIGKILL)
    peak = 0
    while process.is_alive() or receiver.poll():
        if receiver.poll(0.1):
            try:
                peak = max(peak, receiver.recv())
            except EOFError:
                break
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL if kill_at else 0):
        raise SystemExit(f"{name} failed with exit status {process.exitcode}")
    print(
        json.dumps({"part": name, "seconds": round(time.perf_counter() - start, 1), "peak_MiB": peak // 1024}),
        flush=True,
    )


def _watched(sender: object, part: Callable[..., None], arguments: tuple) -> None:
    def watch() -> None:
        best = 0
        while True:
            status = Path("/proc/self/status").read_text()
            now = int(status.split("RssAnon:")[1].split()[0])
            if now > best * 1.01:
                best = now
                sender.send(best)
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    part(*arguments)


def make_shop(folder: Path, items: int) -> None:
    """Write a generated shop."""
    from taoemb.shop import generate_shop

    generate_shop(items, seed=0).save(folder)


def encode(model: str, shop: Path, store: Path) -> None:
    """Encode the shop's items; goes on where it was."""
    from taoemb.catalog import Items
    from taoemb.encoder import Encoder
    from taoemb.store import encode_corpus

    encode_corpus(Encoder(model), Items.load(shop), store)


def random_store(folder: Path, count: int, dimension: int) -> None:
    """Write unit vectors drawn around 1,000 random centres, shard by shard."""
    from taoemb.store import EmbeddingStore

    rng = np.random.default_rng(0)
    centres = rng.normal(size=(1000, dimension)).astype(np.float32)

    def shard(start: int, rows: int) -> np.ndarray:
        mine = np.random.default_rng([1, start])
        vectors = centres[mine.integers(1000, size=rows)] + 0.5 * mine.standard_normal((rows, dimension), np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    beside = folder.with_suffix(".raw")
    beside.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, start in enumerate(range(0, count, 1 << 20)):
        np.save(beside / f"{number}.npy", shard(start, min(1 << 20, count - start)))
        shards.append(np.load(beside / f"{number}.npy", mmap_mode="r"))
    EmbeddingStore([str(i) for i in range(count)], shards, "random").save(folder)


def build(store: Path, out: Path, factory: str) -> None:
    """Index a store from its memory map."""
    from taoemb.index.faiss_index import VectorIndex
    from taoemb.store import EmbeddingStore

    VectorIndex.build(EmbeddingStore.open(store, verify=False), factory).save(out)


def search(store: Path, index: Path) -> None:
    """Open the index and search with rows of the store; print the share that find themselves."""
    from taoemb.index.faiss_index import VectorIndex
    from taoemb.store import EmbeddingStore

    opened, loaded = EmbeddingStore.open(store, verify=False), VectorIndex.load(index)
    rows = np.sort(np.random.default_rng(5).choice(len(opened.shards[0]), 1000, replace=False))
    ids, _ = loaded.search(np.asarray(opened.shards[0][rows]), 10)
    print(
        json.dumps(
            {"self_hit@10": float(np.mean([opened.ids[r] in i for r, i in zip(rows, ids.tolist(), strict=True)]))}
        )
    )


if __name__ == "__main__":
    main()
