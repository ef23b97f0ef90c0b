"""The stages of TaoSR1 on the generated shop: label alone, reasons before and after the label, preferences, GRPO; how many seeds you like.

    python benchmarks/judge_stages.py --data runs/shop-20000-0 --out runs/judge_stages --model SmolLM2-135M.gguf settings...

Words after the options are settings of `JudgeTrainConfig` for every run. Rows: the start model
(zero-shot), ``label``, ``pre`` and ``post`` after supervised fine-tuning, one of these (``--style``) after DPO and after GRPO, and GRPO on prompts
as they come in the place of as many of each grade. Graded on pairs of test queries: the label is the most probable answer at the first place, for
``pre`` the one that a greedy completion ends with. Prints a Markdown table and writes ``OUT/judge_stages.json``; what is there is not
computed again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from taoemb.config import load_config
from taoemb.files import read_json, write_json
from taoemb.judge import CausalJudge
from taoemb.judge.chains import chain_metrics, pass_at_k
from taoemb.judge.evaluation import evaluate_judge
from taoemb.judge.examples import parse, parse_label, shop_examples
from taoemb.judge.prompts import JudgePrompt
from taoemb.judge.sampling import sample_completions
from taoemb.judge.schemes import GRADES_4
from taoemb.judge.train import JudgeTrainer
from taoemb.judge.train_config import JudgeTrainConfig
from taoemb.shop import Shop
from taoemb.shop_rules import load_ontology
from taoemb.types import JudgeOutput

SHOWN = ("macro_f1", "good_f1", "accuracy", "auc", "ece", "pass@1", "pass@5", "format_failure", "step_accuracy", "rule_adherence",
         "discriminative_hallucination")  # fmt: skip
RULES = "Judge how well the item serves the query."  # short: a small model on a CPU reads it for every pair
MAX_CHARS = 100


def main() -> None:
    """Train and evaluate what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--style", choices=("post", "pre"), default="post", help="what is trained further")
    parser.add_argument("--pairs", type=int, default=1000, help="test pairs")
    parser.add_argument("--written", type=int, default=200, help="test pairs for which completions are written")
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_args()
    shop = Shop.load(arguments.data)
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in arguments.seeds:
        for name, found in one_seed(arguments, shop, arguments.model, seed, arguments.out / f"seed{seed}").items():
            rows.setdefault(name, []).append(found)
    keys = (*SHOWN, "kappa", *(f"pass@{k}" for k in range(2, 5)))
    result = {name: {key: [row[key] for row in found if key in row] for key in keys} for name, found in rows.items()}
    write_json(
        arguments.out / "judge_stages.json", {"seeds": arguments.seeds, "settings": arguments.settings, "rows": result}
    )
    print("| stage | " + " | ".join(SHOWN) + " |\n| --- |" + " --- |" * len(SHOWN))
    for name, row in result.items():
        cells = [
            f"{np.mean(v):.3f}" + (f" ± {np.std(v, ddof=1):.3f}" if len(v) > 1 else "") if v else ""
            for v in map(row.__getitem__, SHOWN)
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


def one_seed(
    arguments: argparse.Namespace, shop: Shop, model: str, seed: int, folder: Path
) -> dict[str, dict[str, float]]:
    """stage -> metrics."""
    base = [f"data={arguments.data}", f"seed={seed}", f"rules={RULES}", f"max_chars={MAX_CHARS}", *arguments.settings]
    found: dict[str, dict[str, float]] = {}

    def measured(name: str, trained: str | Path, style: str) -> None:
        file = folder / f"{name}.json"
        if not file.exists():
            write_json(file, measure(arguments, shop, trained, style, folder / "written" / name))
        found[name] = read_json(file)

    def run(name: str, start: str | Path, stages: str, *words: str) -> None:
        config = load_config(JudgeTrainConfig, None, [*base, f"model={start}", f"stages=[{stages}]", *words])
        JudgeTrainer(config, folder / name, say=lambda text: print(f"seed {seed}, {name}, {text}", flush=True)).run()

    measured("zero-shot", model, "post")
    ours = arguments.style
    for style in ("label", "post" if ours == "pre" else "pre"):
        run(style, model, "sft", f"style={style}")
        measured(style, folder / style / "sft" / "model", style)
    run(ours, model, "sft,dpo,grpo", f"style={ours}")
    for stage in ("sft", "dpo", "grpo"):
        measured(ours if stage == "sft" else f"{ours} + {stage}", folder / ours / stage / "model", ours)
    run("natural", folder / ours / "dpo" / "model", "grpo", f"style={ours}", "grpo.balance=false", "balance=false")
    measured(f"{ours} + grpo, natural", folder / "natural" / "grpo" / "model", ours)
    return found


class Parsed:
    """The labels that greedy completions end with, as sure verdicts; a completion without one abstains."""

    name, scheme = "pre", GRADES_4

    def __init__(self, judge: CausalJudge, examples: list[Any], file: Path) -> None:
        texts = sample_completions(judge.model, judge.reads, examples, 1, file, style="pre", temperature=0).texts
        self.labels = {(e.query.id, e.item.id): parse_label(t[0], "pre") for e, t in zip(examples, texts, strict=True)}
        self.fingerprint = judge.fingerprint

    def score(self, pairs: list[Any]) -> JudgeOutput:
        """Look up."""
        labels = [self.labels[q.id, i.id] for q, i in pairs]
        return GRADES_4.output(
            np.array([np.full(4, np.nan) if label is None else np.eye(4)[label] for label in labels])
        )


def measure(arguments: argparse.Namespace, shop: Shop, model: str | Path, style: str, folder: Path) -> dict[str, float]:
    """Of one model."""
    judge = CausalJudge(model)
    if judge.prompt.rules != RULES:  # the start model has none saved
        judge = CausalJudge(judge.model, tokenizer=judge.tokenizer, prompt=JudgePrompt(GRADES_4, RULES, MAX_CHARS))
    examples = shop_examples(shop, arguments.pairs, 7, split="test", balance=False)
    labels = [e.grade for e in examples]
    graded = Parsed(judge, examples, folder / "greedy_all.jsonl") if style == "pre" else judge
    values = evaluate_judge(graded, [(e.query, e.item) for e in examples], np.array(labels), bootstrap=0).values
    some = examples[: arguments.written]
    drawn = sample_completions(judge.model, judge.reads, some, 5, folder / "drawn.jsonl", style=style)  # type: ignore[arg-type]
    found = {**values, **{f"pass@{k}": pass_at_k(drawn.correct(labels[: len(some)]), k) for k in range(1, 6)}}
    if style != "label":
        greedy = sample_completions(
            judge.model, judge.reads, some, 1, folder / "greedy.jsonl", style=style, temperature=0
        )  # type: ignore[arg-type]
        chains = [parse(texts[0], style) for texts in greedy.texts]  # type: ignore[arg-type]
        truth = [e.category for e in some], [e.attribute for e in some]
        found |= chain_metrics(chains, truth[0], truth[1], GRADES_4.labels(load_ontology().grade_table))
    return {name: float(value) for name, value in found.items() if value == value}


if __name__ == "__main__":
    main()
