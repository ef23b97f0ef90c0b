"""Stage 2 under many conditions from the same stage-1 models: equal start, candidates, steps and judge; one table with paired tests.

    python benchmarks/ablation.py --runs runs/seeds/seed0 runs/seeds/seed1 runs/seeds/seed2 \\
        --conditions benchmarks/conditions/grids/policies.yaml --out runs/ablation

``--runs`` are finished run folders that differ in their seed (`benchmarks/seeds.py` makes them): each gives its stage-1 model, its
catalog and its judge. A conditions file maps a name to the settings of stage 2 that differ, and to ``noise``, the
`flip_noise` of an oracle judge, or ``binary``, a judge that tells good from bad alone; settings of the ``backbone`` and of another ``judge``
are named so (``backbone.tower``, ``judge.kind``). ``{model: ...}`` is evaluated as it is: ``bm25``, ``untrained``, ``minilm``, a hub id, or a folder whose ``costs.json``
says what it took (``{seed}`` in it is the run's, ``{models}`` what ``--models`` says). ``{fused: NAME}`` is BM25 fused with the model of that condition,
``{continued: NAME}`` stage 1 trained on for as many item encodings as that condition, which must be there, has spent. ``stage1`` is always
a row, and so is ``default``, the settings of the run. A condition that is there already
with the same settings is not trained again. Prints a Markdown table, with ``*`` where a figure differs from
``--against`` (paired bootstrap over the queries, seeds averaged first, p < .05), and writes ``OUT/ablation.json``.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import yaml
from run import code, machine

from taoemb.backbone import prepare
from taoemb.benchmark import BM25, Systems, fuse, metrics_to
from taoemb.comparison import compare
from taoemb.config import load_config
from taoemb.contrastive import train_contrastive
from taoemb.encoder import Encoder
from taoemb.evaluation import paired_bootstrap
from taoemb.files import read_json, write_json
from taoemb.health import hubness
from taoemb.index.exact import ExactIndex
from taoemb.job import TrainConfig, TrainJob
from taoemb.judge import OracleJudge
from taoemb.judge.build import JudgeBuilder
from taoemb.judge.evaluation import evaluate_judge
from taoemb.judge.examples import shop_examples
from taoemb.judge.schemes import scheme_of
from taoemb.judge.verdicts import output
from taoemb.pretrained import model_path
from taoemb.rewards import RelevanceReward
from taoemb.shop import Shop
from taoemb.store import encode_corpus
from taoemb.trainer import RetrievalGRPOTrainer
from taoemb.types import JudgeOutput, RelevanceJudge

SHOWN = ("ndcg@10", "condensed_ndcg@10", "auc", "recall@100", "goodrate@10", "quality@10", "overlap@10",
         "exclusive_goodrate@10")  # fmt: skip
COSTS = ("item_encodings", "total_item_encodings", "judge_calls", "judge_lookups", "seconds", "total_seconds")
"""Own, and with the stage 1 where a row begins at it; pairs that the judge was asked for, and all that were looked up in its cache or asked."""
BY_SLICE = ("ndcg@10", "recall@100")
DEPTH = 1000
"""Ranks that are evaluated."""
WHOLE = ("backbone.", "judge.")
GAPS = ("condensed_ndcg@10", "auc", "ndcg@10")


def main() -> None:
    """Train and evaluate what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--conditions", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", help="names of conditions; without it all")
    parser.add_argument("--models", default="runs/hard_negatives", help="folder of the models that conditions name")
    parser.add_argument("--against", default="default", help="the condition that the others are tested against")
    parser.add_argument(
        "--gap", nargs=2, metavar=("LOW", "HIGH"), help="also print the share of their distance that each closes"
    )
    arguments = parser.parse_args()
    conditions = {"stage1": None, "default": {}, **yaml.safe_load(arguments.conditions.read_text(encoding="utf-8"))}
    asked = [*(arguments.only or ()), *(arguments.gap or ()), "stage1", arguments.against]
    asked += [conditions[name]["continued"] for name in asked if "continued" in (conditions[name] or {})]
    names = [name for name in conditions if not arguments.only or name in asked]
    found: dict[str, list[dict]] = {name: [] for name in names}
    commits: set[str] = set()
    for run in arguments.runs:
        job = TrainJob(load_config(TrainConfig, run / "config.yaml"), run)
        for name in names:
            fused = (conditions[name] or {}).get("fused")
            base, folder = fused or name, arguments.out / run.name
            file = folder / f"{base}.json"
            model = (conditions[base] or {}).get("model")
            if model and "{seed}" not in model and found[name]:
                found[name].append(found[name][0])  # the runs differ in their seed alone
                continue
            if not file.exists():
                found_here = measure(job, run, base, conditions[base], folder / base, arguments.models)
                write_json(file, {"settings": conditions[base], **code(), **found_here})
                shutil.rmtree(folder / base / "checkpoints", ignore_errors=True)  # hundreds of MB each
            read = read_json(file)
            if read["settings"] != conditions[base]:
                raise SystemExit(f"{file} is of other settings, {read['settings']}; give another --out, or delete it")
            commits.add(f"{read.get('commit', '')} {read.get('changes', '')}".strip())
            begun = {} if model else job.phases.values["stage1"]
            read |= {
                f"total_{cost}": read[cost] + begun.get(cost, 0)
                for cost in ("item_encodings", "seconds")
                if cost in read
            }
            if fused:
                read = {**read, "per_query": read["fused"], "hubness@10": read["fused_hubness@10"]}
            found[name].append(read)
    rows = {name: summary(found[name], found[arguments.against]) for name in names}
    write_json(arguments.out / "ablation.json", {
        **code(), "machine": machine(), "seeds": len(arguments.runs), "commits_of_rows": sorted(commits),
        "conditions": conditions, "against": arguments.against, "rows": rows,
    })  # fmt: skip
    print(table(rows, arguments.against))
    if arguments.gap:
        print(gap(found, *arguments.gap))


