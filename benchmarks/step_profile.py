"""Where a training step of Retrieval-GRPO spends its wall time, and which share of it is the encoder's forward and backward pass.

    OMP_NUM_THREADS=1 python benchmarks/step_profile.py --run runs/seeds/seed0 --out runs/profile
    OMP_NUM_THREADS=1 python benchmarks/step_profile.py --run runs/seeds/seed0 --out runs/profile-minilm --model minilm --warmup 1 \\
        --steps 4 stage2.batch_size=16 stage2.num_candidates=16 stage2.global_negatives=128 stage2.learning_rate=2e-6

``--run`` is a finished run folder (`benchmarks/seeds.py` makes them); it gives the catalog, the judge, the settings and the stage-1
model. The real trainer runs, with timers around the functions of `PARTS`. A timer stops while another one inside of it
runs, so that the seconds add up to the whole; what no timer covers is the row ``unaccounted``. The window begins and ends where a step
begins: by default 100 steps, which hold one refresh and one checkpoint at the default settings. Prints two Markdown
tables and writes ``OUT/step_profile.json``.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

import taoemb.trainer as trainer_module
from taoemb import losses
from taoemb.backbone import prepare
from taoemb.config import load_config
from taoemb.contrastive import Positives
from taoemb.encoder import Encoder
from taoemb.files import write_json
from taoemb.gradcache import GradCache
from taoemb.index.channels import BM25Channel
from taoemb.index.exact import ExactIndex
from taoemb.index.refresh import IndexRefresher
from taoemb.job import TrainConfig, TrainJob
from taoemb.objective import Objective
from taoemb.pretrained import model_path
from taoemb.rewards import ExclusivityReward, QualityReward, RelevanceReward
from taoemb.tracking import Tracker
from taoemb.trainer import RetrievalGRPOTrainer

Trainer = RetrievalGRPOTrainer
PARTS: list[tuple[Any, str, str, str]] = [  # owner, function, part of the first table, row of the second
    (Encoder, "forward", "tokenising", "token ids, moved to the device"),
    (SentenceTransformer, "preprocess", "tokenising", "tokeniser"),
    (SentenceTransformer, "forward", "encoder", "forward pass"),
    (GradCache, "backward", "encoder", "backward pass"),
    (ExactIndex, "search_positions", "index search", "search"),
    (Trainer, "retrieve", "index search", "choosing the candidates"),
    (Positives, "sample", "index search", "drawing positives"),
    (Trainer, "judge", "judge and rewards", "gathering, items and queries as objects"),
    (RelevanceReward, "__call__", "judge and rewards", "relevance"),
    (QualityReward, "__call__", "judge and rewards", "quality"),
    (ExclusivityReward, "__call__", "judge and rewards", "exclusivity, membership"),
    (BM25Channel, "_find", "judge and rewards", "exclusivity, BM25 of queries not seen before"),
    (Trainer, "update", "loss and policy", "similarities, policy, KL, finding the distinct items"),
    (Objective, "__call__", "loss and policy", "advantages and objective"),
    (Positives, "masked", "loss and policy", "masks of InfoNCE"),
    (losses, "info_nce", "loss and policy", "InfoNCE, forward"),
    (torch.Tensor, "backward", "loss and policy", "gradient of the embeddings"),
    (torch.nn.utils, "clip_grad_norm_", "optimizer", "norm of the gradient, clipping"),
    (torch.optim.AdamW, "step", "optimizer", "step"),
    (torch.optim.AdamW, "zero_grad", "optimizer", "freeing the gradient"),
    (IndexRefresher, "touch", "refresh", "keeping the vectors of touched items"),
    (IndexRefresher, "note_retrieved", "refresh", "counting hits"),
    (IndexRefresher, "refresh_if_due", "refresh", "index, staleness"),
    (trainer_module, "save_checkpoint", "checkpoint", "checkpoint"),
    (trainer_module, "effective_rank", "health and logging", "effective rank"),
    (Trainer, "_health", "health and logging", "health"),
    (Tracker, "log", "health and logging", "log"),
]
CLOSED = ("judge and rewards", "refresh", "checkpoint")
"""Parts whose own encoding and searching is theirs: the encoder's row is only what the step itself asks of the encoder."""


