"""Peak memory of training steps as the groups grow, with and without GradCache's chunks: a process of its own per point.

    OMP_NUM_THREADS=1 python benchmarks/step_memory.py --out runs/memory

Transformer, generated shop, two steps of Retrieval-GRPO per point. ``before`` is the peak when the catalog has been encoded and training
begins, ``peak`` the peak at the end; ``texts`` are the queries and distinct items of a step. With a fixed chunk the activations of one
chunk are held, however large the group; a chunk larger than the step holds all of them. Prints a Markdown table and
writes ``OUT/step_memory.json``.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

from taoemb.encoder import Encoder
from taoemb.files import write_json
from taoemb.judge import OracleJudge
from taoemb.pretrained import model_path
from taoemb.rewards import RelevanceReward
from taoemb.shop import generate_shop
from taoemb.trainer import RetrievalGRPOTrainer
from taoemb.trainer_config import RetrievalGRPOConfig

STEPS = 2
WHOLE = 1_000_000
"""A chunk that holds every step."""


def main() -> None:
    """Measure every point in a process of its own, or the one that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="minilm", help="sentence-transformers model, or minilm")
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--groups", nargs="+", default=["2x8", "4x16", "8x32", "16x64"], metavar="BxK")
    parser.add_argument(
        "--whole", nargs="*", default=["2x8", "4x16", "8x32"], metavar="BxK", help="also without chunks"
    )
    parser.add_argument("--chunk", type=int, default=16, help="texts per chunk")
    parser.add_argument("--point", nargs=2, metavar=("BxK", "CHUNK"), help="measure this one and print it as JSON")
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(measure(arguments, *arguments.point)))
        return
    wanted = [(group, arguments.chunk) for group in arguments.groups] + [(group, WHOLE) for group in arguments.whole]
    rows = []
    print("| B x K | texts | chunk | before, MiB | peak, MiB |\n| --- | --- | --- | --- | --- |")
    for group, chunk in wanted:
        command = [sys.executable, __file__, *sys.argv[1:], "--point", group, str(chunk)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        shown = "all" if chunk == WHOLE else chunk
        print(f"| {group} | {row['texts']:.0f} | {shown} | {row['before']:.0f} | {row['peak']:.0f} |", flush=True)
    write_json(arguments.out / "step_memory.json", {"model": arguments.model, "items": arguments.items, "rows": rows})


def measure(arguments: argparse.Namespace, group: str, chunk: str) -> dict[str, float | str]:
    """Train two steps in this process."""
    queries, candidates = map(int, group.split("x"))
    catalog = generate_shop(arguments.items, train_queries=200, validation_queries=0, test_queries=0).catalog
    encoder = Encoder(model_path(arguments.model), device="cpu")
    config = RetrievalGRPOConfig(steps=STEPS, batch_size=queries, num_candidates=candidates, chunk_size=int(chunk),
                                 global_negatives=0, learning_rate=1e-6, save_steps=WHOLE)  # fmt: skip
    relevance = RelevanceReward(OracleJudge(catalog.qrels, catalog.unjudged))
    trainer = RetrievalGRPOTrainer(encoder, catalog, [relevance], [1.0], config, trackers=("jsonl",),
                                   run_dir=arguments.out / f"{group}-{chunk}")  # fmt: skip
    before: list[float] = []
    retrieve = trainer.retrieve

    def watched(*args: object) -> object:
        before.append(peak())
        return retrieve(*args)  # type: ignore[arg-type]

    trainer.retrieve = watched  # type: ignore[method-assign,assignment]
    encodings = trainer.train() - len(catalog.items)
    return {"group": group, "chunk": chunk, "texts": queries + encodings / STEPS, "before": before[0], "peak": peak()}


def peak() -> float:
    """The largest resident memory of this process so far, MiB (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
