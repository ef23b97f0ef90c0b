"""Rewards: what each one says of a candidate, the gate, and gathering functions that answer in every way there is."""

import asyncio
import math
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from taoemb.catalog import Item, Items, Query
from taoemb.contrastive import Positives
from taoemb.index.channels import BM25Channel
from taoemb.index.runs import RunChannel
from taoemb.judge import OracleJudge
from taoemb.rewards import (
    ExclusivityReward,
    ListDiversityReward,
    ListExclusivityReward,
    QualityReward,
    RelevanceReward,
    RewardConfig,
    gate,
    gather,
    item_quality,
)

ITEMS = [Item("a", "red running shoes"), Item("b", "blue running shirt"), Item("c", "garden hose")]
QUERIES = [Query("q0", "red shoes"), Query("q1", "running")]


def columns(pairs):
    """What the trainer hands to a reward function for (query, item) positions."""
    query_positions, item_positions = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return {
        "queries": [QUERIES[q] for q in query_positions],
        "items": [ITEMS[i] for i in item_positions],
        "query_positions": query_positions,
        "item_positions": item_positions,
    }


PAIRS = columns([(0, 0), (0, 1), (1, 1)])


class CountingJudge(OracleJudge):
    """Remembers every pair that it is asked about."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.asked = []

    def score(self, pairs):
        self.asked += [(query.id, item.id) for query, item in pairs]
        return super().score(pairs)


# --- the three objectives ---------------------------------------------------------------------------------------------


def test_relevance_is_the_judges_score_and_nan_where_it_abstains():
    reward = RelevanceReward(OracleJudge({"q0": {"a": 3, "b": 1}}))
    assert reward(**PAIRS).tolist() == pytest.approx([1, 1 / 3, math.nan], nan_ok=True)


def test_relevance_judges_each_pair_once():
    judge = CountingJudge({"q0": {"a": 3}}, unjudged=0)
    reward = RelevanceReward(judge)
    first = reward(**PAIRS)
    again = reward(**columns([(1, 1), (0, 2), (0, 0)]))
    assert judge.asked == [("q0", "a"), ("q0", "b"), ("q1", "b"), ("q0", "c")]
    assert (reward.calls, reward.hits) == (4, 2)
    assert again.tolist() == [first[2], 0, first[0]]


def test_quality_depends_on_the_item_alone():
    assert QualityReward([0.1, 0.5, math.nan])(**PAIRS).tolist() == pytest.approx([0.1, 0.5, 0.5])
    assert math.isnan(QualityReward([0.1, 0.5, math.nan])(**columns([(0, 2)]))[0])


def test_exclusivity_by_membership_is_1_outside_the_channels_top():
    channel = BM25Channel.build([i.id for i in ITEMS], [i.title for i in ITEMS])
    every = columns([(q, i) for q in range(2) for i in range(3)])
    reward = ExclusivityReward(channel, "membership", 1)(**every)
    expected = [0.0 if ITEMS[i].id in channel.top([QUERIES[q].text], 1)[0] else 1.0 for q in range(2) for i in range(3)]
    assert reward.tolist() == expected
    assert expected[:3] == [0, 1, 1]
    assert ExclusivityReward(channel, "membership", 3)(**every)[4] == 0  # a longer Top-n holds the shirt for "running"


def test_lexical_exclusivity_falls_with_the_overlap():
    channel = BM25Channel.build([i.id for i in ITEMS], [i.title for i in ITEMS])
    reward = ExclusivityReward(channel, "lexical", 1)(**columns([(0, 0), (0, 1), (1, 1)]))
    assert reward.tolist() == [0, 1, 0]  # both words of "red shoes", none of them, "running"


def test_what_any_channel_finds_is_not_exclusive():
    """Against sets, over random lists, with a channel of a user's own that has nothing but ``top``."""
    rng = np.random.default_rng(0)
    items = [Item(f"i{n}", f"item {n}") for n in range(30)]
    queries = [Query(f"q{n}", f"query {n}") for n in range(8)]

    def tops():
        return {q.text: rng.permutation([i.id for i in items])[: rng.integers(0, 12)].tolist() for q in queries}

    class Mine:
        name = "mine"
        lists, asked = tops(), 0

        def top(self, queries, n):
            self.asked += len(queries)
            return [self.lists[query][:n] for query in queries]

    mine, other = Mine(), tops()
    reward = ExclusivityReward([mine, RunChannel("other", other)], "membership", 5)
    query_positions, item_positions = rng.integers(0, 8, 200), rng.integers(0, 30, 200)
    given = {"queries": [queries[q] for q in query_positions], "items": [items[i] for i in item_positions],
             "query_positions": query_positions, "item_positions": item_positions}  # fmt: skip
    expected = [
        float(i.id not in {*mine.lists[q.text][:5], *other[q.text][:5]})
        for q, i in zip(given["queries"], given["items"])
    ]
    for _ in range(2):
        values = reward(**given)
        assert values.dtype == np.float32
        assert values.tolist() == expected
    assert 0 < sum(expected) < 200
    assert mine.asked == len(set(query_positions.tolist()))  # remembered by text
    nothing = {name: values[:0] for name, values in given.items()}
    assert reward(**nothing).shape == (0,)


