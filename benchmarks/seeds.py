"""The main job with several seeds: mean and deviation of every system, and paired tests of Retrieval-GRPO over the seeds.

    python benchmarks/seeds.py --out runs/seeds --seeds 3                     # the generated shop, as in `make demo`
    python benchmarks/seeds.py --out runs/mine --data my-shop stage2.steps=400

The catalog and the start model are the same for every seed; training draws differently. A run folder that is there
already is not made again. Prints a Markdown table and writes ``OUT/seeds.json``.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from taoemb.config import load_config
from taoemb.evaluation import paired_bootstrap
from taoemb.files import write_json
from taoemb.job import TrainConfig, TrainJob
from taoemb.shop import generate_shop

OURS = "retrieval_grpo"
SHOWN = ("ndcg@10", "condensed_ndcg@10", "auc", "judged@10", "recall@100", "goodrate@10", "quality@10",
         "exclusive_goodrate@10")  # fmt: skip


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run folders")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="catalog folder; without it the generated shop of the demo")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of `taoemb train`")
    arguments = parser.parse_args()
    data = arguments.data or arguments.out / "shop"
    if arguments.data is None and not (data / "truth.parquet").exists():
        generate_shop(20_000, seed=0).save(data)
    jobs = []
    for seed in range(arguments.seeds):
        settings = [f"data={data}", f"stage1.seed={seed}", f"stage2.seed={seed}", *arguments.overrides]
        jobs.append(TrainJob(load_config(TrainConfig, None, settings), arguments.out / f"seed{seed}"))
        jobs[-1].run()
    summary = summarise(arguments.out, arguments.seeds)
    encodings = {name: np.mean([job.phases.values.get(name, {}).get("item_encodings", 0) for job in jobs])
                 for name in summary["systems"]}  # fmt: skip
    write_json(arguments.out / "seeds.json", summary | {"item_encodings": encodings})
    print(table(summary, encodings))


def summarise(out: Path, seeds: int) -> dict[str, dict]:
    """Mean and deviation over the seeds of each system's metrics, and the paired test of ours against every other."""
    columns = [pq.read_table(out / f"seed{seed}" / "per_query.parquet").to_pydict() for seed in range(seeds)]
    metrics = [name for name in columns[0] if name not in ("system", "query_id", "slice")]
    systems = list(dict.fromkeys(columns[0]["system"]))
    values = {
        system: {
            metric: np.array([
                [np.nan if v is None else v for s, v in zip(c["system"], c[metric], strict=True) if s == system]
                for c in columns
            ], dtype=np.float64)
            for metric in metrics
        }
        for system in systems
    }  # fmt: skip
    means = {s: {m: np.nanmean(v, axis=1) for m, v in row.items() if np.isfinite(v).any()} for s, row in values.items()}
    return {
        "systems": {s: {m: {"mean": v.mean(), "deviation": v.std(ddof=1) if seeds > 1 else 0.0}
                        for m, v in row.items()} for s, row in means.items()},
        "tests": {m: {s: asdict(paired_bootstrap(values[OURS][m], values[s][m]))
                      for s in systems if s != OURS and m in means[s]} for m in means[OURS]},
    }  # fmt: skip


def table(summary: dict[str, dict], encodings: dict[str, float]) -> str:
    """The summary as Markdown: mean ± deviation, and the p-values of our lead below."""
    shown = [m for m in SHOWN if m in summary["systems"][OURS]]
    lines = ["| system | " + " | ".join(shown) + " | item encodings |", "| --- |" + " --- |" * (len(shown) + 1)]
    for system, row in summary["systems"].items():
        cells = [f"{row[m]['mean']:.3f} ± {row[m]['deviation']:.3f}" if m in row else "" for m in shown]
        lines.append(f"| {system} | " + " | ".join(cells) + f" | {encodings[system]:,.0f} |")
    for metric in shown:
        others = summary["tests"].get(metric, {})
        found = [f"{s} {t['difference']:+.4f} (p={t['p_value']:.2g})" for s, t in others.items()]
        lines.append(f"\n{OURS} against, {metric}: " + ", ".join(found))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
