"""The part ``taoemb judge``: train a relevance LLM, distil it, measure judges, write their verdicts."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from taoemb.cli_shared import Out, Seed, told_apart

if TYPE_CHECKING:
    from taoemb.catalog import Catalog, Item, Query, QuerySet
    from taoemb.judge.build import JudgeBuilder, JudgeConfig
    from taoemb.judge.evaluation import JudgeEvaluation
    from taoemb.types import JudgeOutput, RelevanceJudge

_SHOWN = 512  # pairs between two looks at the progress; our choice

judge_app = typer.Typer(
    help="Relevance judges: train and distil one, measure any, write verdicts.", no_args_is_help=True
)

Data = Annotated[Path, typer.Option(help="Catalog folder.")]
Judges = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads the annotation at run time, also on Python 3.10
    typer.Option(
        "--judge",
        help="Settings of a judge in one word, such as 'kind=hf_causal model=runs/judge/sft/model'; repeated, several are compared. "
        "`taoemb train --help-config` lists them under judge.",
    ),
]
Overrides = Annotated[Optional[list[str]], typer.Argument(help="Settings as KEY=VALUE.")]  # noqa: UP045


@judge_app.command("score")
@told_apart
def judge_score(
    data: Data,
    out: Out,
    judge: Annotated[str, typer.Option(help="Settings of the judge in one word, such as 'kind=soft_logic'.")],
    pairs: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="TREC run file of the pairs; by default those that the catalog grades."),
    ] = None,
) -> None:
    """Write a judge's verdicts on pairs to OUT/verdicts.parquet; a second call goes on after a kill."""
    import pyarrow as pa

    from taoemb.files import read_json, write_json
    from taoemb.judge.schemes import scheme_of
    from taoemb.tables import write_table

    builder = _builder(_catalog(data), judge, out)
    found = _run_pairs(builder, pairs) if pairs else builder.graded_pairs(list(builder.catalog.qrels))[0]
    if not found:
        raise ValueError(f"{data} grades no pairs; give a TREC run file with --pairs")
    out.mkdir(parents=True, exist_ok=True)
    facts = {
        "judge": builder.judge.name,
        "fingerprint": builder.judge.fingerprint,
        "settings": judge,
        "catalog": str(data),
    }
    told = out / "verdicts.json"
    if told.exists() and read_json(told)["fingerprint"] != facts["fingerprint"]:
        raise ValueError(f"{out} holds verdicts of {read_json(told)['settings']!r}; give another folder with --out")
    write_json(told, facts)
    typer.echo(f"{builder.judge.name}: {len(found):,} pairs", err=True)
    output, names = _scored(builder.judge, found), scheme_of(builder.judge).names
    columns: dict[str, Any] = {
        "query_id": [query.id for query, _ in found], "item_id": [item.id for _, item in found],
        "label": [names[label] if label >= 0 else None for label in output.grade.tolist()], "score": output.score,
        **{f"p_{name.lower()}": output.probs[:, c] for c, name in enumerate(names)},
    }  # fmt: skip
    if output.label_mass is not None:
        columns["label_mass"] = output.label_mass
    write_table(pa.table(columns), out / "verdicts.parquet")
    typer.echo(f"{out / 'verdicts.parquet'}: {len(found):,} verdicts of {builder.judge.name}", err=True)