def test_words_are_compared_with_bm25_alone():
    bm25 = BM25Channel.build(["a"], ["red shoe"])
    run = RunChannel("other", {})
    for channels, names in ((run, r"\['other'\]"), ([bm25, run], r"\['bm25', 'other'\]")):
        with pytest.raises(ValueError, match=f"exclusivity_mode='lexical' .* got {names}: use 'membership'"):
            ExclusivityReward(channels, "lexical", 1)
    with pytest.raises(TypeError, match="is no channel"):
        ExclusivityReward([{"red shoe": ["a"]}], "membership", 1)
    with pytest.raises(ValueError, match="no entry for 1 of the queries asked for, the first is 'red shoes'"):
        ExclusivityReward(run, "membership", 1)(**columns([(0, 0)]))


def table(**more):
    return Items(pa.table({"id": ["a", "b", "c", "d"], "title": ["t"] * 4, **more}))


def test_quality_column():
    assert item_quality(table(quality=[0.0, 0.2, 1.0, None])).tolist() == pytest.approx(
        [0, 0.2, 1, math.nan], nan_ok=True
    )
    assert item_quality(table(stars=[0.0, 0.2, 1.0, 0.5]), "stars").tolist() == [0, 0.2, 1, 0.5]
    with pytest.raises(ValueError, match=r"'stars' ranges from 1 to 5.*scale it"):
        item_quality(table(stars=[1, 2, 5, 5]), "stars")


def test_quality_without_a_column_is_the_percentile_of_completeness_within_the_category():
    # filled fields: 0, 1, 1 in x; 3 in y
    items = table(category=["x", "x", "x", "y"], brand=["", "B", "", "B"], description=["", "", "long", "long"],
                  price=[None, None, None, 2.0])  # fmt: skip
    assert item_quality(items).tolist() == pytest.approx([1 / 6, 4 / 6, 4 / 6, 1 / 2])


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_gate():
    nan = math.nan
    rewards = np.array(
        [[0.9, 0.5, 0.4], [0.5, 0.7, 1.0], [0.49, 0.8, 1.0], [nan, 0.9, 1.0], [0.9, nan, 1.0]], np.float32
    )
    before = rewards.copy()
    gated = gate(rewards, 0, 0.5)
    expected = [[0.9, 0.5, 0.4], [0.5, 0.7, 1.0], [0.49, 0, 0], [nan, nan, nan], [0.9, nan, 1.0]]
    np.testing.assert_allclose(gated, np.array(expected, np.float32))
    np.testing.assert_array_equal(rewards, before)
    np.testing.assert_allclose(gate(rewards[:, [1, 0, 2]], 1, 0.5), gated[:, [1, 0, 2]])


def test_gate_takes_groups():
    rewards = np.random.default_rng(0).random((4, 5, 3)).astype(np.float32)
    flat = gate(rewards.reshape(20, 3), 0, 0.5)
    np.testing.assert_array_equal(gate(rewards, 0, 0.5), flat.reshape(4, 5, 3))


# --- gathering --------------------------------------------------------------------------------------------------------


def answering(answer, name="mine"):
    def function(**_):
        return answer

    function.__name__ = name
    return function


@pytest.mark.parametrize("answer", [[1, 2.5, 3], (1, 2.5, 3), np.array([1, 2.5, 3])])
def test_gather_takes_any_sequence_of_numbers(answer):
    rewards = gather([answering(answer), answering([0, 0, 0])], **PAIRS)
    assert rewards.dtype == np.float32
    assert rewards.tolist() == [[1, 0], [2.5, 0], [3, 0]]


def test_gather_takes_a_tensor():
    import torch

    assert gather([answering(torch.tensor([1.0, 2.5, 3.0]))], **PAIRS).tolist() == [[1], [2.5], [3]]


