import json
import sys

import faiss
import numpy as np
import pytest
import torch

from taoemb.index.exact import ExactIndex
from taoemb.index.faiss_index import VectorIndex, auto_factory
from taoemb.index.refresh import build_index, load_index
from taoemb.index.results import check_vectors, overlap
from taoemb.store import EmbeddingStore

N, D = 500, 16
FACTORIES = ["exact", "Flat", "HNSW32", "IVF4,Flat"]


def unit(rng, n, d=D):
    vectors = rng.normal(size=(n, d)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


VECTORS = unit(np.random.default_rng(0), N)
QUERIES = unit(np.random.default_rng(1), 20)
IDS = [f"i{i}" for i in range(N)]


def store(vectors=VECTORS, ids=None, shards=3, fingerprint="f1"):
    return EmbeddingStore(ids or [f"i{i}" for i in range(len(vectors))], np.array_split(vectors, shards), fingerprint)


def make(factory, the_store, **parameters):
    return ExactIndex.build(the_store) if factory == "exact" else VectorIndex.build(the_store, factory, **parameters)


def brute_force(queries, k, vectors=VECTORS):
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    positions = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return positions, np.take_along_axis(scores, positions, axis=1)


@pytest.fixture(params=FACTORIES)
def factory(request):
    return request.param


# Search against brute force -------------------------------------------------------------------------------------------


def test_approximate_indexes_find_most(factory):
    wanted, _ = brute_force(QUERIES, 10)
    found, scores = make(factory, store()).search_positions(QUERIES, 10)
    # a random quarter of the vectors would hold .25; random vectors are the worst case of IVF with nprobe 1
    assert overlap(found, wanted) > (0.35 if factory == "IVF4,Flat" else 0.9)
    real = QUERIES.astype(np.float64) @ VECTORS.T
    np.testing.assert_allclose(scores, np.take_along_axis(real, found, axis=1), atol=1e-5)


def test_exact_search_in_blocks(monkeypatch):
    whole = ExactIndex(IDS, VECTORS).search(QUERIES, 7)
    monkeypatch.setattr("taoemb.index.exact._BLOCK_BYTES", 4 * N * 3)  # three queries at a time
    blocks = ExactIndex(IDS, VECTORS).search(QUERIES, 7)
    assert blocks[0].tolist() == whole[0].tolist()
    np.testing.assert_allclose(blocks[1], whole[1], atol=1e-6)


def test_equal_scores_come_in_catalog_order():
    vectors = np.eye(4, dtype=np.float32)[[1, 0, 1, 0, 1, 2]]
    positions, _ = ExactIndex([str(i) for i in range(6)], vectors).search_positions(vectors[[0, 1]], 6)
    assert positions.tolist() == [[0, 2, 4, 1, 3, 5], [1, 3, 0, 2, 4, 5]]


def test_unprobed_cells_are_padding():
    vectors = np.concatenate([VECTORS[:2] + i * 100 * np.eye(4, D, dtype=np.float32)[i] for i in range(4)])
    index = VectorIndex.build(store(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), shards=1), "IVF4,Flat",
                              nprobe=1)  # fmt: skip
    ids, scores = index.search(QUERIES, 8)
    for row, row_scores in zip(ids, scores, strict=True):
        found = [i for i in row if i]
        assert 0 < len(found) < 8
        assert row.tolist() == found + [""] * (8 - len(found))
        assert np.isneginf(row_scores[len(found) :]).all()
        assert np.isfinite(row_scores[: len(found)]).all()


def test_wrong_shapes():
    with pytest.raises(ValueError, match="2 ids for 3 vectors"):
        ExactIndex(["a", "b"], VECTORS[:3])
    with pytest.raises(ValueError, match="must be a matrix"):
        ExactIndex(["a"], VECTORS[0])


@pytest.mark.parametrize("string", ["Nonsense", "", "PQ7", "HNSW32,Nonsense", "IDMap,Flat"])
def test_unknown_factory_string(string):
    with pytest.raises(ValueError, match=f"factory='{string}'"):
        VectorIndex.build(store(), string)


def test_too_few_vectors_to_train():
    with pytest.raises(ValueError, match="'IVF64,Flat' cannot be trained on 50 vectors; use a smaller one or Flat"):
        VectorIndex.build(store(VECTORS[:50]), "IVF64,Flat")


# Parameters and repeatability -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("string", "name", "value"), [("IVF4,Flat", "nprobe", 3), ("HNSW32", "efSearch", 77),
                                                       ("OPQ4_8,IVF4,Flat", "nprobe", 1),
                                                       ("IVF4,PQ4x4,RFlat", "nprobe", 2)])  # fmt: skip
