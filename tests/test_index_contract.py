"""What every index promises, run over every backend: exact, the FAISS family with and without re-scoring, Milvus Lite.

Each backend is built so thoroughly (all cells and nodes searched, all candidates re-scored) that what it finds is exact.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taoemb.files import read_manifest, write_manifest
from taoemb.index.exact import ExactIndex
from taoemb.index.faiss_index import VectorIndex
from taoemb.index.milvus import MilvusIndex
from taoemb.index.refresh import load_index
from taoemb.index.results import check_fingerprint
from taoemb.store import EmbeddingStore, decoded, encoded

N, D = 500, 16


def unit(seed, n, d=D):
    vectors = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


VECTORS, QUERIES = unit(0, N), unit(1, 20)
IDS = [f"i{i}" for i in range(N)]


def identity(vectors):
    return vectors


def store(vectors=VECTORS, ids=None, shards=3, fingerprint="f1", dtype="float32"):
    ids = [f"i{i}" for i in range(len(vectors))] if ids is None else ids
    return EmbeddingStore(ids, [encoded(part, dtype) for part in np.array_split(vectors, shards)], fingerprint)


@dataclass
class Backend:
    """How to build one kind of index, and what becomes of the vectors that it is given."""

    build: Callable[..., object]
    held: Callable[[np.ndarray], np.ndarray] = identity
    dtype: str = "float32"
    least: int = 0
    """Vectors that its training needs."""
    options: dict[str, object] = field(default_factory=dict)

    def make(self, vectors=VECTORS, ids=None, **options):
        return self.build(store(vectors, ids, dtype=self.dtype, **options))


def exact(dtype):
    return lambda the_store: ExactIndex.build(the_store, dtype=dtype)


def faiss(factory, **options):
    return lambda the_store: VectorIndex.build(the_store, factory, **options)


def rounded(dtype):
    return lambda vectors: torch.from_numpy(vectors).to(dtype).float().numpy()


def stored(dtype):
    return lambda vectors: decoded(encoded(vectors, dtype))


BACKENDS = {
    "exact": Backend(exact("float32")),
    "exact float16": Backend(exact("float16"), rounded(torch.float16)),
    "exact bfloat16": Backend(exact("bfloat16"), rounded(torch.bfloat16)),
    "Flat": Backend(faiss("Flat")),
    "HNSW32": Backend(faiss("HNSW32", efSearch=1000)),
    "IVF4,Flat": Backend(faiss("IVF4,Flat", nprobe=4), least=4),
    "SQ8 rescored": Backend(faiss("SQ8", rescore=N), least=1),
    "SQ8 of int8": Backend(faiss("SQ8", rescore=N), stored("int8"), "int8", least=1),
    "RaBitQ rescored": Backend(faiss("RaBitQ", rescore=N)),
    "IVF4,RaBitQ of float16": Backend(faiss("IVF4,RaBitQ", nprobe=4, rescore=N), stored("float16"), "float16", least=4),
    "HNSW32 of 8 dimensions": Backend(faiss("HNSW32", efSearch=1000, truncate_dim=8, rescore=N)),
    "Milvus": Backend(MilvusIndex.build),
}
QUICK = [name for name in BACKENDS if name != "Milvus"]


@pytest.fixture(params=BACKENDS)
def backend(request, tmp_path):
    """A `Backend`; Milvus writes to a file and is closed after the test."""
    if request.param != "Milvus":
        yield BACKENDS[request.param]
        return
    for module in ("pymilvus", "milvus_lite"):
        pytest.importorskip(module, reason=f'needs {module}: pip install "taoemb[milvus]"')
    made = []

    def build(the_store):
        made.append(MilvusIndex.build(the_store, tmp_path / "m.db", f"items{len(made)}"))
        return made[-1]

    yield Backend(build)
    for index in made:
        index.close()


def reopened(index, folder):
    """The index from its files; a Milvus index from its server's."""
    if isinstance(index, MilvusIndex):
        uri, name = index.uri, index.name
        index.close()
        index.__dict__.update(MilvusIndex.open(uri, name).__dict__)  # the fixture closes it
        return index
    index.save(folder)
    return (
        load_index(folder)
        if getattr(index, "dtype", "float32") == "float32"
        else ExactIndex.load(folder, dtype=index.dtype)
    )


