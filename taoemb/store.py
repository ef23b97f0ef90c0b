"""Embeddings on disk: memory-mapped shards with a manifest, written by a streaming, resumable encode.

Layout of a store folder: ``ids.parquet``, ``shard-00000.npy`` ..., and ``manifest.json``, which is written last; a
folder without it is unfinished work that `encode_corpus` continues.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import re
import shutil
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from taoemb.files import (
    checksum,
    fsync,
    read_json,
    read_manifest,
    recover_folder,
    replace_folder,
    take_place,
    write_json,
    write_manifest,
)  # fmt: skip
from taoemb.tables import write_table
from taoemb.types import FloatArray

if TYPE_CHECKING:
    from taoemb.catalog import Items
    from taoemb.encoder import Encoder

FORMAT = 1
KIND = "embedding store"
SHARD_ROWS = 16_384
"""Rows of a shard, the unit that a resumed encode does not repeat; our choice."""
_BLOCK_ROWS = 65_536
_OWN = re.compile(r"(manifest|partial)\.json(\.tmp)?|ids\.parquet(\.tmp)?|shard-\d+\.npy(\..*)?")
"""Names of a store's files."""
StoreType = Literal["float32", "float16", "int8"]
"""Numbers of a stored vector. ``int8``: a row times 127 over its largest number, rounded; its length needs no place,
because the vectors are unit vectors."""
Hashes: TypeAlias = npt.NDArray[np.uint64]


class StoreError(ValueError):
    """A store is unfinished, corrupt or of another encoder or catalog."""


