"""``taoemb evaluate | benchmark``: systems side by side on a catalog."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from taoemb import __version__
from taoemb.cli_shared import Seed, told_apart

if TYPE_CHECKING:
    from taoemb.benchmark import Systems
    from taoemb.comparison import Comparison

Split = Annotated[str, typer.Option(help="Queries of this split that have grades; empty for all.")]
QualityColumn = Annotated[str, typer.Option(help="Numeric item column in [0, 1].")]
Channels = Annotated[
    Optional[list[Path]],  # noqa: UP045 - typer reads the annotation at run time, also on Python 3.10
    typer.Option(help="TREC run file of a channel beside BM25 for overlap and exclusive figures; may be repeated."),
]
Judge = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Settings of a judge in one word, such as 'kind=mean', which grades what the systems find in the place of the "
        "catalog's grades."
    ),
]
Pool = Annotated[int, typer.Option(help="How much of each system's Top the judge grades.")]
Name = Optional[str]  # noqa: UP045


@told_apart
def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Model folders or hub ids, RUN/model for a trained run, or TREC run files.")
    ],
    data: Annotated[Path, typer.Option(help="Catalog folder with queries and qrels.")],
    split: Split = "test",
    quality_column: QualityColumn = "quality",
    channel: Channels = None,
    judge: Judge = None,
    pool: Pool = 20,
) -> None:
    """Compare models and BM25 on a catalog's graded queries, or on any queries by a judge; prints a table."""
    asked = _Asked(data, split, quality_column, channel or [], judge, pool)
    comparison, _ = _compared(dict(zip(models, models, strict=True)), asked)
    typer.echo(comparison.text())


@told_apart
def benchmark(
    systems: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(
            help="Model folders, hub ids, run folders of `taoemb train`, or TREC run files of other systems."
        ),
    ] = None,
    data: Annotated[Optional[Path], typer.Option(help="Catalog folder with queries and qrels.")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(help="Folder to write; its encodings are used again.")] = None,  # noqa: UP045
    split: Split = "test",
    against: Annotated[
        Name, typer.Option(help="System that the others are tested against; the first model given.")
    ] = None,
    gsb: Annotated[Name, typer.Option(help="System beside --against in lists and sheet; the best other.")] = None,
    channel: Channels = None,
    judge: Judge = None,
    pool: Pool = 20,
    quality_column: QualityColumn = "quality",
    depth: Annotated[int, typer.Option(help="Items that are evaluated per query.")] = 1000,
    seed: Seed = 0,
    gsb_score: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--gsb-score", help="Score a filled gsb.csv, or the one in this folder, and exit."),
    ] = None,
) -> None:
    """Compare any systems and BM25 on your own catalog: a page with plots and tests, and a sheet for people."""
    from taoemb.benchmark import BM25, best_other, fusion_name, read_results, sources_of, write_results
    from taoemb.benchmark_report import table_text, write_page
    from taoemb.gsb import score_sheet, write_sheet

    if gsb_score is not None:
        typer.echo(score_sheet(gsb_score).text())
        return
    if data is None or out is None:
        raise ValueError("give a catalog folder with --data and a folder to write with --out")
    if depth < 10:
        raise ValueError(f"depth={depth}: give at least 10")
    _check_out(out)
    sources = sources_of(systems or [])
    model = next((name for name, source in sources.items() if not Path(source).is_file()), None)
    names = {**dict(zip(systems or [], sources, strict=True)), **{name: name for name in (BM25, *sources)}}
    names |= {} if model is None else {fusion_name(model): fusion_name(model)}
    for option, name in (("--against", against), ("--gsb", gsb)):
        if name is not None and name not in names:
            raise ValueError(f"{option} {name!r} takes no part; give one of {', '.join(dict.fromkeys(names.values()))}")
    reference = names[against] if against else model or next(iter(sources))
    if gsb and names[gsb] == reference:
        raise ValueError(f"--gsb {gsb!r} is what the others are compared against; give another one")
    asked = _Asked(data, split, quality_column, channel or [], judge, pool, depth, out / "encodings")
    comparison, prepared = _compared(sources, asked)
    shown = names[gsb] if gsb else best_other(comparison, reference)
    sheet = write_sheet(comparison, shown, reference, out, seed)
    meta = _meta(comparison, prepared, asked) | {"gsb": sheet.replace(str(out) + "/", "")}
    write_results(comparison, prepared.costs, out, against=reference, shown=shown, meta=meta)
    page = write_page(out)
    typer.echo(table_text(read_results(out)))
    typer.echo(f"{sheet}\nlook at {page}", err=True)