def test_parameters_reach_faiss_and_are_kept(string, name, value, tmp_path):
    index = VectorIndex.build(store(), string, **{name: value})
    plain = VectorIndex.build(store(), string)
    index.save(tmp_path / "i")
    assert json.loads((tmp_path / "i" / "manifest.json").read_text())["parameters"] == {name: value}
    loaded = VectorIndex.load(tmp_path / "i")
    np.testing.assert_array_equal(loaded.search(QUERIES, 50)[0], index.search(QUERIES, 50)[0])
    assert index.search(QUERIES, 50)[0].tolist() != plain.search(QUERIES, 50)[0].tolist()
    reference = faiss.read_index(str(tmp_path / "i" / "index.faiss"))  # faiss' own way to set it
    faiss.ParameterSpace().set_index_parameter(reference, name, value)
    np.testing.assert_array_equal(reference.search(QUERIES, 50)[1], loaded.search_positions(QUERIES, 50)[0])


@pytest.mark.parametrize(("string", "parameters"), [("Flat", {"nprobe": 4}), ("IVF4,Flat", {"efSearch": 4}),
                                                    ("IVF4,Flat", {"nprob": 4}), ("IVF4,Flat", {"ntotal": 4}),
                                                    ("IVF4,Flat", {"nprobe": 0})])  # fmt: skip
def test_bad_parameters(string, parameters):
    with pytest.raises(ValueError, match=next(iter(parameters))):
        VectorIndex.build(store(), string, **parameters)


@pytest.mark.parametrize("string", ["HNSW8", "IVF8,Flat"])
def test_deterministic_build_gives_the_same_bytes(string, tmp_path):
    for name in ("a", "b"):
        VectorIndex.build(store(), string, deterministic=True).save(tmp_path / name)
    assert (tmp_path / "a" / "index.faiss").read_bytes() == (tmp_path / "b" / "index.faiss").read_bytes()


def test_a_deterministic_build_adds_in_one_thread_and_leaves_their_number(monkeypatch):
    seen = []

    def spy(vectors, ids):  # runs before each add
        seen.append(faiss.omp_get_max_threads())
        return check_vectors(vectors, ids)

    monkeypatch.setattr("taoemb.index.faiss_index.check_vectors", spy)
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(2)
    try:
        VectorIndex.build(store(), "HNSW8", deterministic=True)
        VectorIndex.build(store(), "HNSW8")
        assert seen == [1, 1, 1, 2, 2, 2]
        assert faiss.omp_get_max_threads() == 2
    finally:
        faiss.omp_set_num_threads(before)


def test_training_sample_is_seeded(monkeypatch):
    monkeypatch.setattr("taoemb.index.faiss_index._TRAIN_ROWS", 100)

    def centroids(seed):
        index = VectorIndex.build(store(), "IVF4,Flat", seed=seed).faiss_index
        return faiss.vector_to_array(faiss.downcast_index(index.quantizer).codes).copy()

    np.testing.assert_array_equal(centroids(0), centroids(0))
    assert not np.array_equal(centroids(0), centroids(1))


# Save and load ----------------------------------------------------------------------------------------------------------


def test_what_is_no_index(tmp_path):
    for load in (load_index, VectorIndex.load):
        with pytest.raises(ValueError, match=r"is no saved index \(no manifest.json\)"):
            load(tmp_path)


# Build, refresh, overlap --------------------------------------------------------------------------------------------------


def test_build_index_chooses_by_factory():
    assert isinstance(build_index(store()), ExactIndex)
    assert isinstance(build_index(store(), "HNSW8"), VectorIndex)


def test_without_faiss_the_exact_index_works(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "faiss", None)
    index = build_index(store(), "Flat")
    index.save(tmp_path / "i")
    assert load_index(tmp_path / "i").search(QUERIES, 1)[0].tolist() == index.search(QUERIES, 1)[0].tolist()
    with pytest.raises(ImportError, match=r'pip install "taoemb\[cpu\]"'):
        build_index(store(), "HNSW32")


def test_overlap():
    fresh = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert overlap(fresh[:, ::-1], fresh) == 1
    assert overlap(np.array([[1, 2, 9, 10], [5, 9, 10, 11]]), fresh) == pytest.approx(3 / 8)
    assert overlap(fresh + 10, fresh) == 0
    padded = np.array([[1, 2, -1, -1], [5, -1, -1, -1]])
    assert overlap(padded, padded) == 1
    assert overlap(np.array([[1, 9, -1, -1], [9, -1, -1, -1]]), padded) == pytest.approx(1 / 3)
    assert overlap(np.zeros((0, 4), int), np.zeros((0, 4), int)) == 1


