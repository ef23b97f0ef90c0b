"""The command line: ``taoemb demo | data | encode | index | search | train | evaluate | judge | benchmark``."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Optional, cast

import typer

from taoemb import __version__
from taoemb.cli_compare import benchmark, evaluate
from taoemb.cli_index import index_app
from taoemb.cli_judge import judge_app
from taoemb.cli_shared import Backend, Out, Seed, told_apart

app = typer.Typer(
    help="Train a search encoder against a judge instead of against hard negatives.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(
    help="Make data: the generated shop, training queries from a catalog, or a catalog from a public set.",
    no_args_is_help=True,
)
app.add_typer(data_app, name="data")
app.add_typer(index_app, name="index")
app.add_typer(judge_app, name="judge")

Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads the annotation at run time, also on Python 3.10
    typer.Argument(
        help="Settings as KEY=VALUE, for example stage2.steps=200; `taoemb train --help-config` lists them."
    ),
]


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Train a search encoder against a judge instead of against hard negatives."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars fill a log file with one endless line
    if version:
        typer.echo(f"taoemb {__version__}")
        raise typer.Exit


@app.command()
@told_apart
def demo(
    out: Out = Path("runs/demo"),
    items: Annotated[int, typer.Option(help="Items of the generated shop.")] = 20_000,
    seed: Seed = 0,
    overrides: Overrides = None,
) -> None:
    """Generate a shop, train on it and compare: a few minutes on two CPU cores."""
    from taoemb.config import load_config
    from taoemb.job import TrainConfig

    shop = out.parent / f"shop-{items}-{seed}"
    if not (shop / "truth.parquet").exists():
        _write_shop(shop, items, seed)
    seeds = [f"stage1.seed={seed}", f"stage2.seed={seed}"]
    _train(load_config(TrainConfig, None, [f"data={shop}", *seeds, *(overrides or [])]), out)


@data_app.command("shop")
@told_apart
def data_shop(
    out: Out,
    items: Annotated[int, typer.Option(help="Number of items.")] = 20_000,
    seed: Seed = 0,
) -> None:
    """Write a generated shop: items, queries with complete grades, clicks."""
    _write_shop(out, items, seed)


def _write_shop(out: Path, items: int, seed: int) -> None:
    from taoemb.files import replace_folder
    from taoemb.shop import generate_shop

    start = time.perf_counter()
    shop = generate_shop(items, seed)
    with replace_folder(out, "truth.parquet") as beside:  # somebody's own catalog is no generated shop
        shop.save(beside)
    catalog = shop.catalog
    grades = sum(len(graded) for graded in catalog.qrels.values())
    typer.echo(f"{out}: {len(catalog.items):,} items, {len(catalog.queries):,} queries, {grades:,} grades "
               f"({time.perf_counter() - start:.1f} s)", err=True)  # fmt: skip


@data_app.command("queries")
@told_apart
def data_queries(
    catalog: Annotated[Path, typer.Argument(help="Catalog folder.")],
    out: Out,
    n: Annotated[int, typer.Option("--n", help="Number of distinct queries.")] = 4000,
    seed: Seed = 0,
) -> None:
    """Write training queries from a catalog's own titles, brands, types and attributes.

    Into the catalog's own folder where it has no queries and clicks, else into another one, with the whole catalog.
    """
    from dataclasses import replace

    import pyarrow as pa

    from taoemb.catalog import Catalog
    from taoemb.queries import generate_queries
    from taoemb.tables import write_table

    for name in ("queries", "clicks"):
        if any((out / f"{name}.{suffix}").exists() for suffix in ("parquet", "jsonl", "csv")):
            raise FileExistsError(f"{out} already holds {name}; give another folder")
    source = Catalog.load(catalog)
    written = generate_queries(source.items, n, seed)
    if out.resolve() == catalog.resolve():
        write_table(written.queries.to_table(), out / "queries.parquet")
        write_table(written.clicks, out / "clicks.parquet")
    else:
        clicks = [written.clicks] if source.clicks is None else [source.clicks, written.clicks]
        whole = source.with_queries(written.queries)
        replace(whole, clicks=pa.concat_tables(clicks, promote_options="default")).save(out)
    for query in written.queries[:5]:
        typer.echo(query.text)
    typer.echo(
        f"{out}: {len(written.queries):,} queries in queries.parquet, their source items in clicks.parquet", err=True
    )


@data_app.command("import")
@told_apart
def data_import(
    format: Annotated[str, typer.Argument(help="esci, wands, homedepot or beir.")],
    source: Annotated[Path, typer.Argument(help="Folder with the files as they are published.")],
    out: Out,
    locale: Annotated[Optional[str], typer.Option(help="esci: us (the default), es or jp.")] = None,  # noqa: UP045
    version: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="esci: small, the harder queries (the default), or large, all."),
    ] = None,
    grades: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="beir: the grade of each score, such as 0=0,1=2,2=3; by default by the highest score."),
    ] = None,
) -> None:
    """Write a catalog from the files of a public set: Amazon ESCI, WANDS, Home Depot, or a folder in the format of BEIR."""
    from collections import Counter
    from inspect import signature

    from taoemb.files import replace_folder
    from taoemb.public_data import KIND, READERS

    if format not in READERS:
        raise ValueError(f"format {format!r}: use {', '.join(READERS)}")
    options: dict[str, Any] = {"locale": locale, "version": version, "grades": grades and _grades(grades)}
    options = {name: value for name, value in options.items() if value is not None}
    for name in options:
        if name not in signature(READERS[format]).parameters:
            raise ValueError(f"{format} takes no --{name}; leave it away")
    catalog = READERS[format](source, **options)
    with replace_folder(out, "catalog.json", KIND) as beside:
        catalog.save(beside)
    splits = Counter(query.split or "no split" for query in catalog.queries)
    found = Counter(grade for graded in catalog.qrels.values() for grade in graded.values())
    typer.echo(
        f"{out}: {len(catalog.items):,} items, {len(catalog.queries):,} queries ("
        + ", ".join(
            f"{split} {splits[split]:,}" for split in ("train", "validation", "test", "no split") if splits[split]
        )
        + f"), {found.total():,} grades ("
        + ", ".join(f"{grade}: {found[grade]:,}" for grade in sorted(found, reverse=True))
        + ")",
        err=True,
    )


def _grades(text: str) -> dict[int, int]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {int(score): int(grade) for score, grade in pairs}
    except ValueError:
        raise ValueError(f"--grades {text}: give a grade to each score, such as 0=0,1=2,2=3") from None


@app.command()
@told_apart
def encode(
    model: Annotated[str, typer.Argument(help="Model folder or hub id, or RUN/model.")],
    data: Annotated[Path, typer.Option(help="Catalog folder.")],
    out: Out,
    dtype: Annotated[str, typer.Option(help="Numbers that are stored: float32, float16 or int8.")] = "float32",
    update: Annotated[
        bool, typer.Option("--update", help="Bring an older store up to date: encode what changed.")
    ] = False,
    device: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Torch device; repeated, a process on each encodes its share."),
    ] = None,
    backend: Backend = "torch",
) -> None:
    """Encode a catalog's items into an embedding store; a second call goes on after a kill."""
    from taoemb.catalog import Items
    from taoemb.encoder import Encoder
    from taoemb.store import encode_corpus

    several = device if device and len(device) > 1 else None
    encoder = Encoder(model, device=device[0] if device and not several else None, backend=cast(Any, backend))
    store = encode_corpus(encoder, Items.load(data), out, dtype=cast(Any, dtype), update=update, devices=several,
                          progress=True)  # fmt: skip
    typer.echo(f"{out}: {len(store):,} embeddings of {store.dimension} dimensions", err=True)


