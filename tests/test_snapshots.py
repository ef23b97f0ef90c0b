"""Generations on disk: after a kill at any moment, with any byte flipped, and under searching threads."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

import taoemb
from taoemb.index.exact import ExactIndex
from taoemb.index.faiss_index import VectorIndex
from taoemb.index.snapshots import LiveIndex, SnapshotError, Snapshots
from taoemb.store import EmbeddingStore

N, D = 60, 8
QUERIES = np.random.default_rng(9).normal(size=(4, D)).astype(np.float32)
KINDS = ["exact", "HNSW8", "IVF4,Flat"]


def index_of(generation, kind="exact", n=N):
    """An index whose ids and vectors tell its generation."""
    vectors = np.random.default_rng(generation).normal(size=(n, D)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    store = EmbeddingStore([f"g{generation}-{i}" for i in range(n)], [vectors], f"f{generation}")
    return ExactIndex.build(store) if kind == "exact" else VectorIndex.build(store, kind, deterministic=True)


def found(index):
    return index.search(QUERIES, 5)[0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_publish_and_open(kind, tmp_path):
    snapshots = Snapshots(tmp_path / "s")
    with pytest.raises(SnapshotError, match="holds no published index"):
        snapshots.open()
    assert snapshots.current is None
    for generation in (1, 2, 3):
        index = index_of(generation, kind)
        assert snapshots.publish(index) == generation == snapshots.current
        number, opened = snapshots.open()
        assert number == generation
        assert type(opened) is type(index)
        assert found(opened) == found(index)
    assert snapshots.generations() == [2, 3]
    assert snapshots.verify() == []


def test_a_bad_index_is_not_published(tmp_path):
    snapshots, exact = Snapshots(tmp_path), index_of(1)
    poor = VectorIndex.build(EmbeddingStore(exact.ids, [exact.vectors], ""), "IVF16,Flat", nprobe=1)
    assert snapshots.publish(exact, probe=QUERIES, store=EmbeddingStore(exact.ids, [exact.vectors], "")) == 1
    with pytest.raises(SnapshotError, match=r"recall@10 of the new index is 0\.\d+, under 0\.9; it is not published"):
        snapshots.publish(poor, probe=QUERIES, store=EmbeddingStore(exact.ids, [exact.vectors], ""))
    assert snapshots.generations() == [1]
    with pytest.raises(ValueError, match="both probe and store"):
        snapshots.publish(poor, probe=QUERIES)
    with pytest.raises(ValueError, match="keep at least 2"):
        Snapshots(tmp_path, keep=1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_in_any_file_is_reported_by_name_and_an_older_generation_serves(kind, tmp_path):
    snapshots = Snapshots(tmp_path / "s")
    snapshots.publish(index_of(1, kind))
    snapshots.publish(index_of(2, kind))
    rng = random.Random(0)
    files = [path for path in sorted((tmp_path / "s" / "gen-000002").iterdir()) if path.is_file()]
    assert len(files) >= 3
    for path in [*files, tmp_path / "s" / "CURRENT"]:
        content = path.read_bytes()
        for place in {0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(12))}:
            damaged = bytearray(content)
            damaged[place] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            (problem,) = snapshots.verify() or [f"nothing, with byte {place} flipped"]
            assert path.name in problem
            with pytest.warns(UserWarning, match=path.name.replace(".", r"\.")):
                number, opened = snapshots.open()
            assert number == (2 if path.name == "CURRENT" else 1)
            assert found(opened) == found(index_of(number, kind))
        path.write_bytes(content)
    assert snapshots.verify() == []


def test_when_no_generation_is_whole_all_are_named(tmp_path):
    snapshots = Snapshots(tmp_path)
    for generation in (1, 2):
        snapshots.publish(index_of(generation))
        (tmp_path / f"gen-{generation:06d}" / "ids.parquet").unlink()
    with pytest.raises(SnapshotError, match=r"gen-000002/ids\.parquet is missing.*gen-000001/ids\.parquet is missing"):
        snapshots.open()


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def kill_many(kind, folder):
    snapshots, rng, seen = Snapshots(Path(folder) / "s"), random.Random(1), set()
    snapshots.publish(index_of(1, kind))

    def child(rounds):  # no pytest, no cleanup: only the work
        pid = os.fork()
        if pid == 0:
            try:
                for _ in range(rounds):
                    snapshots.publish(index_of(max(snapshots.generations()) + 1, kind))
            finally:
                os._exit(0)
        return pid

    start = time.perf_counter()
    assert os.waitpid(child(1), 0)[1] == 0
    work = time.perf_counter() - start  # in a child, which is slower than this process: it copies its memory bit by bit
    assert snapshots.current == 2
    expected = {}
    for _ in range(100):
        first = snapshots.current
        pid = child(10**9)
        time.sleep(rng.uniform(0, 6 * work))
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing had to be skipped
            number, opened = snapshots.open()
        assert number == snapshots.current >= first
        assert snapshots.verify() == []
        expected.setdefault(number, found(index_of(number, kind)))
        assert found(opened) == expected[number]
        seen.add(number)
    assert len(seen) > 5  # the kills did not all come before any work
    snapshots.publish(index_of(max(snapshots.generations()) + 1, kind))
    assert len(snapshots.generations()) == 2
    assert len(list((Path(folder) / "s").iterdir())) <= 4  # two generations, CURRENT, at most one unfinished folder


@pytest.mark.parametrize("kind", ["exact", "HNSW8"])
def test_after_a_kill_at_any_moment_the_last_complete_generation_opens(kind, tmp_path):
    """100 kills each: build, save, publication and the removal of old generations run in a process that is killed; all of it in a
    process of its own, because a fork of this one, grown large by the other tests, is slow."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_snapshots as t; t.kill_many(*sys.argv[1:])"
    root = str(Path(taoemb.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code, kind, str(tmp_path)], env={**os.environ, "PYTHONPATH": root},
                          check=False, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_readers_go_on_through_50_swaps(tmp_path):
    snapshots = Snapshots(tmp_path)
    snapshots.publish(index_of(1, n=2000))
    live, stop, errors, searched = LiveIndex(snapshots), threading.Event(), [], [0] * 4

    def read(reader):
        try:
            while not stop.is_set():
                ids, _ = live.search(QUERIES, 10)
                generations = {item_id.split("-")[0] for item_id in ids.ravel().tolist()}
                assert len(generations) == 1, generations
                searched[reader] += 1
        except Exception as error:  # noqa: BLE001 - whatever it is, the test must fail on it
            errors.append(error)

    readers = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for reader in readers:
        reader.start()
    for generation in range(2, 52):
        snapshots.publish(index_of(generation, n=2000))
        assert live.reload()
        assert not live.reload()
        assert live.generation == generation
    stop.set()
    for reader in readers:
        reader.join()
    assert errors == []
    assert min(searched) > 10


def test_a_damaged_newest_generation_is_tried_once(tmp_path):
    snapshots = Snapshots(tmp_path)
    for generation in (1, 2):
        snapshots.publish(index_of(generation))
    live = LiveIndex(snapshots)
    snapshots.publish(index_of(3))
    (file,) = (tmp_path / "gen-000003").glob("shard-*.npy")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.warns(UserWarning, match="generation 2 is opened"):
        assert not live.reload()
    assert not live.reload()  # without another look at every byte
    assert live.generation == 2
    snapshots.publish(index_of(4))
    assert live.reload()
    assert (live.generation, len(live)) == (4, len(index_of(4)))


def test_the_source_is_kept_with_the_generation(tmp_path):
    snapshots = Snapshots(tmp_path)
    assert snapshots.source == ""
    snapshots.publish(index_of(1), source="items.emb of Monday")
    assert snapshots.source == "items.emb of Monday"
    file = tmp_path / "CURRENT"
    whole = file.read_bytes()
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(SnapshotError, match="CURRENT is corrupt"):
            _ = snapshots.current
    file.write_bytes(whole)
    snapshots.publish(index_of(2))
    assert snapshots.source == ""
    with pytest.raises(ValueError, match="give one line"):
        snapshots.publish(index_of(3), source="a\nb")