def measure(job: TrainJob, run: Path, name: str, settings: dict | None, folder: Path, models: str) -> dict:
    """Train one condition (None: nothing, stage 1 as it is) and evaluate it query by query."""
    if settings is not None and "model" in settings:
        return as_it_is(job, name, settings["model"].replace("{models}", models))
    encoder, costs, judge = job.encoder("stage1"), {"item_encodings": 0, "judge_calls": 0, "seconds": 0.0}, {}
    whole_here = not (folder / "checkpoints").exists()  # what goes on after a kill knows its encodings alone
    if settings is not None and "continued" in settings:
        config = job.continued(read_json(folder.parent / f"{settings['continued']}.json")["item_encodings"])
        encoder, begin = job._prepared("stage1", 1), time.perf_counter()
        encodings = train_contrastive(encoder, job.catalog, config, run_dir=folder, trackers=("jsonl",))
        costs |= {"item_encodings": encodings, "seconds": time.perf_counter() - begin}
    elif settings is not None:
        overrides = [f"{key if key.startswith(WHOLE) else f'stage2.{key}'}={value}" for key, value in settings.items()
                     if key not in ("noise", "binary")]  # fmt: skip
        overrides.append("systems=[stage1,retrieval_grpo]")  # the run may have rows of policies
        whole = load_config(TrainConfig, run / "config.yaml", overrides)
        config = whole.stage2
        prepare(encoder, whole.backbone, one_tower=config.rewards.relevance_alone)
        functions, weights = job._rewards(config)
        if whole.judge != job.config.judge and whole.judge.fitted:
            raise ValueError(
                f"{name}: a judge that is fitted to grades would be fitted to queries that the run is evaluated on; take another"
            )
        for function in functions:
            if not isinstance(function, RelevanceReward):
                continue
            if whole.judge != job.config.judge:
                function.judge = JudgeBuilder(whole.judge, job.catalog, folder / "judge", print).judge
            if "noise" in settings:
                oracle = function.judge
                if not isinstance(oracle, OracleJudge):
                    raise ValueError(
                        f"{name}: noise is for an oracle, and the judge of {run} is {oracle.name}, with its own"
                    )
                function.judge = OracleJudge(oracle.qrels, oracle.unjudged, flip_noise=settings["noise"])
            if settings.get("binary"):
                function.judge = Binary(function.judge, config.rewards.gate_threshold)
            judge = judged(job, function.judge)
        trainer = RetrievalGRPOTrainer(encoder, job.catalog, functions, weights, config, run_dir=folder, name="stage2",
                                       trackers=("jsonl",))  # fmt: skip
        begin = time.perf_counter()
        encodings = trainer.train()
        judges = [function for function in functions if isinstance(function, RelevanceReward)]
        calls = sum(function.calls for function in judges)
        lookups = calls + sum(function.hits for function in judges)
        costs = {
            "item_encodings": encodings,
            "judge_calls": calls,
            "judge_lookups": lookups,
            "seconds": time.perf_counter() - begin,
        }
    if not whole_here:
        costs = {"item_encodings": costs["item_encodings"]}
    return {**costs, "judge": judge, **evaluated(job, name, encoder)}


