"""The command line: ``taoemb index build | refresh | search | info | verify | bench | serve-check``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast

import typer

from taoemb import __version__
from taoemb.cli_shared import Backend, Out, told_apart

if TYPE_CHECKING:
    from taoemb.encoder import Encoder
    from taoemb.index.refresh import AnyIndex
    from taoemb.store import EmbeddingStore
    from taoemb.types import FloatArray

_PROBE = 200
"""Queries on which the recall of a new index is measured; our choice."""

index_app = typer.Typer(help="Build, refresh, search and check a search index.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="Index folder, or folder of snapshots (`taoemb index refresh`).")]
Model = Annotated[str, typer.Option(help="Model folder or hub id, or RUN/model.")]
Factory = Annotated[str, typer.Option(help="FAISS factory string; Flat is exact, auto chooses.")]
Memory = Annotated[float, typer.Option(help="GiB that auto may fill.")]
MinRecall = Annotated[
    float, typer.Option(help="Recall@10 that the index must reach; it searches as deeply as that takes.")
]
TruncateDim = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Index the first so many dimensions alone (Matryoshka models)."),
]
Rescore = Annotated[int, typer.Option(help="Candidates per result that the full vectors, on disk, re-score; 0: none.")]


@index_app.command("build")
@told_apart
def index_build(
    store: Annotated[Path, typer.Argument(help="Embedding store, as `taoemb encode` writes it.")],
    out: Out,
    factory: Factory = "auto",
    memory: Memory = 4.0,
    min_recall: MinRecall = 0.95,
    truncate_dim: TruncateDim = None,
    rescore: Rescore = 0,
) -> None:
    """Build an index over an embedding store."""
    from taoemb.store import EmbeddingStore

    start = time.perf_counter()
    index, what = _built(EmbeddingStore.open(store), factory, memory, min_recall, truncate_dim, rescore)
    index.save(out)
    typer.echo(f"{out}: {what} ({time.perf_counter() - start:.1f} s)", err=True)


@index_app.command("refresh")
@told_apart
def index_refresh(
    folder: Annotated[Path, typer.Argument(help="Folder of snapshots; made by the first call.")],
    model: Model,
    data: Annotated[Path, typer.Option(help="Catalog folder.")],
    factory: Factory = "auto",
    memory: Memory = 4.0,
    min_recall: MinRecall = 0.95,
    truncate_dim: TruncateDim = None,
    rescore: Rescore = 0,
    backend: Backend = "torch",
) -> None:
    """Bring the index of a catalog up to date: encode what changed, build, check the recall, publish; readers go on meanwhile.

    The embeddings are kept in FOLDER/embeddings. A second call goes on after a kill; nobody sees half an index.
    """
    from taoemb.catalog import Items
    from taoemb.encoder import Encoder
    from taoemb.files import checksum
    from taoemb.index.snapshots import Snapshots
    from taoemb.store import encode_corpus

    start, snapshots = time.perf_counter(), Snapshots(folder)
    encoder = Encoder(model, backend=cast(Any, backend))
    store = encode_corpus(encoder, Items.load(data), folder / "embeddings", update=True, progress=True)
    options = [factory, memory, min_recall, truncate_dim, rescore]
    source = f"{checksum(folder / 'embeddings' / 'manifest.json')} {options}"
    if snapshots.source == source and not snapshots.verify():
        typer.echo(f"{folder}: nothing has changed since generation {snapshots.current}", err=True)
        return
    index, what = _built(store, factory, memory, min_recall, truncate_dim, rescore, _some_queries(encoder, data))
    number = snapshots.publish(index, source=source)
    typer.echo(f"{folder}: generation {number}, {what} ({time.perf_counter() - start:.1f} s)", err=True)


def _some_queries(encoder: Encoder, data: Path) -> FloatArray | None:
    """Vectors of some of a catalog's own queries, None where it has none."""
    import numpy as np

    from taoemb.catalog import QuerySet

    texts = QuerySet.load(data).texts
    rows = np.random.default_rng(0).permutation(len(texts))[:_PROBE]
    return encoder.encode_query([texts[row] for row in rows.tolist()]) if texts else None


def _built(
    store: EmbeddingStore,
    factory: str,
    memory: float,
    min_recall: float,
    truncate_dim: int | None,
    rescore: int,
    queries: FloatArray | None = None,
) -> tuple[AnyIndex, str]:
    """An index that finds enough, and a line that says what it is; raises ValueError where it does not.

    Without ``queries`` some are drawn from the items, which are found more easily than real ones: the index is then searched at
    least as deeply as by default.
    """
    from taoemb.index.exact import ExactIndex
    from taoemb.index.faiss_index import VectorIndex, auto_factory
    from taoemb.index.tuning import Truth, draw_queries, tune

    if not 0 <= min_recall <= 1:
        raise ValueError(f"min_recall={min_recall}: give 0 to 1")
    if factory == "auto":
        factory, why = auto_factory(len(store), truncate_dim or store.dimension, memory)
        typer.echo(why, err=True)
    if factory == "Flat" and truncate_dim is None and not rescore:
        return ExactIndex.build(store), f"exact search over {len(store):,} vectors"
    index = VectorIndex.build(store, factory, truncate_dim=truncate_dim, rescore=rescore, deterministic=True)
    truth = Truth(store, draw_queries(store, _PROBE) if queries is None else queries, 10)
    recall = tune(index, truth, 10, min_recall, only_deeper=queries is None)
    settings = "".join(f", {name} {value}" for name, value in index.parameters.items())
    whose = "drawn from the items" if queries is None else "of the catalog"
    found = f"recall@10 {recall:.3f} on {len(truth.queries)} queries {whose}"
    if recall < min_recall:
        raise ValueError(f"{factory}{settings}: {found}, less than --min-recall {min_recall:g}; take another --factory, a larger "
                         "--rescore, or ask for less")  # fmt: skip
    return index, f"{factory}{settings} over {len(store):,} vectors, {found}"


