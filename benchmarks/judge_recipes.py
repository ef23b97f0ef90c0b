"""The systems after TaoSR1 on the generated shop: shaped rewards and replay, stepwise advantages, context; each a row that begins at the same model.

    python benchmarks/judge_recipes.py --data runs/shop-20000-0 --out runs/judge_recipes --conditions benchmarks/conditions/grids/judge_recipes.yaml \\
        --start pre=runs/judge_stages/seed0/pre/sft/model --start post=runs/judge_stages/seed0/post/sft/model --seeds 0 1 2 settings...

Words after the options are settings of `JudgeTrainConfig` for every row. Each model is graded on pairs of test queries, as they come and as many of
each grade, by the label that its greedy completion states; where the label comes first by the most probable label, without context and with it
(``chance`` is the mean probability of the right label, which is how often a completion drawn at temperature 1 states it).
From the log of the training come the entropy, the share of right labels in the completions that are drawn, how many steps that
takes to reach `REACHED`, and what replay did. Prints a Markdown table and writes ``OUT/judge_recipes.json``; what is there is not computed again.
Completions that are drawn before the training are drawn once for all rows that draw the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from judge_stages import MAX_CHARS, RULES

from taoemb.config import load_config
from taoemb.evaluation import paired_bootstrap
from taoemb.files import read_json, write_json
from taoemb.judge import CausalJudge
from taoemb.judge.chains import chain_metrics
from taoemb.judge.contexts import Contexts
from taoemb.judge.evaluation import evaluate_judge
from taoemb.judge.examples import Example, parse, shop_examples
from taoemb.judge.sampling import sample_completions
from taoemb.judge.schemes import GRADES_4
from taoemb.judge.train import JudgeTrainer
from taoemb.judge.train_config import JudgeTrainConfig
from taoemb.shop import Shop
from taoemb.shop_rules import load_ontology
from taoemb.types import JudgeOutput

REACHED = 0.5
"""Share of right labels among the completions of five entries of the log in a row, of ten steps each."""
KINDS = ("natural", "balanced")
SHOWN = ("natural/macro_f1", "natural/good_f1", "natural/accuracy", "balanced/macro_f1", "balanced/accuracy", "natural/auc", "natural/with/auc",
         "natural/with/accuracy", "balanced/with/accuracy", "step_accuracy", "rule_adherence", "discriminative_hallucination", "entropy", "drawn_right",
         "steps_to_reach", "replayed", "rescued")  # fmt: skip


def main() -> None:
    """Train and grade what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--conditions", type=Path, required=True)
    parser.add_argument("--start", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--only", nargs="+", help="rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--pairs", type=int, default=1000, help="test pairs of each kind")
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_args()
    arguments.start = {name: Path(folder) for name, _, folder in (word.partition("=") for word in arguments.start)}
    conditions = yaml.safe_load(arguments.conditions.read_text())
    unknown = {*(arguments.only or []), *(row["start"] for row in conditions.values())} - {
        *conditions,
        *arguments.start,
    }
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: neither a row of {arguments.conditions} nor given with --start")
    shop = Shop.load(arguments.data)
    contexts = Contexts.load("shop", arguments.data)
    rows: dict[str, list[dict[str, float]]] = {}
    for name, folder in arguments.start.items():
        rows[f"start: {name}"] = [graded(arguments, shop, contexts, folder, name, arguments.out / f"start-{name}")]
    for seed in arguments.seeds:
        for name in arguments.only or conditions:
            rows.setdefault(name, []).append(row(arguments, shop, contexts, conditions, name, seed))
    keys = sorted({key for found in rows.values() for one in found for key in one})
    result = {name: {key: [one[key] for one in found if key in one] for key in keys} for name, found in rows.items()}
    queries = [example.query.id for kind in KINDS for example in pairs_of(shop, arguments.pairs, kind)]
    tests = {name: tested(arguments, conditions, name, queries) for name in rows if name in conditions}
    write_json(arguments.out / "judge_recipes.json", {
        "seeds": arguments.seeds, "settings": arguments.settings, "conditions": conditions, "rows": result, "tests": tests,
    })  # fmt: skip
    print("| row | " + " | ".join(SHOWN) + " |\n| --- |" + " --- |" * len(SHOWN))
    for name, found in result.items():
        print(f"| {name} | " + " | ".join(cell(found.get(key, [])) for key in SHOWN) + " |")
    for name, found in tests.items():
        said = [f"{key} {test['difference']:+.3f} (p = {test['p_value']:.2g})" for key, test in found.items()]
        print(f"{name}: {', '.join(said)}")


def pairs_of(shop: Shop, count: int, kind: str) -> list[Example]:
    """What is graded: pairs of test queries as they come (``natural``), or as many of each grade (``balanced``)."""
    return shop_examples(shop, count, 7, split="test", balance=kind == "balanced")


def tested(
    arguments: argparse.Namespace, conditions: dict[str, Any], name: str, queries: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Accuracy over all graded pairs against where the row began, and against the first row that began there: paired bootstrap over the
    queries, each with all its pairs; seeds averaged first."""
    _, of = np.unique(queries, return_inverse=True)
    start = conditions[name]["start"]
    first = next(other for other in conditions if conditions[other]["start"] == start)

    def right(other: str, part: str) -> np.ndarray | None:
        folders = [arguments.out / f"start-{other}"] if other in arguments.start else [
            arguments.out / f"seed{seed}" / other for seed in arguments.seeds]  # fmt: skip
        if not all((folder / "right.json").exists() for folder in folders):
            return None
        found = [read_json(folder / "right.json") for folder in folders]
        if not all(f"natural{part}" in one for one in found):
            return None
        pairs_SN = np.array(
            [[right for kind in KINDS for right in one[f"{kind}{part}"]] for one in found], dtype=np.float64
        )
        sums_SQ = np.stack([np.bincount(of, weights=row) for row in pairs_SN])
        return sums_SQ * (sums_SQ.shape[1] / len(of))  # so that the mean over the queries is the accuracy

    tests = {}
    for part in ("", "/with"):
        ours = right(name, part)
        for other in dict.fromkeys((start, first)):
            theirs = right(other, part)
            if ours is not None and theirs is not None and other != name:
                test = paired_bootstrap(ours, theirs)
                tests[f"accuracy{part} against {other}"] = asdict(test)
    return tests


def cell(values: Sequence[float]) -> str:
    """Mean and deviation of what is there."""
    if not values:
        return ""
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def row(
    arguments: argparse.Namespace, shop: Shop, contexts: Contexts, conditions: dict[str, Any], name: str, seed: int
) -> dict[str, float]:
    """Train one row with one seed, and the rows that it begins at; its figures."""
    folder = arguments.out / f"seed{seed}" / name
    given = dict(conditions[name])
    start, stages = given.pop("start"), given.pop("stages", ["grpo"])
    if start not in arguments.start:
        row(arguments, shop, contexts, conditions, start, seed)
    log = folder / "run" / "grpo" / "log.jsonl"
    identity = {"condition": conditions[name], "settings": arguments.settings, "pairs": arguments.pairs}
    if (folder / "row.json").exists() and (read := read_json(folder / "row.json")) != identity:
        raise SystemExit(f"{folder} is a row of other settings, {read}; give another --out, or delete it")
    write_json(folder / "row.json", identity)
    if not (folder / "graded.json").exists():
        begin = (
            arguments.start.get(start)
            or arguments.out / f"seed{seed}" / start / "run" / conditions[start]["stages"][-1] / "model"
        )
        words = [f"data={arguments.data}", f"seed={seed}", f"rules={RULES}", f"max_chars={MAX_CHARS}", f"model={begin}",
                 f"stages=[{','.join(stages)}]", *arguments.settings, *(f"{key}={value}" for key, value in given.items())]  # fmt: skip
        trainer = JudgeTrainer(load_config(JudgeTrainConfig, None, words), folder / "run",
                               say=lambda text: print(f"seed {seed}, {name}, {text}", flush=True))  # fmt: skip
        config = trainer.config
        draws = config.grpo
        read = "context" if config.contexts and not draws.dyknow.context else "no context"
        shared = (
            arguments.out
            / f"seed{seed}"
            / f"drawn {start}, {read}, {draws.num_generations}, {draws.temperature}, {draws.top_k}"
        )
        mine = folder / "run" / "grpo"
        if "grpo" in stages and (shared / "samples.jsonl").exists() and not mine.exists():
            shutil.copytree(shared, mine)
        model = trainer.run()
        if "grpo" in stages and not shared.exists():
            shared.mkdir(parents=True)
            for kept in ("samples.jsonl", "samples.json"):
                shutil.copy(mine / kept, shared / kept)
        graded(arguments, shop, contexts, model, config.style, folder)
    return {**read_json(folder / "graded.json"), **(logged(log) if "grpo" in stages else {})}


def logged(file: Path) -> dict[str, float]:
    """What the training says of itself: over its last 50 steps, and how long it took to get somewhere."""
    rows = [one for one in map(json.loads, file.read_text().splitlines()) if "label/right" in one]
    right = np.array([one["label/right"] for one in rows])
    window = np.convolve(right, np.full(5, 0.2), "valid") if len(right) >= 5 else right
    found = {"drawn_right": float(right[-5:].mean()), "entropy": float(np.mean([one["entropy"] for one in rows[-5:]])),
             "entropy_at_first": float(np.mean([one["entropy"] for one in rows[:2]])), "drawn_right_at_first": float(right[:5].mean())}  # fmt: skip
    if (window >= REACHED).any():
        found["steps_to_reach"] = float(rows[int((window >= REACHED).argmax()) + min(4, len(rows) - 1)]["step"])
    if "replay/groups" in rows[0]:  # of the groups of a step
        found |= {
            name: float(np.mean([one[f"replay/{key}"] for one in rows]))
            for name, key in (("replayed", "groups"), ("rescued", "rescued"))
        }
    return found


def graded(
    arguments: argparse.Namespace, shop: Shop, contexts: Contexts, model: Path, style: str, folder: Path
) -> dict[str, float]:
    """Figures of one model."""
    file = folder / "graded.json"
    if file.exists():
        return dict(read_json(file))
    folder.mkdir(parents=True, exist_ok=True)
    judge = CausalJudge(model)
    found: dict[str, float] = {}
    right: dict[str, list[bool]] = {}
    for kind in KINDS:
        examples = pairs_of(shop, arguments.pairs, kind)
        pairs, labels = [(e.query, e.item) for e in examples], np.array([e.grade for e in examples])

        chains = written(judge, examples, style, folder / f"{kind}.jsonl")
        if style == "pre":
            sure = np.array(
                [np.full(4, np.nan) if c.label is None else np.eye(4)[c.label] for c in chains]
            )  # without a label it abstains
            found |= figures(GRADES_4.output(sure), examples, kind, ("macro_f1", "good_f1", "accuracy", "kappa"))
            found[f"{kind}/mean_label"] = float(np.mean([c.label for c in chains if c.label is not None]))
            right[kind] = [c.label == label for c, label in zip(chains, labels.tolist(), strict=True)]
        else:
            names = ("macro_f1", "good_f1", "accuracy", "kappa", "auc", "ece")
            chunks = [contexts.chunk(e.query, e.item) for e in examples]
            outputs = judge.score(pairs), judge.score(pairs, [chunk.text if chunk else "" for chunk in chunks])
            for output, prefix in zip(outputs, (kind, f"{kind}/with"), strict=True):
                found |= figures(output, examples, prefix, names)
                found[f"{prefix}/mean_label"] = float(np.argmax(output.probs, 1).mean())
                found[f"{prefix}/chance"] = float(output.probs[np.arange(len(labels)), labels].mean())
            without, with_chunk = (np.argmax(output.probs, 1) == labels for output in outputs)
            right |= {kind: without.tolist(), f"{kind}/with": with_chunk.tolist()}
            kinds = np.array([(f"misleading {c.kind}" if c.misleading else c.kind) if c else "none" for c in chunks])
            for one in np.unique(kinds):
                at = kinds == one
                found |= {f"{kind}/{one}/pairs": float(at.sum()), f"{kind}/{one}/accuracy": float(without[at].mean()),
                          f"{kind}/{one}/accuracy_with": float(with_chunk[at].mean())}  # fmt: skip
        if kind == "natural":
            truth = [e.category for e in examples][: len(chains)], [e.attribute for e in examples][: len(chains)]
            found |= chain_metrics(chains, *truth, GRADES_4.labels(load_ontology().grade_table))  # type: ignore[arg-type]
    found = {key: float(value) for key, value in found.items() if value == value}
    write_json(folder / "right.json", right)
    write_json(file, found)
    return found


def figures(output: JudgeOutput, examples: Sequence[Example], prefix: str, names: Sequence[str]) -> dict[str, float]:
    """Of verdicts on the examples, named ``prefix/name``."""
    pairs, labels = [(e.query, e.item) for e in examples], np.array([e.grade for e in examples])
    values = evaluate_judge(Scored(output), pairs, labels, bootstrap=0).values
    return {f"{prefix}/{name}": values[name] for name in names}


class Scored:
    """Verdicts that are there already, of the pairs in their order."""

    name, fingerprint, scheme = "scored", "scored", GRADES_4

    def __init__(self, output: JudgeOutput) -> None:
        self.output = output

    def score(self, pairs: Sequence[tuple[Any, Any]]) -> JudgeOutput:
        """All of them."""
        assert len(pairs) == len(self.output.probs)
        return self.output


def written(judge: CausalJudge, examples: Sequence[Example], style: str, file: Path) -> list[Any]:
    """Chains of greedy completions; where the label comes first, of 200 alone, for what their reasons say."""
    some = examples if style == "pre" else examples[:200]
    texts = sample_completions(
        judge.model, judge.reads, some, 1, file, style=style, temperature=0, max_new_tokens=64
    ).texts  # type: ignore[arg-type]
    return [parse(text[0], style) for text in texts]  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