def same(index, truth, held=identity, k=10, queries=QUERIES):
    """``index`` finds what brute force in float64 over ``truth`` (id -> vector) finds."""
    ids, vectors = np.array(list(truth), dtype=object), held(np.array(list(truth.values())).reshape(-1, D))
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    found, found_scores = index.search(queries, k)
    width = order.shape[1]
    assert found.shape == found_scores.shape == (len(queries), k)
    assert (found.dtype, found_scores.dtype) == (object, np.float32)
    assert found[:, :width].tolist() == ids[order].tolist()
    assert (found[:, width:] == "").all()
    np.testing.assert_allclose(found_scores[:, :width], np.take_along_axis(scores, order, axis=1), atol=1e-5)
    assert np.isneginf(found_scores[:, width:]).all()
    assert len(index) == len(truth)


def truth_of(vectors=VECTORS, ids=None):
    return dict(zip(IDS if ids is None else ids, vectors, strict=False))


# Search -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 10, 100])
def test_search_is_brute_force(backend, k):
    same(backend.make(), truth_of(), backend.held, k)


def test_more_wanted_than_there_are(backend):
    for count in (5, 4):
        same(backend.make(VECTORS[:count]), truth_of(VECTORS[:count], IDS[:count]), backend.held, k=7)


def test_one_item(backend):
    if backend.least > 1:
        with pytest.raises(ValueError, match="cannot be trained on 1 vectors"):
            backend.make(VECTORS[:1], ["only"], shards=1)
    else:
        same(backend.make(VECTORS[:1], ["only"], shards=1), {"only": VECTORS[0]}, backend.held, k=2)


def test_no_item(backend):
    if backend.least:
        with pytest.raises(ValueError, match="cannot be trained on 0 vectors"):
            backend.make(VECTORS[:0], shards=1)
    else:
        index = backend.make(VECTORS[:0], shards=1)
        same(index, {}, k=2)
        index.update(["first"], VECTORS[:1])
        same(index, {"first": VECTORS[0]}, backend.held, k=2)


def test_no_query(backend):
    same(backend.make(), truth_of(), k=5, queries=QUERIES[:0])


def test_equal_vectors(backend):
    """Items with the same vector are all found, next to each other, each with its own id."""
    vectors = np.repeat(VECTORS[:8], 3, axis=0)
    found, scores = backend.make(vectors).search(VECTORS[:8], 3)
    assert [sorted(row) for row in found.tolist()] == [sorted(f"i{3 * i + j}" for j in range(3)) for i in range(8)]
    np.testing.assert_allclose(scores, 1, atol=0.01)


ODD_IDS = ["0012", "12", "ключ 🍵", "a" * 5000, "1e5", "nan", " ", "x,y\n\"z'", "None", "-1"]


def test_ids_of_every_kind(backend, tmp_path):
    vectors = np.eye(10, D, dtype=np.float32)
    index = backend.make(vectors, ODD_IDS)
    for _ in range(2):
        ids, _ = index.search(vectors, 1)
        assert ids[:, 0].tolist() == ODD_IDS
        assert all(type(i) is str for i in ids[:, 0])
        assert sorted(index.ids) == sorted(ODD_IDS)
        index = reopened(index, tmp_path / "i")


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8])
def test_numbers_of_other_types_are_converted(backend, dtype):
    queries = np.round(QUERIES * 100).astype(dtype)
    index = backend.make()
    assert index.search(queries, 3)[0].tolist() == index.search(queries.astype(np.float32), 3)[0].tolist()
    assert index.search(queries.tolist(), 3)[0].shape == (20, 3)


# What is refused ----------------------------------------------------------------------------------------------------------


def bad(value):
    vectors = VECTORS.copy()
    vectors[7, 3] = value
    return vectors