@dataclass(frozen=True)
class EmbeddingStore:
    """``N`` unit vectors with their ids, in memory or memory-mapped.

    ``shards`` are ``[n, D]`` blocks in order, all of one `StoreType`; `vectors` and `blocks` give float32 of any.
    ``fingerprint`` is that of the encoder that made them.
    """

    ids: list[str]
    shards: list[npt.NDArray[Any]]
    fingerprint: str

    def __post_init__(self) -> None:
        rows = sum(len(shard) for shard in self.shards)
        if rows != len(self.ids):
            raise StoreError(f"{len(self.ids)} ids but {rows} vectors")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dimension(self) -> int:
        """Number of dimensions ``D``."""
        return int(self.shards[0].shape[1]) if self.shards else 0

    @property
    def dtype(self) -> str:
        """The `StoreType`."""
        return self.shards[0].dtype.name if self.shards else "float32"

    @cached_property
    def vectors(self) -> FloatArray:
        """All vectors as one float32 ``[N, D]``: the memory map itself where it is one float32 shard, else a copy."""
        parts = [decoded(shard) for shard in self.shards]
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)

    def blocks(self) -> Iterator[FloatArray]:
        """All vectors in order as float32 ``[n, D]`` of a bounded size."""
        for shard in self.shards:
            for start in range(0, len(shard), _BLOCK_ROWS):
                yield decoded(shard[start : start + _BLOCK_ROWS])

    def rows(self, positions: npt.NDArray[np.int64]) -> FloatArray:
        """The vectors at these positions, float32 ``[n, D]``; reads no others."""
        return decoded(self.stored_rows(positions))

    def stored_rows(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Like `rows`, as they are stored (`decoded` makes float32 of them)."""
        return gather(self.shards, positions) if self.shards else np.zeros((0, 0), np.float32)

    @classmethod
    def open(cls, folder: str | Path, verify: bool = True) -> EmbeddingStore:
        """Open a finished store memory-mapped; with ``verify`` every file is read once against its checksum.

        Raises StoreError, naming the file, when the store is unfinished or a file is missing or corrupt.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        for name, expected in manifest["files"].items():
            if not (folder / name).exists():
                raise StoreError(f"{folder / name} is missing; encode the catalog again, with --update")
            if verify and checksum(folder / name) != expected:
                raise StoreError(
                    f"{folder / name} is corrupt (its checksum is not the manifest's); encode again, with --update"
                )
        ids = pq.read_table(folder / "ids.parquet", columns=["id"]).column("id").to_pylist()
        names = sorted(name for name in manifest["files"] if name.startswith("shard-"))
        shards = [np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in names]
        return cls(ids, shards, manifest["fingerprint"])

    def save(self, folder: str | Path) -> None:
        """Write the store; it appears complete or not at all and takes the place of an older store.

        Raises FileExistsError where the folder holds anything but a finished store.
        """
        with replace_folder(Path(folder), "manifest.json", KIND) as beside:
            _write_ids(beside, self.ids)
            for number, shard in enumerate(self.shards):
                _write_shard(beside, number, shard)
            _finish(beside, _identity(self.ids, self.fingerprint, self.dimension, self.dtype))


def encoded(vectors: FloatArray, dtype: str) -> npt.NDArray[Any]:
    """Unit vectors ``[N, D]`` as a `StoreType`."""
    if dtype == "int8":
        largest = np.abs(vectors).max(axis=1, keepdims=True, initial=0)
        return np.rint(vectors * (127 / np.where(largest == 0, 1, largest))).astype(np.int8)
    return np.ascontiguousarray(vectors, dtype=dtype)


def gather(shards: Sequence[npt.NDArray[Any]], positions: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """The rows at these positions of the concatenated ``shards``, which are not concatenated for it."""
    found = np.empty((len(positions), shards[0].shape[1]), shards[0].dtype)
    start = 0
    for shard in shards:
        here = (positions >= start) & (positions < start + len(shard))
        found[here] = shard[positions[here] - start]
        start += len(shard)
    return found


def decoded(shard: npt.NDArray[Any]) -> FloatArray:
    """Stored vectors of any `StoreType` as float32."""
    return shard if shard.dtype == np.float32 else unit_rows(shard.astype(np.float32))


def unit_rows(vectors: npt.NDArray[np.floating[Any]]) -> FloatArray:
    """Vectors ``[N, D]`` divided by their length; a zero row stays zero."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):  # infinity becomes NaN, which is refused where vectors are checked
        return np.asarray(vectors / np.where(length == 0, 1, length), dtype=np.float32)


def encode_corpus(
    encoder: Encoder,
    items: Items,
    out: str | Path | None = None,
    *,
    dtype: StoreType = "float32",
    update: bool = False,
    devices: Sequence[str] | None = None,
    shard_rows: int = SHARD_ROWS,
    progress: bool = False,
) -> EmbeddingStore:
    """Encode a catalog's items into a store; memory stays at one shard beside the result.

    With ``out`` the shards go to disk and a second call with the same encoder and items continues after a kill, or
    returns at once when the store is complete. Without it the store is in memory.

    Args:
        encoder: gives the vectors.
        items: the catalog's items.
        out: folder of the store.
        dtype: numbers of a stored vector; ``float16`` takes half the place, ``int8`` a quarter.
        update: bring a store of an older catalog, or of another encoder, up to date: only items whose text is new or
            changed are encoded where the encoder is the same. The old store stays in place until the new one is complete.
        devices: such as ``["cuda:0", "cuda:1"]``: a process on each encodes its share of the shards. As with every
            module that starts processes, a script needs ``if __name__ == "__main__":``.
        shard_rows: rows of a shard.
        progress: show a bar.

    Raises StoreError when ``out`` holds a store of another encoder or catalog (also one with other item texts) and not
    ``update``: nothing is overwritten.
    """
    from taoemb.encoder import check_device  # not above: an index is searched without the libraries of models

    if dtype not in get_args(StoreType):
        raise ValueError(f"dtype={dtype!r}: give one of {', '.join(get_args(StoreType))}")
    fingerprint, ids = encoder.fingerprint, items.ids
    if out is None:
        if devices or update:
            raise ValueError("devices and update need a folder: give out")
        work = _Work(Path(), shard_rows, dtype)
        shards = [work.shard(encoder, items, n) for n in _bar(range(work.count(items)), work, items, progress)]
        return EmbeddingStore(ids, shards, fingerprint)
    for device in devices or ():
        check_device(device)
    folder = Path(out)
    recover_folder(folder)
    hashes = _text_hashes(items, encoder.template.fields)
    identity = _identity(ids, fingerprint, encoder.dimension, dtype)
    identity["texts_hash"] = hashlib.sha256(hashes.tobytes()).hexdigest()[:32]
    work = _Work(folder, shard_rows, dtype)
    holds = _holds(folder, identity, shard_rows)
    if update and holds == "this" and (folder / "manifest.json").exists():
        shutil.rmtree(_next(folder), ignore_errors=True)  # of an update that is no longer wanted
        with contextlib.suppress(StoreError):  # a damaged one is made again
            return EmbeddingStore.open(folder)
        holds = "another"
    if update and holds == "another":
        _check_own(folder)  # it will give way
        work = _Work(_next(folder), shard_rows, dtype, *_reusable(folder, identity, ids, hashes))
        if _holds(work.folder, identity, shard_rows) == "another":  # what is left of an update to another catalog
            shutil.rmtree(work.folder)
    missing = _start(work, items, hashes, identity)
    if not (work.folder / "manifest.json").exists():
        numbers = (
            _encode_apart(encoder, items, work, missing, devices) if devices else _encode(encoder, items, work, missing)
        )
        for _ in _bar(numbers, work, items, progress, skipped=work.count(items) - len(missing)):
            pass
        _finish(work.folder, identity)
    if work.folder != folder:
        take_place(work.folder, folder)
    return EmbeddingStore.open(folder)


def _next(folder: Path) -> Path:
    """Where an update of a store is made."""
    return folder.with_name(f".{folder.name}.next")


def _holds(folder: Path, identity: dict[str, Any], shard_rows: int) -> str:
    """``this`` store, finished or not, ``another``, also a damaged one, or "" where there is none."""
    for name, rows in (("manifest.json", None), ("partial.json", shard_rows)):
        if (folder / name).exists():
            try:
                found = read_manifest(folder / name) if name == "manifest.json" else read_json(folder / name)
            except ValueError:
                return "another"
            return "another" if _differences(found, identity, rows) else "this"
    return ""


def _check_own(folder: Path) -> None:
    """Raises StoreError where a folder holds files that no store has: they would be lost with it."""
    strange = sorted(path.name for path in folder.iterdir() if not _OWN.fullmatch(path.name)) if folder.exists() else []
    if strange:
        raise StoreError(
            f"{folder} holds other files than a store's ({', '.join(strange[:3])}); give a folder of its own"
        )


@dataclass(frozen=True)
class _Work:
    """A store being made: where, how, and what an older store already has."""

    folder: Path
    shard_rows: int
    dtype: str
    old: Path | None = None
    old_rows: npt.NDArray[np.int64] | None = None
    """Row of each item in the store ``old``, -1 where it must be encoded."""

    def count(self, items: Items) -> int:
        """Number of shards; an empty catalog has one without rows, which keeps the dimension."""
        return max(1, -(-len(items) // self.shard_rows))

    def shard(self, encoder: Encoder, items: Items, number: int) -> npt.NDArray[Any]:
        """The stored vectors of one shard; raises StoreError naming an item whose embedding is no number."""
        rows = np.arange(number * self.shard_rows, min((number + 1) * self.shard_rows, len(items)))
        known = np.full(len(rows), -1) if self.old_rows is None else self.old_rows[rows]
        new = np.flatnonzero(known < 0)
        part = items[number * self.shard_rows : number * self.shard_rows + len(rows)]
        vectors = encoder.encode_document(part if len(new) == len(rows) else [part[i] for i in new.tolist()])
        if not np.isfinite(vectors).all():
            bad = items.ids[rows[new[int(np.argmin(np.isfinite(vectors).all(axis=1)))]]]
            raise StoreError(f"the encoder gave a NaN or infinite embedding for item {bad!r}")
        coded = encoded(vectors, self.dtype)
        if len(new) == len(rows):
            return coded
        stored = np.empty((len(rows), encoder.dimension), self.dtype)
        stored[new] = coded
        kept = known >= 0
        stored[kept] = self._old.stored_rows(known[kept])
        return stored

    @cached_property
    def _old(self) -> EmbeddingStore:
        assert self.old is not None
        shards = _whole_shards(self.old)
        return EmbeddingStore([""] * sum(map(len, shards)), shards, "")


def _encode(encoder: Encoder, items: Items, work: _Work, numbers: Sequence[int]) -> Iterator[int]:
    """Write these shards; gives the number of each when it is written."""
    for number in numbers:
        _write_shard(work.folder, number, work.shard(encoder, items, number))
        encoder.forget_tokens()  # memory stays at a shard's
        yield number


def _encode_apart(
    encoder: Encoder, items: Items, work: _Work, numbers: Sequence[int], devices: Sequence[str]
) -> Iterator[int]:
    """Like `_encode`, by one process a device; whichever is free takes the next shard."""
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    free = spawn.Queue()
    for device in devices:
        free.put(device)
    threads = max(1, torch.get_num_threads() // len(devices))
    with ProcessPoolExecutor(len(devices), spawn, _join, (encoder, items.table, work, free, threads)) as pool:
        try:
            for job in as_completed([pool.submit(_encode_here, number) for number in numbers]):
                yield job.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_here: dict[str, Any] = {}
"""In a process of `_encode_apart`: what `_encode_here` works with."""


def _join(encoder: Encoder, table: pa.Table, work: _Work, free: Any, threads: int) -> None:
    from taoemb.catalog import Items

    parent = multiprocessing.parent_process()
    if parent is not None:  # a killed parent must not leave a process behind that holds a GPU and writes shards
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    _here.update(encoder=encoder, items=Items(table), work=work, device=free.get())


def _follow(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _encode_here(number: int) -> int:
    _here["encoder"].model.to(_here["device"])
    return next(_encode(_here["encoder"], _here["items"], _here["work"], [number]))


def _bar(numbers: Iterable[int], work: _Work, items: Items, progress: bool, skipped: int = 0) -> Iterator[int]:
    """Shard numbers as they come, behind a progress bar of items."""
    done = min(skipped * work.shard_rows, len(items))
    with tqdm(
        total=len(items), initial=done, desc="encode items", unit="item", disable=None if progress else True
    ) as bar:
        for number in numbers:
            yield number
            bar.update(min(work.shard_rows, len(items) - number * work.shard_rows))


def ids_hash(ids: Sequence[str]) -> str:
    """Hash of ids in order."""
    digest = hashlib.sha256()
    for item_id in ids:
        digest.update(item_id.encode() + b"\0")
    return digest.hexdigest()[:32]


def _identity(ids: Sequence[str], fingerprint: str, dimension: int, dtype: str) -> dict[str, Any]:
    return {
        "kind": KIND,
        "format": FORMAT,
        "fingerprint": fingerprint,
        "ids_hash": ids_hash(ids),
        "count": len(ids),
        "dimension": dimension,
        "dtype": dtype,
    }


def _text_hashes(items: Items, fields: Sequence[str]) -> Hashes:
    """A hash of the columns that the template reads per item ``[N]``: a vector must not outlive an edited title."""
    names = [name for name in fields if name in items.table.column_names]
    key = hashlib.sha256("\0".join(names).encode()).digest()
    found = np.empty(len(items), np.uint64)
    for start in range(0, len(items), SHARD_ROWS):  # all texts at once may be gigabytes
        table = items.table.slice(start, SHARD_ROWS)
        columns = [pc.fill_null(table.column(name).cast(pa.large_string()), "").to_pylist() for name in names]
        texts = ("\0".join(row).encode() for row in zip(*columns, strict=True)) if names else [b""] * len(table)
        digests = b"".join(hashlib.blake2b(text, digest_size=8, key=key).digest() for text in texts)
        found[start : start + len(table)] = np.frombuffer(digests, np.uint64)
    return found


def _differences(found: dict[str, Any], identity: dict[str, Any], shard_rows: int | None = None) -> list[str]:
    """The entries in which a manifest is not of this identity."""
    wanted = identity if shard_rows is None else {**identity, "shard_rows": shard_rows}
    return [key for key, value in wanted.items() if found.get(key) != value]


def _reusable(
    folder: Path, identity: dict[str, Any], ids: Sequence[str], hashes: Hashes
) -> tuple[Path, npt.NDArray[np.int64]] | tuple[()]:
    """The store, finished or not, and the row of each item in it, -1 where it lacks the item, or has it with another text."""
    same = {name: identity[name] for name in ("fingerprint", "dimension", "dtype")}
    try:
        if (folder / "manifest.json").exists():
            found = read_manifest(folder / "manifest.json")
            EmbeddingStore.open(folder)
        else:
            found = read_json(folder / "partial.json")
    except ValueError as error:
        warnings.warn(f"{error}; nothing is taken over from it, all items are encoded", stacklevel=3)
        return ()
    table = pq.read_table(folder / "ids.parquet")
    if _differences(found, same) or "text_hash" not in table.column_names:
        return ()
    rows = sum(map(len, _whole_shards(folder)))
    place = {item_id: i for i, item_id in enumerate(table.column("id").to_pylist()[:rows])}
    known = np.array([place.get(item_id, -1) for item_id in ids], dtype=np.int64)
    old_hashes = table.column("text_hash").to_numpy()
    if rows:
        known[old_hashes[known] != hashes] = -1
    return folder, known


def _whole_shards(folder: Path) -> list[npt.NDArray[Any]]:
    """The shards of a store as far as they follow each other."""
    shards: list[npt.NDArray[Any]] = []
    while (file := folder / _shard_name(len(shards))).exists():
        shards.append(np.load(file, mmap_mode="r", allow_pickle=False))
    return shards


def _start(work: _Work, items: Items, hashes: Hashes, identity: dict[str, Any]) -> list[int]:
    """Claim a folder for a store, or find it claimed for the same one; returns the numbers of the missing shards."""
    folder = work.folder
    finished, partial = folder / "manifest.json", folder / "partial.json"
    if finished.exists() or partial.exists():
        wrong = (_differences(read_manifest(finished), identity) if finished.exists()
                 else _differences(read_json(partial), identity, work.shard_rows))  # fmt: skip
        if wrong:
            remedy = "bring it up to date with update=True (--update), " if finished.exists() else ""
            raise StoreError(f"{folder} holds the embeddings of another encoder or catalog ({', '.join(wrong)} differ); "
                             f"{remedy}give another folder or delete this one")  # fmt: skip
    else:
        if any(folder.glob("shard-*.npy")):
            raise StoreError(f"{folder} holds shards but no manifest.json that names their encoder; delete the folder")
        _check_own(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write_ids(folder, items.ids, hashes)
        write_json(partial, {**identity, "shard_rows": work.shard_rows})
    return [n for n in range(work.count(items)) if not (folder / _shard_name(n)).exists()]


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.npy"


def _write_ids(folder: Path, ids: Sequence[str], hashes: Hashes | None = None) -> None:
    columns = {"id": pa.array(ids, pa.string())} | ({} if hashes is None else {"text_hash": pa.array(hashes)})
    write_table(pa.table(columns), folder / "ids.parquet")


def _write_shard(folder: Path, number: int, vectors: npt.NDArray[Any]) -> None:
    beside = folder / f"{_shard_name(number)}.{os.getpid()}.tmp"
    with beside.open("wb") as file:
        np.save(file, np.ascontiguousarray(vectors), allow_pickle=False)
    fsync(beside)
    beside.replace(folder / _shard_name(number))


def _finish(folder: Path, identity: dict[str, Any]) -> None:
    names = ["ids.parquet", *sorted(path.name for path in folder.glob("shard-*.npy"))]
    files = {name: checksum(folder / name) for name in names}
    write_manifest(folder / "manifest.json", {**identity, "files": files})
    (folder / "partial.json").unlink(missing_ok=True)
    for leftover in folder.glob("shard-*.tmp"):  # of a process that was killed
        leftover.unlink()


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / "manifest.json"
    if not file.exists():
        what = "is unfinished; run the same encode again" if (folder / "partial.json").exists() else "is no store"
        raise StoreError(f"{folder} {what} (no manifest.json)")
    manifest = read_manifest(file)
    if manifest.get("kind") != KIND:
        raise StoreError(f"{folder} is a {manifest.get('kind', 'folder of another kind')}, no {KIND}")
    if manifest.get("format") != FORMAT:
        raise StoreError(f"{file} has format {manifest.get('format')!r}; this version reads {FORMAT}: encode again")
    return manifest
