"""Stage 1, then Retrieval-GRPO, with all weights of a transformer on one GPU: what it gains, what it costs, where the time goes.

    python benchmarks/gpu/train.py --out runs/gpu-train                                          # MiniLM, 20,000 items
    python benchmarks/gpu/train.py --out runs/x --device cpu --items 300 --steps 3               # to try it without a GPU
    python benchmarks/step_profile.py --run runs/gpu-train/run --out runs/gpu-profile --warmup 10   # the finer split of a step

The generated shop, through `TrainJob`: its judge is the shop's own rules, its index exact search with torch. KEY=VALUE are settings of
`taoemb train` and go over the ones here. Writes ``OUT/train.json``: the device, the metrics before and after with the paired test against
stage 1, seconds and item encodings a second of each stage, the split of a step as the trainer logs it, the rate of encoding alone, and the
peak of the GPU's memory. The run folder is ``OUT/run``; the same command goes on from its last checkpoint after a kill, and then
counts only what it did itself.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from taoemb.config import load_config
from taoemb.files import read_json, write_json
from taoemb.job import TrainConfig, TrainJob
from taoemb.shop import generate_shop

SETTINGS = (
    "model=minilm", "systems=[bm25,untrained,stage1,retrieval_grpo]",
    "stage1.learning_rate=2e-5", "stage1.chunk_size=512",
    "stage2.learning_rate=5e-6", "stage2.chunk_size=512",
)  # fmt: skip
"""For transformers; the chunk is for the memory of one large GPU."""
STAGES = {"stage1": "stage1", "stage2": "retrieval_grpo"}
WARM = 10
"""Steps of a log that do not count: the first ones fill the tokeniser's and the allocator's caches."""


def main() -> None:
    """Train, evaluate, write and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--steps", type=int, help="of each stage; by default as the settings say")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of `taoemb train`")
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; give --device cpu to try this without one")
    if not cuda:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # models go to a GPU where there is one
    shop = arguments.out / "shop"
    if not (shop / "truth.parquet").exists():
        queries = min(4000, 10 * arguments.items)
        generate_shop(arguments.items, train_queries=queries, validation_queries=min(200, queries // 20),
                      test_queries=min(500, queries // 8)).save(shop)  # fmt: skip
    steps = [f"{stage}.steps={arguments.steps}" for stage in STAGES] if arguments.steps else []
    config = load_config(TrainConfig, None, [f"data={shop}", *SETTINGS, *steps, *arguments.overrides])
    start = time.perf_counter()
    job = TrainJob(config, arguments.out / "run")
    job.run()
    spent = time.perf_counter() - start
    write_json(arguments.out / "train.json", {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__, "threads": torch.get_num_threads(), "items": len(job.catalog.items),
        "overrides": arguments.overrides, "seconds in all": spent,
        "stages": {stage: stage_figures(job, stage, name) for stage, name in STAGES.items()},
        "encoding alone, items/s": encoding_rate(job),
        "peak GPU memory, MiB": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
        **comparison(job.run_dir),
    })  # fmt: skip
    print((arguments.out / "train.json").read_text(encoding="utf-8"))


def stage_figures(job: TrainJob, stage: str, name: str) -> dict[str, Any]:
    """Settings, cost and, where the log tells it, the split of a step."""
    settings, spent = getattr(job.config, stage), job.phases.values[name]
    figures: dict[str, Any] = {
        "steps": settings.steps, "batch_size": settings.batch_size, "chunk_size": settings.chunk_size,
        "learning_rate": settings.learning_rate, "seconds": spent["seconds"], "item encodings": spent["item_encodings"],
        "item encodings/s": spent["item_encodings"] / spent["seconds"],
    }  # fmt: skip
    rows = [
        json.loads(line) for line in (job.run_dir / "logs" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    rows = rows[WARM:] or rows
    parts = sorted({key for row in rows for key in row if key.startswith("seconds/")})
    if parts:
        split = {key.removeprefix("seconds/"): float(np.mean([row.get(key, 0.0) for row in rows])) for key in parts}
        figures["seconds of a step"] = split
        figures["forward and backward, share"] = (split["forward"] + split["backward"]) / sum(split.values())
    return figures


def encoding_rate(job: TrainJob) -> float:
    """Items a second that the trained model encodes, from texts to vectors; a first turn is not counted."""
    encoder, seconds = job.encoder("retrieval_grpo"), []
    for _ in range(2):
        start = time.perf_counter()
        encoder.encode_document(list(job.catalog.items))
        seconds.append(time.perf_counter() - start)
    return len(job.catalog.items) / seconds[-1]


def comparison(run: Path) -> dict[str, Any]:
    """What the run measured: the metrics of every system, and Retrieval-GRPO against stage 1."""
    metrics = read_json(run / "metrics.json")
    tests = {metric: against["stage1"] for metric, against in metrics["tests"].items() if "stage1" in against}
    return {"metrics": metrics["systems"], "retrieval_grpo against stage1": tests}


if __name__ == "__main__":
    main()
