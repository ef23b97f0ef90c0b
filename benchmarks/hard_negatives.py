"""Time to a given nDCG@10: the hard-negative pipeline built from sentence-transformers' own parts, and Retrieval-GRPO, in turns in one run.

    python benchmarks/hard_negatives.py --run runs/demo --out runs/hard_negatives --turns 3

``--run`` is a finished run folder (or one with its start model): its catalog, start model, settings and judge. Both begin at the start model and use
one thread count. The pipeline is sentence-transformers' documented one: `MultipleNegativesRankingLoss` with batches without duplicates on (query,
item) pairs, `mine_hard_negatives` with the model that this gives, training on with the mined negatives, mining again ``--rounds`` times.
It is run twice: its positives are what stage 1 trains on (``clicks``), or all items of the training queries that the catalog grades good (``grades``;
mined items that are graded good are then taken out too, so both know what the judge knows). Evaluation is not counted. The target is
the highest nDCG@10 that a pipeline reaches at any evaluation, in the median of the turns. Writes ``OUT/hard_negatives.json``, and the pipelines' last models with
their ``costs.json`` into ``OUT/POSITIVES/turnN``.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import sentence_transformers
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from sentence_transformers.util import mine_hard_negatives
from transformers import TrainerCallback

from taoemb.backbone import prepare
from taoemb.catalog import Catalog
from taoemb.config import load_config
from taoemb.contrastive import Positives, train_contrastive
from taoemb.encoder import Encoder
from taoemb.evaluation import evaluate
from taoemb.files import write_json
from taoemb.index.exact import ExactIndex
from taoemb.job import TrainConfig, TrainJob
from taoemb.store import encode_corpus
from taoemb.trainer import RetrievalGRPOTrainer
from taoemb.types import GOOD_GRADE

MINING = {"range_min": 0, "range_max": 100, "relative_margin": 0.05, "num_negatives": 5, "sampling_strategy": "top", "use_faiss": True,
          "batch_size": 1024}  # fmt: skip
"""As in the documentation's example of mining for a bi-encoder: positives must be 5 % nearer than what is taken for a negative."""
PIPELINES = ("clicks", "grades")


def main() -> None:
    """Run both in turns, print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=1e-2,
        help="of the pipeline's first training; the later ones have .3 of it",
    )
    parser.add_argument("--steps", type=int, default=1500, help="of the pipeline's first training, batches of 128")
    parser.add_argument("--hard-steps", type=int, default=500, help="of each training with mined negatives")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=(*PIPELINES, "ours"), default=[*PIPELINES, "ours"])
    parser.add_argument("--every", type=int, default=50, help="steps between evaluations")
    arguments = parser.parse_args()
    job = TrainJob(load_config(TrainConfig, arguments.run / "config.yaml"), arguments.run)
    curves: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in arguments.only}
    for turn in range(arguments.turns):
        for name, found in curves.items():
            clock = Clock(job, arguments.every)
            if name == "ours":
                ours(arguments.out / "ours", job, clock)
            else:
                pipeline(arguments, job, clock, name, turn)
            found.append([(round(spent, 2), round(ndcg, 4)) for spent, ndcg in clock.curve])
            shown = clock.curve[:: max(1, len(clock.curve) // 12)]
            print(
                f"turn {turn}, {name}: " + ", ".join(f"{ndcg:.3f} at {spent:.0f} s" for spent, ndcg in shown),
                flush=True,
            )
    result: dict[str, Any] = {
        "learning_rate": arguments.learning_rate, "steps": arguments.steps, "hard_steps": arguments.hard_steps, "rounds": arguments.rounds,
        "mining": MINING, "threads": torch.get_num_threads(), "curves": curves, "against": {},
        "versions": {"sentence_transformers": sentence_transformers.__version__, "torch": torch.__version__},
    }  # fmt: skip
    for name in [name for name in PIPELINES if name in curves and "ours" in curves]:
        target = float(np.median([max(ndcg for _, ndcg in curve) for curve in curves[name]]))
        seconds = {who: [reached(curve, target) for curve in curves[who]] for who in (name, "ours")}
        ratio = float(np.median(seconds["ours"]) / np.median(seconds[name]))
        result["against"][name] = {"target": target, "seconds": seconds, "ratio": ratio}
        print(f"{name}: nDCG@10 {target:.4f} after " + ", ".join(f"{who} {np.median(values):.0f} s ({', '.join(f'{v:.0f}' for v in values)})"
                                                               for who, values in seconds.items()) + f"; ratio {ratio:.2f}")  # fmt: skip
    write_json(arguments.out / "hard_negatives.json", result)


def reached(curve: list[tuple[float, float]], target: float) -> float:
    """Seconds to the first evaluation at the target; of a turn that stays below it, to its own best."""
    return next(spent for spent, ndcg in curve if ndcg >= min(target, max(ndcg for _, ndcg in curve)))


class Clock(TrainerCallback):
    """Seconds of training, without evaluations, and what the model was worth then."""

    def __init__(self, job: TrainJob, every: int) -> None:
        self.job, self.every, self.curve = job, every, []
        self.began, self.paused = time.perf_counter(), 0.0
        self.encoder: Encoder | None = None

    @property
    def seconds(self) -> float:
        """So far."""
        return time.perf_counter() - self.began - self.paused

    def look(self, encoder: Encoder) -> float:
        """Evaluate, beside the clock."""
        spent, begin = self.seconds, time.perf_counter()
        queries, grades = self.job.test_queries, self.job.catalog.qrels
        index = ExactIndex.build(encode_corpus(encoder, self.job.catalog.items))
        ids, scores = index.search(encoder.encode_query(queries.texts), 10)
        run = {
            q: dict(zip(i, s, strict=True)) for q, i, s in zip(queries.ids, ids.tolist(), scores.tolist(), strict=True)
        }
        known = {q: grades.get(q, {}) for q in queries.ids}
        ndcg = float(
            evaluate(run, known, metrics=["ndcg@10"], unjudged=self.job.catalog.unjudged, queries=queries.ids).mean()[
                "ndcg@10"
            ]
        )
        self.curve.append((spent, ndcg))
        self.paused += time.perf_counter() - begin
        return ndcg

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Every so many steps."""
        if self.encoder is not None and state.global_step % self.every == 0:
            self.look(self.encoder)


