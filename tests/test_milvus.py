"""`MilvusIndex` on a real Milvus Lite, against `ExactIndex`; without pymilvus what needs neither still runs."""

import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import numpy as np
import pytest

from taoemb.index import milvus
from taoemb.index.exact import ExactIndex
from taoemb.index.milvus import MilvusIndex
from taoemb.store import EmbeddingStore

N, D = 2000, 32


def unit(seed, n, d=D):
    vectors = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


VECTORS, QUERIES = unit(0, N), unit(1, 20)
IDS = [f"i{i}" for i in range(N)]


def store(vectors=VECTORS, ids=None, shards=3, fingerprint="f1"):
    return EmbeddingStore(ids or [f"i{i}" for i in range(len(vectors))], np.array_split(vectors, shards), fingerprint)


def test_without_pymilvus_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    for make in (lambda: MilvusIndex.build(store(), tmp_path / "m.db"), lambda: MilvusIndex.open("http://localhost:1")):
        with pytest.raises(ImportError, match=r'pip install "taoemb\[milvus\]"'):
            make()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.db"


@pytest.fixture
def make(path):
    """`MilvusIndex.build` or `open` on the test's file; what it gave is closed after the test."""
    for module in ("pymilvus", "milvus_lite"):
        pytest.importorskip(module, reason=f'needs {module}: pip install "taoemb[milvus]"')
    made = []

    def make(*args, **options):
        made.append(
            MilvusIndex.build(args[0], path, *args[1:], **options) if args else MilvusIndex.open(path, **options)
        )
        return made[-1]

    yield make
    for index in made:
        index.close()
    assert not milvus._lite_users


def same(index, exact, k=10, queries=QUERIES):
    ids, scores = index.search(queries, k)
    wanted, best = exact.search(queries, k)
    assert ids.dtype == object
    assert scores.dtype == np.float32
    assert ids.tolist() == wanted.tolist()
    np.testing.assert_allclose(scores, best, atol=1e-5)


def collections(index):
    return set(index._client.list_collections())


# Search ---------------------------------------------------------------------------------------------------------------


def test_flat_is_exact(make, monkeypatch):
    index, exact = make(store(), batch_rows=300), ExactIndex.build(store())
    for k in (1, 10, 500):
        same(index, exact, k)
    assert (len(index), index.dimension, index.fingerprint) == (N, D, "f1")
    assert index.ids == sorted(IDS)
    monkeypatch.setattr(milvus, "_RESULT_ROWS", 35)  # three queries at a time
    same(index, exact)
    index.close()
    index = make()  # a fresh client and server
    assert (len(index), index.dimension, index.fingerprint) == (N, D, "f1")
    same(index, exact)


@pytest.mark.parametrize(
    ("index_type", "thorough", "lazy"),
    [("IVF_FLAT", {"nlist": 16, "nprobe": 16}, {"nlist": 16, "nprobe": 1}),
     ("HNSW", {"M": 16, "efConstruction": 200, "ef": 500}, {"M": 2, "efConstruction": 4, "ef": 1})],
)  # fmt: skip
def test_parameters_reach_milvus(make, index_type, thorough, lazy):
    exact = ExactIndex.build(store())
    same(make(store(), index_type=index_type, params=thorough), exact)
    same(make(), exact)  # opened, it searches with the same settings
    wanted = exact.search(QUERIES, 10)[0]
    found = make(store(), index_type=index_type, params=lazy).search(QUERIES, 10)[0]
    assert np.mean([len({*a} & {*b}) / 10 for a, b in zip(found, wanted)]) < 0.9


ODD_IDS = ["0012", "12", "ключ 🍵", "a" * 65_535, "🍵" * 16_383, "1e5", "nan", " ", "x,y\n\"z'", "None", "-1", "\\", "\\n", "a\tb\r",
           "' or id != '", '"] or id != ""', "%", "{a}", "\x00", "\x1f"]  # fmt: skip