# Update and remove ----------------------------------------------------------------------------------------------------


def test_an_index_that_cannot_be_changed_says_so():
    index = VectorIndex.build(store(), "PQ4x4fs")
    with pytest.raises(ValueError, match=r"'PQ4x4fs' cannot be changed; build it again"):
        index.update(["a"], VECTORS[:1])


def test_an_update_leaves_the_store_alone(tmp_path):
    store().save(tmp_path / "s")
    opened = EmbeddingStore.open(tmp_path / "s")
    index = ExactIndex.build(opened)
    index.update([IDS[0]], VECTORS[[1]])
    np.testing.assert_array_equal(EmbeddingStore.open(tmp_path / "s").vectors, VECTORS)
    own = VECTORS.copy()
    ExactIndex(IDS, own).update([IDS[0]], VECTORS[[1]])
    np.testing.assert_array_equal(own, VECTORS)


def test_faiss_own_id_map_over_an_inverted_file_is_why_there_is_none_here():
    """The fault is in FAISS 1.15: after a removal the map and the lists disagree. If this fails, it has been mended."""
    flat = faiss.IndexFlatIP(D)
    mapped = faiss.IndexIDMap2(faiss.IndexIVFFlat(flat, D, 4, faiss.METRIC_INNER_PRODUCT))
    mapped.train(VECTORS)
    mapped.add_with_ids(VECTORS, np.arange(N) + 1000)
    mapped.remove_ids(np.arange(100) + 1000)
    faiss.downcast_index(mapped.index).nprobe = 4
    hits = mapped.search(VECTORS[100:], 1)[1][:, 0] == np.arange(100, N) + 1000
    assert hits.mean() < 0.5


@pytest.mark.parametrize(("count", "dimension", "memory", "factory"), [
    (1, 8, 1, "Flat"), (100_000, 256, 1, "Flat"), (1_000_000, 256, 4, "IVF4096,Flat"), (10_000_000, 256, 4, "IVF16384,SQ8"),
    (10_000_000, 255, 1.5, "IVF16384,SQ4"),
])  # fmt: skip
def test_auto_chooses_what_fits_the_memory_and_says_why(count, dimension, memory, factory):
    chosen, why = auto_factory(count, dimension, memory)
    assert chosen == factory
    assert f"{count:,} x {dimension}" in why
    with pytest.raises(ValueError, match="need .* GiB even as IVF"):
        auto_factory(10**9, dimension, memory)


@pytest.mark.filterwarnings("ignore:.*swigvarlink")
@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16,SQ8", "IVF16,SQ4"])
def test_what_auto_may_choose_can_be_built_and_changed(factory, monkeypatch, tmp_path):
    vectors = unit(np.random.default_rng(4), 2000)
    index = VectorIndex.build(store(vectors), factory)
    index.update(["new"], QUERIES[:1])
    assert index.search(QUERIES[:1], 1)[0].tolist() == [["new"]]
    monkeypatch.setattr("taoemb.index.refresh.auto_factory", lambda count, dimension: (factory, ""))
    assert build_index(store(vectors), "auto").factory == factory


# Update of a lossy transform, shortened vectors, re-scoring ---------------------------------------------------------------


def test_an_update_behind_a_lossy_transform_names_the_right_items():
    """8 of 16 dimensions are left, by another rotation than a rebuild's; the ids must be right all the same."""
    rng = np.random.default_rng(3)
    index = VectorIndex.build(store(), "OPQ4_8,IVF4,Flat", nprobe=4)
    truth = dict(zip(IDS, VECTORS, strict=True))
    changed = rng.choice(IDS, 60, replace=False).tolist() + [f"new {i}" for i in range(20)]
    fresh = unit(rng, len(changed))
    index.update(changed, fresh)
    truth.update(zip(changed, fresh, strict=True))
    index.remove(IDS[:50])
    truth = {item_id: vector for item_id, vector in truth.items() if item_id not in set(IDS[:50])}
    vectors = np.array(list(truth.values()))
    afresh = VectorIndex.build(EmbeddingStore(list(truth), [vectors], ""), "OPQ4_8,IVF4,Flat", nprobe=4)
    hits = [np.mean([name in row for name, row in zip(truth, one.search(vectors, 10)[0].tolist(), strict=True)])
            for one in (index, afresh)]  # fmt: skip
    assert hits[0] > hits[1] - 0.05
    assert hits[1] > 0.8


