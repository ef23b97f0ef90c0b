import json
import sys

import numpy as np
import pytest

from taoemb.index import bench as bench_module
from taoemb.index.bench import BenchRow, Candidate, bench, default_candidates, describe, draw_queries, list_count, sweep
from taoemb.index.bench_report import recommend, write_bench
from taoemb.index.tuning import Truth
from taoemb.store import EmbeddingStore

N, D = 2000, 16
CANDIDATES = [
    "exact",
    "Flat",
    Candidate("IVF32,Flat", "nprobe", (1, 4, 32)),
    Candidate("IVF32,SQ8", "nprobe", (32,)),
    Candidate("HNSW8", "efSearch", (4, 200)),
    "PQ4x4fs",
]


def clustered(seed, n):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(40, D))
    vectors = centres[rng.integers(0, 40, n)] + 0.6 * rng.normal(size=(n, D))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


VECTORS, QUERIES = clustered(1, N), clustered(2, 120)


def store(vectors=VECTORS, shards=3):
    return EmbeddingStore([f"i{i}" for i in range(len(vectors))], np.array_split(vectors, shards), "f1")


@pytest.fixture(scope="module")
def rows():
    return bench(store(), QUERIES, candidates=CANDIDATES, batch=50, repeats=2)


def of(rows, factory):
    return [row for row in rows if row.factory == factory]


def row(name, recall, p50, mb=1.0, **more):
    values = {"recall_at_100": recall, "queries_per_second": 100.0, "p99_ms": 2 * p50, "build_seconds": 1.0,
              "refresh_seconds": None}  # fmt: skip
    return BenchRow(factory=name, k=10, recall_at_k=recall, p50_ms=p50, size_mb=mb, **{**values, **more})


# Figures --------------------------------------------------------------------------------------------------------------


def test_a_row_per_index_and_setting(rows):
    names = ["exact", "Flat", *(f"IVF32,Flat nprobe={p}" for p in (1, 4, 32)), "IVF32,SQ8 nprobe=32",
             "HNSW8 efSearch=4", "HNSW8 efSearch=200", "PQ4x4fs"]  # fmt: skip
    assert [row.name for row in rows] == names
    assert all(row.k == 10 and row.queries_per_second > 0 and 0 < row.p50_ms <= row.p99_ms for row in rows)
    assert len({row.build_seconds for row in of(rows, "IVF32,Flat")}) == 1


def test_what_searches_everything_has_recall_1(rows):
    for row in [*of(rows, "exact"), *of(rows, "Flat"), of(rows, "IVF32,Flat")[-1]]:
        assert row.recall_at_k == row.recall_at_100 == 1.0


@pytest.mark.parametrize("factory", ["IVF32,Flat", "HNSW8"])
def test_recall_grows_with_the_search_parameter(rows, factory):
    recalls = [row.recall_at_k for row in of(rows, factory)]
    assert recalls == sorted(recalls)
    assert recalls[0] < 0.97 < 0.99 < recalls[-1]


def test_recall_is_that_of_brute_force(rows):
    """Of one coarse row, computed here from scratch with the same search by faiss."""
    import faiss

    index = faiss.index_factory(D, "PQ4x4fs", faiss.METRIC_INNER_PRODUCT)
    sample = np.sort(np.random.default_rng(0).permutation(N))
    index.train(VECTORS[sample])
    index.add(VECTORS)
    for k, found in ((10, "recall_at_k"), (100, "recall_at_100")):
        best = np.argsort(-(QUERIES.astype(np.float64) @ VECTORS.T), axis=1)[:, :k]
        hits = [len(set(a) & set(b)) / k for a, b in zip(index.search(QUERIES, k)[1].tolist(), best.tolist())]
        assert getattr(of(rows, "PQ4x4fs")[0], found) == pytest.approx(np.mean(hits), abs=0.002)


def test_equal_scores_are_right_and_repeated_items_count_once(monkeypatch):
    twins = np.repeat(VECTORS[:100], 2, axis=0)  # every item twice: which of two equal ones is found is chance
    truth = Truth(store(twins), VECTORS[:5], 1)
    assert truth.recall(np.array([[2 * i] for i in range(5)]), 1) == 1.0
    assert truth.recall(np.array([[2 * i + 1] for i in range(5)]), 1) == 1.0
    truth = Truth(store(), VECTORS[:1], 4)
    best = np.argsort(-(VECTORS @ VECTORS[0]))
    assert truth.recall(np.array([best[:4]]), 4) == 1.0
    assert truth.recall(np.array([[best[0]] * 4]), 4) == 0.25
    assert truth.recall(np.array([[best[0], best[1], best[500], -1]]), 4) == 0.5


def test_sizes(rows):
    sizes = {row.factory: row.size_mb for row in rows}
    assert sizes["exact"] == N * D * 4 / 1e6
    assert sizes["exact"] < sizes["Flat"] < sizes["exact"] + 0.001  # a header
    assert sizes["PQ4x4fs"] < sizes["IVF32,SQ8"] < sizes["Flat"] < sizes["IVF32,Flat"] < sizes["HNSW8"]