def test_bad_queries(backend):
    index = backend.make()
    for queries, words in [
        (QUERIES[0], r"must be a matrix \[rows, dimensions\], but have shape \(16,\)"),
        (QUERIES[:, :8], "8 dimensions, the index has 16"),
        (bad(np.nan)[:10], "row 7 holds NaN or infinity"),
        (bad(-np.inf)[:10], "row 7 holds NaN or infinity"),
        (QUERIES.astype(str), "dtype <U"),
        (QUERIES.astype(object), "dtype object"),
        (QUERIES > 0, "dtype bool"),
        (np.full((1, D), 1e300), "row 0 holds NaN or infinity"),
    ]:
        with pytest.raises(ValueError, match=words):
            index.search(queries, 3)
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"k={k}: ask for at least 1"):
            index.search(QUERIES, k)
    same(index, truth_of(), backend.held)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_vectors(backend, value):
    if backend.dtype != "int8":  # a store's int8 has no such value
        with pytest.raises(ValueError, match="item vectors: row 7 holds NaN or infinity"):
            backend.make(bad(value), shards=1)


@pytest.mark.parametrize("ids", [["a", "b", "c", "d", "a"], ["a", "a", "b", "c", "d"]])
def test_repeated_ids(backend, ids):
    with pytest.raises(ValueError, match="ids must be unique"):
        backend.make(VECTORS[:5], ids, shards=2)  # also across shards


def test_the_fingerprint_stays_and_another_is_refused(backend, tmp_path):
    index = backend.make()
    for _ in range(2):
        check_fingerprint(index, "f1")
        with pytest.raises(
            ValueError, match="the index was built with encoder f1, the queries come from f2: encode and build"
        ):
            check_fingerprint(index, "f2")
        index = reopened(index, tmp_path / "i")


