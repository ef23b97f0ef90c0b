import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import taoemb.store
from taoemb.catalog import Items, ItemTemplate
from taoemb.encoder import Encoder
from taoemb.files import read_manifest, write_manifest
from taoemb.index.exact import ExactIndex
from taoemb.store import EmbeddingStore, StoreError, encode_corpus

ROWS = 100  # of a shard: the 600 items of the small shop make 6


class Counting(Encoder):
    """Counts the shards that are encoded, and fails at one of them."""

    def __init__(self, *args, fail_at=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls, self.fail_at = 0, fail_at

    def encode_document(self, items, progress=False):
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.calls += 1
        return super().encode_document(items, progress)


@pytest.fixture
def items(small_shop):
    return small_shop.items


@pytest.fixture(scope="module")
def wanted(static_model, small_shop):
    encoder = Encoder(static_model)
    return encoder.encode_document(ItemTemplate().texts(small_shop.items))


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_store_holds_what_the_encoder_gives(static_model, items, wanted, tmp_path):
    encoder = Encoder(static_model)
    on_disk = encode_corpus(encoder, items, tmp_path / "s", shard_rows=ROWS)
    in_memory = encode_corpus(encoder, items, shard_rows=250)
    one_shard = encode_corpus(encoder, items, tmp_path / "one")
    for store in (on_disk, in_memory, one_shard):
        np.testing.assert_allclose(store.vectors, wanted, atol=1e-6)
        assert store.ids == items.ids
        assert (len(store), store.dimension, store.fingerprint) == (600, 16, encoder.fingerprint)
        assert store.vectors.dtype == np.float32
    assert [len(shard) for shard in on_disk.shards] == [100] * 6
    assert [len(shard) for shard in in_memory.shards] == [250, 250, 100]
    assert all(isinstance(shard, np.memmap) for shard in on_disk.shards)
    assert one_shard.vectors is one_shard.shards[0]  # no copy of the memory map
    assert isinstance(one_shard.vectors, np.memmap)


@pytest.mark.parametrize("fail_at", range(6))
def test_an_interrupted_encode_goes_on_at_its_shard(fail_at, static_model, items, wanted, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(Counting(static_model, fail_at=fail_at), items, tmp_path, shard_rows=ROWS)
    with pytest.raises(StoreError, match="is unfinished; run the same encode again"):
        EmbeddingStore.open(tmp_path)
    encoder = Counting(static_model)
    store = encode_corpus(encoder, items, tmp_path, shard_rows=ROWS)
    assert encoder.calls == 6 - fail_at
    np.testing.assert_allclose(store.vectors, wanted, atol=1e-6)
    names = {"ids.parquet", "manifest.json", *(f"shard-{i:05d}.npy" for i in range(6))}
    assert {path.name for path in tmp_path.iterdir()} == names


KILLED = """
import os, signal, sys
from taoemb import Catalog, Encoder, encode_corpus
class Killed(Encoder):
    calls = 0
    def encode_document(self, items, progress=False):
        if self.calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        self.calls += 1
        return super().encode_document(items, progress)
encode_corpus(Killed(sys.argv[1]), Catalog.load(sys.argv[2]).items, sys.argv[3], shard_rows=100)
"""


def test_a_killed_process_goes_on_at_its_shard(static_model, small_shop_folder, items, wanted, tmp_path):
    root = str(Path(taoemb.__file__).parent.parent)
    arguments = [sys.executable, "-c", KILLED, str(static_model), str(small_shop_folder), str(tmp_path / "s")]
    done = subprocess.run(arguments, env={**os.environ, "PYTHONPATH": root}, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    encoder = Counting(static_model)
    store = encode_corpus(encoder, items, tmp_path / "s", shard_rows=100)
    assert encoder.calls == 3
    np.testing.assert_allclose(store.vectors, wanted, atol=1e-6)


def test_a_kill_while_a_shard_is_written(static_model, items, wanted, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(Counting(static_model, fail_at=2), items, tmp_path, shard_rows=ROWS)
    (tmp_path / "shard-00002.npy.tmp").write_bytes(b"\x93NUMPY half of a sh")
    np.testing.assert_allclose(encode_corpus(Encoder(static_model), items, tmp_path, shard_rows=ROWS).vectors, wanted)


def test_a_kill_before_the_first_shard(static_model, items, wanted, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(Counting(static_model, fail_at=0), items, tmp_path, shard_rows=ROWS)
    (tmp_path / "partial.json").unlink()  # as if killed one write earlier
    np.testing.assert_allclose(encode_corpus(Encoder(static_model), items, tmp_path, shard_rows=ROWS).vectors, wanted)


def test_a_complete_store_is_not_encoded_again(static_model, items, tmp_path):
    first = encode_corpus(Encoder(static_model), items, tmp_path, shard_rows=ROWS)
    before = snapshot(tmp_path)
    encoder = Counting(static_model, fail_at=0)
    again = encode_corpus(encoder, items, tmp_path)
    np.testing.assert_array_equal(again.vectors, first.vectors)
    assert snapshot(tmp_path) == before


def others(static_model, items):
    """Encoders and items that a store of ``Encoder(static_model)`` over ``items`` is not of."""
    moved = Encoder(static_model)
    with torch.no_grad():
        moved.model[0].embedding.weight[0, 0] += 1
    titles = items.table.column("title").to_pylist()
    titles[17] += " (new)"
    edited = items.table.set_column(items.table.column_names.index("title"), "title", pa.array(titles))
    return {
        "weights": (moved, items),
        "template": (Encoder(static_model, template=ItemTemplate(max_chars=20)), items),
        "fewer items": (Encoder(static_model), items[:599]),
        "another order": (Encoder(static_model), items[::-1]),
        "an edited title": (Encoder(static_model), Items(edited)),
    }


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("what", ["weights", "template", "fewer items", "another order", "an edited title"])
def test_a_store_of_something_else_is_refused_and_kept(what, finished, static_model, items, tmp_path):
    if finished:
        encode_corpus(Encoder(static_model), items, tmp_path, shard_rows=ROWS)
    else:
        with pytest.raises(KeyboardInterrupt):
            encode_corpus(Counting(static_model, fail_at=2), items, tmp_path, shard_rows=ROWS)
    before = snapshot(tmp_path)
    encoder, other_items = others(static_model, items)[what]
    with pytest.raises(StoreError, match="of another encoder or catalog"):
        encode_corpus(encoder, other_items, tmp_path, shard_rows=ROWS)
    assert snapshot(tmp_path) == before


def test_numbers_that_no_text_shows_do_not_matter(static_model, items, tmp_path):
    encode_corpus(Encoder(static_model), items, tmp_path)
    repriced = items.table.drop_columns(["price"])
    assert len(encode_corpus(Counting(static_model, fail_at=0), Items(repriced), tmp_path)) == 600


def test_unfinished_work_keeps_its_shard_size(static_model, items, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(Counting(static_model, fail_at=2), items, tmp_path, shard_rows=ROWS)
    with pytest.raises(StoreError, match="shard_rows"):
        encode_corpus(Encoder(static_model), items, tmp_path, shard_rows=200)


def test_shards_of_nobody_are_not_adopted(static_model, items, tmp_path):
    encode_corpus(Encoder(static_model), items, tmp_path, shard_rows=ROWS)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(StoreError, match="delete the folder"):
        encode_corpus(Encoder(static_model), items, tmp_path, shard_rows=ROWS)


@pytest.mark.parametrize("name", ["shard-00000.npy", "shard-00005.npy", "ids.parquet"])
@pytest.mark.parametrize("at", [-1, 0, 200])
def test_one_flipped_bit_is_named(name, at, static_model, items, tmp_path):
    encode_corpus(Encoder(static_model), items, tmp_path, shard_rows=ROWS)
    flip(tmp_path / name, at)
    with pytest.raises(StoreError, match=f"{name} is corrupt"):
        EmbeddingStore.open(tmp_path)
    with pytest.raises(StoreError, match=f"{name} is corrupt"):  # not encoded over either
        encode_corpus(Encoder(static_model), items, tmp_path, shard_rows=ROWS)


def test_a_missing_shard_is_named(static_model, items, tmp_path):
    encode_corpus(Encoder(static_model), items, tmp_path, shard_rows=ROWS)
    (tmp_path / "shard-00003.npy").unlink()
    with pytest.raises(StoreError, match=r"shard-00003\.npy is missing"):
        EmbeddingStore.open(tmp_path)


def test_what_is_no_store(tmp_path, static_model, items):
    with pytest.raises(StoreError, match="is no store"):
        EmbeddingStore.open(tmp_path)
    encode_corpus(Encoder(static_model), items, tmp_path)
    manifest = tmp_path / "manifest.json"
    write_manifest(manifest, {**read_manifest(manifest), "format": 99})
    with pytest.raises(StoreError, match="has format 99"):
        EmbeddingStore.open(tmp_path)
    manifest.write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is corrupt"):
        EmbeddingStore.open(tmp_path)


def test_an_embedding_that_is_no_number_names_its_item(static_model, items, tmp_path):
    encoder = Encoder(static_model)
    row = encoder.model[0].tokenizer.encode(items[207].title.split()[0]).ids[0]
    with torch.no_grad():
        encoder.model[0].embedding.weight[row] = float("nan")
    with pytest.raises(StoreError, match="NaN or infinite embedding for item 'i0000"):
        encode_corpus(encoder, items, tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_ids_and_vectors_must_match():
    with pytest.raises(StoreError, match="2 ids but 3 vectors"):
        EmbeddingStore(["a", "b"], [np.zeros((2, 4), np.float32), np.zeros((1, 4), np.float32)], "")


def test_save_and_open(tmp_path):
    rng = np.random.default_rng(0)
    store = EmbeddingStore(["ü", "2", "0012"], [rng.normal(size=(n, 4)).astype(np.float32) for n in (2, 1)], "abc")
    store.save(tmp_path / "s")
    found = EmbeddingStore.open(tmp_path / "s")
    assert (found.ids, found.fingerprint) == (store.ids, "abc")
    np.testing.assert_array_equal(found.vectors, store.vectors)
    found.save(tmp_path / "s")  # over the files that it reads
    np.testing.assert_array_equal(EmbeddingStore.open(tmp_path / "s").vectors, store.vectors)
    np.testing.assert_array_equal(found.vectors, store.vectors)


def test_save_replaces_a_store_with_more_shards(static_model, items, tmp_path):
    small = encode_corpus(Encoder(static_model), items, tmp_path, shard_rows=ROWS)
    EmbeddingStore(small.ids, [np.asarray(small.vectors)], small.fingerprint).save(tmp_path)
    found = EmbeddingStore.open(tmp_path)
    assert len(found.shards) == 1
    np.testing.assert_array_equal(found.vectors, small.vectors)


def test_save_replaces_nothing_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError):
        EmbeddingStore([], [], "").save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# Numbers of a stored vector ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "size", "cosine"), [("float16", 2, 0.9999), ("int8", 1, 0.9999)])
def test_smaller_numbers_keep_the_vectors(dtype, size, cosine, static_model, items, wanted, tmp_path):
    encoder = Encoder(static_model)
    store = encode_corpus(encoder, items, tmp_path / "s", dtype=dtype, shard_rows=ROWS)
    assert store.dtype == dtype
    assert sum(shard.nbytes for shard in store.shards) == size * 600 * 16
    for vectors in (store.vectors, np.concatenate(list(store.blocks())), store.rows(np.arange(600))):
        assert vectors.dtype == np.float32
        assert ((vectors * wanted).sum(1) >= cosine * np.linalg.norm(wanted, axis=1) ** 2).all()
    np.testing.assert_array_equal(encode_corpus(encoder, items, dtype=dtype).vectors, store.vectors)
    store.save(tmp_path / "copy")
    np.testing.assert_array_equal(EmbeddingStore.open(tmp_path / "copy").vectors, store.vectors)
    with pytest.raises(StoreError, match=r"dtype differ"):
        encode_corpus(encoder, items, tmp_path / "s", shard_rows=ROWS)


def test_int8_is_rows_times_127_over_their_largest_number():
    vectors = np.array([[0.6, -0.8], [0, 0], [1, 0]], np.float32)
    store = EmbeddingStore(["a", "b", "c"], [vectors], "")
    coded = taoemb.store.encoded(vectors, "int8")
    assert coded.tolist() == [[95, -127], [0, 0], [127, 0]]
    length = (95**2 + 127**2) ** 0.5
    decoded = EmbeddingStore(store.ids, [coded], "").vectors
    np.testing.assert_allclose(decoded, [[95 / length, -127 / length], [0, 0], [1, 0]], rtol=1e-6)


def test_an_unknown_type_is_refused(static_model, items):
    with pytest.raises(ValueError, match="dtype='bfloat16': give one of float32, float16, int8"):
        encode_corpus(Encoder(static_model), items, dtype="bfloat16")


def test_rows_of_any_order_and_shard():
    vectors = np.arange(30, dtype=np.float32).reshape(10, 3)
    store = EmbeddingStore([str(i) for i in range(10)], [vectors[:4], vectors[4:4], vectors[4:]], "")
    for positions in ([9, 0, 4, 3, 3], [], [5]):
        np.testing.assert_array_equal(store.rows(np.array(positions, np.int64)), vectors[positions])


# A changed catalog ------------------------------------------------------------------------------------------------------


class Reading(Encoder):
    """Keeps the ids that it encodes, and fails after so many shards."""

    def __init__(self, *args, fail_at=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.read, self.calls, self.fail_at = [], 0, fail_at

    def encode_document(self, items, progress=False):
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.calls += 1
        self.read += [item.id for item in items]
        return super().encode_document(items, progress)


def changed(items):
    """The items of another day: in another order, 30 gone, two edited, one with a new id."""
    table = items.table.take(np.random.default_rng(0).permutation(600)[:570])
    columns = {name: table.column(name).to_pylist() for name in ("title", "id")}
    columns["title"][17] += " (new)"
    columns["title"][200] = "something else"
    columns["id"][300] = "newcomer"
    edited = [columns["id"][i] for i in (17, 200, 300)]
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    return Items(table), edited


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_an_update_encodes_only_what_changed(dtype, static_model, items, tmp_path):
    encode_corpus(Encoder(static_model), items, tmp_path / "s", dtype=dtype, shard_rows=ROWS)
    today, edited = changed(items)
    encoder = Reading(static_model)
    store = encode_corpus(encoder, today, tmp_path / "s", dtype=dtype, update=True, shard_rows=ROWS)
    assert sorted(encoder.read) == sorted(edited)
    afresh = encode_corpus(Encoder(static_model), today, dtype=dtype)
    np.testing.assert_array_equal(store.vectors, afresh.vectors)
    assert store.ids == afresh.ids == today.ids
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    again = Reading(static_model)
    encode_corpus(again, today, tmp_path / "s", dtype=dtype, update=True)
    assert again.read == []


def test_an_update_to_another_encoder_encodes_all(static_model, items, tmp_path):
    encode_corpus(Encoder(static_model), items, tmp_path / "s", shard_rows=ROWS)
    other, _ = others(static_model, items)["weights"]
    store = encode_corpus(other, items, tmp_path / "s", update=True, shard_rows=ROWS)
    np.testing.assert_array_equal(store.vectors, encode_corpus(other, items).vectors)
    assert store.fingerprint == other.fingerprint


@pytest.mark.parametrize("fail_at", range(6))
def test_an_interrupted_update_leaves_the_old_store_and_goes_on(fail_at, static_model, items, tmp_path):
    old = encode_corpus(Encoder(static_model), items, tmp_path / "s", shard_rows=ROWS)
    today, _ = changed(items)
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(Reading(static_model, fail_at=fail_at), today, tmp_path / "s", update=True, shard_rows=ROWS)
    np.testing.assert_array_equal(EmbeddingStore.open(tmp_path / "s").vectors, old.vectors)
    encoder = Reading(static_model)
    store = encode_corpus(encoder, today, tmp_path / "s", update=True, shard_rows=ROWS)
    assert encoder.calls == 6 - fail_at
    np.testing.assert_array_equal(store.vectors, encode_corpus(Encoder(static_model), today).vectors)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_an_interrupted_update_gives_way_to_a_newer_catalog(static_model, items, tmp_path):
    encode_corpus(Encoder(static_model), items, tmp_path / "s", shard_rows=ROWS)
    today, _ = changed(items)
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(Reading(static_model, fail_at=2), today, tmp_path / "s", update=True, shard_rows=ROWS)
    encoder = Reading(static_model)
    store = encode_corpus(encoder, items[:300], tmp_path / "s", update=True, shard_rows=ROWS)
    assert (encoder.read, store.ids) == ([], items.ids[:300])
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("today", [True, False])
@pytest.mark.parametrize("name", ["shard-00002.npy", "ids.parquet", "manifest.json"])
def test_a_damaged_store_is_made_again_from_nothing(name, today, static_model, items, tmp_path):
    encode_corpus(Encoder(static_model), items, tmp_path / "s", shard_rows=ROWS)
    flip(tmp_path / "s" / name, 50)
    encoder, wanted = Reading(static_model), changed(items)[0] if today else items
    with pytest.warns(UserWarning, match=f"{name} is corrupt.*all items are encoded"):
        store = encode_corpus(encoder, wanted, tmp_path / "s", update=True, shard_rows=ROWS)
    assert len(encoder.read) == len(wanted)
    np.testing.assert_array_equal(store.vectors, encode_corpus(Encoder(static_model), wanted).vectors)


def test_an_unfinished_store_is_brought_up_to_date_too(static_model, items, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(Reading(static_model, fail_at=3), items, tmp_path / "s", shard_rows=ROWS)
    today, edited = changed(items)
    encoder = Reading(static_model)
    store = encode_corpus(encoder, today, tmp_path / "s", update=True, shard_rows=ROWS)
    had = set(items.ids[: 3 * ROWS]) - set(edited)
    assert sorted(encoder.read) == sorted(i for i in today.ids if i not in had)
    np.testing.assert_array_equal(store.vectors, encode_corpus(Encoder(static_model), today).vectors)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_stop_before_any_file_operation_of_an_update(static_model, items, tmp_path, monkeypatch):
    """Stopped before the n-th rename or removal, for every n: the rerun gives the new store, and all that was encoded counts."""
    today, edited = changed(items)
    truth = encode_corpus(Encoder(static_model), today).vectors
    encode_corpus(Encoder(static_model), items, tmp_path / "old", shard_rows=ROWS)
    for at in range(100):
        folder = tmp_path / f"n{at}" / "s"
        shutil.copytree(tmp_path / "old", folder)
        left = [at]

        def counted(operation, left=left):
            def run(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return operation(*args, **kwargs)

            return run

        first, second = Reading(static_model), Reading(static_model)
        with monkeypatch.context() as patch:
            for name in ("replace", "rename", "unlink"):
                patch.setattr(Path, name, counted(getattr(Path, name)))
            try:
                encode_corpus(first, today, folder, update=True, shard_rows=ROWS)
                break
            except KeyboardInterrupt:
                pass
        store = encode_corpus(second, today, folder, update=True, shard_rows=ROWS)
        np.testing.assert_array_equal(store.vectors, truth)
        assert [path.name for path in folder.parent.iterdir()] == ["s"]
        assert not list(folder.glob("*.tmp"))
        assert len(first.read) + len(second.read) <= len(edited) + 1  # at most what the shard in hand encoded, twice
    assert at > 10


def test_other_files_than_its_own_are_never_lost(static_model, items, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="holds other files than a store's .notes.txt"):
        encode_corpus(Encoder(static_model), items, tmp_path)
    (tmp_path / "notes.txt").unlink()
    encode_corpus(Encoder(static_model), items, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="notes.txt"):
        encode_corpus(Encoder(static_model), changed(items)[0], tmp_path, update=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_texts_are_hashed_slice_by_slice(monkeypatch, items):
    whole = taoemb.store._text_hashes(items, ("title", "brand"))
    monkeypatch.setattr(taoemb.store, "SHARD_ROWS", 7)
    np.testing.assert_array_equal(taoemb.store._text_hashes(items, ("title", "brand")), whole)
    assert len(np.unique(whole)) == len(
        set(zip(*(items.table.column(c).to_pylist() for c in ("title", "brand")), strict=True))
    )


def test_an_empty_catalog_keeps_its_dimension(static_model, items, tmp_path):
    for dtype in ("float32", "int8"):
        store = encode_corpus(Encoder(static_model), items[:0], tmp_path / dtype, dtype=dtype)
        assert (len(store), store.dimension, store.dtype) == (0, 16, dtype)
        index = ExactIndex.build(store)
        assert index.search(np.ones((1, 16)), 2)[0].tolist() == [["", ""]]


def test_a_store_without_text_hashes_is_encoded_afresh(static_model, items, tmp_path):
    encode_corpus(Encoder(static_model), items).save(tmp_path / "s")
    encoder = Reading(static_model)
    encode_corpus(encoder, changed(items)[0], tmp_path / "s", update=True)
    assert len(encoder.read) == 570


# Several devices --------------------------------------------------------------------------------------------------------


def test_several_processes_make_the_same_store(static_model, items, tmp_path):
    encoder = Encoder(static_model)
    encode_corpus(encoder, items, tmp_path / "s", shard_rows=ROWS)
    today, _ = changed(items)
    store = encode_corpus(encoder, today, tmp_path / "s", devices=["cpu", "cpu"], update=True, shard_rows=ROWS)
    np.testing.assert_array_equal(store.vectors, encode_corpus(encoder, today).vectors)


class Broken(Encoder):
    """Fails in the process that encodes."""

    def encode_document(self, items, progress=False):
        raise MemoryError("too much")


def test_a_mistake_in_a_process_reaches_the_caller(static_model, items, tmp_path):
    with pytest.raises(MemoryError, match="too much"):
        encode_corpus(Broken(static_model), items, tmp_path, devices=["cpu"])
    for device, words in (("nowhere", "device='nowhere': give cpu"), ("cuda:99", "device='cuda:99': torch sees")):
        with pytest.raises(ValueError, match=words):
            encode_corpus(Encoder(static_model), items, tmp_path / "s", devices=[device])
        with pytest.raises(ValueError, match=words):
            Encoder(static_model, device=device)
    with pytest.raises(ValueError, match="give out"):
        encode_corpus(Encoder(static_model), items, devices=["cpu"])


ORPHAN = """
import os, signal, sys, threading, time
from taoemb import Catalog, Encoder, encode_corpus
def die():
    while not list(__import__("pathlib").Path(sys.argv[3]).glob("shard-*.npy")):
        time.sleep(0.05)
    import multiprocessing
    print(" ".join(str(child.pid) for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    threading.Thread(target=die).start()
    encode_corpus(Encoder(sys.argv[1]), Catalog.load(sys.argv[2]).items, sys.argv[3], shard_rows=1, devices=["cpu"])
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks processes up in /proc")
def test_processes_end_with_a_killed_parent(static_model, small_shop_folder, tmp_path):
    (tmp_path / "orphan.py").write_text(ORPHAN)
    root = str(Path(taoemb.__file__).parent.parent)
    arguments = [
        sys.executable,
        str(tmp_path / "orphan.py"),
        str(static_model),
        str(small_shop_folder),
        str(tmp_path / "s"),
    ]
    done = subprocess.run(
        arguments, env={**os.environ, "PYTHONPATH": root}, check=False, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    children = [int(pid) for pid in done.stdout.split()]
    assert children
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