@app.command()
@told_apart
def search(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    query: Annotated[str, typer.Argument(help="What a shopper would type.")],
    k: Annotated[int, typer.Option("-k", help="Number of items.")] = 10,
) -> None:
    """Print the items that a trained run finds for a query."""
    from taoemb.catalog import Items
    from taoemb.config import load_config
    from taoemb.encoder import Encoder
    from taoemb.index.refresh import load_index
    from taoemb.index.results import check_fingerprint
    from taoemb.job import TrainConfig

    if not query.strip():
        raise ValueError("the query is empty; give what a shopper would type")
    if not (run / "index").is_dir() or not (run / "model").is_dir():
        raise ValueError(f"{run} is no finished run folder (no model/ and index/); train one with `taoemb train`")
    items = Items.load(load_config(TrainConfig, run / "config.yaml").data)
    encoder, index = Encoder(run / "model"), load_index(run / "index")
    check_fingerprint(index, encoder.fingerprint)
    ids, scores = index.search(encoder.encode_query([query]), k)
    for rank, (item_id, score) in enumerate(zip(ids[0], scores[0], strict=True), start=1):
        if item_id:
            item = items[int(items.positions([item_id])[0])]
            facts = [item.brand, item.category, "" if item.price is None else f"{item.price:.2f}"]
            typer.echo("  ".join([f"{rank:3d}", f"{score:.3f}", item_id, item.title, *filter(None, facts)]))


@app.command()
@told_apart
def train(
    out: Annotated[Optional[Path], typer.Option(help="Run folder; the same one goes on after a kill.")] = None,  # noqa: UP045
    data: Annotated[Optional[Path], typer.Option(help="Catalog folder; short for data=FOLDER.")] = None,  # noqa: UP045
    config: Annotated[Optional[Path], typer.Option(help="YAML file with settings.")] = None,  # noqa: UP045
    help_config: Annotated[bool, typer.Option("--help-config", help="List every setting and exit.")] = False,
    overrides: Overrides = None,
) -> None:
    """Train on a catalog: stage 1, Retrieval-GRPO, the rows to compare with, and a report."""
    from taoemb.config import describe, load_config
    from taoemb.job import TrainConfig

    if help_config:
        for setting in describe(TrainConfig):
            typer.echo(f"{setting.key} ({setting.type}, default {setting.default!r})\n    {setting.doc}")
        return
    settings = load_config(TrainConfig, config, [*([f"data={data}"] if data else []), *(overrides or [])])
    if out is None or not settings.data:
        raise ValueError("give a catalog folder with --data and a run folder with --out")
    _train(settings, out)


def _train(config: Any, out: Path) -> None:
    from taoemb.job import TrainJob

    if not Path(config.data).is_dir():  # before the run folder is claimed with a mistyped name
        raise FileNotFoundError(f"{config.data} is not a folder; give a catalog folder with --data")
    start = time.perf_counter()
    job = TrainJob(config, out)
    comparison = job.run()
    if not job.world.owner:  # of several processes one speaks
        return
    spent = f"{time.perf_counter() - start:.0f} s"
    if comparison is None:
        typer.echo(spent, err=True)
        return
    typer.echo(comparison.text(job.phases.values))
    typer.echo(f"{spent}; look at {out / 'report.html'}", err=True)


app.command()(evaluate)
app.command()(benchmark)


if __name__ == "__main__":
    sys.exit(app())
