"""How well an index follows the encoder, by refresh mode, along real training runs.

    python benchmarks/refresh.py --run runs/demo --out runs/refresh                  # the shop of `make demo`
    python benchmarks/refresh.py --run runs/demo --out runs/refresh --items 100000   # a larger shop, the same start model

Stage 2 is trained once per mode from the run's stage-1 model. After every refresh, and just before the next one, where the
index is at its oldest, the whole catalog is encoded afresh (not counted) and the index in use is compared with exact search
over that: overlap@K of a probe of training queries, Recall@10 of the fresh Top-10, seconds, and the share of the catalog
that the refresh encoded.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from taoemb.backbone import prepare
from taoemb.catalog import Catalog
from taoemb.config import load_config
from taoemb.encoder import Encoder
from taoemb.files import write_json
from taoemb.index.channels import BM25Channel
from taoemb.index.exact import ExactIndex
from taoemb.index.results import overlap
from taoemb.job import TrainConfig
from taoemb.judge import OracleJudge
from taoemb.rewards import ExclusivityReward, QualityReward, RelevanceReward, item_quality
from taoemb.shop import generate_shop
from taoemb.store import encode_corpus
from taoemb.trainer import PROBE, RetrievalGRPOTrainer

MODES = ("never", "full", "touched", "rolling", "procrustes")


class Measured(RetrievalGRPOTrainer):
    """The trainer, which also compares its index with a fresh one around every refresh."""

    def _refresh_if_due(self, step: int) -> None:
        interval = self.config.refresh_steps or self.measure_every
        due = step > 0 and step % interval == 0
        if due:
            self.rows.append({"step": step, "when": "before", **self._compare()})
        encoded, start = self.refresher.encoded, time.perf_counter()
        super()._refresh_if_due(step)
        spent = time.perf_counter() - start
        if due:
            self.rows.append({"step": step, "when": "after", "seconds": spent, **self._compare(),
                              "share": (self.refresher.encoded - encoded) / len(self.item_texts)})  # fmt: skip

    def _compare(self) -> dict[str, float]:
        fresh = ExactIndex.build(encode_corpus(self.encoder, self.catalog.items))
        probe = self.encoder.encode_query([self.query_texts[q] for q in self.train_queries[:PROBE]])
        K = self.config.num_candidates
        stale_K, fresh_K = (index.search_positions(probe, K)[0] for index in (self.refresher.index, fresh))
        return {"overlap": overlap(stale_K, fresh_K), "recall@10": overlap(stale_K[:, :10], fresh_K[:, :10]),
                "cosine": float((self.refresher.index.vectors * fresh.vectors).sum(1).mean())}  # fmt: skip


def main() -> None:
    """Train once per mode and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", type=Path, required=True, help="finished run folder: its stage-1 model and its catalog"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--items", type=int, help="items of a new shop; without it the run's own catalog")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--every", type=int, default=100, help="steps between refreshes")
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--asynchronous", action="store_true")
    arguments = parser.parse_args()
    settings = load_config(TrainConfig, arguments.run / "config.yaml")
    catalog = Catalog.load(settings.data) if arguments.items is None else generate_shop(arguments.items, seed=0).catalog
    bm25 = BM25Channel.build(catalog.items.ids, settings.template.texts(catalog.items))
    found = {}
    for mode in arguments.modes:
        found[mode] = measure(mode, arguments, settings, catalog, bm25)
        write_json(arguments.out / "refresh.json", found)
        print(line(mode, found[mode]), flush=True)


def measure(
    mode: str, arguments: argparse.Namespace, settings: TrainConfig, catalog: Catalog, bm25: BM25Channel
) -> dict:
    """One training run in one mode."""
    from dataclasses import replace

    never = mode == "never"
    config = replace(settings.stage2, refresh_steps=0 if never else arguments.every, refresh_share=arguments.share,
                     refresh_mode="full" if never else mode, refresh_async=arguments.asynchronous)  # fmt: skip
    weights = config.rewards
    rewards = [RelevanceReward(OracleJudge(catalog.qrels, catalog.unjudged)), QualityReward(item_quality(catalog.items)),
               ExclusivityReward(bm25, weights.exclusivity_mode, weights.exclusivity_top_n)]  # fmt: skip
    name = f"{mode}-{len(catalog.items)}-{arguments.every}-{arguments.share:g}" + "-async" * arguments.asynchronous
    encoder = Encoder(arguments.run / "models" / "stage1")
    prepare(encoder, settings.backbone)
    trainer = Measured(encoder, catalog, rewards, [weights.relevance, weights.quality, weights.exclusivity], config,
                       run_dir=arguments.out, name=name, trackers=("jsonl",))  # fmt: skip
    trainer.rows, trainer.measure_every = [], arguments.every
    start = time.perf_counter()
    trainer.train()
    return {"rows": trainer.rows, "items": len(catalog.items), "steps": config.steps, "every": arguments.every,
            "seconds": time.perf_counter() - start}  # fmt: skip


def line(mode: str, found: dict) -> str:
    """The means over the refreshes of a run as a row of a Markdown table."""

    def mean(key: str, when: str) -> float:
        return float(np.mean([row[key] for row in found["rows"] if row["when"] == when]))

    return (f"| {mode} | {mean('share', 'after'):.3f} | {mean('seconds', 'after'):.2f} | {mean('overlap', 'after'):.3f} | "
            f"{mean('recall@10', 'after'):.3f} | {mean('overlap', 'before'):.3f} | {mean('cosine', 'before'):.4f} |")  # fmt: skip


if __name__ == "__main__":
    print(
        "| mode | share encoded | seconds | overlap@K after | recall@10 after | overlap@K before the next | cosine before |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    main()
