"""Time to a given nDCG@10: pipelines of mined hard negatives, built from sentence-transformers' own parts, and Retrieval-GRPO, in turns in one run.

    OMP_NUM_THREADS=1 python benchmarks/hard_negatives.py --run runs/demo --out runs/hard_negatives --turns 3

``--run`` is a run folder with its start model: its catalog, settings and judge. A pipeline trains with `MultipleNegativesRankingLoss`, batches without
duplicates, on (query, item) pairs, then in ``--rounds`` rounds mines negatives with the model it has (`mine_hard_negatives`) and trains on with them:

- ``clicks``: pairs are what stage 1 trains on; a negative, which may be unknown, must score below 95 % (``--margin``) of the farthest click;
- ``grades``: pairs are all items of the training queries that the catalog grades good; all others are known to be bad, so no margin is needed, and the
  pipeline knows what the judge knows;
- ``stage1``: as ``grades``, from our stage 1 of the same turn on instead of a first training of its own; its seconds count.

Rate, sampling and margin were chosen on the validation split of the generated shop (LOG). A round mines five negatives of each query for all its pairs. All
parts begin at the start model, use one thread count and take seeds by the turn. Evaluation, on ``--split``, is not counted. A pipeline's target is its highest
nDCG@10 at any evaluation, in the median of the turns; the four hundredths below it are given too. Writes a file per turn and part, which is not made again,
``OUT/hard_negatives.json``, and the pipelines' last models with their ``costs.json`` into ``OUT/PART/turnN``.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from datasets import Dataset
from run import code, machine
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from sentence_transformers.util import mine_hard_negatives
from transformers import TrainerCallback

from taoemb import contrastive
from taoemb.backbone import prepare
from taoemb.catalog import Catalog
from taoemb.config import load_config
from taoemb.contrastive import Positives, train_contrastive
from taoemb.encoder import Encoder
from taoemb.evaluation import evaluate
from taoemb.files import read_json, write_json
from taoemb.index.exact import ExactIndex
from taoemb.job import TrainConfig, TrainJob
from taoemb.store import encode_corpus
from taoemb.tracking import Tracker
from taoemb.trainer import RetrievalGRPOTrainer

PIPELINES = ("clicks", "grades", "stage1")
MINING = {"range_min": 0, "range_max": 100, "num_negatives": 5, "use_faiss": True, "batch_size": 1024, "verbose": False}
Curve = list[tuple[float, float]]
"""Seconds of training, nDCG@10."""


def main() -> None:
    """Run the parts in turns, print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--learning-rate", type=float, default=3e-2, help="of the first training; rounds have .3 of it")
    parser.add_argument("--batch", type=int, default=128, help="pairs, with their negatives in a round")
    parser.add_argument("--steps", type=int, default=1500, help="of the pipeline's first training")
    parser.add_argument("--hard-steps", type=int, default=250, help="of each round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--sampling", choices=("top", "random"), default="random", help="of the Top-100")
    parser.add_argument("--margin", type=float, default=0.05, help="of the negatives of clicks; 0 for none")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=(*PIPELINES, "ours"), default=[*PIPELINES, "ours"])
    parser.add_argument("--split", default="test")
    parser.add_argument("--every", type=int, default=50, help="steps between evaluations")
    arguments = parser.parse_args()
    config = load_config(TrainConfig, arguments.run / "config.yaml")
    curves: dict[str, list[Curve]] = {name: [] for name in arguments.only}
    over: list[float] = []
    settings = {"every": arguments.every, "split": arguments.split}
    theirs = {
        name: getattr(arguments, name)
        for name in ("learning_rate", "batch", "steps", "hard_steps", "rounds", "sampling", "margin")
    }
    for turn in range(arguments.turns):
        for name, found in curves.items():
            file = arguments.out / f"turn{turn}" / f"{name}.json"
            identity = settings | ({} if name == "ours" else theirs)
            if not file.exists():
                # A job of its own: a job keeps BM25, texts and verdicts, which each part is to pay for
                job = TrainJob(config, arguments.run)
                clock = Clock(job, arguments.every, arguments.split)
                extra = (
                    ours(arguments.out / "work", job, clock, turn)
                    if name == "ours"
                    else pipeline(arguments, job, clock, name, turn)
                )
                write_json(file, {"settings": identity, "curve": clock.rounded(), **extra})
            read = read_json(file)
            if read["settings"] != identity:
                raise SystemExit(f"{file} is of other settings, {read['settings']}; give another --out, or delete it")
            found.append(read["curve"])
            if name == "ours":
                over.append(read["stage1_seconds"])
            shown = read["curve"][:: max(1, len(read["curve"]) // 12)]
            print(
                f"turn {turn}, {name}: " + ", ".join(f"{ndcg:.3f} at {spent:.0f} s" for spent, ndcg in shown),
                flush=True,
            )
    result: dict[str, Any] = {**code(), "machine": machine(), **settings, **theirs, "mining": MINING,
                              "threads": torch.get_num_threads(), "curves": curves, "stage1_seconds": over, "against": {}}  # fmt: skip
    for name in [name for name in PIPELINES if name in curves and "ours" in curves]:
        best = float(np.median([max(ndcg for _, ndcg in curve) for curve in curves[name]]))
        lower = [cents / 100 for cents in range(math.ceil(100 * best) - 1, math.ceil(100 * best) - 5, -1)]
        found = [against(curves[name], curves["ours"], target) for target in (best, *lower)]
        result["against"][name] = found[0] | {"lower": found[1:]}
        print(f"{name} (our stage 1 ends at {np.median(over):.0f} s), seconds to nDCG@10: " + "; ".join(f"{one['target']:.3f} theirs {np.median(one['theirs']):.0f}, ours {np.median(one['ours']):.0f}, "
                                                         f"ratio {one['ratio']:.2f}" for one in found))  # fmt: skip
    write_json(arguments.out / "hard_negatives.json", result)


def against(theirs: list[Curve], ours: list[Curve], target: float) -> dict[str, Any]:
    """Seconds of each turn to a target, and our median over theirs."""
    seconds = {
        "theirs": [reached(curve, target) for curve in theirs],
        "ours": [reached(curve, target) for curve in ours],
    }
    return {"target": target, **seconds, "ratio": float(np.median(seconds["ours"]) / np.median(seconds["theirs"]))}


def reached(curve: Curve, target: float) -> float:
    """Seconds to the first evaluation at the target; of a turn that stays below it, to its own best.

    >>> reached([(1.0, 0.2), (2.0, 0.5), (3.0, 0.4)], 0.3), reached([(1.0, 0.2), (2.0, 0.5), (3.0, 0.4)], 0.6)
    (2.0, 2.0)
    """
    return next(spent for spent, ndcg in curve if ndcg >= min(target, max(ndcg for _, ndcg in curve)))


class Clock(TrainerCallback):
    """Seconds of training, without evaluations, and what the model was worth then."""

    def __init__(self, job: TrainJob, every: int, split: str) -> None:
        self.job, self.every = job, every
        self.queries = job.test_queries if split == "test" else job.catalog.queries.select(split, job.catalog.qrels)
        self.curve: Curve = []
        self.began, self.paused = time.perf_counter(), 0.0
        self.encoder: Encoder | None = None

    @property
    def seconds(self) -> float:
        """So far."""
        return time.perf_counter() - self.began - self.paused

    def rounded(self) -> Curve:
        """The curve, for a file."""
        return [(round(spent, 2), round(ndcg, 4)) for spent, ndcg in self.curve]

    def look(self, encoder: Encoder) -> None:
        """Evaluate, beside the clock."""
        spent, begin = self.seconds, time.perf_counter()
        queries, catalog = self.queries, self.job.catalog
        index = ExactIndex.build(encode_corpus(encoder, catalog.items))
        found = zip(
            queries.ids, *(part.tolist() for part in index.search(encoder.encode_query(queries.texts), 10)), strict=True
        )
        run = {query: dict(zip(ids, scores, strict=True)) for query, ids, scores in found}
        known = {query: catalog.qrels.get(query, {}) for query in queries.ids}
        result = evaluate(run, known, metrics=["ndcg@10"], unjudged=catalog.unjudged, queries=queries.ids)
        self.curve.append((spent, float(result.mean()["ndcg@10"])))
        self.paused += time.perf_counter() - begin

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Every so many steps."""
        if self.encoder is not None and state.global_step % self.every == 0:
            self.look(self.encoder)


def ours(folder: Path, job: TrainJob, clock: Clock, turn: int) -> dict[str, float]:
    """Stage 1 and stage 2 as the run is set, but for the seed; returns when stage 1 was over."""
    encoder, _ = stage1(folder, job, clock, turn)
    over = clock.seconds
    encoder.save(folder / "stage1")
    encoder = clock.encoder = Encoder(folder / "stage1")
    prepare(encoder, job.config.backbone, one_tower=job.config.stage2.rewards.relevance_alone)
    config = dataclasses.replace(job.config.stage2, seed=turn)
    functions, weights = job._rewards(config)
    RetrievalGRPOTrainer(encoder, job.catalog, functions, weights, config, run_dir=folder, name="stage2", trackers=("jsonl",),
                         callbacks=[clock]).train()  # fmt: skip
    shutil.rmtree(folder)
    return {"stage1_seconds": over}


def stage1(folder: Path, job: TrainJob, clock: Clock, turn: int) -> tuple[Encoder, int]:
    """Our stage 1 from the start model, and its item encodings."""
    shutil.rmtree(folder, ignore_errors=True)
    encoder = job._prepared("untrained", 1)

    class Looking(Tracker):
        def log(self, step: int, metrics: Any) -> None:
            super().log(step, metrics)
            if (step + 1) % clock.every == 0:
                clock.look(encoder)

    with patch.object(contrastive, "Tracker", Looking):
        encodings = train_contrastive(
            encoder, job.catalog, dataclasses.replace(job.config.stage1, seed=turn), run_dir=folder, trackers=("jsonl",)
        )
    return encoder, encodings


def pipeline(arguments: argparse.Namespace, job: TrainJob, clock: Clock, kind: str, turn: int) -> dict[str, Any]:
    """sentence-transformers alone, but for the stage 1 that ``stage1`` begins at; returns how many pairs there are, and rows are mined in each round."""
    folder, batch = arguments.out / kind / f"turn{turn}", arguments.batch
    shutil.rmtree(folder, ignore_errors=True)
    texts = job.encoder("untrained").item_texts(job.catalog.items)
    pairs = positives(job.catalog, "clicks" if kind == "clicks" else "grades")
    queries = {query.id: query.text for query in job.catalog.queries}
    dataset = Dataset.from_dict({
        "anchor": [queries[q] for q, _ in pairs], "positive": [texts[i] for _, i in pairs],
    })  # fmt: skip
    corpus, encodings = list(dict.fromkeys(texts)), 0
    if kind == "stage1":
        encoder, encodings = stage1(folder, job, clock, turn)
    else:
        encoder = clock.encoder = job.encoder("untrained")
        fit(encoder, dataset, arguments.steps, batch, arguments.learning_rate, clock, folder, turn)
        encodings = batch * arguments.steps
    clock.encoder, mined_rows = encoder, []
    clock.look(encoder)
    for number in range(1, arguments.rounds + 1):
        mined = mine_hard_negatives(
            dataset,
            encoder.model,
            corpus=corpus,
            sampling_strategy=arguments.sampling,
            relative_margin=(arguments.margin or None) if kind == "clicks" else None,
            output_format="triplet" if kind == "clicks" else "n-tuple",  # a margin leaves many queries fewer than five
            **MINING,
        )
        mined_rows.append(len(mined))
        seed = 100 * turn + number
        fit(encoder, mined, arguments.hard_steps, batch, 0.3 * arguments.learning_rate, clock, folder, seed)
        clock.look(encoder)
        encodings += len(corpus) + (len(mined.column_names) - 1) * batch * arguments.hard_steps
    spent = clock.seconds
    shutil.rmtree(folder, ignore_errors=True)
    encoder.save(folder)
    write_json(folder / "costs.json", {"item_encodings": encodings, "judge_calls": 0, "seconds": spent})
    return {"pairs": len(dataset), "mined_rows": mined_rows}


def positives(catalog: Catalog, kind: str) -> list[tuple[str, int]]:
    """(training query, position of an item)."""
    if kind == "grades":
        catalog = dataclasses.replace(catalog, clicks=None)
    found = Positives(catalog, catalog.items.ids)
    return [(catalog.queries.ids[q], int(i)) for q in found.queries.tolist() for i in found.of(q)]


def fit(
    encoder: Encoder,
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
    loss = MultipleNegativesRankingLoss(encoder.model)
    SentenceTransformerTrainer(
        model=encoder.model, args=arguments, train_dataset=dataset, loss=loss, callbacks=[clock]
    ).train()


if __name__ == "__main__":
    main()