def test_refresh_is_measured_where_an_index_can_be_changed(rows):
    assert {row.factory for row in rows if row.refresh_seconds is None} == {"PQ4x4fs"}


def test_refresh_moves_one_percent_and_leaves_the_store(monkeypatch):
    moved = []
    update = bench_module._Exact.update

    def spy(engine, positions, vectors):
        moved.append((positions, vectors))
        done = update(engine, positions, vectors)
        assert np.array_equal(engine.index.vectors[positions], vectors)
        return done

    monkeypatch.setattr(bench_module._Exact, "update", spy)
    before = VECTORS.copy()
    bench(store(shards=1), QUERIES[:5], candidates=["exact"], repeats=2)
    assert [len(set(positions.tolist())) for positions, _ in moved] == [20, 20]
    assert all(0.9 < np.mean(np.sum(v * VECTORS[p], axis=1)) < 0.9999 for p, v in moved)
    np.testing.assert_array_equal(VECTORS, before)


def test_candidates_take_turns(monkeypatch):
    order = []

    def timed(engine, queries, k, batch):
        order.append(type(engine).__name__)
        return (float(len(order)), 1.0, 1.0)

    monkeypatch.setattr(bench_module, "_timed", timed)
    rows = bench(store(), QUERIES[:5], candidates=["exact", "Flat"], repeats=3)
    assert order == ["_Exact", "_Faiss"] * 3
    assert [row.queries_per_second for row in rows] == [3.0, 4.0]  # medians of 1 3 5 and 2 4 6


def test_threads_are_given_back():
    import faiss
    import torch

    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    with bench_module.one_thread():
        assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == (1, 1)
    assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == before


def test_drawn_queries_are_unit_vectors_near_the_store():
    queries = draw_queries(store(), seed=3)
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-5)
    nearest = (queries @ VECTORS.T).max(axis=1)
    assert 0.8 < nearest.mean() < 0.97
    assert nearest.max() < 0.9999  # none of them is in the store
    np.testing.assert_array_equal(queries, draw_queries(store(), seed=3))
    assert draw_queries(store(VECTORS[:7])).shape == queries.shape


def test_small_store_has_no_recall_at_100():
    said = []
    rows = bench(store(VECTORS[:60]), candidates=["exact", "HNSW8"], k=60, repeats=1, progress=said.append)
    assert all(row.recall_at_100 is None for row in rows)
    assert rows[0].recall_at_k == 1.0
    assert said[:2] == ["build exact", "build HNSW8"]


# Candidates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [23_000, 50_000, 1_000_000, 2_800_000])
def test_list_count_between_4_and_16_roots(count):
    assert 4 * count**0.5 <= list_count(count) <= 16 * count**0.5 or list_count(count) * 2 * 39 > min(count, 262_144)
    assert list_count(count) * 39 <= min(count, 262_144)


def test_defaults_with_and_without_libraries(monkeypatch):
    monkeypatch.setitem(sys.modules, "hnswlib", None)
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    candidates, notes = default_candidates(N)
    assert [c.factory for c in candidates] == ["exact", "Flat", "IVF32,Flat", "IVF32,SQ8", "HNSW32"]
    assert candidates[2].values == (1, 4, 16)
    assert [note.split()[0] for note in notes] == ["hnswlib", "usearch"]
    assert set(notes) <= set(describe(store())["notes"])
    monkeypatch.setitem(sys.modules, "faiss", None)
    candidates, notes = default_candidates(N)
    assert [c.factory for c in candidates] == ["exact"]
    assert "IVF32,SQ8" in notes[0]
    assert bench(store(), QUERIES[:5], repeats=1)[0].recall_at_k == 1.0
    for missing in ("hnswlib", "usearch"):
        with pytest.raises(ImportError, match=f"pip install {missing}"):
            bench(store(), QUERIES, candidates=[missing])


@pytest.mark.parametrize("library", ["hnswlib", "usearch"])
def test_other_libraries_agree(library):
    pytest.importorskip(bench_module.LIBRARIES[library])
    low, high = bench(store(), QUERIES, candidates=[Candidate(library, "efSearch", (10, 300))], repeats=1)
    assert low.recall_at_k <= high.recall_at_k
    assert high.recall_at_k > 0.98
    assert high.size_mb > N * D * 4 / 1e6
    assert high.refresh_seconds is not None


def test_a_default_bench_covers_all():
    rows = bench(store(), QUERIES[:20], repeats=1, batch=20)
    assert {row.factory for row in rows} >= {"exact", "Flat", "IVF32,Flat", "IVF32,SQ8", "HNSW32"}


def test_sweeps():
    assert sweep("OPQ8,IVF16,PQ4").values == (1, 4, 16)
    assert sweep("HNSW32").parameter == sweep("hnswlib").parameter == "efSearch"
    assert sweep("PQ8").settings == sweep("exact").settings == [{}]


# Choice ---------------------------------------------------------------------------------------------------------------