def test_a_bad_change_changes_nothing(backend):
    index = backend.make()
    for ids, vectors, message in [(["a"], VECTORS[:2], "1 ids for 2 vectors"), (["a", "a"], VECTORS[:2], "unique"),
                                  (["a"], np.full((1, D), np.nan), "NaN"), (["a"], VECTORS[:1, :5], "5 dimensions"),
                                  (["a"], VECTORS[0], "matrix"), (["a"], VECTORS[:1].astype(str), "dtype <U")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            index.update(ids, vectors)
    with pytest.raises(KeyError, match="1 of 2 ids are not in the index, the first is 'nobody'"):
        index.remove([IDS[0], "nobody"])
    index.update([], VECTORS[:0])
    index.remove([])
    same(index, truth_of(), backend.held)


# Changes ------------------------------------------------------------------------------------------------------------------


def test_update_and_remove_are_a_rebuild(backend, tmp_path):
    rng = np.random.default_rng(3)
    index, truth = backend.make(), truth_of()
    for turn in range(4):
        changed = rng.choice(sorted(truth), 60, replace=False).tolist() + [f"new{turn}-{i}" for i in range(20)]
        fresh = unit([3, turn], len(changed))
        index.update(changed, fresh)
        truth.update(zip(changed, fresh, strict=True))
        gone = rng.choice(sorted(truth), 50, replace=False).tolist()
        index.remove(gone)
        truth = {item_id: vector for item_id, vector in truth.items() if item_id not in gone}
        if turn == 2:
            index = reopened(index, tmp_path / "i")
    assert sorted(index.ids) == sorted(truth)
    same(index, truth, backend.held)


def test_a_change_leaves_the_store_and_its_other_indexes_alone(backend):
    shared = store(dtype=backend.dtype)
    index, other = backend.build(shared), ExactIndex.build(shared)
    index.update([IDS[7], "new"], VECTORS[[8, 9]])
    index.remove([IDS[3]])
    assert shared.ids == other.ids == IDS
    same(other, truth_of(), stored(backend.dtype) if backend.dtype != "float32" else identity)


def test_everything_can_go_and_come_back(backend):
    index = backend.make()
    index.remove(IDS)
    assert index.ids == []
    same(index, {}, k=5)
    index.update(IDS[:7], VECTORS[:7])
    same(index, truth_of(VECTORS[:7], IDS[:7]), backend.held)


def row(seed):
    return unit(seed, 1)[0]


names = st.integers(0, 30).map(lambda i: f"item {i}")
operations = st.one_of(
    st.tuples(st.just("update"), st.dictionaries(names, st.integers(0, 10_000), max_size=12)),
    st.tuples(st.just("remove"), st.sets(names, max_size=8)),
    st.tuples(st.just("search"), st.integers(1, 50)),
    st.tuples(st.just("reload"), st.none()),
)


@pytest.mark.parametrize("name", QUICK)
@settings(max_examples=20)
@given(st.lists(operations, max_size=12))
def test_any_sequence_of_changes_is_a_rebuild(name, sequence):
    backend = BACKENDS[name]
    truth = {f"start {i}": VECTORS[i] for i in range(40)}
    index = backend.make(np.array(list(truth.values())), list(truth))
    for what, argument in sequence:
        if what == "update":
            new = {name: row([7, seed, int(name[5:])]) for name, seed in argument.items()}  # no two alike: no ties
            index.update(list(new), np.array(list(new.values()), np.float32).reshape(-1, D))
            truth |= new
        elif what == "remove":
            there = sorted(argument & truth.keys())
            index.remove(there)
            truth = {name: vector for name, vector in truth.items() if name not in there}
        elif what == "search":
            same(index, truth, backend.held, argument)
        else:
            with tempfile.TemporaryDirectory() as folder:
                index = reopened(index, Path(folder) / "i")
        assert len(index) == len(truth)
    same(index, truth, backend.held)


# Files --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUICK)
def test_a_saved_index_is_the_same(name, tmp_path):
    backend = BACKENDS[name]
    index = backend.make()
    loaded = reopened(index, tmp_path / "i")
    assert type(loaded) is type(index)
    assert (loaded.ids, loaded.fingerprint, len(loaded)) == (index.ids, "f1", N)
    for one, other in zip(loaded.search(QUERIES, 10), index.search(QUERIES, 10), strict=True):
        np.testing.assert_array_equal(one, other)
    assert {path.suffix for path in (tmp_path / "i").iterdir()} <= {".json", ".parquet", ".npy", ".faiss"}  # no pickle
    backend.make(VECTORS[::-1].copy()).save(tmp_path / "i")  # takes the old one's place
    assert load_index(tmp_path / "i").search(VECTORS[:1], 1)[0].tolist() == [[IDS[-1]]]
    loaded.search(QUERIES, 10)  # the files it reads are gone from their place, not from under it


@pytest.mark.parametrize("name", QUICK)
def test_saving_replaces_only_an_index(name, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError):
        BACKENDS[name].make().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", QUICK)
def test_damaged_files_are_named(name, tmp_path):
    BACKENDS[name].make(shards=1).save(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        for damaged in (whole[:-10], bytes(flipped)):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{path.name} is .*corrupt"):
                load_index(tmp_path)
        path.unlink()
        with pytest.raises(ValueError, match=path.name):
            load_index(tmp_path)
        path.write_bytes(whole)
    assert len(load_index(tmp_path)) == N


def test_the_vectors_that_rescore_stay_on_disk(tmp_path):
    store().save(tmp_path / "s")
    index = VectorIndex.build(EmbeddingStore.open(tmp_path / "s"), "SQ8", rescore=4)
    assert all(isinstance(shard, np.memmap) for shard in index.shards)
    index.save(tmp_path / "i")
    (loaded,) = VectorIndex.load(tmp_path / "i").shards
    assert isinstance(loaded, np.memmap)
    np.testing.assert_array_equal(loaded, VECTORS)
    assert json.loads((tmp_path / "i" / "manifest.json").read_text())["rescore"] == 4


def test_vectors_that_change_often_do_not_pile_up():
    index = VectorIndex.build(store(), "SQ8", rescore=N)
    truth = truth_of()
    for turn in range(30):
        fresh = unit([9, turn], 2)
        index.update([IDS[turn % 4], f"new {turn % 3}"], fresh)
        truth |= {IDS[turn % 4]: fresh[0], f"new {turn % 3}": fresh[1]}
    assert len(index._added) == 4 + 3
    same(index, truth)


def test_an_index_of_an_older_version_opens(tmp_path):
    VectorIndex.build(store(), "Flat").save(tmp_path)
    manifest = read_manifest(tmp_path / "manifest.json")
    write_manifest(
        tmp_path / "manifest.json", {k: v for k, v in manifest.items() if k not in ("rescore", "truncate_dim")}
    )
    same(load_index(tmp_path), truth_of())