def as_it_is(job: TrainJob, name: str, model: str) -> dict:
    """Evaluate a model that nothing here trains."""
    if model == "bm25":
        return {"item_encodings": 0, **evaluated(job, name, None)}
    if model == "untrained":
        return {"item_encodings": 0, **evaluated(job, name, job.encoder("untrained"))}
    folder = model_path(model.format(seed=job.config.stage1.seed))
    costs = read_json(file) if (file := Path(folder) / "costs.json").exists() else {"item_encodings": 0}
    return {**costs, **evaluated(job, name, Encoder(folder, template=job.config.template))}


def judged(job: TrainJob, judge: RelevanceJudge) -> dict[str, float]:
    """What a judge is worth on 1,000 pairs of test queries of a generated shop."""
    if not (Path(job.config.data) / "truth.parquet").exists():
        return {}
    examples = shop_examples(Shop.load(job.config.data), 1000, 7, split="test", balance=False)
    labels = scheme_of(judge).labels([e.grade for e in examples])
    values = evaluate_judge(judge, [(e.query, e.item) for e in examples], labels, bootstrap=0).values
    return {name: values[name] for name in ("auc", "kappa", "good_f1")}


class Binary:
    """A judge that only tells good from bad."""

    def __init__(self, judge: RelevanceJudge, threshold: float) -> None:
        self.judge, self.threshold = judge, threshold
        self.name, self.fingerprint = f"{judge.name} (good or bad)", f"{judge.fingerprint} binary {threshold}"

    def score(self, pairs: list) -> JudgeOutput:
        """Grade 3 for what is good, else 0."""
        score = self.judge.score(pairs).score
        good = np.where(np.isnan(score), np.nan, score >= self.threshold)
        return output(np.stack([1 - good, 0 * good, 0 * good, good], axis=1))


def evaluated(job: TrainJob, name: str, encoder: Encoder | None) -> dict:
    """metric -> value per test query, None where a query has none, of an encoder (None: BM25) and of its fusion with BM25."""
    texts, queries = job.test_queries.texts, job.test_queries
    encoders = {} if encoder is None else {name: (encoder, ExactIndex.build(encode_corpus(encoder, job.catalog.items)))}
    systems = Systems(encoders, bm25=job.bm25)
    lists = systems.tops(texts, DEPTH)
    runs = {"fused": fuse([lists[BM25], lists[name]], DEPTH)} if encoders else {}
    comparison = compare(job.catalog, queries, encoders, None if encoders else job.bm25, channels=list(job.channels.values()), quality_N=job.quality_N,
                         top_n=job.config.stage2.rewards.exclusivity_top_n, runs=runs, metrics=metrics_to(DEPTH), depth=DEPTH)  # fmt: skip
    found = {
        system: {
            metric: [None if np.isnan(v) else v for v in values.tolist()]
            for metric, values in evaluation.per_query.items()
        }
        for system, evaluation in comparison.evaluations.items()
    }
    crowded = {
        system: hubness(np.unique([item for top in tops for item in top], return_counts=True)[1])
        for system, (tops, _) in comparison.lists.items()
    }
    system = name if encoders else BM25
    row = {
        "per_query": found[system],
        "hubness@10": crowded[system],
        "slices": [query.slice for query in queries],
    }
    return row | ({"fused": found["fused"], "fused_hubness@10": crowded["fused"]} if encoders else {})