def test_ids_of_odd_kinds(make, monkeypatch):
    vectors = np.eye(len(ODD_IDS), D, dtype=np.float32)
    index = make(store(vectors, ODD_IDS))
    assert index.search(vectors, 1)[0][:, 0].tolist() == ODD_IDS
    assert index.ids == sorted(ODD_IDS)
    with monkeypatch.context() as patch:
        patch.setattr(milvus, "MAX_K", 1)  # a page an id: each is where the next page goes on from
        assert index.ids == sorted(ODD_IDS)
    index.update(ODD_IDS[::-1], vectors)
    assert index.search(vectors, 1)[0][:, 0].tolist() == ODD_IDS[::-1]
    for i, item_id in enumerate(ODD_IDS):  # each takes itself out and nothing else
        index.remove([item_id])
        assert index.ids == sorted(ODD_IDS[i + 1 :])


def test_requests_stay_small(monkeypatch):
    monkeypatch.setattr(milvus, "_BATCH_BYTES", 1000)
    ids = ["a" * n for n in (1, 200, 100, 100, 300, 1, 1, 1)]
    assert [(s.start, s.stop) for s in milvus._batches(ids, 0, 3)] == [(0, 2), (2, 4), (4, 5), (5, 8)]
    assert list(milvus._batches([], 8, 3)) == []


# Update and remove ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index_type", ["FLAT", "IVF_FLAT", "HNSW"])
def test_update_and_remove_are_a_rebuild(make, index_type):
    params = {"FLAT": {}, "IVF_FLAT": {"nlist": 4, "nprobe": 4}, "HNSW": {"ef": 500}}[index_type]
    index = make(store(VECTORS[:500]), index_type=index_type, params=params)
    truth = dict(zip(IDS, VECTORS[:500]))
    rng = np.random.default_rng(3)
    for turn in range(3):
        changed = rng.choice(sorted(truth), 60, replace=False).tolist() + [f"new {turn} {i}" for i in range(20)]
        fresh = unit([3, turn], 80)
        index.update(changed, fresh)
        truth.update(zip(changed, fresh))
        gone = rng.choice(sorted(truth), 50, replace=False).tolist()
        index.remove([*gone, gone[0]])
        truth = {item_id: vector for item_id, vector in truth.items() if item_id not in gone}
        exact = ExactIndex(list(truth), np.array(list(truth.values())))
        same(index, exact)  # at once
        assert len(index) == len(truth)
        if turn == 1:
            index.close()
            index = make()
    assert index.ids == sorted(truth)


