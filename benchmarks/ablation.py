"""Stage 2 under many conditions from the same stage-1 models: equal start, candidates, steps and judge; one table with paired tests.

    python benchmarks/ablation.py --runs runs/seeds/seed0 runs/seeds/seed1 runs/seeds/seed2 \\
        --conditions benchmarks/conditions/policies.yaml --out runs/ablation

``--runs`` are finished run folders that differ in their seed (`benchmarks/seeds.py` makes them): each gives its stage-1 model, its
catalog and its judge. A conditions file maps a name to the settings of stage 2 that differ, and to ``noise``, the
`flip_noise` of an oracle judge; ``stage1`` is always a row, and so is ``default``, the settings of the run. A condition that is there already is not trained again. Prints a Markdown table, with ``*`` where a figure differs from
``default`` (paired bootstrap over the queries, seeds averaged first, p < .05), and writes ``OUT/ablation.json``.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np
import yaml

from taoemb.comparison import compare
from taoemb.config import load_config
from taoemb.encoder import Encoder
from taoemb.evaluation import paired_bootstrap
from taoemb.files import read_json, write_json
from taoemb.index.exact import ExactIndex
from taoemb.job import TrainConfig, TrainJob
from taoemb.judge import OracleJudge
from taoemb.rewards import RelevanceReward
from taoemb.store import encode_corpus
from taoemb.trainer import RetrievalGRPOTrainer

SHOWN = ("ndcg@10", "condensed_ndcg@10", "auc", "recall@100", "goodrate@10", "quality@10", "overlap@10",
         "exclusive_goodrate@10")  # fmt: skip


def main() -> None:
    """Train and evaluate what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--conditions", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", help="names of conditions; without it all")
    arguments = parser.parse_args()
    conditions = {"stage1": None, "default": {}, **yaml.safe_load(arguments.conditions.read_text(encoding="utf-8"))}
    names = [name for name in conditions if not arguments.only or name in (*arguments.only, "stage1", "default")]
    found: dict[str, list[dict]] = {name: [] for name in names}
    for run in arguments.runs:
        job = TrainJob(load_config(TrainConfig, run / "config.yaml"), run)
        for name in names:
            file = arguments.out / run.name / f"{name}.json"
            if not file.exists():
                write_json(file, measure(job, run, name, conditions[name], arguments.out / run.name / name))
            found[name].append(read_json(file))
    rows = {name: summary(found[name], found["default"]) for name in names}
    write_json(arguments.out / "ablation.json", {"seeds": len(arguments.runs), "conditions": conditions, "rows": rows})
    print(table(rows))


def measure(job: TrainJob, run: Path, name: str, settings: dict | None, folder: Path) -> dict:
    """Train one condition (None: nothing, stage 1 as it is) and evaluate it query by query."""
    encoder, encodings = job.encoder("stage1"), 0
    if settings is not None:
        overrides = [f"stage2.{key}={value}" for key, value in settings.items() if key != "noise"]
        overrides.append("systems=[stage1,retrieval_grpo]")  # the run may have rows of policies
        config = load_config(TrainConfig, run / "config.yaml", overrides).stage2
        functions, weights = job._rewards(config)
        for function in functions:
            if isinstance(function, RelevanceReward) and "noise" in settings:
                oracle = function.judge  # of the generated shop; another kind of judge has noise of its own
                function.judge = OracleJudge(oracle.qrels, oracle.unjudged, flip_noise=settings["noise"])
        trainer = RetrievalGRPOTrainer(encoder, job.catalog, functions, weights, config, run_dir=folder, name="stage2",
                                       trackers=("jsonl",))  # fmt: skip
        encodings = trainer.train()
    return {"item_encodings": encodings, **evaluated(job, name, encoder)}


def evaluated(job: TrainJob, name: str, encoder: Encoder) -> dict:
    """metric -> value per test query, None where a query has none."""
    index = ExactIndex.build(encode_corpus(encoder, job.catalog.items))
    comparison = compare(job.catalog, job.test_queries, {name: (encoder, index)}, None, channels=list(job.channels.values()),
                         quality_N=job.quality_N, top_n=job.config.stage2.rewards.exclusivity_top_n)  # fmt: skip
    per_query = comparison.evaluations[name].per_query
    return {
        "per_query": {
            metric: [None if np.isnan(v) else v for v in values.tolist()] for metric, values in per_query.items()
        }
    }


def summary(seeds: list[dict], default: list[dict]) -> dict:
    """Means, deviations over the seeds and tests against the default condition."""
    row: dict = {"item_encodings": float(np.mean([seed["item_encodings"] for seed in seeds])), "metrics": {}}
    for metric in seeds[0]["per_query"]:
        ours, theirs = (
            np.array([seed["per_query"][metric] for seed in some], dtype=np.float64) for some in (seeds, default)
        )
        if np.isfinite(ours).any() and metric in default[0]["per_query"]:
            means = np.nanmean(ours, axis=1)
            row["metrics"][metric] = {"mean": float(means.mean()), "deviation": float(means.std(ddof=1)) if len(means) > 1 else 0.0,
                                      "against_default": asdict(paired_bootstrap(ours, theirs))}  # fmt: skip
    return row


def table(rows: dict[str, dict]) -> str:
    """Markdown: mean ± deviation; the best of each column in bold."""
    shown = [metric for metric in SHOWN if metric in rows["default"]["metrics"]]
    lines = ["| condition | " + " | ".join(shown) + " | item encodings |", "| --- |" + " --- |" * (len(shown) + 1)]
    best = {
        metric: (min if metric.startswith("overlap") else max)(row["metrics"][metric]["mean"] for row in rows.values())
        for metric in shown
    }
    for name, row in rows.items():
        cells = []
        for metric in shown:
            value = row["metrics"][metric]
            text = f"{value['mean']:.3f}" + (f" ± {value['deviation']:.3f}" if value["deviation"] else "")
            text = f"**{text}**" if value["mean"] == best[metric] else text
            cells.append(text + ("*" if name != "default" and value["against_default"]["p_value"] < 0.05 else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {row['item_encodings'] / 1e6:.2f} M |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
