"""Embeddings on disk: memory-mapped shards with a manifest, written by a streaming, resumable encode.

Layout of a store folder: ``ids.parquet``, ``shard-00000.npy`` ..., and ``manifest.json``, which is written last; a
folder without it is unfinished work that `encode_corpus` continues.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from taoemb.files import checksum, fsync, read_json, read_manifest, replace_folder, write_json, write_manifest
from taoemb.tables import write_table
from taoemb.types import FloatArray

if TYPE_CHECKING:
    from taoemb.catalog import Items
    from taoemb.encoder import Encoder

FORMAT = 1
KIND = "embedding store"
SHARD_ROWS = 16_384
"""Rows of a shard, the unit that a resumed encode does not repeat; our choice."""


class StoreError(ValueError):
    """A store is unfinished, corrupt or of another encoder or catalog."""


@dataclass(frozen=True)
class EmbeddingStore:
    """``N`` unit vectors with their ids, in memory or memory-mapped.

    ``shards`` are float32 ``[n, D]`` blocks in order; ``fingerprint`` is that of the encoder that made them.
    """

    ids: list[str]
    shards: list[npt.NDArray[np.float32]]
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

    @cached_property
    def vectors(self) -> FloatArray:
        """All vectors as one ``[N, D]`` array: the memory map itself where there is one shard, else a copy."""
        return self.shards[0] if len(self.shards) == 1 else np.concatenate(self.shards)

    @classmethod
    def open(cls, folder: str | Path, verify: bool = True) -> EmbeddingStore:
        """Open a finished store memory-mapped; with ``verify`` every file is read once against its checksum.

        Raises StoreError, naming the file, when the store is unfinished or a file is missing or corrupt.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        for name, expected in manifest["files"].items():
            if not (folder / name).exists():
                raise StoreError(f"{folder / name} is missing; encode the catalog again")
            if verify and checksum(folder / name) != expected:
                raise StoreError(f"{folder / name} is corrupt (its checksum is not the manifest's); encode again")
        ids = pq.read_table(folder / "ids.parquet").column("id").to_pylist()
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
            _finish(beside, _identity(self.ids, self.fingerprint, self.dimension))


def encode_corpus(
    encoder: Encoder,
    items: Items,
    out: str | Path | None = None,
    *,
    shard_rows: int = SHARD_ROWS,
    progress: bool = False,
) -> EmbeddingStore:
    """Encode a catalog's items into a store; memory stays at one shard beside the result.

    With ``out`` the shards go to disk and a second call with the same encoder and items continues after a kill, or
    returns at once when the store is complete. Without it the store is in memory.

    Raises StoreError when ``out`` holds a store of another encoder or catalog (also one with other item texts): nothing
    is overwritten.
    """
    fingerprint, ids = encoder.fingerprint, items.ids
    if out is None:
        return EmbeddingStore(ids, list(_encode_shards(encoder, items, 0, shard_rows, progress)), fingerprint)
    folder = Path(out)
    identity = _identity(ids, fingerprint, encoder.dimension)
    identity["texts_hash"] = _texts_hash(items, encoder.template.fields)
    done = _start(folder, ids, identity, shard_rows)
    if not (folder / "manifest.json").exists():
        shards = _encode_shards(encoder, items, done, shard_rows, progress)
        for number, shard in enumerate(shards, start=done):
            _write_shard(folder, number, shard)
            encoder.forget_tokens()  # memory stays at a shard's
        _finish(folder, identity)
    return EmbeddingStore.open(folder)


def _encode_shards(
    encoder: Encoder, items: Items, done: int, shard_rows: int, progress: bool
) -> Iterator[npt.NDArray[np.float32]]:
    first = min(done * shard_rows, len(items))
    with tqdm(
        total=len(items), initial=first, desc="encode items", unit="item", disable=None if progress else True
    ) as bar:
        for start in range(first, len(items), shard_rows):
            rows = range(start, min(start + shard_rows, len(items)))
            vectors = encoder.encode_document(items[rows.start : rows.stop])
            if not np.isfinite(vectors).all():
                bad = items.ids[rows[int(np.argmin(np.isfinite(vectors).all(axis=1)))]]
                raise StoreError(f"the encoder gave a NaN or infinite embedding for item {bad!r}")
            bar.update(len(rows))
            yield vectors


def ids_hash(ids: Sequence[str]) -> str:
    """Hash of ids in order."""
    digest = hashlib.sha256()
    for item_id in ids:
        digest.update(item_id.encode() + b"\0")
    return digest.hexdigest()[:32]


def _identity(ids: Sequence[str], fingerprint: str, dimension: int) -> dict[str, Any]:
    return {
        "kind": KIND,
        "format": FORMAT,
        "fingerprint": fingerprint,
        "ids_hash": ids_hash(ids),
        "count": len(ids),
        "dimension": dimension,
        "dtype": "float32",
    }


def _texts_hash(items: Items, fields: Sequence[str]) -> str:
    """Hash of the columns that the template reads: a store must not outlive an edited title."""
    columns = {name: items.table.column(name) for name in fields if name in items.table.column_names}
    hashes = {name: ids_hash([value or "" for value in column.to_pylist()]) for name, column in columns.items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:32]


def _start(folder: Path, ids: Sequence[str], identity: dict[str, Any], shard_rows: int) -> int:
    """Claim a folder for a store, or find it claimed for the same one; returns the number of finished shards."""
    for name in ("manifest.json", "partial.json"):
        file = folder / name
        if file.exists():
            found = read_manifest(file) if name == "manifest.json" else read_json(file)
            wrong = [key for key, value in identity.items() if found.get(key) != value]
            if name == "partial.json" and found.get("shard_rows") != shard_rows:
                wrong.append("shard_rows")
            if wrong:
                raise StoreError(
                    f"{folder} holds the embeddings of another encoder or catalog ({', '.join(wrong)} differ); "
                    "give another folder or delete this one"
                )
            if name == "manifest.json":
                return len(found["files"])
            break
    else:
        if any(folder.glob("shard-*.npy")):
            raise StoreError(f"{folder} holds shards but no manifest.json that names their encoder; delete the folder")
        folder.mkdir(parents=True, exist_ok=True)
        _write_ids(folder, ids)
        write_json(folder / "partial.json", {**identity, "shard_rows": shard_rows})
    done = 0
    while (folder / _shard_name(done)).exists():
        done += 1
    return done


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.npy"


def _write_ids(folder: Path, ids: Sequence[str]) -> None:
    write_table(pa.table({"id": pa.array(ids, pa.string())}), folder / "ids.parquet")


def _write_shard(folder: Path, number: int, vectors: npt.NDArray[np.float32]) -> None:
    beside = folder / (_shard_name(number) + ".tmp")
    with beside.open("wb") as file:
        np.save(file, np.ascontiguousarray(vectors, dtype=np.float32), allow_pickle=False)
    fsync(beside)
    beside.replace(folder / _shard_name(number))


def _finish(folder: Path, identity: dict[str, Any]) -> None:
    names = ["ids.parquet", *sorted(path.name for path in folder.glob("shard-*.npy"))]
    files = {name: checksum(folder / name) for name in names}
    write_manifest(folder / "manifest.json", {**identity, "files": files})
    (folder / "partial.json").unlink(missing_ok=True)


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
