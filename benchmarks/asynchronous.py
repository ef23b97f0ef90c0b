"""What refreshing the index in the background costs a training step.

    python benchmarks/asynchronous.py --run runs/demo --out runs/asynchronous                       # on the CPU
    python benchmarks/asynchronous.py --run runs/demo --out runs/asynchronous --device cuda --items 100000

One training run from the run's stage-1 model with a full refresh in the background every few steps: the steps during which an
encode runs beside are compared with those during which none does, so that both alternate in one run. The same number of steps
without a refresh, and with refreshes that training waits for, are the frame.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from taoemb.backbone import prepare
from taoemb.catalog import Catalog
from taoemb.config import load_config
from taoemb.encoder import Encoder
from taoemb.files import write_json
from taoemb.index.channels import BM25Channel
from taoemb.job import TrainConfig
from taoemb.judge import OracleJudge
from taoemb.rewards import ExclusivityReward, QualityReward, RelevanceReward, item_quality
from taoemb.shop import generate_shop
from taoemb.trainer import RetrievalGRPOTrainer


class Timed(RetrievalGRPOTrainer):
    """The trainer, with the seconds of every step and whether an encode ran beside it."""

    def _refresh_if_due(self, step: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if step:
            self.steps.append((now - self.began, self.beside))
        super()._refresh_if_due(step)
        self.began, self.beside = now, self.refresher.refreshing


def main() -> None:
    """Train three times and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", type=Path, required=True, help="finished run folder: its stage-1 model and its catalog"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--items", type=int, help="items of a new shop; without it the run's own catalog")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=40, help="steps between refreshes")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    settings = load_config(TrainConfig, arguments.run / "config.yaml")
    catalog = Catalog.load(settings.data) if arguments.items is None else generate_shop(arguments.items, seed=0).catalog
    bm25 = BM25Channel.build(catalog.items.ids, settings.template.texts(catalog.items))
    weights = settings.stage2.rewards
    found: dict[str, object] = {"items": len(catalog.items), "steps": arguments.steps, "every": arguments.every,
                                "device": arguments.device, "threads": torch.get_num_threads()}  # fmt: skip
    if arguments.device.startswith("cuda"):
        found["device"] = torch.cuda.get_device_name()
    for name, every, background in (
        ("never", 0, False),
        ("waited for", arguments.every, False),
        ("beside", arguments.every, True),
    ):
        rewards = [RelevanceReward(OracleJudge(catalog.qrels, catalog.unjudged)), QualityReward(item_quality(catalog.items)),
                   ExclusivityReward(bm25, weights.exclusivity_mode, weights.exclusivity_top_n)]  # fmt: skip
        config = replace(settings.stage2, steps=arguments.steps, save_steps=10 * arguments.steps, refresh_steps=every,
                         refresh_mode="full", refresh_async=background)  # fmt: skip
        encoder = Encoder(arguments.run / "models" / "stage1", device=arguments.device)
        prepare(encoder, settings.backbone)
        trainer = Timed(encoder, catalog, rewards, [weights.relevance, weights.quality, weights.exclusivity], config,
                        run_dir=arguments.out, name=f"{name}-{time.time_ns()}", trackers=())  # fmt: skip
        trainer.steps, trainer.began, trainer.beside = [], 0.0, False
        trainer.train()
        found[name] = summary(trainer.steps)
        print(name, found[name], flush=True)
        write_json(arguments.out / "asynchronous.json", found)


def summary(steps: list[tuple[float, bool]]) -> dict[str, float]:
    """Seconds of steps, the first tenth left out: those with an encode beside against those without."""
    steps = steps[len(steps) // 10 :]
    seconds, beside = np.array([s for s, _ in steps]), np.array([b for _, b in steps])
    row = {"seconds in all": float(seconds.sum()), "step ms": 1e3 * float(np.median(seconds))}
    if beside.any() and not beside.all():
        alone, both = np.median(seconds[~beside]), np.median(seconds[beside])
        row |= {"step alone ms": 1e3 * float(alone), "step with an encode beside ms": 1e3 * float(both), "ratio": float(both / alone),
                "share of steps with an encode beside": float(beside.mean())}  # fmt: skip
    return row


if __name__ == "__main__":
    main()