def test_recommend_is_the_fastest_that_reaches_the_recall():
    rows = [row("exact", 1.0, 8.0), row("quick", 0.94, 0.1), row("good", 0.95, 0.5), row("better", 0.99, 0.7)]
    best, why = recommend(rows)
    assert best is rows[2]
    assert why == ("good answers a single query fastest, in 0.5 ms (p50) at recall .950, of the 3 of 4 rows with a recall@10 of "
                   "at least .950; exact search takes 8 ms.")  # fmt: skip
    assert recommend(rows, 0.96)[0] is rows[3]
    assert recommend(rows, 0.9)[0] is rows[1]
    best, why = recommend(rows, 1.0)
    assert best is rows[0]
    assert "exact search takes" not in why


def test_recommend_takes_the_smaller_of_equally_fast_ones():
    assert recommend([row("big", 1.0, 1.0, mb=2.0), row("small", 0.96, 1.0, mb=1.0)])[0].factory == "small"


def test_recommend_says_what_taoemb_does_not_build():
    best, why = recommend([row("usearch", 1.0, 0.1), row("Flat", 1.0, 2.0)])
    assert best.factory == "usearch"
    assert "taoemb does not build usearch, of what it builds Flat is fastest with 2 ms" in why


def test_recommend_none_and_errors():
    best, why = recommend([row("a", 0.5, 1.0), row("b", 0.7, 9.0)])
    assert best is None
    assert why == "No row has a recall@10 of at least .950; the nearest is b with .700."
    with pytest.raises(ValueError, match="no rows"):
        recommend([])
    for recall in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="min_recall"):
            recommend([row("a", 1.0, 1.0)], recall)


# Files ----------------------------------------------------------------------------------------------------------------


def test_json_holds_everything(rows, tmp_path):
    meta = describe(store(), QUERIES, candidates=CANDIDATES, batch=50, repeats=2)
    write_bench(rows, meta, tmp_path / "new")
    value = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert [BenchRow(**entry) for entry in value["rows"]] == rows
    assert value["meta"] == meta
    assert (meta["vectors"], meta["dimensions"], meta["queries"], meta["repeats"]) == (N, D, "120 given", 2)
    best, why = recommend(rows)
    assert rows[value["recommended"]["row"]] == best
    assert value["recommended"]["why"] == why


def test_page_is_self_contained(rows, tmp_path):
    page = write_bench(rows, describe(store()), tmp_path).read_text()
    assert not [word for word in ("http:", "https:", "src=", "<script", "url(", "@import", "<link") if word in page]
    assert page.count("<svg") == 2
    assert page.count("<tr") == 1 + len(rows)
    assert page.count('<circle class="solid"') == 2 * len(rows)
    assert page.count('class="best"') == 1
    assert "prefers-color-scheme:dark" in page
    assert "Gaussian noise" in page
    assert "nan" not in page.lower().replace("nano", "")


def test_page_escapes_and_shows_what_is_not_known(tmp_path):
    rows = [row("<b>&", 0.5, 1.0, recall_at_100=None)]
    page = write_bench(rows, {"<x>": "<y>", "notes": ["<z>"]}, tmp_path).read_text()
    assert not [tag for tag in ("<b>", "<x>", "<y>", "<z>") if tag in page]
    assert "–" in page
    assert json.loads((tmp_path / "bench.json").read_text())["recommended"]["row"] is None
    with pytest.raises(ValueError, match="no rows"):
        write_bench([], {}, tmp_path)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"store": EmbeddingStore([], [], "f")}, "the store is empty"),
        ({"k": N + 1}, "k=2001 but the store holds 2000"),
        ({"k": 0}, "k=0"),
        ({"batch": 0}, "batch=0"),
        ({"repeats": 0}, "repeats=0"),
        ({"queries": np.full((2, D), np.nan)}, "row 0 holds NaN"),
        ({"queries": QUERIES[:, :8]}, "8 dimensions, the index has 16"),
        ({"queries": QUERIES[:0]}, "no queries"),
        ({"queries": QUERIES[0]}, "must be a matrix"),
        ({"candidates": []}, "no candidates"),
        ({"candidates": ["IVF,nonsense"]}, "no FAISS factory string"),
        ({"candidates": [Candidate("Flat", "nprobe", (4,))]}, "'Flat' has no search setting nprobe"),
    ],
)
def test_bad_input(given, message):
    with pytest.raises(ValueError, match=message):
        bench(**{"store": store(), "queries": QUERIES, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("HNSW32", "ef", (1,)), "parameter='ef'"),
        (("HNSW32", "efSearch"), "or neither"),
        (("HNSW32", "", (1,)), "or neither"),
        (("HNSW32", "efSearch", (8, 0)), "efSearch=0"),
        (("exact", "nprobe", (1,)), "exact has no search setting nprobe"),
        (("hnswlib", "nprobe", (1,)), "hnswlib has no search setting nprobe"),
    ],
)
def test_bad_candidates(given, message):
    with pytest.raises(ValueError, match=message):
        Candidate(*given)
