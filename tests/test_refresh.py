"""The refresher against an encoder whose drift is known."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from taoemb.index.exact import ExactIndex
from taoemb.index.faiss_index import VectorIndex
from taoemb.index.refresh import IndexRefresher, RefreshConfig, build_index, rotation
from taoemb.index.results import overlap
from taoemb.index.tuning import Truth, draw_queries, tune
from taoemb.store import EmbeddingStore

N, D = 400, 12
IDS = [f"i{i}" for i in range(N)]


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


class Drifting:
    """An encoder that moves by itself: ``at(step)`` are the vectors of all items at a step."""

    def __init__(self, turn=0.0, noise=0.05, moving=None):
        rng = np.random.default_rng(0)
        self.start, self.away = unit(rng.normal(size=(N, D))), rng.normal(size=(N, D))
        self.turn, self.noise = turn, noise
        self.moving = np.ones(N, bool) if moving is None else moving
        self.step, self.asked = 0, []

    def at(self, step):
        angle = self.turn * step
        plane = np.eye(D)
        plane[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        return unit((self.start + self.moving[:, None] * self.noise * step * self.away) @ plane)

    def __call__(self):
        vectors = self.at(self.step)

        def encode(positions):
            self.asked.append(positions)
            return vectors[positions]

        return encode


def refresher(encoder, build=build_index, **config):
    return IndexRefresher(encoder, build, EmbeddingStore(IDS, [encoder.at(0)], ""), RefreshConfig(**config))


def run(index, encoder, steps, touched=None):
    """Take steps, each of which touches some items; returns the steps at which a new index came."""
    swapped = []
    for step in range(1, steps):
        encoder.step = step
        if index.refresh_if_due(step):
            swapped.append(step)
        if touched is not None:
            index.touch(touched, encoder.at(step)[touched])
            index.note_retrieved(touched[None, :5])
    return swapped


def vectors_of(index):
    return index.index.vectors


def test_full_is_due_every_so_many_steps_and_is_an_index_built_afresh():
    encoder = Drifting()
    index = refresher(encoder, steps=10)
    assert run(index, encoder, 35) == [10, 20, 30]
    afresh = ExactIndex(IDS, encoder.at(30))
    np.testing.assert_array_equal(vectors_of(index), afresh.vectors)
    queries = encoder.at(34)[:20]
    for mine, its in zip(index.index.search(queries, 10), afresh.search(queries, 10), strict=True):
        np.testing.assert_array_equal(mine, its)
    assert index.encoded == 3 * N
    assert index.age(34) == 4


@pytest.mark.parametrize("mode", ["full", "touched", "rolling", "procrustes"])
def test_never(mode):
    encoder = Drifting()
    index = refresher(encoder, mode=mode, steps=0)
    before = index.index
    assert run(index, encoder, 50, np.arange(10)) == []
    assert index.index is before
    assert encoder.asked == []


def test_touched_costs_nothing_and_takes_the_last_vectors_that_training_made():
    encoder, touched = Drifting(), np.arange(50, 90)
    index = refresher(encoder, mode="touched", steps=10)
    run(index, encoder, 21, touched)
    assert index.encoded == 0
    assert encoder.asked == []
    np.testing.assert_array_equal(vectors_of(index)[touched], encoder.at(19)[touched])  # step 20 began before its touch
    rest = np.setdiff1d(np.arange(N), touched)
    np.testing.assert_array_equal(vectors_of(index)[rest], encoder.at(0)[rest])


def test_rolling_comes_around_the_whole_catalog():
    encoder = Drifting()
    index = refresher(encoder, mode="rolling", steps=5, share=0.25)
    run(index, encoder, 21)
    assert [len(asked) for asked in encoder.asked] == [N // 4] * 4
    assert len(np.unique(np.concatenate(encoder.asked))) == N  # the oldest first, so none twice before all once
    assert index.encoded == N


@pytest.mark.parametrize("share", [0.02, 0.1])
def test_rolling_takes_the_hot_and_the_drifting_first_and_not_what_was_touched(share):
    moving = np.zeros(N, bool)
    moving[:100] = True
    encoder = Drifting(moving=moving, noise=0.02)
    encoder.start[:100] = unit(
        encoder.start[0] + 0.1 * encoder.start[:100]
    )  # the moving ones are a region of their own
    index = refresher(encoder, mode="rolling", steps=20, share=share)
    touched, hot = np.arange(0, N, 4), np.array([21, 33, 59, 301])
    for _ in range(200):
        index.note_retrieved(hot)
    run(index, encoder, 21, touched)
    chosen = set(encoder.asked[0].tolist())
    assert len(chosen) == share * N
    assert {21, 33, 59} <= chosen  # hot and drifting
    assert not chosen & set(touched.tolist())
    assert len(chosen & set(range(100))) >= 0.7 * len(chosen)


def test_procrustes_undoes_a_turn_for_what_was_not_encoded():
    encoder = Drifting(turn=0.05, noise=0.0)
    index = refresher(encoder, mode="procrustes", steps=20, share=0.2)
    run(index, encoder, 21)
    truth = encoder.at(20)
    assert index.encoded == N // 5
    assert (vectors_of(index) * truth).sum(1).min() > 0.99
    assert (encoder.at(0) * truth).sum(1).min() < 0.9


@pytest.mark.parametrize("mode", ["touched", "rolling", "procrustes"])
def test_partial_modes_are_nearer_to_a_rebuild_than_no_refresh(mode):
    encoder = Drifting(turn=0.01, noise=0.01)
    touched = np.random.default_rng(1).choice(N, 150, replace=False)
    index = refresher(encoder, mode=mode, steps=20, share=0.3)
    run(index, encoder, 41, touched)
    fresh, stale = ExactIndex(IDS, encoder.at(40)), ExactIndex(IDS, encoder.at(0))
    queries = encoder.at(40)[::7]
    wanted = fresh.search_positions(queries, 10)[0]
    mine, none = (overlap(one.search_positions(queries, 10)[0], wanted) for one in (index.index, stale))
    assert mine > none + 0.03


def test_rotation_is_the_best_orthogonal_map():
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(D, D)))[0]
    old = unit(rng.normal(size=(100, D)))
    found = rotation(old, (old @ turn + 0.01 * rng.normal(size=old.shape)).astype(np.float32))
    np.testing.assert_allclose(found @ found.T, np.eye(D), atol=1e-5)
    np.testing.assert_allclose(found, turn, atol=0.02)
    np.testing.assert_allclose(rotation(old[:0], old[:0]) @ np.eye(D), np.eye(D), atol=1e-6)  # nothing known: stay


def test_the_old_index_stays_usable_and_a_failed_refresh_changes_nothing():
    encoder = Drifting()
    index = refresher(encoder, mode="rolling", steps=1)
    old = index.index
    before = old.search(encoder.start[:5], 5)[0].tolist()
    encoder.step = 1
    assert index.refresh_if_due(1)
    assert index.index is not old
    assert old.search(encoder.start[:5], 5)[0].tolist() == before
    kept = index.index
    index.touch(np.array([3]), encoder.at(2)[[3]])

    def fail():
        raise MemoryError

    index._encoder = fail
    with pytest.raises(MemoryError):
        index.refresh_if_due(2)
    assert index.index is kept
    assert (index.built_at, index.started_at) == (1, 1)
    assert index.state()["touched"].tolist() == [3]


@pytest.mark.parametrize("mode", ["full", "touched", "rolling", "procrustes"])
def test_a_restored_refresher_goes_on_as_the_first_would(mode):
    touched = np.arange(0, N, 3)
    whole = Drifting(turn=0.01)
    one = refresher(whole, mode=mode, steps=7)
    run(one, whole, 40, touched)
    parted = Drifting(turn=0.01)
    two = refresher(parted, mode=mode, steps=7)
    run(two, parted, 25, touched)
    state = {name: array.copy() for name, array in two.state().items()}
    two = refresher(parted, mode=mode, steps=7)
    two.restore(state)
    for step in range(25, 40):
        parted.step = step
        two.refresh_if_due(step)
        two.touch(touched, parted.at(step)[touched])
        two.note_retrieved(touched[None, :5])
    assert one.state().keys() == two.state().keys()
    for name, array in one.state().items():
        np.testing.assert_array_equal(array, two.state()[name], err_msg=name)
    np.testing.assert_array_equal(vectors_of(one), vectors_of(two))


def test_in_the_background_training_goes_on_with_the_old_index():
    gate, encoder = threading.Event(), Drifting()
    now = encoder()

    def slow():
        vectors = encoder.at(encoder.step)

        def encode(positions):
            assert gate.wait(20)
            return vectors[positions]

        return encode

    index = IndexRefresher(slow, build_index, EmbeddingStore(IDS, [now(np.arange(N))], ""),
                           RefreshConfig(steps=5, asynchronous=True))  # fmt: skip
    old = index.index
    encoder.step = 5
    assert not index.refresh_if_due(5)
    encoder.step = 6
    assert not index.refresh_if_due(6)
    assert index.index is old
    gate.set()
    for step in range(7, 2000):
        encoder.step = 7
        if index.refresh_if_due(step):
            break
        threading.Event().wait(0.005)
    np.testing.assert_array_equal(vectors_of(index), encoder.at(5))  # by the encoder of the step at which it began
    assert index.built_at == 5
    index.close()


def test_an_error_in_the_background_is_raised_in_training():
    def broken():
        def encode(positions):
            raise FloatingPointError("boom")

        return encode

    store = EmbeddingStore(IDS, [Drifting().at(0)], "")
    index = IndexRefresher(broken, build_index, store, RefreshConfig(steps=1, asynchronous=True))
    assert not index.refresh_if_due(1)
    index._worker.shutdown()
    with pytest.raises(FloatingPointError, match="boom"):
        index.refresh_if_due(2)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"mode": "some"}, "give one of full, touched"),
        ({"steps": -1}, "give 0"),
        ({"share": 0.0}, "share of the catalog"),
    ],
)
def test_settings_are_checked(setting, message):
    with pytest.raises(ValueError, match=message):
        replace(RefreshConfig(), **setting)


def test_an_empty_catalog():
    index = IndexRefresher(lambda: lambda positions: np.zeros((0, D), np.float32), build_index,
                           EmbeddingStore([], [np.zeros((0, D), np.float32)], ""), RefreshConfig("rolling", 1))  # fmt: skip
    assert index.refresh_if_due(1)
    assert index.age(1) == 0


@pytest.mark.parametrize(("config", "line"), [
    ({"steps": 100}, "full refresh every 100 steps, 6 times, 100% of 400 items encoded each time, about 3.0 s, 18 s in all"),
    ({"steps": 100, "mode": "touched"}, "touched refresh every 100 steps, 6 times, 0% of 400 items"),
    ({"steps": 50, "mode": "rolling", "share": 0.2}, "every 50 steps, 13 times, 20% of 400 items encoded each time, about 0.6 s"),
    ({"steps": 0}, "no refresh in 700 steps"), ({"steps": 700}, "no refresh in 700 steps"),
])  # fmt: skip
def test_forecast(config, line):
    encoder = Drifting()
    index = refresher(encoder, **config)
    assert line in index.forecast(700, 3.0)
    done = run(index, encoder, 700)
    assert f" {len(done)} times" in index.forecast(700, 3.0) or not done


# Staleness, recall ------------------------------------------------------------------------------------------------------


def probing(encoder, build=build_index, k=10, **config):
    return IndexRefresher(encoder, build, EmbeddingStore(IDS, [encoder.at(0)], ""), RefreshConfig(**config),
                          probe=lambda: encoder.at(encoder.step)[::9], k=k)  # fmt: skip


def true_overlap(index, encoder, step, k=10):
    queries, truth = encoder.at(step)[::9], ExactIndex(IDS, encoder.at(step))
    return overlap(index.search_positions(queries, k)[0], truth.search_positions(queries, k)[0])


@pytest.mark.parametrize("mode", ["full", "rolling"])
def test_a_stale_index_is_refreshed_before_its_time(mode):
    encoder = Drifting(noise=0.01)
    index = probing(encoder, steps=1000, mode=mode, share=1.0, probe_steps=5, min_overlap=0.8)
    seen = []
    for step in range(1, 200):
        encoder.step = step
        if index.refresh_if_due(step):
            break
        if index.probed_at == step:
            seen.append((step, index.overlap))
    assert seen
    assert step == seen[-1][0] + 5
    for at, found in seen:  # the candidates alone were encoded: what they could not show makes it look a little better
        assert found >= 0.8
        assert 0 <= found - true_overlap(ExactIndex(IDS, encoder.at(0)), encoder, at) < 0.1
    assert true_overlap(ExactIndex(IDS, encoder.at(0)), encoder, step) < 0.8
    assert true_overlap(index.index, encoder, step) == 1
    looked = sum(len(asked) for asked in encoder.asked[:-1])
    assert index.encoded == looked + len(encoder.asked[-1])
    assert all(len(asked) <= 45 * 40 for asked in encoder.asked[:-1])
    assert index.overlap == pytest.approx(true_overlap(ExactIndex(IDS, encoder.at(0)), encoder, step))


def test_an_index_that_stays_true_is_left_alone():
    encoder = Drifting(noise=0.0)
    index = probing(encoder, steps=0, probe_steps=5)
    assert run(index, encoder, 40) == []
    assert (index.overlap, index.refreshes, len(encoder.asked)) == (1.0, 0, 7)


def test_what_a_look_encodes_is_touched():
    encoder = Drifting(noise=0.01)
    index = probing(encoder, mode="touched", steps=10, probe_steps=4)
    run(index, encoder, 11)
    assert index.encoded == sum(map(len, encoder.asked))
    looked = encoder.asked[-1]
    np.testing.assert_array_equal(vectors_of(index)[looked], encoder.at(8)[looked])


def test_drift_is_what_touched_vectors_moved():
    encoder = Drifting(noise=0.02)
    index = refresher(encoder, steps=10)
    touched = np.arange(20)
    index.touch(touched, encoder.at(7)[touched])
    wanted = 1 - (encoder.at(0)[:20].astype(np.float64) * encoder.at(7)[:20]).sum(1).mean()
    assert index.drift == pytest.approx(wanted, abs=1e-6)
    index.touch(touched[:0], np.zeros((0, D), np.float32))
    assert index.drift == pytest.approx(wanted, abs=1e-6)


def ivf(store):
    return build_index(store, "IVF16,Flat")


@pytest.mark.parametrize("min_recall", [0.5, 0.9, 1.0])
def test_as_many_lists_are_searched_as_the_recall_takes(min_recall):
    encoder = Drifting()
    index = probing(encoder, ivf, steps=3, min_recall=min_recall)
    for step in (0, 3):
        encoder.step = step
        assert index.refresh_if_due(step) == (step > 0)
        probes = index.index.parameters["nprobe"]
        assert index.recall == pytest.approx(true_overlap(index.index, encoder, step))
        assert index.recall >= min_recall
        if probes > 1:
            index.index.set_parameters(nprobe=probes // 2)
            assert true_overlap(index.index, encoder, step) < min_recall
            index.index.set_parameters(nprobe=probes)


def test_an_index_that_finds_too_little_is_refused():
    def poor(store):
        return VectorIndex.build(store, "PQ2x2")

    encoder = Drifting()
    with pytest.raises(
        ValueError, match=r"finds .*% of the exact Top-10, less than min_recall=0.95; use another factory"
    ):
        probing(encoder, poor)
    assert probing(encoder, poor, min_recall=0.0).refresh_if_due(100)
    good = [True]
    index = probing(encoder, lambda store: build_index(store) if good[0] else poor(store), steps=5)
    good[0], before = False, index.index
    encoder.step = 5
    with pytest.warns(UserWarning, match="step 5: the refreshed index finds .* the one before stays in use"):
        assert not index.refresh_if_due(5)
    assert index.index is before
    assert (index.refreshes, index.encoded, index.age(5)) == (0, N, 5)


def test_a_restored_refresher_searches_as_deeply():
    encoder = Drifting(noise=0.01)
    index = probing(encoder, ivf, steps=5, min_recall=0.99)
    run(index, encoder, 12)
    state = {name: array.copy() for name, array in index.state().items()}
    encoder.step = 300  # by now the same recall takes another number of lists
    again = probing(encoder, ivf, steps=5, min_recall=0.99)
    again.restore(state)
    assert again.index.parameters == index.index.parameters
    for name, array in index.state().items():
        np.testing.assert_array_equal(array, again.state()[name], err_msg=name)


def test_in_the_background_a_late_refresh_is_waited_for():
    gate, encoder = threading.Event(), Drifting()

    def slow():
        vectors = encoder.at(encoder.step)
        return lambda positions: vectors[positions] if gate.wait(20) else None

    index = IndexRefresher(slow, build_index, EmbeddingStore(IDS, [encoder.at(0)], ""),
                           RefreshConfig(steps=5, asynchronous=True))  # fmt: skip
    for step in (5, 6, 9):
        encoder.step = step
        assert not index.refresh_if_due(step)
    threading.Timer(0.2, gate.set).start()
    assert index.refresh_if_due(10)  # the next one is due: no training with an index older than that
    np.testing.assert_array_equal(vectors_of(index), encoder.at(5))
    index.close()


def test_truth_block_by_block(monkeypatch):
    monkeypatch.setattr("taoemb.store._BLOCK_ROWS", 30)
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng.normal(size=(N, D))), unit(rng.normal(size=(7, D)))
    store = EmbeddingStore(IDS, np.array_split(vectors, 3), "")
    for k in (1, 10, N + 5):
        wanted = np.argsort(-(queries @ vectors.T), axis=1)[:, :k]
        truth = Truth(store, queries, k)
        np.testing.assert_array_equal(truth.positions, wanted)
        assert truth.recall(wanted, k) == 1
        assert truth.recall(wanted[:, ::-1], k) == 1
        assert truth.recall(np.where(wanted == wanted[:, :1], -1, wanted), k) == pytest.approx(1 - 1 / min(k, N))


def test_equal_items_are_equally_right():
    """A catalog's variants have the same text: which of them is found does not matter."""
    one = unit(np.random.default_rng(0).normal(size=(N // 4, D)))
    store = EmbeddingStore(IDS, [np.repeat(one, 4, axis=0)], "")
    truth = Truth(store, one[:9], 2)
    assert truth.recall(truth.positions ^ 3, 2) == 1  # the other two of the four
    index = VectorIndex.build(store, "IVF16,Flat")
    assert tune(index, Truth(store, unit(np.random.default_rng(1).normal(size=(50, D))), 10), 10, 1.0) == 1


def test_only_deeper():
    store = EmbeddingStore(IDS, [unit(np.random.default_rng(0).normal(size=(N, D)))], "")
    easy = Truth(store, store.vectors[:30], 1)
    index = VectorIndex.build(store, "IVF16,Flat", nprobe=5)
    assert tune(index, easy, 1, 0.9, only_deeper=True) == 1
    assert index.parameters == {"nprobe": 5}
    assert tune(index, easy, 1, 0.9) == 1
    assert index.parameters == {"nprobe": 1}
    assert tune(index, Truth(store, draw_queries(store, 50), 10), 10, 1.0, only_deeper=True) == 1
    assert index.parameters["nprobe"] > 5


def test_nothing_asked_is_nothing_set():
    store = EmbeddingStore(IDS, [unit(np.random.default_rng(0).normal(size=(N, D)))], "")
    index = VectorIndex.build(store, "IVF16,Flat", nprobe=5)
    assert 0 < tune(index, Truth(store, store.vectors[:20], 10), 10, 0.0) < 1
    assert index.parameters == {"nprobe": 5}
    empty = EmbeddingStore([], [np.zeros((0, D), np.float32)], "")
    assert Truth(empty, draw_queries(empty), 3).recall(np.zeros((0, 0), np.int64), 3) == 1


@pytest.mark.parametrize("mode", ["touched", "rolling"])
def test_what_a_refresh_in_the_background_took_is_kept_until_it_is_published(mode):
    gate, encoder = threading.Event(), Drifting()

    def slow():
        vectors = encoder.at(encoder.step)
        return lambda positions: vectors[positions] if gate.wait(20) else None

    def made():
        return IndexRefresher(slow, build_index, EmbeddingStore(IDS, [encoder.at(0)], ""),
                              RefreshConfig(mode, steps=5, asynchronous=True))  # fmt: skip

    index = made()
    index.touch(np.arange(4), encoder.at(3)[:4])
    encoder.step = 5
    assert not index.refresh_if_due(5)
    index.touch(np.arange(2), encoder.at(5)[:2])
    state = {name: array.copy() for name, array in index.state().items()}
    gate.set()
    index.close()
    again = made()
    again.restore(state)
    np.testing.assert_array_equal(again.state()["touched"], np.arange(4))
    np.testing.assert_array_equal(
        again.state()["touched_vectors"], np.concatenate([encoder.at(5)[:2], encoder.at(3)[2:4]])
    )
    assert not again.refresh_if_due(6)  # nothing of the other's refresh is published here
    again.close()


def test_looks_alone_do_not_make_training_wait():
    gate, encoder = threading.Event(), Drifting(noise=0.05)
    looks = []

    def slow():
        vectors, first = encoder.at(encoder.step), len(looks) == 0
        looks.append(1)
        return lambda positions: vectors[positions] if first or gate.wait(20) else None

    index = IndexRefresher(slow, build_index, EmbeddingStore(IDS, [encoder.at(0)], ""),
                           RefreshConfig(steps=0, probe_steps=2, asynchronous=True, min_overlap=1.0),
                           probe=lambda: encoder.at(encoder.step)[::9])  # fmt: skip
    start = time.perf_counter()
    for step in (1, 2, 3, 4):
        encoder.step = step
        assert not index.refresh_if_due(step)
    assert time.perf_counter() - start < 10
    gate.set()
    index.close()


def test_drawn_queries_lie_near_the_store():
    vectors = unit(np.random.default_rng(0).normal(size=(N, 64)))
    store = EmbeddingStore(IDS, np.array_split(vectors, 3), "")
    drawn = draw_queries(store, 200, seed=3)
    assert drawn.shape == (200, 64)
    assert (drawn @ vectors.T).max(1).mean() == pytest.approx(1 / np.sqrt(1 + 0.5**2), abs=0.01)
    np.testing.assert_array_equal(drawn, draw_queries(store, 200, seed=3))
    assert not np.array_equal(drawn, draw_queries(store, 200, seed=4))


@pytest.mark.parametrize(("setting", "message"), [({"probe_steps": -1}, "probe_steps=-1: give 0"),
                                                  ({"min_overlap": 1.1}, "min_overlap=1.1: give 0 to 1"),
                                                  ({"min_recall": -0.1}, "min_recall=-0.1: give 0 to 1")])  # fmt: skip
def test_measures_are_checked(setting, message):
    with pytest.raises(ValueError, match=message):
        replace(RefreshConfig(), **setting)