def test_none_and_nan_abstain():
    rewards = gather([answering([None, math.nan, 1.0])], **PAIRS)
    assert rewards[:, 0].tolist() == pytest.approx([math.nan, math.nan, 1], nan_ok=True)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "'mine' gave None; give one number"),
        (1.0, "'mine' gave 1.0; give one number"),
        ([1.0, 2.0], r"'mine' gave \(2,\) values for 3 candidates"),
        ([[1.0], [2.0], [3.0]], r"'mine' gave \(3, 1\) values for 3 candidates"),
        ([1.0, math.inf, 2.0], "'mine' gave an infinite reward"),
        ([1.0, -math.inf, 2.0], "'mine' gave an infinite reward"),
    ],
)
def test_gather_names_the_function_that_answers_wrongly(answer, message):
    with pytest.raises(ValueError, match=message):
        gather([answering([0, 0, 0], "other"), answering(answer)], **PAIRS)


def test_an_error_in_a_reward_function_is_the_callers_to_see():
    def broken(**_):
        raise RuntimeError("no such model")

    async def broken_later(**_):
        raise RuntimeError("no such model")

    for function in (broken, broken_later):
        with pytest.raises(RuntimeError, match="no such model"):
            gather([answering([0, 0, 0]), function], **PAIRS)


def test_async_functions_run_together():
    """Each waits for the other to have started: one after the other they would never end."""
    started = {"a": asyncio.Event(), "b": asyncio.Event()}

    def waiting(mine, other, value):
        async def function(*, items, **_):
            started[mine].set()
            await asyncio.wait_for(started[other].wait(), timeout=5)
            return [value] * len(items)

        return function

    functions = [waiting("a", "b", 1.0), answering([2.0, None, 2.0]), waiting("b", "a", 3.0)]
    rewards = gather(functions, **PAIRS)
    np.testing.assert_array_equal(rewards, np.array([[1, 2, 3], [1, math.nan, 3], [1, 2, 3]], np.float32))


def test_async_functions_work_where_a_loop_is_running_already():
    """As in a notebook."""

    async def function(*, items, **_):
        await asyncio.sleep(0)
        return [1.0] * len(items)

    async def notebook():
        return gather([function], **PAIRS)

    assert asyncio.run(notebook()).tolist() == [[1], [1], [1]]


def test_functions_get_the_documented_columns_aligned():
    """By TRL's contract: take what you need by name, the rest by ``**kwargs``."""
    seen = {}

    def function(queries, items, query_positions, item_positions, **kwargs):
        seen.update(kwargs, texts=[(q.text, i.title) for q, i in zip(queries, items, strict=True)])
        assert [QUERIES[q] for q in query_positions] == list(queries)
        assert [ITEMS[i] for i in item_positions] == list(items)
        return [float(len(i.title)) for i in items]

    gather([function], **PAIRS)
    assert seen["texts"][2] == ("running", "blue running shirt")


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quality": -0.1}, "quality=-0.1: give a weight of 0 or more"),
        ({"exclusivity": math.nan}, "exclusivity=nan: give a weight"),
        ({"relevance": 0, "quality": 0, "exclusivity": 0}, "every reward weight is 0"),
        ({"exclusivity_top_n": 0}, "exclusivity_top_n=0: give at least 1"),
        ({"exclusivity_mode": "soft"}, "exclusivity_mode='soft': give one of membership, soft_rank, lexical"),
        ({"gate_threshold": 1.5}, "gate_threshold=1.5: give a relevance from 0 to 1"),
        ({"gate_threshold": math.nan}, "gate_threshold=nan"),
    ],
)
def test_config_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig(**settings)


def test_config_takes_a_single_objective():
    assert RewardConfig(relevance=0, quality=0, exclusivity=1).exclusivity == 1


def test_a_quality_column_that_was_asked_for_must_be_there(small_shop):
    with pytest.raises(ValueError, match=r"quality_column='ratign': the items have no such column; they have \['id'"):
        item_quality(small_shop.items, "ratign")


# Soft ranks, noisy and uncertain judges -----------------------------------------------------------------------------------


def test_soft_rank_of_a_long_channel_does_not_overflow():
    channel = RunChannel("other", {"red shoes": ["a"], "running": []})
    kept = ExclusivityReward(channel, "soft_rank", 10_000, 10.0)(**PAIRS)
    assert kept.tolist() == pytest.approx([0.0, 1.0, 1.0])


def test_soft_rank_by_hand():
    tops = {"a": {"q": [f"i{n}" for n in range(200)]}, "b": {"q": ["i50"]}}
    channels = [RunChannel(name, top) for name, top in tops.items()]
    reward = ExclusivityReward(channels, "soft_rank", 100, 10.0)
    items = [Item(id=f"i{n}", title="t") for n in (0, 49, 50, 99, 109, 180, 900)]
    got = reward(queries=[Query("1", "q")] * 7, items=items, item_positions=np.arange(7))

    def kept(rank):
        return 1 - 1 / (1 + math.exp(-(100 - rank) / 10))

    expected = [kept(1), kept(50), kept(51) * kept(1), kept(100), kept(110), 1.0, 1.0]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert expected[3] == 0.5


