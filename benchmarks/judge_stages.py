"""The stages of TaoSR1 on the generated shop: label alone, reasons before and after the label, preferences, GRPO; how many seeds you like.

    python benchmarks/judge_stages.py --data runs/shop-20000-0 --out runs/judge_stages --model SmolLM2-135M.gguf settings...
    python benchmarks/judge_stages.py --data runs/shop-20000-0 --out runs/judge_stages --model SmolLM2-135M.gguf --layers 4 settings...

``--layers N`` keeps the first N layers of a Llama and those of its tokens that the shop and the folders of ``--corpora`` need, for
machines that cannot train the whole; there is no row of the start model then. Words after the options are settings of `JudgeTrainConfig` for every run. Rows: the start model
(zero-shot), ``label``, ``pre`` and ``post`` after supervised fine-tuning, ``post`` after DPO and after GRPO, and GRPO on prompts as they come
in the place of as many of each grade. Graded on pairs of test queries: the label is the most probable answer at the first place, for
``pre`` the one that a greedy completion ends with. Prints a Markdown table and writes ``OUT/judge_stages.json``; what is there is not
computed again.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from taoemb.catalog import Catalog, Query
from taoemb.config import load_config
from taoemb.files import read_json, replace_folder, write_json
from taoemb.judge import CausalJudge
from taoemb.judge.causal import load_causal
from taoemb.judge.chains import chain_metrics, pass_at_k
from taoemb.judge.evaluation import evaluate_judge
from taoemb.judge.examples import parse, parse_label, shop_examples
from taoemb.judge.prompts import JudgePrompt
from taoemb.judge.sampling import sample_completions
from taoemb.judge.schemes import GRADES_4
from taoemb.judge.train import JudgeTrainConfig, JudgeTrainer
from taoemb.shop import Shop
from taoemb.shop_rules import load_ontology
from taoemb.types import JudgeOutput

SHOWN = ("macro_f1", "good_f1", "accuracy", "auc", "ece", "pass@1", "pass@5", "format_failure", "step_accuracy", "rule_adherence",
         "discriminative_hallucination")  # fmt: skip
RULES = "Judge how well the item serves the query."  # short: a small model on a CPU reads it for every pair
MAX_CHARS = 100
RARE = 10
"""A token that the corpora hold less often is not kept."""


def main() -> None:
    """Train and evaluate what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--layers", type=int, help="keep the first ones alone")
    parser.add_argument("--corpora", type=Path, nargs="+", default=[], help="catalogs whose tokens are also kept")
    parser.add_argument("--pairs", type=int, default=1000, help="test pairs")
    parser.add_argument("--written", type=int, default=200, help="test pairs for which completions are written")
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_args()
    shop = Shop.load(arguments.data)
    rows: dict[str, list[dict[str, float]]] = {}
    model = arguments.model
    if arguments.layers:
        model = str(cut(model, arguments.layers, [arguments.data, *arguments.corpora], arguments.out / "start"))
    for seed in arguments.seeds:
        for name, found in one_seed(arguments, shop, model, seed, arguments.out / f"seed{seed}").items():
            rows.setdefault(name, []).append(found)
    result = {name: {key: [row[key] for row in found if key in row] for key in SHOWN} for name, found in rows.items()}
    write_json(
        arguments.out / "judge_stages.json", {"seeds": arguments.seeds, "settings": arguments.settings, "rows": result}
    )
    print("| stage | " + " | ".join(SHOWN) + " |\n| --- |" + " --- |" * len(SHOWN))
    for name, row in result.items():
        cells = [
            f"{np.mean(v):.3f}" + (f" ± {np.std(v, ddof=1):.3f}" if len(v) > 1 else "") if v else ""
            for v in row.values()
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

    if not arguments.layers:  # a part of a model says nothing
        measured("zero-shot", model, "post")
    for style in ("label", "pre"):
        run(style, model, "sft", f"style={style}")
        measured(style, folder / style / "sft" / "model", style)
    run("post", model, "sft,dpo,grpo")
    for stage in ("sft", "dpo", "grpo"):
        measured("post" if stage == "sft" else f"post + {stage}", folder / "post" / stage / "model", "post")
    run("natural", folder / "post" / "dpo" / "model", "grpo", "grpo.balance=false", "balance=false")
    measured("post + grpo, natural", folder / "natural" / "grpo" / "model", "post")
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


def cut(model: str, layers: int, corpora: list[Path], folder: Path) -> Path:
    """The first layers of a Llama, with the tokens that the texts need: what of a real model a CPU can train."""
    if folder.exists():
        return folder
    whole, tokenizer = load_causal(model, dtype="float32")
    prompt, counts = JudgePrompt(GRADES_4, RULES, MAX_CHARS), Counter[int]()
    for corpus in corpora:
        catalog = Catalog.load(corpus)
        texts = [prompt.user(Query("", ""), catalog.items[i]) for i in range(min(len(catalog.items), 20_000))]
        texts += [query.text for query in catalog.queries]
        for start in range(0, len(texts), 1000):
            counts.update(token for row in tokenizer(texts[start : start + 1000])["input_ids"] for token in row)
        if (corpus / "truth.parquet").exists():
            for example in shop_examples(Shop.load(corpus), 8000, 99):
                counts.update(tokenizer(example.reasons)["input_ids"])
    counts.update(dict.fromkeys(tokenizer(prompt.system() + "".join(map(str, range(100))))["input_ids"], RARE))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab, merges = state["model"]["vocab"], [tuple(merge) for merge in state["model"]["merges"]]
    token_of, parts = {number: token for token, number in vocab.items()}, {a + b: (a, b) for a, b in merges}
    added = [token for token in state["added_tokens"] if token["content"] in vocab]
    waiting = [token_of[number] for number, count in counts.items() if count >= RARE and number in token_of]
    waiting += [token for token in vocab if len(token) == 1] + [token["content"] for token in added]
    kept: set[str] = set()
    while waiting:
        token = waiting.pop()
        if token not in kept:
            kept.add(token)
            waiting += parts.get(token, ())  # what it is merged from
    order = sorted(kept, key=vocab.__getitem__)
    state["model"]["vocab"] = {token: number for number, token in enumerate(order)}
    state["model"]["merges"] = [list(merge) for merge in merges if "".join(merge) in kept and {*merge} <= kept]
    state["added_tokens"] = [token | {"id": order.index(token["content"])} for token in added]
    fewer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), chat_template=tokenizer.chat_template,
        **{name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")},
    )  # fmt: skip
    rows = whole.get_input_embeddings().weight.detach()[torch.tensor([vocab[token] for token in order])]
    whole.model.layers = whole.model.layers[:layers]
    whole.config.num_hidden_layers = layers
    whole.resize_token_embeddings(len(order))
    with torch.no_grad():
        whole.get_input_embeddings().weight.copy_(rows)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for settings in (whole.config, whole.generation_config):
            setattr(settings, name, getattr(fewer, name))
    with replace_folder(folder, "config.json") as beside:
        whole.save_pretrained(beside)
        fewer.save_pretrained(beside)
    print(f"{folder}: {layers} layers, {len(order):,} tokens, {whole.num_parameters() / 1e6:.1f} million weights")
    return folder


if __name__ == "__main__":
    main()