@pytest.mark.parametrize("options", [{}, {"truncate_dim": 6}])
@pytest.mark.parametrize("factory", ["SQ8", "SQ4", "RaBitQ", "PQ2x4"])
def test_rescoring_is_the_exact_order_of_what_faiss_proposes(factory, options):
    plain = VectorIndex.build(store(), factory, **options)
    index = VectorIndex.build(store(), factory, **options, rescore=4)
    proposed = plain.search_positions(QUERIES, 40)[0]
    exact = QUERIES.astype(np.float64) @ VECTORS.T
    scores = np.take_along_axis(exact, proposed, axis=1)
    wanted = np.take_along_axis(proposed, np.argsort(-scores, axis=1)[:, :10], axis=1)
    positions, found = index.search_positions(QUERIES, 10)
    np.testing.assert_array_equal(positions, wanted)
    np.testing.assert_allclose(found, np.take_along_axis(exact, wanted, axis=1), atol=1e-5)
    truth = brute_force(QUERIES, 10)[0]
    assert overlap(positions, truth) > overlap(plain.search_positions(QUERIES, 10)[0], truth)


def test_shortened_vectors_are_the_first_dimensions_normalised():
    index = VectorIndex.build(store(), "Flat", truncate_dim=6)
    vectors, queries = (a[:, :6] / np.linalg.norm(a[:, :6], axis=1, keepdims=True) for a in (VECTORS, QUERIES))
    wanted, scores = brute_force(queries, 10, vectors)
    positions, found = index.search_positions(QUERIES, 10)
    np.testing.assert_array_equal(positions, wanted)
    np.testing.assert_allclose(found, scores, atol=1e-5)
    assert index.faiss_index.d == 6


@pytest.mark.parametrize(("options", "words"), [({"truncate_dim": 0}, "truncate_dim=0: give 1 to 16"),
                                                ({"truncate_dim": 17}, "truncate_dim=17: give 1 to 16"),
                                                ({"rescore": -1}, "rescore=-1: give 0")])  # fmt: skip
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        VectorIndex.build(store(), "Flat", **options)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_on_a_gpu_is_exact_over_the_rounded_vectors(dtype, monkeypatch):
    """The way of a GPU, taken on the CPU: rough scores propose, float32 decides."""
    index = ExactIndex(IDS, VECTORS, dtype=dtype)
    wanted = index.search_positions(QUERIES, 10)
    values, positions = index._best_of_half(torch.from_numpy(QUERIES), 10)
    np.testing.assert_array_equal(positions.numpy(), wanted[0])
    np.testing.assert_allclose(values.numpy(), wanted[1], atol=1e-6)


def test_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match="dtype='int8': give one of float32, float16, bfloat16"):
        ExactIndex(IDS, VECTORS, dtype="int8")


def test_the_exact_index_searches_the_memory_map_where_it_lies(tmp_path):
    store(shards=1).save(tmp_path / "s")
    opened = EmbeddingStore.open(tmp_path / "s")
    assert np.shares_memory(ExactIndex.build(opened).vectors, opened.shards[0])


def gpus():
    return faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="this faiss is built for GPUs")
def test_a_faiss_without_gpus_says_which_to_install():
    with pytest.raises(ImportError, match=r'this faiss is built without GPUs: .*"taoemb\[gpu\]"'):
        VectorIndex.build(store(), "Flat").to_gpu()


@pytest.mark.skipif(not gpus(), reason="needs faiss for GPUs, and one")
@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "IVF4,SQ8", "IVF4,PQ4x8"])
def test_a_gpu_finds_what_the_cpu_finds(factory, tmp_path):
    index = VectorIndex.build(store(), factory, rescore=3, **({"nprobe": 4} if "IVF" in factory else {}))
    moved = index.to_gpu(temp_memory_mib=64)
    assert overlap(moved.search_positions(QUERIES, 10)[0], index.search_positions(QUERIES, 10)[0]) > 0.95
    moved.save(tmp_path / "i")
    assert overlap(VectorIndex.load(tmp_path / "i").search_positions(QUERIES, 10)[0],
                   index.search_positions(QUERIES, 10)[0]) == 1  # fmt: skip
    with pytest.raises(ValueError, match="cannot be changed"):
        moved.update(["new"], VECTORS[:1])
    with pytest.raises(ValueError, match="faiss sees"):
        index.to_gpu(gpus())
    with pytest.raises(ValueError, match="has no GPU form"):
        VectorIndex.build(store(), "HNSW8").to_gpu()