def test_flips_are_corrected_in_the_mean():
    """A judge that calls 10 % of the bad items good and 30 % of the good ones bad: the reward is right on average."""
    rng, truth = np.random.default_rng(0), np.repeat([0.0, 1.0], 20_000)
    noisy = np.where(rng.random(40_000) < np.where(truth, 0.3, 0.1), 1 - truth, truth)

    class Noisy:
        name, scheme = "noisy", None

        def score(self, pairs):
            return SimpleNamespace(score=noisy[: len(pairs)])

    reward = RelevanceReward(Noisy(), flips=(0.1, 0.3))
    places = np.arange(40_000)
    got = reward(queries=[None] * 40_000, items=[None] * 40_000, query_positions=places, item_positions=places)
    assert got[:20_000].mean() == pytest.approx(0, abs=0.02)
    assert got[20_000:].mean() == pytest.approx(1, abs=0.02)
    assert set(np.round(np.unique(got), 4)) == {np.float32(np.round(-0.1 / 0.6, 4)), np.float32(1.5)}


def test_the_uncertain_middle_abstains():
    reward = RelevanceReward(OracleJudge({"q": {"a": 0, "b": 1, "c": 2, "d": 3}}), uncertain=(0.2, 0.5))
    items = [Item(id=i, title="t") for i in "abcd"]
    got = reward(
        queries=[Query("q", "x")] * 4, items=items, query_positions=np.zeros(4, int), item_positions=np.arange(4)
    )
    np.testing.assert_allclose(got, [0, np.nan, 2 / 3, 1], atol=1e-6)


@pytest.mark.parametrize(("setting", "words"), [
    ({"flips": (0.5, 0.5)}, "sum to less than 1"), ({"flips": (-0.1, 0.0)}, "two shares of 0 or more"),
    ({"uncertain": (0.6, 0.4)}, "the lower one first"), ({"exclusivity_softness": 0.0}, "more than 0 ranks"),
    ({"exclusivity_mode": "fuzzy"}, "give one of membership, soft_rank, lexical"),
])  # fmt: skip
def test_new_settings_are_checked(setting, words):
    with pytest.raises(ValueError, match=words):
        RewardConfig(**setting)


def test_a_click_is_worth_something_whatever_the_judge_says():
    clicked = SimpleNamespace(known=lambda queries, items: (queries == 0) & (items <= 1))
    judge = OracleJudge({"q0": {"a": 3}, "q1": {"b": 0}})  # says nothing about q0 and b
    reward = RelevanceReward(judge, clicked=clicked, click_floor=0.6)
    assert reward(**PAIRS).tolist() == pytest.approx([1.0, 0.6, 0.0])


def test_clicks_by_the_catalog(small_shop):
    positives = Positives(small_shop, small_shop.items.ids)
    query = int(positives.queries[0])
    items = np.arange(len(small_shop.items))
    assert np.flatnonzero(positives.known(np.full(len(items), query), items)).tolist() == positives.of(query).tolist()


LISTS = {
    "queries": [QUERIES[0], QUERIES[0]],
    "items": [[ITEMS[0], ITEMS[1]], [ITEMS[1], ITEMS[2]]],
    "item_positions": np.array([[0, 1], [1, 2]]),
    "relevance": np.array([[1.0, 0.7], [0.7, 0.2]]),
    "group_relevance": np.array([[1.0, 0.7, 0.2]] * 2),
}


def test_list_exclusivity_is_the_recall_that_a_list_adds():
    """Two good candidates, a and b; the channel finds a."""
    channel = RunChannel("other", {"red shoes": ["a"]})
    reward = ListExclusivityReward(channel, 10, 0.5)
    assert reward(**LISTS).tolist() == [0.5, 0.5]
    assert ListExclusivityReward(RunChannel("none", {"red shoes": []}), 10, 0.5)(**LISTS).tolist() == [1.0, 0.5]


def test_diversity_counts_the_values_of_the_good_items():
    items = [Item("a", "x", brand="Ay"), Item("b", "y", brand="Bee"), Item("c", "z", brand="Ay"), Item("d", "w")]
    reward = ListDiversityReward("brand", 0.5)
    lists = [[items[0], items[1]], [items[0], items[2]], [items[0], items[3]], [items[1], items[2]]]
    relevance = np.array([[1, 1], [1, 1], [1, 1], [1, 0.2]])
    assert reward(items=lists, relevance=relevance).tolist() == [1.0, 0.5, 0.5, 0.5]
    colours = [[Item("a", "x", attributes={"colour": c}) for c in row] for row in (("red", "blue"), ("red", "red"))]
    assert ListDiversityReward("colour", 0.5)(items=colours, relevance=np.ones((2, 2))).tolist() == [1.0, 0.5]
