"""How time grows with the catalog, the candidates of a query and the batch: three curves, a plot.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py --run runs/demo --out runs/scaling

``--run`` is a finished run folder: its stage-1 model, catalog, judge and settings.

- Items, the first of one generated shop: seconds to encode them (tokenising included), seconds of a refresh (token ids kept, of up to 500,000 texts; exact index built), and
  milliseconds of one query for 10 items, by exact search and by an inverted file (``IVF,SQ8``) that is searched as deeply as Recall@10 of `RECALL` takes.
- K and batch: milliseconds of a step of Retrieval-GRPO, median over the steps that do not refresh, the points in turns.

Writes ``OUT/scaling.json`` and ``OUT/scaling.png``; ``growth`` is how much the last doubling of K and of the batch costs, and how much more an item of the
largest catalog takes to encode than one of the catalog a size below.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run import code, machine
from transformers import TrainerCallback

from taoemb.catalog import Items
from taoemb.config import load_config
from taoemb.encoder import Encoder
from taoemb.files import write_json
from taoemb.index.bench import list_count
from taoemb.index.exact import ExactIndex
from taoemb.index.faiss_index import VectorIndex
from taoemb.index.tuning import Truth, tune
from taoemb.job import TrainConfig, TrainJob
from taoemb.shop import generate_shop
from taoemb.store import encode_corpus
from taoemb.trainer import RetrievalGRPOTrainer

RECALL = 0.95
WARMUP, STEPS, TURNS = 3, 20, 3


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--items", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000],
                        help="sizes, two or more")  # fmt: skip
    parser.add_argument("--candidates", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    arguments = parser.parse_args()
    job = TrainJob(load_config(TrainConfig, arguments.run / "config.yaml"), arguments.run)
    batch, candidates = job.config.stage2.batch_size, job.config.stage2.num_candidates
    points = [(batch, k) for k in arguments.candidates] + [(b, candidates) for b in arguments.batches]
    spent = steps(job, list(dict.fromkeys(points)), arguments.out / "work")
    result: dict[str, Any] = {
        **code(), "machine": machine(), "threads": torch.get_num_threads(), "batch_size": batch, "num_candidates": candidates,
        "candidates": [{"num_candidates": k, "ms_a_step": spent[batch, k]} for k in arguments.candidates],
        "batches": [{"batch_size": b, "ms_a_step": spent[b, candidates]} for b in arguments.batches],
        "items": catalogs(job, sorted(arguments.items)),
    }  # fmt: skip
    result["growth"] = {
        "K": doubling(result["candidates"], "num_candidates", "ms_a_step"), "batch": doubling(result["batches"], "batch_size", "ms_a_step"),
        "item": doubling(result["items"], "items", "encode_seconds", per_unit=True),
    }  # fmt: skip
    write_json(arguments.out / "scaling.json", result)
    for name in ("items", "candidates", "batches"):
        rows = result[name]
        print("| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
        for row in rows:
            print("| " + " | ".join(f"{value:,.6g}" for value in row.values()) + " |")
    draw(result, arguments.out / "scaling.png")


def doubling(rows: list[dict[str, float]], size: str, cost: str, *, per_unit: bool = False) -> float:
    """The last row's cost over the one's before it, as many times the size; ``per_unit`` of a unit."""
    before, last = rows[-2:]
    times, more = last[cost] / before[cost], last[size] / before[size]
    return times / more if per_unit else times ** (np.log(2) / np.log(more))


class Stopwatch(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.begun = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start."""
        self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop."""
        self.seconds.append(time.perf_counter() - self.begun)


def steps(job: TrainJob, points: list[tuple[int, int]], folder: Path) -> dict[tuple[int, int], float]:
    """(batch, K) -> median milliseconds of a step."""
    seconds: dict[tuple[int, int], list[float]] = {point: [] for point in points}
    for _ in range(TURNS):
        for batch, k in points:
            shutil.rmtree(folder, ignore_errors=True)
            config = dataclasses.replace(job.config.stage2, batch_size=batch, num_candidates=k, steps=WARMUP + STEPS, refresh_steps=0,
                                         eval_steps=0)  # fmt: skip
            encoder, watch = job._prepared("stage1", 2), Stopwatch()
            functions, weights = job._rewards(config)
            trainer = RetrievalGRPOTrainer(encoder, job.catalog, functions, weights, config, run_dir=folder, trackers=("jsonl",),
                                           callbacks=[watch])  # fmt: skip
            trainer.train()
            seconds[batch, k] += watch.seconds[WARMUP:-1]  # the last one saves
    shutil.rmtree(folder, ignore_errors=True)
    return {point: 1e3 * float(np.median(values)) for point, values in seconds.items()}


def catalogs(job: TrainJob, sizes: list[int]) -> list[dict[str, float]]:
    """A row per size."""
    whole = generate_shop(sizes[-1], seed=0, train_queries=10, validation_queries=10, test_queries=10).catalog.items
    queries, rows = job.test_queries.texts, []
    for size in sizes:
        items, encoder = whole[:size], job.encoder("stage1")
        rows.append({"items": size, **one_catalog(encoder, items, queries)})
        print(rows[-1], flush=True)
    return rows


def one_catalog(encoder: Encoder, items: Items, queries: list[str]) -> dict[str, float]:
    """Seconds of encoding and of a refresh, milliseconds of a query."""
    begin = time.perf_counter()
    encode_corpus(encoder, items)
    encoded = time.perf_counter()
    store = encode_corpus(encoder, items)
    exact = ExactIndex.build(store)
    refreshed = time.perf_counter()
    inverted = VectorIndex.build(store, f"IVF{list_count(len(items))},SQ8")
    built = time.perf_counter()
    query_QD = encoder.encode_query(queries)
    recall = tune(inverted, Truth(store, query_QD, 10), 10, RECALL)
    return {
        "encode_seconds": encoded - begin, "refresh_seconds": refreshed - encoded, "ivf_build_seconds": built - refreshed,
        "exact_ms": per_query(exact, query_QD), "ivf_ms": per_query(inverted, query_QD), "ivf_recall": recall,
    }  # fmt: skip


def per_query(index: ExactIndex | VectorIndex, query_QD: np.ndarray) -> float:
    """Median milliseconds of one query at a time."""
    index.search(query_QD[:1], 10)
    seconds = []
    for row in query_QD[:200]:
        begin = time.perf_counter()
        index.search(row[None], 10)
        seconds.append(time.perf_counter() - begin)
    return 1e3 * float(np.median(seconds))


def draw(result: dict[str, Any], file: Path) -> None:
    """Three panels, both axes logarithmic."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (catalog, query, step) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    items = result["items"]
    sizes = [row["items"] for row in items]
    for axes, title, keys in (
        (catalog, "the catalog, seconds", {"encode_seconds": "encode", "refresh_seconds": "refresh, exact", "ivf_build_seconds": "build IVF,SQ8"}),
        (query, "one query for 10 items, ms", {"exact_ms": "exact", "ivf_ms": f"IVF,SQ8, Recall@10 ≥ {RECALL}"}),
    ):  # fmt: skip
        for key, label in keys.items():
            axes.plot(sizes, [row[key] for row in items], marker="o", label=label)
        axes.set(title=title, xlabel="items")
    for name, key, label in (
        ("candidates", "num_candidates", f"K, batch {result['batch_size']}"),
        ("batches", "batch_size", f"batch, K {result['num_candidates']}"),
    ):
        step.plot(
            [row[key] for row in result[name]], [row["ms_a_step"] for row in result[name]], marker="o", label=label
        )
    step.set(title="a step of Retrieval-GRPO, ms", xlabel="K, or queries in a batch")
    for axes in (catalog, query, step):
        axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
