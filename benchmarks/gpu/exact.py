"""Exact search with torch on a GPU against the bandwidth at which the same memory can be read, and against faiss-gpu.

    python benchmarks/gpu/exact.py --out runs/gpu-exact                               # 10 and 50 million x 384
    python benchmarks/gpu/exact.py --out runs/x --device cpu --vectors 100000         # to try it without a GPU

Random unit vectors, made on the device. Per size, number type and batch the median over the turns, and the share of the limit:
the bytes of all vectors over the time of one pass (a batch is one pass while its scores fit the working memory), against the
faster of reading the vectors (a sum) and copying them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from taoemb.files import write_json
from taoemb.index.exact import ExactIndex
from taoemb.index.faiss_index import VectorIndex, import_faiss
from taoemb.index.results import overlap
from taoemb.store import EmbeddingStore

ROWS = 1_000_000


def main() -> None:
    """Measure and print a row per size, type and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--vectors", type=int, nargs="+", default=[10_000_000, 50_000_000])
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--faiss", action="store_true", help="compare with faiss on the GPU too")
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "CPU"
    found: dict[str, object] = {"device": name, "torch": torch.__version__, "turns": arguments.turns, "rows": []}
    rows: list[dict[str, object]] = []
    for count in arguments.vectors:
        store = EmbeddingStore([str(i) for i in range(count)], list(random_shards(count, arguments)), "")
        queries = store.rows(np.arange(max(arguments.batches), dtype=np.int64))
        truth = None
        for dtype in arguments.dtypes:
            index = ExactIndex.build(store, arguments.device, dtype)
            limit = bandwidth(index._vectors, arguments.turns)
            for batch in arguments.batches:
                spent = median(lambda i=index, q=queries[:batch]: i.search_positions(q, 10), arguments.turns)
                rows.append({"vectors": count, "dtype": dtype, "batch": batch, "ms": 1e3 * spent, "limit GB/s": limit / 1e9,
                             "share of the limit": index._vectors.nbytes / spent / limit})  # fmt: skip
                print(rows[-1], flush=True)
            top = index.search_positions(queries[:16], 10)[0]
            truth = top if truth is None else truth
            rows.append({"vectors": count, "dtype": dtype, "overlap@10 with the first type": overlap(top, truth)})
            print(rows[-1], flush=True)
            del index
            if arguments.device.startswith("cuda"):
                torch.cuda.empty_cache()
        if arguments.faiss:
            rows.append(by_faiss(store, queries, arguments))
            print(rows[-1], flush=True)
        write_json(arguments.out / "exact.json", {**found, "rows": rows})


def random_shards(count: int, arguments: argparse.Namespace) -> Iterator[np.ndarray]:
    """float16 unit vectors, a million at a time."""
    generator = torch.Generator(arguments.device).manual_seed(0)
    for start in range(0, count, ROWS):
        shape = (min(ROWS, count - start), arguments.dimension)
        vectors = torch.randn(shape, generator=generator, device=arguments.device)
        yield torch.nn.functional.normalize(vectors).half().cpu().numpy()


def median(part: Callable[[], object], turns: int) -> float:
    """Median seconds, after one turn that does not count; the part must end when its result is there."""
    seconds = []
    for _ in range(turns + 1):
        start = time.perf_counter()
        part()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def bandwidth(vectors: torch.Tensor, turns: int) -> float:
    """Bytes a second at which this memory can be read, the faster of a sum and a copy of a part of it."""
    part = vectors[: max(1, len(vectors) // 8)]
    beside = torch.empty_like(part)

    def copy() -> None:
        beside.copy_(part)
        beside[-1, -1].item()  # waits for the device

    read = vectors.nbytes / median(lambda: vectors.view(torch.int16).sum().item(), turns)
    return max(read, 2 * part.nbytes / median(copy, turns))


def by_faiss(store: EmbeddingStore, queries: np.ndarray, arguments: argparse.Namespace) -> dict[str, object]:
    """Flat search by faiss, in half precision on the GPU."""
    index = VectorIndex.build(store, "Flat")
    if arguments.device.startswith("cuda"):
        index = index.to_gpu(temp_memory_mib=1024, float16=True)
    row: dict[str, object] = {"vectors": len(store), "faiss": import_faiss().__version__}
    for batch in arguments.batches:
        spent = median(lambda q=queries[:batch]: index.search_positions(q, 10), arguments.turns)
        row[f"batch {batch}, ms"] = 1e3 * spent
    return row


if __name__ == "__main__":
    main()