@dataclass(frozen=True)
class _Asked:
    """What both commands are asked for."""

    data: Path
    split: str
    quality_column: str
    channels: list[Path]
    judge: str | None
    pool: int
    depth: int = 0
    """Items per query of a benchmark; 0: what `compare` takes by itself."""
    folder: Path | None = None
    """Where encodings and costs are kept."""


def _compared(sources: dict[str, str], asked: _Asked) -> tuple[Comparison, Systems]:
    """Load the catalog, prepare the systems, let the judge grade where there is one, and compare."""
    from taoemb.benchmark import chosen_queries, complete_if_all_good, listed, metrics_to, prepare
    from taoemb.catalog import Catalog
    from taoemb.cli_judge import judge_config, judged_pool
    from taoemb.comparison import DEPTH, METRICS, compare
    from taoemb.index.runs import RunChannel
    from taoemb.rewards import item_quality

    if asked.pool < 1:
        raise ValueError(f"pool={asked.pool}: give at least 1")
    if asked.judge:
        judge_config(asked.judge)  # a mistake in it comes out before the catalog is encoded
    catalog = Catalog.load(asked.data)
    queries = chosen_queries(catalog, asked.data, asked.split, judged=bool(asked.judge))
    quality_N = item_quality(catalog.items, asked.quality_column)
    channels = [RunChannel.load(file, catalog.queries, catalog.items.ids) for file in asked.channels]
    for run in channels:
        run.top(queries.texts, 1)  # it must hold every query: better said before the catalog is encoded
    systems = prepare(sources, catalog, queries, asked.folder, progress=asked.folder is not None)
    depth = asked.depth or DEPTH
    runs = listed(systems, queries.texts, depth, fusion=asked.depth > 0)
    evaluator = None
    if asked.judge:
        tops = systems.tops(queries.texts, asked.pool) | {
            name: [t[: asked.pool] for t in top] for name, top in runs.items()
        }
        verdicts = (
            asked.folder / "judge" / hashlib.sha256(asked.judge.encode()).hexdigest()[:8] if asked.folder else None
        )
        catalog, evaluator = judged_pool(catalog, queries, list(tops.values()), asked.judge, verdicts)
    elif (complete := complete_if_all_good(catalog, queries)) is not catalog:
        catalog = complete
        typer.echo("every graded pair is good: pairs without a grade count as irrelevant", err=True)
    for source in sources.values():
        _warn_of_the_same_judge(source, evaluator)
    return compare(
        catalog, queries, systems.encoders, systems.bm25, channels=[systems.bm25, *channels], quality_N=quality_N, top_n=100,
        runs=runs, metrics=metrics_to(asked.depth) if asked.depth else METRICS, depth=depth,
    ), systems  # fmt: skip


def _check_out(out: Path) -> None:
    """A folder of something else is not written into: a run folder has files of the same names."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; give a folder with --out")
    if out.exists() and any(out.iterdir()) and not ((out / "encodings").is_dir() or (out / "benchmark.json").exists()):
        raise FileExistsError(
            f"{out} holds something that is no benchmark; give a new folder, or an empty one, with --out"
        )


def _meta(comparison: Comparison, systems: Systems, asked: _Asked) -> dict[str, object]:
    import torch

    catalog = comparison.catalog
    devices = sorted({encoder.device.type for encoder, _ in systems.encoders.values()} | {"cpu"})
    return {
        "data": catalog.metadata.get("name", asked.data.resolve().name),
        "items": len(catalog.items),
        "queries": len(comparison.queries),
        "split": asked.split or "all",
        "graded_by": f"judge ({asked.judge})"
        if asked.judge
        else catalog.metadata.get("labels", "the catalog's grades"),
        "unjudged": "not known" if catalog.unjudged is None else "irrelevant",
        "channels": ", ".join(["bm25", *(file.name for file in asked.channels)]),
        "depth": asked.depth,
        "device": f"{', '.join(devices)}, {torch.get_num_threads()} thread(s)",
        "version": __version__,
    }


def _warn_of_the_same_judge(model: str, evaluator: str | None) -> None:
    """A model that was trained against a judge is not to be measured by it without a word."""
    from taoemb.files import read_json

    file = Path(model).parent / "judge" / "judge.json"
    reward = read_json(file) if Path(model).name == "model" and file.is_file() else {}
    if reward and evaluator == reward["fingerprint"]:
        typer.echo(f"warning: the judge {reward['name']} that evaluates also gave the reward of {model}: gains may be nothing but agreement "
                   "with it; use another judge, or grades of people", err=True)  # fmt: skip
    elif reward and evaluator is None and reward["kind"] == "oracle":
        typer.echo(f"warning: the reward of {model} came from a catalog's grades (judge oracle): if they are made as these are, read its "
                   "gains as an upper bound, for a judge without errors", err=True)  # fmt: skip