@judge_app.command("eval")
@told_apart
def judge_eval(
    data: Data,
    out: Out,
    judge: Judges = None,
    split: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Graded queries of this split, empty for all; by default 'test', or where no query is of it, all that are not for training."
        ),
    ] = None,
    pairs: Annotated[int, typer.Option(help="Pairs to judge, at most; drawn at random.")] = 2000,
    attacks: Annotated[int, typer.Option(help="Pairs that are changed to fool the judge, at most.")] = 300,
    reasons: Annotated[int, typer.Option(help="Completions that a language model writes for each of 200 pairs.")] = 0,
    style: Annotated[
        str, typer.Option(help="Where the label stands in them: post (first), pre (last) or label.")
    ] = "post",
    seed: Seed = 0,
) -> None:
    """Measure judges on graded pairs: F1s, AUC, calibration, attacks; writes OUT/judge.html and OUT/judge.json."""
    import numpy as np

    from taoemb.judge.adversarial import attack
    from taoemb.judge.evaluation import evaluate_judge
    from taoemb.judge.report import compare_text, write_judge_report
    from taoemb.judge.schemes import scheme_of

    asked = judge or ["kind=auto"]
    if len(set(asked)) < len(asked):
        raise ValueError(
            f"--judge {next(w for w in asked if asked.count(w) > 1)!r} is given twice; give each judge once"
        )
    catalog = _catalog(data)
    builders = [_builder(catalog, words, out) for words in asked]
    held = {query for builder in builders for query in builder.calibration_queries}
    examples = _graded(builders[0], data, split, pairs, seed, held)
    graded, grades = [(e.query, e.item) for e in examples], [e.grade for e in examples]
    labels_of = str(catalog.metadata.get("labels", "the catalog's grades"))
    facts = {
        "Catalog": str(data),
        "Split": "not for training" if split is None else split or "all",
        "True labels": labels_of,
    }
    evaluations: list[JudgeEvaluation] = []
    for builder, words in zip(builders, asked, strict=True):
        scheme = scheme_of(builder.judge)
        if evaluations and scheme.names != evaluations[0].scheme.names:
            raise ValueError(f"{words!r} gives the labels {', '.join(scheme.names)}, the judges before it {', '.join(evaluations[0].scheme.names)}: "
                             "their figures do not compare; evaluate them apart, or give one scheme to all")  # fmt: skip
        labels = scheme.labels(grades)
        found = evaluate_judge(builder.judge, graded, labels, seed=seed)
        some = np.random.default_rng([seed, 1]).permutation(len(graded))[:attacks]
        if len(some):
            attacked = attack(builder.judge, [graded[i] for i in some], labels[some], bootstrap=200, seed=seed)
            found = dataclasses.replace(found, attacks=attacked)
        if reasons:
            written = _written(builder, examples[:200], reasons, style, out, words, seed)
            found = dataclasses.replace(found, generated=written)
        builder.close()  # before the next model is loaded
        name = found.judge if len(builders) == 1 else words.replace("kind=", "", 1)
        evaluations.append(dataclasses.replace(found, judge=name))
        typer.echo(evaluations[-1].text() + "\n")
        page = write_judge_report(evaluations, out, facts)
    if len(evaluations) > 1:
        typer.echo(compare_text(evaluations) + "\n")
    typer.echo(f"look at {page}", err=True)


@judge_app.command("train")
@told_apart
def judge_train(
    out: Annotated[Optional[Path], typer.Option(help="Run folder; the same one goes on after a kill.")] = None,  # noqa: UP045
    data: Annotated[Optional[Path], typer.Option(help="A generated shop or graded catalog; short for data=.")] = None,  # noqa: UP045
    model: Annotated[Optional[str], typer.Option(help="Start model; short for model=NAME.")] = None,  # noqa: UP045
    stages: Annotated[Optional[str], typer.Option(help="Stages, such as sft,dpo,grpo; short for stages=[...].")] = None,  # noqa: UP045
    recipe: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Settings to begin with: taosr1, agrl, she, step_model, dyknow, or a YAML file of your own."),
    ] = None,
    help_config: Annotated[bool, typer.Option("--help-config", help="List every setting and exit.")] = False,
    overrides: Overrides = None,
) -> None:
    """Train a relevance LLM as TaoSR1 does: supervised reasons, preferences, GRPO; or as its successors do, by --recipe."""
    from taoemb.config import describe, load_config
    from taoemb.judge.train import CONTEXTS_FILE, JudgeTrainer
    from taoemb.judge.train_config import JudgeTrainConfig, recipe_file

    if help_config:
        for setting in describe(JudgeTrainConfig):
            typer.echo(f"{setting.key} ({setting.type}, default {setting.default!r})\n    {setting.doc}")
        return
    given = {"data": data, "model": model, "stages": stages and f"[{stages}]"}
    words = [f"{name}={value}" for name, value in given.items() if value]
    config = load_config(JudgeTrainConfig, recipe and recipe_file(recipe), [*words, *(overrides or [])])
    if out is None:
        raise ValueError("give a run folder with --out")
    trained = JudgeTrainer(config, out, say=lambda text: typer.echo(text, err=True)).run()
    contexts = f" judge.contexts={out / CONTEXTS_FILE}" if config.contexts else ""
    typer.echo(f"the judge is {trained}: judge.kind=hf_causal judge.model={trained}{contexts}", err=True)


