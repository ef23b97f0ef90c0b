"""What smaller numbers, shorter vectors and re-scoring cost and save, on a catalog's own queries.

    python benchmarks/compress.py --store items.emb --model runs/demo/model --data my-shop --out runs/compress

Every index is searched as deeply as recall@10 .95 on the catalog's queries takes (`taoemb.index.tuning.tune`), or as deeply as it can.
Recall against exact search; queries per second in batches of 100 and the median of a single query, one thread, the indexes taking
turns; megabytes are those in memory, the vectors that re-score stay on disk.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from taoemb.catalog import Catalog
from taoemb.encoder import Encoder
from taoemb.files import write_json
from taoemb.index.bench import one_thread
from taoemb.index.exact import ExactIndex
from taoemb.index.faiss_index import VectorIndex, import_faiss
from taoemb.index.refresh import AnyIndex
from taoemb.index.tuning import Truth, tune
from taoemb.store import EmbeddingStore

RECALL = 0.95


def main() -> None:
    """Build all, measure in turns, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="catalog with queries")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    store = EmbeddingStore.open(arguments.store, verify=False)
    texts = [query.text for query in Catalog.load(arguments.data).queries][-arguments.queries :]
    queries = Encoder(arguments.model).encode_query(texts)
    truth = Truth(store, queries, 10)
    lists, short = 1 << round(np.log2(4 * np.sqrt(len(store)))), store.dimension // 4
    kinds: dict[str, AnyIndex] = {}
    for dtype in ("float32", "float16"):
        kinds[f"exact, {dtype}"] = ExactIndex.build(store, dtype=dtype)
    for factory, options in (
        (f"IVF{lists},Flat", {}), (f"IVF{lists},SQ8", {}), (f"IVF{lists},SQ8", {"rescore": 4}),
        (f"IVF{lists},SQ4", {"rescore": 4}), (f"IVF{lists},RaBitQ", {}), (f"IVF{lists},RaBitQ", {"rescore": 10}),
        (f"IVF{lists},SQ8", {"truncate_dim": short}), (f"IVF{lists},SQ8", {"truncate_dim": short, "rescore": 10}),
    ):  # fmt: skip
        start = time.perf_counter()
        name = ", ".join([factory, *(f"{key}={value}" for key, value in options.items())])
        kinds[name] = VectorIndex.build(store, factory, **options)
        tune(kinds[name], truth, 10, RECALL)
        print(name, kinds[name].parameters, f"{time.perf_counter() - start:.0f} s", flush=True)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    with one_thread():
        for turn in range(arguments.turns + 1):
            for name, index in kinds.items():
                taken = timed(index, queries)
                if turn:
                    times[name].append(taken)
    rows = []
    for name, index in kinds.items():
        rate, single = np.median(times[name], axis=0)
        size = megabytes(index, store)
        rows.append({"index": name, "search": getattr(index, "parameters", {}), "recall@10": truth.recall(index.search_positions(queries, 10)[0], 10),
                     "queries/s": rate, "one query ms": single, "MB": size})  # fmt: skip
    write_json(arguments.out / "compress.json", {"vectors": len(store), "dimension": store.dimension, "turns": arguments.turns,
                                                 "queries": len(queries), "rows": rows})  # fmt: skip
    print(
        "| index | nprobe | recall@10 | queries/s | one query, ms | MB in memory |\n| --- | --- | --- | --- | --- | --- |"
    )
    for row in rows:
        print(f"| {row['index']} | {row['search'].get('nprobe', '')} | {row['recall@10']:.3f} | {row['queries/s']:,.0f} | "
              f"{row['one query ms']:.2f} | {row['MB']:,.0f} |")  # fmt: skip


def timed(index: AnyIndex, queries: np.ndarray) -> tuple[float, float]:
    """Queries per second in batches of 100, and the median milliseconds of single queries."""
    start = time.perf_counter()
    for first in range(0, len(queries), 100):
        index.search(queries[first : first + 100], 10)
    rate = len(queries) / (time.perf_counter() - start)
    singles = []
    for query in queries[:50]:
        start = time.perf_counter()
        index.search(query[None], 10)
        singles.append(time.perf_counter() - start)
    return rate, 1e3 * float(np.median(singles))


def megabytes(index: AnyIndex, store: EmbeddingStore) -> float:
    """Of the vectors as the index holds them, without ids."""
    if isinstance(index, ExactIndex):
        return len(store) * store.dimension * (4 if index.dtype == "float32" else 2) / 1e6
    return float(import_faiss().serialize_index(index.faiss_index).nbytes / 1e6)


if __name__ == "__main__":
    main()