def ours(folder: Path, job: TrainJob, clock: Clock) -> None:
    """Stage 1 and stage 2 as the run is set."""
    shutil.rmtree(folder, ignore_errors=True)
    encoder = job._prepared("untrained", 1)
    train_contrastive(encoder, job.catalog, job.config.stage1, run_dir=folder, trackers=("jsonl",))
    clock.look(encoder)
    encoder.save(folder / "stage1")
    encoder = Encoder(folder / "stage1")
    prepare(encoder, job.config.backbone)
    functions, weights = job._rewards(job.config.stage2)
    clock.encoder = encoder
    trainer = RetrievalGRPOTrainer(encoder, job.catalog, functions, weights, job.config.stage2, run_dir=folder, name="stage2",
                                   trackers=("jsonl",), callbacks=[clock])  # fmt: skip
    trainer.train()


def pipeline(arguments: argparse.Namespace, job: TrainJob, clock: Clock, kind: str, turn: int) -> None:
    """sentence-transformers alone."""
    folder = arguments.out / kind / f"turn{turn}"
    clock.encoder = encoder = job.encoder("untrained")
    model: SentenceTransformer = encoder.model
    texts = encoder.item_texts(job.catalog.items)
    pairs = positives(job.catalog, kind)
    queries = {query.id: query.text for query in job.catalog.queries}
    dataset = Dataset.from_dict({
        "anchor": [queries[q] for q, _ in pairs], "positive": [texts[i] for _, i in pairs],
    })  # fmt: skip
    corpus, encodings = list(dict.fromkeys(texts)), 128 * arguments.steps
    fit(model, dataset, arguments.steps, 128, arguments.learning_rate, clock, folder, turn)
    clock.look(encoder)
    for round_ in range(1, arguments.rounds + 1):
        mined = mine_hard_negatives(dataset, model, corpus=corpus, output_format="triplet", verbose=False, **MINING)
        if kind == "grades":
            mined = without_good(mined, job.catalog, texts)
        fit(model, mined, arguments.hard_steps, 64, 0.3 * arguments.learning_rate, clock, folder, turn + 100 * round_)
        clock.look(encoder)
        encodings += len(corpus) + 2 * 64 * arguments.hard_steps
    spent = clock.seconds
    shutil.rmtree(folder, ignore_errors=True)
    encoder.save(folder)
    write_json(folder / "costs.json", {"item_encodings": encodings, "judge_calls": 0, "seconds": spent})


def positives(catalog: Catalog, kind: str) -> list[tuple[str, int]]:
    """(training query, position of an item)."""
    if kind == "grades":
        catalog = dataclasses.replace(catalog, clicks=None)
    found = Positives(catalog, catalog.items.ids)
    return [(catalog.queries.ids[q], int(i)) for q in found.queries.tolist() for i in found.of(q)]


def without_good(mined: Dataset, catalog: Catalog, texts: list[str]) -> Dataset:
    """Triplets whose negative has no good grade for the query."""
    good: dict[str, set[str]] = {}
    for query in catalog.queries.select("train"):
        listed = catalog.qrels.get(query.id, {})
        rows = catalog.items.positions([i for i, grade in listed.items() if grade >= GOOD_GRADE]).tolist()
        good.setdefault(query.text, set()).update(texts[row] for row in rows)
    return mined.filter(lambda row: row["negative"] not in good.get(row["anchor"], ()))


def fit(
    model: SentenceTransformer,
    dataset: Dataset,
    steps: int,
    batch: int,
    learning_rate: float,
    clock: Clock,
    folder: Path,
    seed: int,
) -> None:
    """Their trainer, with their settings but for steps, batch and rate."""
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=steps, per_device_train_batch_size=batch, learning_rate=learning_rate, warmup_steps=0.1,
        batch_sampler=BatchSamplers.NO_DUPLICATES, save_strategy="no", report_to="none", disable_tqdm=True, seed=seed, logging_steps=10_000,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=dataset, loss=MultipleNegativesRankingLoss(model), callbacks=[clock]
    )
    trainer.train()


if __name__ == "__main__":
    main()