class Clock:
    """Seconds and calls by (part, row); at any moment exactly one timer runs."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.seconds: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()
        self._stack = [("unaccounted", "")]
        self._now = now
        self._since = now()

    def reset(self) -> None:
        """Begin the window here."""
        self._book()
        self.seconds.clear()
        self.calls.clear()

    def _book(self) -> None:
        if torch.cuda.is_initialized():  # else the time goes to whoever waits for the device next
            torch.cuda.synchronize()
        now = self._now()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    @contextmanager
    def timer(self, part: str, row: str) -> Iterator[None]:
        """Time the block, less the timers inside of it."""
        closed = next((outer for outer, _ in self._stack if outer in CLOSED), None)
        if closed is not None and closed != part:
            part, row = closed, f"{part}, {row}"
        self._book()
        self._stack.append((part, row))
        self.calls[part, row] += 1
        try:
            yield
        finally:
            self._book()
            self._stack.pop()

    def wrap(self, owner: Any, name: str, part: str, row: str) -> None:
        """Put a timer around a function of a class or a module."""
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.timer(part, row):
                return original(*args, **kwargs)

        setattr(owner, name, timed)


class _WindowOver(Exception):
    """The steps that count are done."""


def main() -> None:
    """Run the steps and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="finished run folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="sentence-transformers model, or minilm; by default the run's stage-1 model")
    parser.add_argument("--warmup", type=int, default=10, help="steps before those that count")
    parser.add_argument("--steps", type=int, default=100, help="steps that count")
    parser.add_argument(
        "--cpu", action="store_true", help="seconds of the processor instead of the wall's: on a busy machine"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of `taoemb train`")
    arguments = parser.parse_args()
    if (arguments.out / "checkpoints").exists():
        raise ValueError(f"{arguments.out} holds a run that would be gone on with; give another folder")
    job = TrainJob(load_config(TrainConfig, arguments.run / "config.yaml"), arguments.run)
    settings = load_config(TrainConfig, arguments.run / "config.yaml", arguments.overrides)
    if settings.stage2.prefetch:
        raise ValueError("stage2.prefetch=true: the timers follow one thread; leave it off")
    encoder = job.encoder("stage1")
    if arguments.model is not None:  # reading items as the run does
        encoder = Encoder(model_path(arguments.model), template=settings.template)
    prepare(encoder, settings.backbone)
    functions, weights = job._rewards(settings.stage2)
    trainer = RetrievalGRPOTrainer(encoder, job.catalog, functions, weights, settings.stage2, run_dir=arguments.out,
                                   trackers=("jsonl",))  # fmt: skip
    clock = Clock(time.process_time if arguments.cpu else time.perf_counter)
    profile(trainer, clock, arguments.warmup, arguments.steps)
    result = {
        "model": arguments.model or "stage 1 of the run", "items": len(job.catalog.items), "threads": torch.get_num_threads(),
        "device": str(encoder.device), "batch_size": settings.stage2.batch_size, "steps": arguments.steps,
        "clock": "processor" if arguments.cpu else "wall",
        "num_candidates": settings.stage2.num_candidates, "global_negatives": settings.stage2.global_negatives,
        "ms a step": 1e3 * clock.seconds.total() / arguments.steps,
        "rows": [{"part": part, "row": row, "ms a step": 1e3 * spent / arguments.steps, "calls": clock.calls[part, row]}
                 for (part, row), spent in clock.seconds.most_common()],
    }  # fmt: skip
    write_json(arguments.out / "step_profile.json", result)
    print(tables(clock, arguments.steps))


def profile(trainer: RetrievalGRPOTrainer, clock: Clock, warmup: int, steps: int) -> None:
    """Train until the window is over; the trainer is of no use afterwards."""
    if not trainer.config.steps > warmup + steps:
        raise ValueError(f"stage2.steps={trainer.config.steps}: give more than the {warmup + steps} that are run")
    for owner, name, part, row in PARTS:
        clock.wrap(owner, name, part, row)
    IndexRefresher.refresh_if_due = at_window(IndexRefresher.refresh_if_due, clock, warmup, steps)  # type: ignore[method-assign]
    try:
        trainer.train()
    except _WindowOver:
        return
    raise RuntimeError("the trainer ended before the steps that count")


def at_window(begin_step: Callable[..., bool], clock: Clock, warmup: int, steps: int) -> Callable[..., bool]:
    """What a step begins with, ending the warm-up and the window."""

    def begin(refresher: IndexRefresher, step: int) -> bool:
        if step == warmup:
            clock.reset()
        if step == warmup + steps:
            clock._book()
            raise _WindowOver
        return begin_step(refresher, step)

    return begin


def tables(clock: Clock, steps: int) -> str:
    """Markdown: the parts of a step, and what each consists of."""
    whole = clock.seconds.total()
    parts: Counter[str] = Counter()
    for (part, _), spent in clock.seconds.items():
        parts[part] += spent
    lines = ["| part | ms a step | share |", "| --- | --- | --- |"]
    for part, spent in parts.most_common():
        lines.append(f"| {part} | {1e3 * spent / steps:.1f} | {spent / whole:.1%} |")
    lines += [f"| all | {1e3 * whole / steps:.1f} | 100% |", "", "| part | row | calls | ms a step | share |",
              "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for (part, row), spent in clock.seconds.most_common():
        calls = clock.calls[part, row]
        lines.append(f"| {part} | {row} | {calls} | {1e3 * spent / steps:.2f} | {spent / whole:.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
