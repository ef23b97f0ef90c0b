"""FAISS behind a factory string, with string ids, a manifest and no pickle."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from taoemb.files import checksum, read_manifest, replace_folder, write_manifest
from taoemb.index.results import (
    SearchResult,
    as_queries,
    as_result,
    check_k,
    check_unique,
    check_vectors,
    known_ids,
    overlap,
)
from taoemb.store import EmbeddingStore, decoded, encoded, gather, ids_hash, unit_rows
from taoemb.tables import write_table
from taoemb.types import FloatArray

_TRAIN_ROWS, _TRAIN_ROWS_PER_LIST = 262_144, 40
"""Vectors that a quantizer is trained on at most, and more where it has so many lists that FAISS wants them; our choice."""
_EXACT_NUMBERS = 50_000_000
"""Numbers (vectors x dimensions) up to which exact search is chosen: 200 MB, about 20 ms of one core's bandwidth."""
_KIND = "vector index"
_PARAMETERS = ("nprobe", "efSearch")
_RESCORE_BYTES = 64 << 20
"""Vectors that are read at a time to re-score candidates."""


def auto_factory(count: int, dimension: int, memory_gib: float = 4.0) -> tuple[str, str]:
    """A factory string for ``count`` vectors, and why: exact search while a query costs a few milliseconds on a core, then
    an inverted file in float32, then in one byte a dimension, then in half of one, as far as the memory allows.

    The limits are our choice, from measurements on two CPU cores (benchmarks/LOG.md).

    Raises ValueError when even the smallest does not fit.

    >>> auto_factory(20_000, 256)
    ('Flat', '20,000 x 256: exact search, 0.02 GiB')
    >>> auto_factory(1_000_000, 256)[0]
    'IVF4096,Flat'
    >>> auto_factory(10_000_000, 256, memory_gib=4)[0]
    'IVF16384,SQ8'
    """
    lists = 1 << round(np.log2(4 * np.sqrt(max(1, count))))
    sizes = {f"IVF{lists},Flat": 4.0 * dimension + 8, f"IVF{lists},SQ8": dimension + 8.0,
             f"IVF{lists},SQ4": dimension / 2 + 8}  # fmt: skip
    if count * dimension <= _EXACT_NUMBERS:
        sizes = {"Flat": 4.0 * dimension, **sizes}
    for factory, row_bytes in sizes.items():
        size = count * row_bytes / 2**30
        if size <= memory_gib:
            what = "exact search" if factory == "Flat" else factory
            return factory, f"{count:,} x {dimension}: {what}, {size:.2f} GiB"
    raise ValueError(f"{count:,} vectors of {dimension} dimensions need {size:.1f} GiB even as {factory}, {memory_gib:g} are "
                     "allowed; allow more, shorten the vectors or use several machines")  # fmt: skip


