"""`serve_check` on folders that are fit to serve, and on every way of not being."""

import threading

import numpy as np
import pytest

from taoemb.index.exact import ExactIndex
from taoemb.index.faiss_index import VectorIndex
from taoemb.index.serving import open_index, serve_check, verify
from taoemb.index.snapshots import LiveIndex, Snapshots
from taoemb.store import EmbeddingStore

N, D = 2000, 16


def unit(seed, n):
    vectors = np.random.default_rng(seed).normal(size=(n, D)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


STORE = EmbeddingStore([f"i{i}" for i in range(N)], [unit(0, N)], "f1")


@pytest.fixture
def served(tmp_path):
    Snapshots(tmp_path / "served").publish(ExactIndex.build(STORE))
    return tmp_path / "served"


def outcome(folder, **options):
    checks = serve_check(folder, **{"seconds": 0.2, "threads": 2, **options})
    return {check.name: check.passed for check in checks}, {check.name: check.text for check in checks}


ALL = ["files", "fingerprint", "recall", "load"]


def test_what_is_fit(served, tmp_path):
    ExactIndex.build(STORE).save(tmp_path / "index")
    for folder in (served, tmp_path / "index"):
        passed, text = outcome(folder, fingerprint="f1", store=STORE)
        assert passed == dict.fromkeys(ALL, True)
        assert "recall@10 1.000" in text["recall"]
        assert "searches by 2 threads" in text["load"]
        assert verify(folder) == []


def test_what_is_not_known_is_said(served):
    passed, text = outcome(served)
    assert passed == dict.fromkeys(ALL, True)
    assert "no model was given" in text["fingerprint"]
    assert "not measured" in text["recall"]


def test_a_damaged_file(served):
    (file,) = (served / "gen-000001").glob("shard-*.npy")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    passed, text = outcome(served)
    assert passed == {"files": False}
    assert file.name in text["files"]


def test_a_damaged_generation_with_an_older_one(served):
    Snapshots(served).publish(ExactIndex.build(STORE))
    (file,) = (served / "gen-000002").glob("shard-*.npy")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.warns(UserWarning, match="generation 1 is opened"):
        passed, _ = outcome(served, store=STORE)
    assert passed == {"files": False, "fingerprint": True, "recall": True, "load": True}


def test_another_encoder(served):
    passed, text = outcome(served, fingerprint="f2")
    assert passed == {"files": True, "fingerprint": False}
    assert "built with encoder f1" in text["fingerprint"]


def test_too_little_is_found(tmp_path):
    VectorIndex.build(STORE, "IVF64,Flat", nprobe=1).save(tmp_path / "i")
    passed, text = outcome(tmp_path / "i", store=STORE)
    assert not passed["recall"]
    assert "at least 0.9 is wanted" in text["recall"]
    queries = unit(5, 30)
    found, wanted = (one.search(queries, 10)[0] for one in (open_index(tmp_path / "i"), ExactIndex.build(STORE)))
    hits = np.mean([len({*a} & {*b}) / 10 for a, b in zip(found, wanted, strict=True)])
    passed, text = outcome(tmp_path / "i", store=STORE, queries=queries, min_recall=0.0)
    assert passed["recall"]
    assert f"recall@10 {hits:.3f}" in text["recall"]


def test_too_slow(served):
    passed, text = outcome(served, max_p99_ms=1e-6)
    assert not passed["load"]
    assert "over 1e-06 ms" in text["load"]


def test_an_answer_that_changes_under_load(served, monkeypatch):
    search, main = LiveIndex.search, threading.get_ident()

    def wavering(self, vectors, k):
        ids, scores = search(self, vectors, k)
        return (ids if threading.get_ident() == main else ids[:, ::-1] + "?"), scores

    monkeypatch.setattr(LiveIndex, "search", wavering)
    passed, text = outcome(served)
    assert not passed["load"]
    assert "with other items than alone" in text["load"]


def test_variants_with_the_same_vector_are_no_fault(tmp_path):
    twins = EmbeddingStore(STORE.ids, [np.repeat(STORE.vectors[: N // 4], 4, axis=0)], "f1")
    ExactIndex.build(twins).save(tmp_path / "e")
    VectorIndex.build(twins, "IVF16,Flat", nprobe=16).save(tmp_path / "i")
    for name in "ei":
        passed, text = outcome(tmp_path / name, store=twins, k=10)
        assert passed == dict.fromkeys(ALL, True), text
        assert "recall@10 1.000" in text["recall"]


def test_a_store_of_something_else_is_not_compared(served):
    for store, words in ((EmbeddingStore(STORE.ids, STORE.shards, "f2"), "of another encoder than the index"),
                         (EmbeddingStore([f"x{i}" for i in range(N)], STORE.shards, "f1"), "other items than the index")):  # fmt: skip
        passed, text = outcome(served, store=store)
        assert passed["recall"]
        assert words in text["recall"]


@pytest.mark.parametrize("options", [{"threads": 0}, {"seconds": 0}, {"seconds": -1}])
def test_no_load_is_refused(options, served):
    with pytest.raises(ValueError, match="give at least one thread and some time"):
        serve_check(served, **options)


def test_an_error_under_load_ends_the_readers(served, monkeypatch):
    def broken(self):
        raise OSError("the disk is gone")

    monkeypatch.setattr(LiveIndex, "reload", broken)
    before = threading.active_count()
    with pytest.raises(OSError, match="the disk is gone"):
        outcome(served)
    assert threading.active_count() == before


def test_few_items_and_none(tmp_path):
    for count in (3, 0):
        few = EmbeddingStore(STORE.ids[:count], [STORE.vectors[:count]], "f1")
        ExactIndex.build(few).save(tmp_path / str(count))
        assert outcome(tmp_path / str(count), store=few)[0] == dict.fromkeys(ALL, True)


def test_damaged_embeddings_beside_are_named(served):
    STORE.save(served / "embeddings")
    assert verify(served) == []
    (file,) = (served / "embeddings").glob("shard-*.npy")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert "embeddings/shard-00000.npy is corrupt" in verify(served)[0]