def test_bad_changes_change_nothing(make):
    index = make(store())
    for ids, vectors, message in [(["a"], VECTORS[:2], "1 ids for 2 vectors"), (["a", "a"], VECTORS[:2], "unique"),
                                  (["a"], np.full((1, D), np.nan), "NaN"), (["a"], VECTORS[:1, :5], "5 dimensions"),
                                  (["a"], VECTORS[0], "matrix"), (["é" * 32_768], VECTORS[:1], "'é+' has 65536 bytes"),
                                  ([""], VECTORS[:1], "id '' has 0 bytes"),
                                  (["\ud800"], VECTORS[:1], r"id '\\ud800' is no valid Unicode")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            index.update(ids, vectors)
    with pytest.raises(KeyError, match="1 of 2 ids are not in the index, the first is 'nobody'"):
        index.remove([IDS[0], "nobody"])
    index.update([], VECTORS[:0])
    index.remove([])
    same(index, ExactIndex.build(store()))


# What is refused ------------------------------------------------------------------------------------------------------


def test_bad_queries(make):
    index = make(store())
    for queries, k, message in [(QUERIES[:, :8], 3, "8 dimensions, the index has 32"), (QUERIES[0], 3, "matrix"),
                                (QUERIES * np.nan, 3, "row 0 holds NaN"), (QUERIES, 0, "k=0: ask for at least 1"),
                                (QUERIES, 16_385, "k=16385: Milvus finds at most 16,384")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            index.search(queries, k)


def nan_at_the_end():
    vectors = VECTORS.copy()
    vectors[-1, 3] = np.nan
    return vectors


def test_a_refused_build_leaves_what_was_there(make):
    old = make(store(fingerprint="old"))
    for the_store, options, message in [
        (store(nan_at_the_end()), {}, "row 665 holds NaN or infinity"),
        (store(VECTORS[:3], ["a", "b", "a"]), {}, "ids must be unique"),
        (
            store(VECTORS[:3], ["a", "b", "x" * 65_536]),
            {},
            "id 'x+' has 65536 bytes in UTF-8; Milvus takes 1 to 65,535",
        ),
        (EmbeddingStore([], [], "f"), {}, "the store has no vectors"),
        (store(), {"batch_rows": 0}, "batch_rows=0"),
        (store(), {"index_type": "NONSENSE"}, "cannot build index_type='NONSENSE' with params={}: "),
        (store(), {"index_type": "IVF_FLAT", "params": {"nlist": "many"}}, "with params={'nlist': 'many'}"),
        (store(), {"name": "a-b"}, "name='a-b': give letters"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(the_store, **options)
        assert collections(old) == {old.collection}
    assert make().fingerprint == "old"
    same(old, ExactIndex.build(store()))


def test_what_cannot_be_opened_says_what_is_missing(make, path, tmp_path):
    with pytest.raises(ValueError, match=r"there is no Milvus Lite file .*m\.db"):
        make()
    with pytest.raises(ValueError, match=r"x\.txt'.* ends in \.db"):
        MilvusIndex.build(store(), tmp_path / "x.txt")
    index = make(store())
    with pytest.raises(ValueError, match="holds no index named 'other'"):
        make(name="other")
    client = index._client
    client.create_collection("plain", dimension=4)
    with pytest.raises(ValueError, match="'plain' is a collection in .*, not an alias"):
        make(name="plain")
    with pytest.raises(ValueError, match="'plain' is a collection in .*, not an alias"):
        make(store(), "plain")
    client.create_alias("plain", "foreign")
    with pytest.raises(ValueError, match=r"'plain' behind 'foreign' lacks the properties taoemb\.kind, .*taoemb\.fing"):
        make(name="foreign")
    index.close()
    with pytest.raises(ValueError, match="the index is closed"):
        index.search(QUERIES, 1)
    index.close()  # again does nothing


# Snapshots ------------------------------------------------------------------------------------------------------------


def test_a_new_build_takes_the_name_over(make):
    others = unit(5, 700, 16)
    first = make(store(fingerprint="one"))
    first._client.create_collection("items_7", dimension=4)  # somebody else's
    reader = make()
    second = make(store(others, fingerprint="two"))
    assert collections(first) == {"items_7", first.collection, second.collection}
    same(reader, ExactIndex.build(store()))  # until it is told to, a reader stays with the vectors of its encoder
    assert reader.fingerprint == "one"
    with pytest.raises(ValueError, match=r"no longer current; call reload\(\)"):
        reader.update(["a"], VECTORS[:1])
    with pytest.raises(ValueError, match=r"no longer current; call reload\(\)"):
        reader.remove([IDS[0]])
    assert reader.reload()
    assert not reader.reload()
    assert (reader.fingerprint, reader.dimension, len(reader)) == ("two", 16, 700)
    same(reader, ExactIndex.build(store(others)), queries=unit(6, 20, 16))
    third = make(store(fingerprint="three"))
    assert collections(first) == {"items_7", second.collection, third.collection}
    with pytest.raises(ValueError, match=r"'items_\d+' of 'items' is gone; call reload\(\)"):
        first.search(QUERIES, 1)
    assert first.reload()
    same(first, ExactIndex.build(store()))


def test_two_names_in_one_file(make):
    one, two = make(store(), "one"), make(store(VECTORS[::-1].copy()), "two")
    make(store(), "one")
    same(make(name="one"), ExactIndex.build(store()))
    same(two, ExactIndex.build(store(VECTORS[::-1].copy())))
    assert collections(two) >= {one.collection, two.collection}


def test_rows_that_got_lost_are_noticed(make, monkeypatch):
    old = make(store(fingerprint="old"))
    upsert = MilvusIndex._upsert
    monkeypatch.setattr(MilvusIndex, "_upsert", lambda self, c, ids, v: upsert(self, c, ids[1:], v[1:]))
    with pytest.raises(RuntimeError, match=r"counts 1997 rows in items_\d+ after 2000 were sent"):
        make(store())
    assert collections(old) == {old.collection}
    assert make().fingerprint == "old"


def test_transient_errors_are_tried_again_a_few_times(make, monkeypatch):
    import pymilvus

    waits, calls = [], []
    upsert = pymilvus.MilvusClient.upsert

    def flaky(self, *args, **options):
        calls.append(args)
        if len(calls) % 3:
            raise pymilvus.MilvusException(message="channel not ready", retriable=True)
        return upsert(self, *args, **options)

    monkeypatch.setattr(milvus, "time", SimpleNamespace(sleep=waits.append, time=time.time))
    monkeypatch.setattr(pymilvus.MilvusClient, "upsert", flaky)
    same(make(store()), ExactIndex.build(store()))
    assert waits == [0.1, 0.2] * 3
    for retriable, attempts in [(True, 6), (False, 1)]:
        calls.clear()
        error = pymilvus.MilvusException(message="no", retriable=retriable)

        def fail(self, *args, error=error, **options):
            calls.append(args)
            raise error

        monkeypatch.setattr(pymilvus.MilvusClient, "upsert", fail)
        with pytest.raises(pymilvus.MilvusException, match="no"):
            make(store())
        assert len(calls) == attempts


KILLED = """
    import os, signal, sys
    import numpy as np
    from pymilvus import MilvusClient
    from taoemb.index.milvus import MilvusIndex
    from taoemb.store import EmbeddingStore

    path, method, number, after = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "after"
    real, calls = getattr(MilvusClient, method), []

    def deadly(self, *args, **options):
        calls.append(method)
        if len(calls) == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(self, *args, **options)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(MilvusClient, method, deadly)
    vectors = np.eye(32, dtype=np.float32)
    MilvusIndex.build(EmbeddingStore([f"n{i}" for i in range(32)], [vectors], "new"), path, batch_rows=10)
"""


@pytest.mark.parametrize(
    ("method", "number", "when"),
    [("create_collection", 1, "after"), ("upsert", 3, "after"), ("create_index", 1, "before"),
     ("alter_alias", 1, "before"), ("alter_alias", 1, "after")],
)  # fmt: skip
def test_a_killed_build_leaves_the_old_or_the_new_snapshot(make, path, method, number, when):
    make(store(fingerprint="old")).close()
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(path), method, str(number), when]
    child = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    index = make()
    assert len(collections(index)) == 2
    if (method, when) == ("alter_alias", "after"):
        assert (index.fingerprint, len(index)) == ("new", 32)
    else:
        assert (index.fingerprint, len(index)) == ("old", N)
        same(index, ExactIndex.build(store()))
    after = make(store(fingerprint="after"))
    same(after, ExactIndex.build(store()))
    assert collections(after) == {index.collection, after.collection}  # nothing half-built is left


def test_a_file_that_another_process_has_open(make, path):
    make(store())
    script = "import sys; from taoemb.index.milvus import MilvusIndex; MilvusIndex.open(sys.argv[1])"
    command = [sys.executable, "-c", script, str(path)]
    child = subprocess.run(command, capture_output=True, timeout=60, check=False, text=True)
    assert "ConnectionError: Milvus Lite cannot open" in child.stderr
    assert "another process has it open" in child.stderr


def test_a_server_by_its_uri(make, tmp_path):
    make(store()).close()  # skips where Milvus Lite is not installed
    from milvus_lite.adapter.grpc.server import start_server_in_thread

    server, database, port = start_server_in_thread(str(tmp_path / "server"))
    try:
        uri = f"http://127.0.0.1:{port}"
        index = MilvusIndex.build(store(), uri, "net")
        other = MilvusIndex.open(uri.replace("//", "//user:secret@"), "net")
        same(other, ExactIndex.build(store()))
        other.update(["new"], QUERIES[:1])
        assert index.search(QUERIES[:1], 1)[0].tolist() == [["new"]]
        with pytest.raises(ValueError, match="holds no index named 'x'") as caught:
            MilvusIndex.open(uri.replace("//", "//user:secret@"), "x")
        assert "secret" not in str(caught.value)
        index.close()
        assert len(other) == N + 1
        other.close()
    finally:
        server.stop(grace=0).wait()
        database.close()


def test_a_path_is_told_from_a_uri():
    assert [milvus._is_path(uri) for uri in ("m.db", "a/m.db", "http://h:19530", "https://u:p@h", "unix:/s", "tcp://h")] == [
        True, True, False, False, False, False]  # fmt: skip