@judge_app.command("distill")
@told_apart
def judge_distill(
    data: Data,
    out: Out,
    judge: Annotated[str, typer.Option(help="Settings of the teacher, such as 'kind=hf_causal model=...'.")],
    model: Annotated[str, typer.Option(help="Encoder to start from: a folder, a hub id, or minilm.")] = "minilm",
    per_query: Annotated[
        int, typer.Option(help="Pairs of each training query: half from BM25's best, half at random.")
    ] = 16,
    seed: Seed = 0,
    overrides: Overrides = None,
) -> None:
    """Distil a judge's probabilities into a cross-encoder small enough to be a reward in training; settings: steps, batch_size, ..."""
    import numpy as np

    from taoemb.catalog import ItemTemplate
    from taoemb.config import load_config
    from taoemb.index.channels import BM25Channel
    from taoemb.judge.cross_encoder import DistillConfig, train_cross_encoder
    from taoemb.judge.schemes import scheme_of
    from taoemb.pretrained import model_path

    builder = _builder(_catalog(data), judge, out)
    config = load_config(DistillConfig, None, [f"seed={seed}", *(overrides or [])])
    catalog, items, rng = builder.catalog, builder.catalog.items, np.random.default_rng([seed, 3])
    queries = catalog.queries.select("train")
    if not len(queries):
        raise ValueError(f"{data} has no query of split 'train'; write some with `taoemb data queries`")
    near = BM25Channel.build(items.ids, ItemTemplate().texts(items)).top(queries.texts, per_query - per_query // 2)
    pairs: list[tuple[Query, Item]] = []
    for query, found in zip(queries, near, strict=True):
        drawn = [*items.positions(found).tolist(), *rng.integers(len(items), size=per_query // 2).tolist()]
        pairs += [(query, items[i]) for i in dict.fromkeys(drawn)]
    teacher = builder.judge
    typer.echo(f"{teacher.name} judges {len(pairs):,} pairs of {len(queries):,} training queries", err=True)
    train_cross_encoder(
        model_path(model), pairs, teacher.score(pairs).probs, config, run_dir=out, scheme=scheme_of(teacher)
    )
    folder = out / "judges" / "cross_encoder"
    typer.echo(f"the judge is {folder}: judge.kind=cross_encoder judge.model={folder}", err=True)


@judge_app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@told_apart
def judge_serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or hub id of the judge; options after it go to vLLM.")],
) -> None:
    """Serve a judge with vLLM, whose server speaks OpenAI's protocol; `judge.kind=openai_server` asks it."""
    served = _served_name(Path(model))
    command = ["vllm", "serve", model, "--served-model-name", served, "--enable-prefix-caching", *context.args]
    prompt = f" judge.prompt={model}" if Path(model).is_dir() else ""
    port = context.args[context.args.index("--port") + 1] if "--port" in context.args[:-1] else "8000"
    typer.echo(shlex.join(command), err=True)
    if importlib.util.find_spec("vllm") is None:
        raise ImportError("vllm is not installed here; install it with: pip install vllm (it needs a GPU), then run the line above. "
                          f"Ask it with judge.kind=openai_server judge.url=http://HOST:{port}/v1 judge.model={served}{prompt}")  # fmt: skip
    os.execvp(command[0], command)


def judged_pool(
    catalog: Catalog,
    queries: QuerySet,
    tops: Sequence[Sequence[Sequence[str]]],
    words: str,
    folder: Path | None = None,
) -> tuple[Catalog, str]:
    """The catalog with a judge's grades of what systems found (system -> query -> item ids) and nothing else graded, and the judge's
    fingerprint. A grade is that of the most probable label; where the judge abstains there is none. ``folder`` keeps the
    verdicts of judges that keep any."""
    from taoemb.judge.schemes import scheme_of

    with tempfile.TemporaryDirectory() as scratch:
        builder = _builder(catalog, words, folder or Path(scratch))
        pairs = [
            (query, item_id)
            for n, query in enumerate(queries)
            for item_id in dict.fromkeys(i for top in tops for i in top[n] if i)
        ]
        items = catalog.items
        found = builder.judge.score(
            [
                (query, items[int(i)])
                for (query, _), i in zip(pairs, items.positions([i for _, i in pairs]), strict=True)
            ]
        )
        name, fingerprint = builder.judge.name, builder.judge.fingerprint
        grades = scheme_of(builder.judge).grades(found.grade)
        builder.close()
    qrels: dict[str, dict[str, int]] = {query.id: {} for query in queries}
    for (query, item_id), grade in zip(pairs, grades.tolist(), strict=True):
        if grade >= 0:
            qrels[query.id][item_id] = grade
    typer.echo(f"graded by the judge {name}: {len(pairs):,} pairs, the union of what the systems find", err=True)
    return dataclasses.replace(catalog, qrels=qrels, metadata={**catalog.metadata, "unjudged": None}), fingerprint


def _served_name(model: Path) -> str:
    """The folder's name and its weights' checksum: verdicts are cached by the name that a server gives its model."""
    from taoemb.files import checksum

    weights = sorted(model.glob("*.safetensors")) if model.is_dir() else []
    sums = "".join(checksum(file) for file in weights)
    return f"{model.name}-{hashlib.sha256(sums.encode()).hexdigest()[:8]}" if weights else str(model)


# -- what they share ---------------------------------------------------------------------------------------------------


def _catalog(data: Path) -> Catalog:
    from taoemb.catalog import Catalog

    if not data.is_dir():
        raise FileNotFoundError(f"{data} is not a folder; give a catalog folder with --data")
    return Catalog.load(data)


def _builder(catalog: Catalog, words: str, out: Path) -> JudgeBuilder:
    from taoemb.judge.build import JudgeBuilder

    return JudgeBuilder(judge_config(words), catalog, out, lambda text: typer.echo(text, err=True))


def judge_config(words: str) -> JudgeConfig:
    """The settings of a judge from one word; raises ValueError that says what they look like."""
    from taoemb.config import load_config
    from taoemb.judge.build import JudgeConfig

    try:
        return load_config(JudgeConfig, None, shlex.split(words))
    except ValueError as error:
        raise ValueError(f"--judge {words!r}: {error}. Settings in one word look like 'kind=soft_logic'") from None


def _scored(judge: RelevanceJudge, pairs: Sequence[tuple[Query, Item]]) -> JudgeOutput:
    """The verdicts, with a progress bar."""
    import numpy as np
    from tqdm import tqdm

    from taoemb.types import JudgeOutput

    parts = []
    with tqdm(total=len(pairs), unit="pair", disable=None) as bar:
        for start in range(0, len(pairs), _SHOWN):
            parts.append(judge.score(pairs[start : start + _SHOWN]))
            bar.update(min(_SHOWN, len(pairs) - start))
    known = [part.label_mass for part in parts if part.label_mass is not None]
    mass = np.concatenate(known) if len(known) == len(parts) else None
    return JudgeOutput(
        np.concatenate([part.probs for part in parts]), np.concatenate([part.score for part in parts]), mass
    )


def _run_pairs(builder: JudgeBuilder, file: Path) -> list[tuple[Query, Item]]:
    from taoemb.index.runs import read_run

    queries, items = {q.id: q for q in builder.catalog.queries}, builder.catalog.items
    found = read_run(file, queries, items.ids)
    return [(queries[query], items[int(i)]) for query, ranked in found.items() for i in items.positions(ranked)]


def _graded(
    builder: JudgeBuilder, data: Path, split: str | None, count: int, seed: int, held: set[str]
) -> Sequence[Any]:
    """Graded pairs as examples: the generated shop's with their verdicts, else those that the catalog lists."""
    import numpy as np

    from taoemb.judge.examples import Example, shop_examples
    from taoemb.shop import Shop

    if (data / "truth.parquet").exists() and split != "":
        found = shop_examples(Shop.load(data), count, seed, split=split or "test", balance=False)
        return [example for example in found if example.query.id not in held]
    catalog = builder.catalog
    graded = (
        builder.graded_queries
        if split is None
        else [q.id for q in catalog.queries if q.id in catalog.qrels and split in ("", q.split)]
    )
    ids = [query for query in graded if query not in held]
    pairs, grades = builder.graded_pairs(ids)
    if not pairs:
        have = sorted({q.split or "(none)" for q in catalog.queries if q.id in catalog.qrels and q.id not in held})
        asked = "" if split is None else f"of split {split!r} "
        raise ValueError(f"{data} grades no query {asked}that no judge is fitted on; there are {have or 'none'}: use --split '' "
                         "for all")  # fmt: skip
    drawn = np.sort(np.random.default_rng([seed, 2]).permutation(len(pairs))[:count])
    return [Example(pairs[i][0], pairs[i][1], grades[i]) for i in drawn]


def _written(
    builder: JudgeBuilder, examples: Sequence[Any], count: int, style: str, out: Path, words: str, seed: int
) -> dict[str, float]:
    """pass@k of drawn completions, and what the greedy ones' reasons are worth; of language models here alone."""
    from taoemb.judge.causal import CausalJudge
    from taoemb.judge.chains import chain_metrics, pass_at_k
    from taoemb.judge.contexts import ContextJudge
    from taoemb.judge.examples import parse
    from taoemb.judge.sampling import sample_completions
    from taoemb.judge.verdicts import fingerprint
    from taoemb.shop_rules import load_ontology

    judge: Any = builder.judge
    while hasattr(judge, "judge") and not isinstance(judge, ContextJudge):  # behind a calibration, a cache
        judge = judge.judge
    if isinstance(judge, ContextJudge):
        examples = [dataclasses.replace(e, context=judge.contexts(e.query, e.item)) for e in examples]
        judge = judge.judge
    if not isinstance(judge, CausalJudge):
        return {}
    file, labels = (
        out / "written" / f"{fingerprint(words)[:12]}.jsonl",
        judge.scheme.labels([e.grade for e in examples]),
    )
    settings: dict[str, Any] = {"style": style, "seed": seed, "progress": "writing"}
    drawn = sample_completions(judge.model, judge.reads, examples, count, file, **settings)
    found = {f"pass@{k}": pass_at_k(drawn.correct(labels.tolist()), k) for k in range(1, count + 1)}
    if style == "label" or any(e.category is None for e in examples):
        return found
    greedy = sample_completions(
        judge.model, judge.reads, examples, 1, file.with_suffix(".greedy.jsonl"), temperature=0, **settings
    )
    chains = [parse(texts[0], settings["style"], judge.scheme) for texts in greedy.texts]
    table = judge.scheme.labels(load_ontology().grade_table)
    return found | chain_metrics(chains, [e.category for e in examples], [e.attribute for e in examples], table)