@index_app.command("search")
@told_apart
def index_search(
    folder: Folder,
    query: Annotated[str, typer.Argument(help="What a shopper would type.")],
    model: Model,
    k: Annotated[int, typer.Option("-k", help="Number of items.")] = 10,
    backend: Backend = "torch",
) -> None:
    """Print rank, score and id of the items that an index finds for a query."""
    from taoemb.encoder import Encoder
    from taoemb.index.results import check_fingerprint
    from taoemb.index.serving import open_index

    if not query.strip():
        raise ValueError("the query is empty; give what a shopper would type")
    index, encoder = open_index(folder), Encoder(model, backend=cast(Any, backend))
    check_fingerprint(index, encoder.fingerprint)
    ids, scores = index.search(encoder.encode_query([query]), k)
    for rank, (item_id, score) in enumerate(zip(ids[0], scores[0], strict=True), start=1):
        if item_id:
            typer.echo(f"{rank:3d}  {score:.3f}  {item_id}")


@index_app.command("info")
@told_apart
def index_info(folder: Folder) -> None:
    """Describe a saved index after verifying its files."""
    from taoemb.index.serving import open_index
    from taoemb.index.snapshots import LiveIndex

    opened = open_index(folder)
    index = opened.index if isinstance(opened, LiveIndex) else opened
    facts: dict[str, object] = {"generation": opened.generation} if isinstance(opened, LiveIndex) else {}
    facts |= {"factory": getattr(index, "factory", "Flat (exact search)"), **getattr(index, "parameters", {})}
    facts |= {name: value for name in ("truncate_dim", "rescore") if (value := getattr(index, name, None))}
    facts |= {"items": f"{len(index):,}", "dimensions": index.dimension, "fingerprint": index.fingerprint}
    typer.echo("\n".join(f"{name}: {value}" for name, value in facts.items()))


@index_app.command("verify")
@told_apart
def index_verify(
    folder: Annotated[Path, typer.Argument(help="Index, embedding store, or folder of snapshots.")],
) -> None:
    """Check every file against its checksum; exit status 1, naming the file, when one is damaged."""
    from taoemb.index.serving import verify

    problems = verify(folder)
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{folder} is whole")


@index_app.command("bench")
@told_apart
def index_bench(
    store: Annotated[Path, typer.Argument(help="Embedding store, as `taoemb encode` writes it.")],
    out: Out,
    factory: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="FAISS factory string, exact, hnswlib or usearch; may be repeated. Without it: the usual ones."
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Items per query.")] = 10,
    min_recall: Annotated[float, typer.Option(help="Recall that the recommended index must reach.")] = 0.95,
) -> None:
    """Compare indexes on your own vectors: recall, speed, memory, build and update; holds all of them in memory at once."""
    from taoemb.index.bench import bench, describe
    from taoemb.index.bench_report import recommend, write_bench
    from taoemb.store import EmbeddingStore

    opened = EmbeddingStore.open(store)
    rows = bench(opened, candidates=factory, k=k, progress=lambda text: typer.echo(text, err=True))
    meta = describe(opened, candidates=factory, k=k) | {"store": str(store), "version": __version__}
    page = write_bench(rows, meta, out, min_recall)
    for row in rows:
        typer.echo(f"{row.name:28s} recall@{row.k} {row.recall_at_k:.3f}  {row.queries_per_second:9,.0f} queries/s  "
                   f"p50 {row.p50_ms:.3f} ms  p99 {row.p99_ms:.3f} ms  {row.size_mb:,.1f} MB")  # fmt: skip
    typer.echo(recommend(rows, min_recall)[1])
    typer.echo(f"look at {page}", err=True)


@index_app.command("serve-check")
@told_apart
def index_serve_check(
    folder: Folder,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Model that will encode the queries: its fingerprint is compared."),
    ] = None,
    store: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Embedding store, for the recall; FOLDER/embeddings where that exists."),
    ] = None,
    min_recall: Annotated[float, typer.Option(help="Recall@10 that must be found.")] = 0.9,
    max_p99_ms: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Milliseconds that 99 % of the searches must stay under."),
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads that search at once.")] = 4,
    seconds: Annotated[float, typer.Option(help="Seconds of load.")] = 5.0,
) -> None:
    """Check that a folder is fit to serve: files, fingerprint, recall, latency under load; exit status 1 when it is not."""
    from taoemb.encoder import Encoder
    from taoemb.index.serving import serve_check
    from taoemb.store import EmbeddingStore

    beside = folder / "embeddings"
    where = store or (beside if (beside / "manifest.json").exists() else None)
    checks = serve_check(folder, fingerprint=Encoder(model).fingerprint if model else "",
                         store=EmbeddingStore.open(where) if where else None, min_recall=min_recall, max_p99_ms=max_p99_ms,
                         threads=threads, seconds=seconds)  # fmt: skip
    for check in checks:
        typer.echo(f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.text}")
    if not all(check.passed for check in checks):
        raise typer.Exit(1)