def summary(seeds: list[dict], reference: list[dict]) -> dict:
    """Means, deviations over the seeds and tests against another condition; ndcg@10 and recall@100 per slice."""
    row: dict = {cost: float(np.mean([seed[cost] for seed in seeds if cost in seed] or [0])) for cost in COSTS}
    row |= {"metrics": {}, "slices": {}}
    for metric in seeds[0]["per_query"]:
        ours, theirs = (
            np.array([seed["per_query"][metric] for seed in some], dtype=np.float64) for some in (seeds, reference)
        )
        if np.isfinite(ours).any() and metric in reference[0]["per_query"]:
            row["metrics"][metric] = spread(np.nanmean(ours, axis=1)) | {
                "against": asdict(paired_bootstrap(ours, theirs))
            }
        for part in dict.fromkeys(seeds[0].get("slices", ())) if metric in BY_SLICE else ():
            of = np.array(seeds[0]["slices"]) == part
            if not np.isfinite(ours[:, of] + theirs[:, of]).any():
                continue
            test = asdict(paired_bootstrap(ours[:, of], theirs[:, of]))
            row["slices"].setdefault(part, {"queries": int(of.sum())})[metric] = spread(
                np.nanmean(ours[:, of], axis=1)
            ) | {"against": test}
    row["metrics"]["hubness@10"] = spread(np.array([seed["hubness@10"] for seed in seeds]))
    return row


def spread(values: np.ndarray) -> dict[str, float]:
    """Mean and deviation over the seeds."""
    return {
        "mean": float(values.mean()),
        "deviation": float(values.std(ddof=1)) if np.ptp(values) else 0.0,  # equal figures would have one of rounding
    }


def gap(found: dict[str, list[dict]], low: str, high: str) -> str:
    """Markdown: which share of the distance from one condition to another each closes, with the middle 95 % of its bootstrap over
    the queries (seeds averaged first)."""
    lines = [f"| share of the gap from {low} to {high} | " + " | ".join(GAPS) + " |", "| --- |" + " --- |" * len(GAPS)]
    draws = np.random.default_rng(0)
    for name in found:
        cells = []
        for metric in GAPS:
            rows = [
                np.array([seed["per_query"].get(metric, []) for seed in found[some]], dtype=np.float64)
                for some in (name, low, high)
            ]
            ours, base, top = (np.nanmean(some, axis=0) for some in rows)
            known = np.flatnonzero(np.isfinite(ours + base + top))
            if not len(known) or name in (low, high):
                cells.append("")
                continue
            drawn = known[draws.integers(len(known), size=(10_000, len(known)))]
            shares = (ours - base)[drawn].mean(1) / (top - base)[drawn].mean(1)
            share = (ours - base)[known].mean() / (top - base)[known].mean()
            cells.append(f"{share:.2f} [{np.percentile(shares, 2.5):.2f}, {np.percentile(shares, 97.5):.2f}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(rows: dict[str, dict], against: str) -> str:
    """Markdown: mean ± deviation; the best of each column in bold."""
    shown = [metric for metric in SHOWN if metric in rows[against]["metrics"]]
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
            differs = name != against and value["against"]["p_value"] < 0.05
            cells.append(text + ("*" if differs else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {row['item_encodings'] / 1e6:.2f} M |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