def import_faiss() -> Any:
    """The faiss module; raises ImportError that names the extra to install."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            'VectorIndex needs faiss: pip install "taoemb[cpu]" (or "taoemb[gpu]"); ExactIndex works without it'
        ) from error
    return faiss


@dataclass
class VectorIndex:
    """A FAISS index over unit vectors (inner product) whose items are named by string ids.

    Make one with `build` or `load`. Labels inside FAISS are places in ``slots``, catalog positions at first, so that no id
    map is wrapped around it: FAISS's own over an inverted file names wrong items after a removal. A removed item leaves
    its place empty (``""``).

    With ``rescore`` FAISS proposes that many times ``k`` candidates, from shortened or coarsely rounded vectors as the factory
    and ``truncate_dim`` say, and the store's own vectors, which stay on disk where they are memory-mapped, decide.
    """

    slots: list[str]
    factory: str
    fingerprint: str
    faiss_index: Any = field(repr=False)
    dimension: int
    truncate_dim: int | None = None
    rescore: int = 0
    shards: list[npt.NDArray[Any]] = field(default_factory=list, repr=False)
    """The store's vectors, where they re-score."""

    def __post_init__(self) -> None:
        self._row = np.arange(len(self.slots) if self.rescore else 0)  # of each slot in `_rows`
        self._given = sum(len(shard) for shard in self.shards)
        self._added = np.empty((0, self.dimension), self.shards[0].dtype if self.shards else np.float32)
        self._hold(self.slots)

    def _hold(self, slots: list[str]) -> None:
        self.slots, self._ids = slots, np.asarray(slots, dtype=object)
        self._empty = np.flatnonzero(self._ids == "").astype(np.int64)
        self._selector: Any = None

    def _shortened(self, vectors: FloatArray) -> FloatArray:
        """What FAISS is given of vectors ``[n, D]``."""
        return vectors if self.truncate_dim is None else shortened(vectors, self.truncate_dim)

    @property
    def ids(self) -> list[str]:
        """Ids of the items in the index."""
        return [item_id for item_id in self.slots if item_id]

    @classmethod
    def build(
        cls,
        store: EmbeddingStore,
        factory: str = "Flat",
        *,
        truncate_dim: int | None = None,
        rescore: int = 0,
        seed: int = 0,
        deterministic: bool = False,
        **parameters: int,
    ) -> VectorIndex:
        """Train on a sample where the factory needs it, then add the store's shards one by one.

        Args:
            store: the vectors.
            factory: FAISS factory string such as ``Flat``, ``HNSW32``, ``IVF1024,Flat``; ``SQ8`` and ``IVF1024,SQ8`` hold one
                byte a dimension, ``RaBitQ`` and ``IVF1024,RaBitQ`` one bit.
            truncate_dim: FAISS holds the first so many dimensions alone, normalised again (for Matryoshka models).
            rescore: candidates per result that the full vectors re-score; 0: FAISS's scores are the last word.
            seed: of the training sample.
            deterministic: add single-threaded, so that a graph index comes out the same every time.
            parameters: search settings, ``nprobe`` (without it a sixteenth of the lists, at least 8) or ``efSearch``.

        Raises ValueError for an unknown factory string or parameter, or too few vectors to train it.
        """
        faiss = import_faiss()
        if truncate_dim is not None and not 0 < truncate_dim <= max(1, store.dimension):
            raise ValueError(f"truncate_dim={truncate_dim}: give 1 to {store.dimension}, the store's dimensions")
        if rescore < 0:
            raise ValueError(f"rescore={rescore}: give 0 (off) or how many candidates per result")
        dimension = truncate_dim or store.dimension
        try:
            index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ValueError(f"factory={factory!r} is no FAISS factory string for {dimension} dimensions "
                             f"(examples: Flat, HNSW32, IVF1024,Flat): {str(error).rpartition(': ')[2]}") from None  # fmt: skip
        _set_parameters(index, {**_defaults(index), **parameters})
        check_unique(store.ids)  # also across blocks, which are checked one by one below
        if not index.is_trained:
            _train(index, store, factory, seed, dimension)
        threads = faiss.omp_get_max_threads()
        try:
            if deterministic:
                faiss.omp_set_num_threads(1)
            start = 0
            for block in store.blocks():
                index.add(shortened(check_vectors(block, store.ids[start : start + len(block)]), dimension))
                start += len(block)
        except RuntimeError as error:  # IDMap wants ids, NSG wants all vectors at once
            raise ValueError(f"factory={factory!r} cannot be filled shard by shard: {error}") from None
        finally:
            faiss.omp_set_num_threads(threads)
        return cls(store.ids, factory, store.fingerprint, index, store.dimension, truncate_dim, rescore,
                   store.shards if rescore else [])  # fmt: skip

    @property
    def parameters(self) -> dict[str, int]:
        """The search settings, ``nprobe`` or ``efSearch`` where the index has one."""
        return _get_parameters(self.faiss_index)

    def set_parameters(self, **parameters: int) -> None:
        """Change search settings; raises ValueError for one that this index does not have."""
        _set_parameters(self.faiss_index, parameters)

    @property
    def lists(self) -> int:
        """Lists of an inverted file; 0 for other kinds."""
        return int(getattr(_core(self.faiss_index), "nlist", 0))

    def __len__(self) -> int:
        return len(self.slots) - len(self._empty)

    def search(self, vectors: npt.ArrayLike, k: int) -> SearchResult:
        """The Top-``k`` of ``B`` query vectors ``[B, D]``: ids ``[B, k]`` and scores ``[B, k]``, best first.

        Where fewer than ``k`` items are found, a row is padded with id "" and score -inf.
        """
        return as_result(*self.search_positions(vectors, k), self._ids, k)

    def search_positions(self, vectors: npt.ArrayLike, k: int) -> tuple[npt.NDArray[np.int64], FloatArray]:
        """Like `search` with catalog positions, -1 where nothing was found: ``[B, min(k, N)]`` each."""
        queries = as_queries(vectors, self.dimension)
        k = min(check_k(k), len(self))
        if not len(queries) or not k:
            return np.zeros((len(queries), k), np.int64), np.zeros((len(queries), k), np.float32)
        selector, count = self._without_empty(), min(max(1, self.rescore) * k, len(self))
        options = {} if selector is None else {"params": selector}
        scores, positions = self.faiss_index.search(self._shortened(queries), count, **options)
        return self._rescored(queries, positions, k) if self.rescore else (positions, scores)

    def _rescored(
        self, queries: FloatArray, positions: npt.NDArray[np.int64], k: int
    ) -> tuple[npt.NDArray[np.int64], FloatArray]:
        """The best ``k`` of the candidates by the full vectors' own inner products."""
        scores = np.empty(positions.shape, np.float32)
        step = max(1, _RESCORE_BYTES // (4 * self.dimension * positions.shape[1]))
        for start in range(0, len(queries), step):
            places, query_BD = positions[start : start + step], queries[start : start + step]
            vectors = decoded(gather(self._rows, self._row[np.maximum(places, 0).ravel()])).reshape(*places.shape, -1)
            scores[start : start + step] = np.einsum("bkd,bd->bk", vectors, query_BD)
        scores[positions < 0] = -np.inf
        order = np.lexsort((positions, -scores), axis=1)[:, :k]
        return np.take_along_axis(positions, order, 1), np.take_along_axis(scores, order, 1)

    def _without_empty(self) -> Any:
        """For a graph, whose nodes stay when an item goes: search parameters that leave the empty places out."""
        if not len(self._empty) or not hasattr(self.faiss_index, "hnsw"):
            return None
        faiss = import_faiss()
        if self._selector is None:
            batch = faiss.IDSelectorBatch(self._empty)
            self._selector = faiss.IDSelectorNot(batch)
            self._selector.batch = batch  # FAISS keeps a pointer, Python must keep the object
        return faiss.SearchParametersHNSW(efSearch=self.faiss_index.hnsw.efSearch, sel=self._selector)

    def update(self, ids: Sequence[str], vectors: npt.ArrayLike) -> None:
        """Give these items the vectors ``[n, D]``; ids that are new are added.

        A flat index is then as one built afresh; an inverted file keeps its cells, which is nearly as good (a new vector
        goes to its nearest one); a graph takes a changed item in as a new node and leaves the old one out of the results.
        Not for use beside searches in other threads.

        Raises ValueError where vectors or ids are unfit, or this kind of index cannot be changed.
        """
        array = check_vectors(vectors, ids, self.dimension)
        kind = self._changeable()
        slot = {item_id: i for i, item_id in enumerate(self.slots) if item_id}
        known = np.array([item_id in slot for item_id in ids], dtype=bool)
        places = np.array([slot[item_id] for item_id in ids if item_id in slot], dtype=np.int64)
        given, slots = self._shortened(array), list(self.slots)  # the list may be the store's own
        if kind == "flat" and len(places):
            _flat_codes(self.faiss_index)[places] = self.faiss_index.sa_encode(given[known])
        elif kind == "ivf" and len(places):
            self.faiss_index.remove_ids(places)
            self.faiss_index.add_with_ids(given[known], places)
        elif kind == "graph":
            for place in places.tolist():
                slots[place] = ""
            places, known = places[:0], np.zeros_like(known)
        fresh = [item_id for item_id, old in zip(ids, known, strict=True) if not old]
        if kind == "ivf":
            self.faiss_index.add_with_ids(given[~known], np.arange(len(slots), len(slots) + len(fresh)))
        else:
            self.faiss_index.add(given[~known])
        if self.rescore:
            self._remember(places, array, known)
        self._hold([*slots, *fresh])

    def _remember(self, places: npt.NDArray[np.int64], array: FloatArray, known: npt.NDArray[np.bool_]) -> None:
        """Put new vectors behind those that re-score, which may be a memory map: known items at ``places``, then new ones."""
        dtype = self.shards[0].dtype.name if self.shards else "float32"
        new = encoded(array, dtype)
        rows = np.full(len(new), -1)
        rows[known] = self._row[places]
        again = rows >= self._given  # changed before: its row is free again
        self._added[rows[again] - self._given] = new[again]
        rows[~again] = self._given + len(self._added) + np.arange((~again).sum())
        self._row[places] = rows[known]
        self._row = np.concatenate([self._row, rows[~known]])
        self._added = np.concatenate([self._added, new[~again]])

    @property
    def _rows(self) -> list[npt.NDArray[Any]]:
        """Where `_row` points: the store's vectors, and those that came or changed since."""
        return [*self.shards, self._added]

    def remove(self, ids: Sequence[str]) -> None:
        """Take items out. Raises KeyError naming an id that is not there, ValueError where this kind cannot be changed."""
        gone = known_ids(ids, self.ids)
        kind = self._changeable()
        places = np.array([i for i, item_id in enumerate(self.slots) if item_id in gone], dtype=np.int64)
        if kind == "flat":  # FAISS closes the gaps
            self.faiss_index.remove_ids(places)
            self._row = np.delete(self._row, places) if self.rescore else self._row
            self._hold([item_id for item_id in self.slots if item_id not in gone])
        else:
            if kind == "ivf" and len(places):
                self.faiss_index.remove_ids(places)
            self._hold(["" if item_id in gone else item_id for item_id in self.slots])

    def _changeable(self) -> str:
        faiss = import_faiss()
        if isinstance(self.faiss_index, faiss.IndexFlatCodes):
            return "flat"
        if isinstance(self.faiss_index, faiss.IndexHNSW):
            return "graph"
        outer = isinstance(self.faiss_index, (faiss.IndexIVF, faiss.IndexPreTransform))
        if outer and isinstance(_core(self.faiss_index), faiss.IndexIVF):
            return "ivf"
        raise ValueError(f"an index of factory {self.factory!r} cannot be changed; build it again")

    def to_gpu(self, device: int = 0, *, temp_memory_mib: int = 256, float16: bool = False) -> VectorIndex:
        """The index on a GPU, for searching; this one stays as it is. Flat, IVF and PQ indexes have a GPU form.

        Args:
            device: number of the GPU.
            temp_memory_mib: MiB that FAISS reserves there for its intermediate results, beside the index itself.
            float16: hold vectors and tables in half precision.

        Raises ImportError where FAISS is built without GPUs, ValueError where the GPU or the kind of index is not there, and
        RuntimeError where what the GPU finds is not what the CPU finds.
        """
        faiss = import_faiss()
        if not hasattr(faiss, "StandardGpuResources"):
            raise ImportError('this faiss is built without GPUs: pip uninstall faiss-cpu, then pip install "taoemb[gpu]"; '
                              "ExactIndex searches on a GPU with torch alone")  # fmt: skip
        if not 0 <= device < faiss.get_num_gpus():
            raise ValueError(f"device={device}: faiss sees {faiss.get_num_gpus()} GPUs")
        resources, options = faiss.StandardGpuResources(), faiss.GpuClonerOptions()
        resources.setTempMemory(temp_memory_mib << 20)
        options.useFloat16 = float16
        try:
            moved = faiss.index_cpu_to_gpu(resources, device, self.faiss_index, options)
        except RuntimeError as error:
            raise ValueError(f"an index of factory {self.factory!r} has no GPU form: {error}") from None
        moved.resources = resources  # FAISS keeps a pointer, Python must keep the object
        index = dataclasses.replace(self, slots=list(self.slots), faiss_index=moved)
        index._row, index._added = self._row, self._added
        probe = unit_rows(np.random.default_rng(0).standard_normal((64, self.dimension)))
        if len(self) and overlap(*(one.search_positions(probe, 10)[0] for one in (index, self))) < 0.9:
            raise RuntimeError(f"faiss {faiss.__version__} finds other items on this GPU than on the CPU; use ExactIndex, or "
                               "a faiss that is built for this GPU")  # fmt: skip
        return index

    def save(self, folder: str | Path) -> None:
        """Write ``index.faiss``, ``ids.parquet`` and ``manifest.json``; the folder appears complete or not at all."""
        import pyarrow as pa

        faiss = import_faiss()
        with replace_folder(Path(folder), "manifest.json", _KIND) as beside:
            on_gpu = isinstance(self.faiss_index, getattr(faiss, "GpuIndex", ()))
            index = faiss.index_gpu_to_cpu(self.faiss_index) if on_gpu else self.faiss_index
            faiss.write_index(index, str(beside / "index.faiss"))
            write_table(pa.table({"id": pa.array(self.slots, pa.string())}), beside / "ids.parquet")
            if self.rescore:
                self._write_vectors(beside / "vectors.npy")
            manifest = {
                "kind": _KIND,
                "format": 1,
                "factory": self.factory,
                "fingerprint": self.fingerprint,
                "dimension": self.dimension,
                "truncate_dim": self.truncate_dim,
                "rescore": self.rescore,
                "count": len(self),
                "ids_hash": ids_hash(self.slots),
                "parameters": self.parameters,
                "files": {path.name: checksum(path) for path in sorted(beside.iterdir())},
            }
            write_manifest(beside / "manifest.json", manifest)

    @classmethod
    def load(cls, folder: str | Path) -> VectorIndex:
        """Open a saved index; raises ValueError naming the file that is missing or corrupt."""
        import pyarrow.parquet as pq

        faiss = import_faiss()
        folder = Path(folder)
        file = folder / "manifest.json"
        if not file.exists():
            raise ValueError(f"{folder} is no saved index (no manifest.json)")
        manifest = read_manifest(file)
        for name, expected in manifest["files"].items():
            if not (folder / name).exists() or checksum(folder / name) != expected:
                raise ValueError(f"{folder / name} is missing or corrupt; build the index again")
        index = faiss.read_index(str(folder / "index.faiss"))
        _set_parameters(index, manifest["parameters"])
        ids = pq.read_table(folder / "ids.parquet").column("id").to_pylist()
        rescore = manifest.get("rescore", 0)
        shards = [np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False)] if rescore else []
        return cls(ids, manifest["factory"], manifest["fingerprint"], index, manifest["dimension"],
                   manifest.get("truncate_dim"), rescore, shards)  # fmt: skip

    def _write_vectors(self, path: Path) -> None:
        """The vectors that re-score, in the order of the slots."""
        dtype = self.shards[0].dtype if self.shards else np.dtype(np.float32)
        shape = (len(self.slots), self.dimension)
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})
            step = max(1, _RESCORE_BYTES // max(1, dtype.itemsize * self.dimension))
            for start in range(0, len(self.slots), step):
                file.write(gather(self._rows, self._row[start : start + step]).tobytes())


def shortened(vectors: FloatArray, dimension: int) -> FloatArray:
    """The first ``dimension`` numbers of vectors ``[n, D]``, normalised again; all of them are left as they are."""
    if dimension >= vectors.shape[1]:
        return vectors
    return np.ascontiguousarray(unit_rows(vectors[:, :dimension]))


def _flat_codes(index: Any) -> npt.NDArray[np.uint8]:
    """The encoded vectors of a flat index, ``[N, bytes]``, as they lie in its memory."""
    size = index.ntotal * index.code_size
    codes: npt.NDArray[np.uint8] = import_faiss().rev_swig_ptr(index.codes.data(), size).reshape(-1, index.code_size)
    return codes


def _train(index: Any, store: EmbeddingStore, factory: str, seed: int, dimension: int) -> None:
    wanted = max(_TRAIN_ROWS, _TRAIN_ROWS_PER_LIST * getattr(_core(index), "nlist", 0))
    rows = np.sort(np.random.default_rng(seed).permutation(len(store))[:wanted])
    sample = shortened(check_vectors(store.rows(rows), [store.ids[row] for row in rows]), dimension)
    try:
        index.train(sample)
    except RuntimeError as error:
        raise ValueError(
            f"factory={factory!r} cannot be trained on {len(store)} vectors; use a smaller one or Flat: "
            f"{str(error).splitlines()[-1]}"
        ) from None


def _core(index: Any) -> Any:
    """The index that is searched behind a transform (``OPQ16,IVF1024,PQ16``) or a refinement (``IVF1024,PQ16,RFlat``)."""
    for name in ("index", "base_index"):
        if hasattr(index, name):
            return _core(import_faiss().downcast_index(getattr(index, name)))
    return index


def _defaults(index: Any) -> dict[str, int]:
    """FAISS probes one list of an inverted file, which finds too little; a sixteenth, at least 8, is our choice."""
    index = _core(index)
    return {"nprobe": min(index.nlist, max(8, index.nlist // 16))} if hasattr(index, "nlist") else {}


def _set_parameters(index: Any, parameters: dict[str, int]) -> None:
    index = _core(index)
    for name, value in parameters.items():
        target = index.hnsw if name == "efSearch" and hasattr(index, "hnsw") else index
        if name not in _PARAMETERS or not hasattr(target, name):
            raise ValueError(f"parameter {name!r} does not fit this index; known: {_PARAMETERS}")
        if value < 1:
            raise ValueError(f"{name}={value}: give at least 1")
        setattr(target, name, value)


def _get_parameters(index: Any) -> dict[str, int]:
    index = _core(index)
    found = {"efSearch": index.hnsw.efSearch} if hasattr(index, "hnsw") else {}
    return {**found, **({"nprobe": index.nprobe} if hasattr(index, "nprobe") else {})}
