"""The BM25 channel against the formula computed the slow way, sets computed by hand, and itself after save and load;
what all channels share against their own Top-n; run files against the evaluation, ranx and themselves."""

from __future__ import annotations

import gzip
import logging
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taoemb.catalog import Query
from taoemb.evaluation import rank_query
from taoemb.index import channels
from taoemb.index.channels import BM25Channel, Channel, IndexChannel, ranked_channels
from taoemb.index.exact import ExactIndex
from taoemb.index.faiss_index import VectorIndex
from taoemb.index.runs import RunChannel, write_run
from taoemb.index.snapshots import LiveIndex, Snapshots
from taoemb.store import EmbeddingStore

STOP_WORDS = {"a", "an", "and", "for", "in", "no", "not", "of", "on", "or", "the", "to", "with"}
WORDS = ["red", "blue", "shoe", "shoes", "running", "shirt", "the", "with", "5", "m", "usb", "c", "café", "cables"]


def slow_bm25(texts: list[list[str]], query: list[str], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """The formula of the BM25Channel docstring in float64, term by term and item by item."""
    mean_length = sum(map(len, texts)) / len(texts)
    scores = []
    for text in texts:
        counts = Counter(text)
        score = 0.0
        for term in query:
            df = sum(term in other for other in texts)
            if df and counts[term]:
                idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
                score += idf * counts[term] / (counts[term] + k1 * (1 - b + b * len(text) / mean_length))
        scores.append(score)
    return scores


def random_catalog(seed: int, size: int = 40) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(0, 12))) for _ in range(size)]
    return [f"item{i:02d}" for i in range(size)], texts


@pytest.fixture
def unstemmed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "Stemmer", None)  # import Stemmer now raises ImportError


@pytest.mark.usefixtures("unstemmed")
@pytest.mark.parametrize(("seed", "k1", "b"), [(0, 1.5, 0.75), (1, 0.9, 0.4), (2, 1.5, 0.0), (3, 0.0, 0.5)])
def test_scores_follow_the_documented_formula(seed: int, k1: float, b: float) -> None:
    ids, texts = random_catalog(seed)
    channel = BM25Channel.build(ids, texts, k1=k1, b=b)
    terms = [[word for word in text.split() if word not in STOP_WORDS] for text in texts]
    queries = ["red shoes", "running with the usb c", "5 m cables", "café", "blue blue shirt", "shirt nowhere"]
    found_ids, found_scores = channel.search(queries, k=len(ids))
    for query, row_ids, row_scores in zip(queries, found_ids, found_scores, strict=True):
        expected = slow_bm25(terms, [word for word in query.split() if word not in STOP_WORDS], k1, b)
        order = sorted((i for i in range(len(ids)) if expected[i] > 0), key=lambda i: (-round(expected[i], 5), i))
        assert 0 < len(order) < len(ids)
        assert row_ids.tolist() == [ids[i] for i in order] + [""] * (len(ids) - len(order))
        np.testing.assert_allclose(row_scores[: len(order)], [expected[i] for i in order], rtol=1e-5)
        assert np.all(row_scores[len(order) :] == -np.inf)


def test_stemming_and_stop_words_join_word_forms() -> None:
    channel = BM25Channel.build(["a", "b"], ["Red RUNNING shoes", "a cable for the running shoe"])
    assert channel.terms("The running Shoes") == ["run", "shoe"]
    assert channel.top(["runs shoe"], 5) == [["a", "b"]]  # "a" is the shorter text


@pytest.mark.usefixtures("unstemmed")
def test_without_pystemmer_words_stay_as_they_are() -> None:
    channel = BM25Channel.build(["a", "b"], ["red running shoes", "red shoe"])
    assert channel.terms("The running Shoes") == ["running", "shoes"]
    assert channel.top(["shoe"], 5) == [["b"]]


def test_search_returns_the_contract_types_and_padding() -> None:
    ids, scores = BM25Channel.build(["a", "b", "c"], ["red", "red red", "blue"]).search(["red", "green"], k=5)
    assert ids.shape == scores.shape == (2, 5)
    assert ids.dtype == object
    assert scores.dtype == np.float32
    assert ids.tolist() == [["b", "a", "", "", ""], [""] * 5]
    assert np.all(np.isneginf(scores[ids == ""]))


@pytest.mark.parametrize("query", ["", "   ", "the of and", "unseenword", "!?"])
def test_a_query_without_known_terms_has_no_results(query: str) -> None:
    channel = BM25Channel.build(["a", "b"], ["red shoe", ""])
    assert channel.top([query], 3) == [[]]
    assert channel.search([query], 3)[0].tolist() == [["", "", ""]]
    assert channel.term_overlap([query], np.array([[0, 1]])).tolist() == [[0.0, 0.0]]
    assert channel.membership([query], np.array([["a", "b"]], dtype=object), 3).tolist() == [[False, False]]


@pytest.mark.parametrize("texts", [[], ["", "the", "?"]])
def test_a_catalog_without_terms_finds_nothing(texts: list[str], tmp_path: Path) -> None:
    channel = BM25Channel.build([f"i{i}" for i in range(len(texts))], texts)
    channel.save(tmp_path / "bm25")
    for one in (channel, BM25Channel.load(tmp_path / "bm25")):
        assert len(one) == len(texts)
        assert one.search(["red"], 2)[0].tolist() == [["", ""]]
        assert one.top(["red"], 2) == [[]]
        assert one.term_overlap(["red"], np.array([[-1]])).tolist() == [[0.0]]


def test_equal_scores_keep_catalog_order_and_a_short_list_is_a_prefix() -> None:
    ids = [f"i{i}" for i in range(30, 0, -1)]
    channel = BM25Channel.build(ids, ["red shoe", "red shirt", "red hat"] * 10)
    assert channel.top(["red"], 30) == [ids]
    for n in (1, 7, 29):
        assert channel.top(["red"], n) == [ids[:n]]
        assert channel.search(["red"], n)[0].tolist() == [ids[:n]]


def test_word_order_of_the_query_does_not_matter() -> None:
    ids, texts = random_catalog(4)
    channel = BM25Channel.build(ids, texts)
    np.testing.assert_array_equal(*(channel.search([q], 40)[1] for q in ("red run usb c 5", "5 c usb run red")))


def test_membership_and_ranks_agree_with_top() -> None:
    ids, texts = random_catalog(5)
    channel = BM25Channel.build(ids, texts)
    rng = np.random.default_rng(0)
    queries = ["red shoes", "usb c", "nothing known", "blue running shirt"]
    for n in (1, 5, 12, 100, 3):  # the cached list is cut, and made longer when needed
        asked = rng.choice([*ids, "", "not an item"], size=(len(queries), 25)).astype(object)
        tops = channel.top(queries, n)
        ranks = channel.ranks(queries, asked, n)
        expected = [[top.index(i) + 1 if i in top else 0 for i in row] for top, row in zip(tops, asked, strict=True)]
        assert ranks.dtype == np.int32
        assert ranks.tolist() == expected
        member = channel.membership(queries, asked, n)
        assert member.dtype == np.bool_
        assert member.tolist() == [[rank > 0 for rank in row] for row in expected]
        assert tops == [[i for i in row if i] for row in channel.search(queries, n)[0].tolist()]


def test_a_query_seen_before_is_not_scored_again(monkeypatch: pytest.MonkeyPatch) -> None:
    channel = BM25Channel.build(*random_catalog(6))
    scored: list[str] = []
    score = channel._scores
    monkeypatch.setattr(channel, "_scores", lambda query: scored.append(query) or score(query))
    asked = np.array([["item00"]], dtype=object)
    channel.membership(["red"], asked, 10)
    channel.membership(["red"], asked, 10)
    channel.top(["red"], 5)
    assert scored == ["red"]
    channel.top(["red"], 20)
    assert scored == ["red", "red"]
    monkeypatch.setattr(channels, "_CACHED_POSITIONS", 25)  # the oldest queries make room
    channel.top(["blue"], 20)
    channel.top(["red"], 20)
    assert scored == ["red", "red", "blue", "red"]


def test_term_overlap_is_the_share_of_the_querys_distinct_terms() -> None:
    channel = BM25Channel.build(["a", "b", "c"], ["Red running shoes, red", "Blue shoe for the run", ""])
    queries = ["a red red shoe", "run unseenword blue red"]
    overlap = channel.term_overlap(queries, np.array([[0, 1, 2, -1], [1, 0, -1, 1]]))
    assert overlap.dtype == np.float32
    np.testing.assert_allclose(overlap, [[1.0, 0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 0.5]])


def test_term_overlap_matches_sets_of_terms() -> None:
    ids, texts = random_catalog(7)
    channel = BM25Channel.build(ids, texts)
    rng = np.random.default_rng(1)
    queries = [" ".join(rng.choice([*WORDS, "unseenword"], size=rng.integers(0, 6))) for _ in range(20)]
    positions = rng.integers(0, len(ids), size=(20, 15))
    sets = [set(channel.terms(text)) for text in texts]
    expected = [
        [len(set(channel.terms(query)) & sets[i]) / max(1, len(set(channel.terms(query)))) for i in row]
        for query, row in zip(queries, positions, strict=True)
    ]
    np.testing.assert_allclose(channel.term_overlap(queries, positions), expected, rtol=1e-6)


def test_saved_and_loaded_channel_gives_the_same_results(tmp_path: Path) -> None:
    ids, texts = random_catalog(8)
    ids = [f"é/{i}" for i in ids]
    channel = BM25Channel.build(ids, texts, name="inverted index", k1=1.2, b=0.3)
    channel.save(tmp_path / "deep" / "bm25")
    loaded = BM25Channel.load(str(tmp_path / "deep" / "bm25"))
    queries = ["red shoes", "running usb c", "café", "", "unseenword"]
    for ours, theirs in zip(channel.search(queries, 50), loaded.search(queries, 50), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    positions = np.arange(len(ids))[None].repeat(len(queries), axis=0)
    np.testing.assert_array_equal(channel.term_overlap(queries, positions), loaded.term_overlap(queries, positions))
    assert (loaded.name, len(loaded)) == ("inverted index", len(ids))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["bm25"]  # nothing left beside it
    for path in (tmp_path / "deep" / "bm25").iterdir():
        if path.suffix == ".npy":
            np.load(path, allow_pickle=False)
        else:
            assert path.suffix == ".json"


def test_save_replaces_a_channel_but_nothing_else(tmp_path: Path) -> None:
    BM25Channel.build(["old"], ["red"]).save(tmp_path / "bm25")
    BM25Channel.build(["new"], ["red"]).save(tmp_path / "bm25")
    assert BM25Channel.load(tmp_path / "bm25").top(["red"], 1) == [["new"]]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(FileExistsError, match="photos"):
        BM25Channel.build(["new"], ["red"]).save(tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"meow"


def test_load_explains_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="no saved BM25 channel"):
        BM25Channel.load(tmp_path)
    BM25Channel.build(["a"], ["shoes"]).save(tmp_path / "bm25")
    monkeypatch.setitem(sys.modules, "Stemmer", None)
    with pytest.raises(ImportError, match="PyStemmer"):
        BM25Channel.load(tmp_path / "bm25")
    settings = tmp_path / "bm25" / "channel.json"
    settings.write_text(
        re.sub(r'"format": \d+', '"format": 99', settings.read_text(encoding="utf-8")), encoding="utf-8"
    )
    with pytest.raises(ValueError, match="format 99"):
        BM25Channel.load(tmp_path / "bm25")


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="2 ids and 1 texts"):
        BM25Channel.build(["a", "b"], ["x"])
    with pytest.raises(ValueError, match="'a' comes twice"):
        BM25Channel.build(["a", "b", "a"], ["x", "y", "z"])
    with pytest.raises(ValueError, match="an id is empty"):
        BM25Channel.build(["a", ""], ["x", "y"])
    with pytest.raises(ValueError, match="b from 0 to 1"):
        BM25Channel.build(["a"], ["x"], b=1.5)
    channel = BM25Channel.build(["a", "b"], ["red", "blue"])
    with pytest.raises(ValueError, match="k must be 1 or more, got 0"):
        channel.search(["red"], 0)
    with pytest.raises(ValueError, match="n must be 1 or more"):
        channel.top(["red"], -1)
    with pytest.raises(TypeError, match="sequence of texts"):
        channel.search("red", 1)
    with pytest.raises(ValueError, match="from -1 to 1, got 0 to 2"):
        channel.term_overlap(["red"], np.array([[0, 2]]))
    with pytest.raises(ValueError, match="a row for each of 1 queries"):
        channel.term_overlap(["red"], np.array([0, 1]))
    with pytest.raises(ValueError, match="a row for each of 2 queries"):
        channel.membership(["red", "blue"], np.array([["a"]], dtype=object), 1)


def test_duplicate_texts_and_queries_and_empty_batches() -> None:
    channel = BM25Channel.build(["a", "b"], ["red", "red"])
    assert channel.top(["red", "red"], 2) == [["a", "b"], ["a", "b"]]
    assert channel.top([], 2) == []
    assert channel.search([], 2)[0].shape == (0, 2)
    assert channel.term_overlap([], np.empty((0, 3), dtype=np.int64)).shape == (0, 3)


def test_it_is_quiet_and_a_channel(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.DEBUG):
        channel = BM25Channel.build(*random_catalog(9))
        channel.search(["red", ""], 5)
        channel.save(tmp_path / "bm25")
        BM25Channel.load(tmp_path / "bm25").top(["red"], 5)
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.name.startswith("bm25s")]
    assert isinstance(channel, Channel)
    assert channel.name == "bm25"


# --- what all channels share ------------------------------------------------------------------------------------------


class Recorded:
    """A user's own channel: it has ``name`` and ``top`` and nothing else, and remembers what it was asked."""

    name = "recorded"

    def __init__(self, tops: dict[str, list[str]]) -> None:
        self.tops = tops
        self.asked: list[tuple[list[str], int]] = []

    def top(self, queries: Sequence[str], n: int) -> list[list[str]]:
        self.asked.append((list(queries), n))
        return [self.tops[query][:n] for query in queries]


QUERIES = ["red shoes", "usb c", "nothing known", "blue running shirt"]


def one_of_each(tmp_path: Path) -> list[Channel]:
    ids, texts = random_catalog(5)
    bm25 = BM25Channel.build(ids, texts)
    asked = [Query(f"q{i}", text) for i, text in enumerate(QUERIES)]
    write_run(bm25, asked, 30, tmp_path / "other.trec")
    vectors = np.random.default_rng(2).normal(size=(len(ids) + len(QUERIES), 4)).astype(np.float32)
    encoded = dict(zip(QUERIES, vectors[len(ids) :]))
    index = ExactIndex(ids, vectors[: len(ids)])
    return [
        bm25,
        RunChannel.load(tmp_path / "other.trec", asked, ids),
        IndexChannel(index, lambda queries: np.array([encoded[query] for query in queries])),
        Recorded({query: list(np.random.default_rng(len(query)).permutation(ids)) for query in QUERIES[:3]} | {QUERIES[3]: []}),
    ]  # fmt: skip


def test_ranks_and_membership_of_every_channel_agree_with_its_top(tmp_path: Path) -> None:
    channels = one_of_each(tmp_path)
    ids, _ = random_catalog(5)
    rng = np.random.default_rng(0)
    ranked = ranked_channels(channels)
    assert list(ranked) == ["bm25", "other", "index", "recorded"]
    for plain, channel in zip(channels, ranked.values(), strict=True):
        assert isinstance(plain, Channel)
        for n in (1, 5, 12, 100, 3):
            asked = rng.choice([*ids, "", "not an item"], size=(len(QUERIES), 25)).astype(object)
            tops = [list(top) for top in plain.top(QUERIES, n)]
            assert channel.top(QUERIES, n) == tops
            expected = [[top.index(i) + 1 if i in top else 0 for i in row] for top, row in zip(tops, asked)]
            assert channel.ranks(QUERIES, asked, n).tolist() == expected, channel.name
            assert channel.membership(QUERIES, asked, n).tolist() == [[rank > 0 for rank in row] for row in expected]


def test_a_users_channel_is_asked_once_for_each_text() -> None:
    mine = Recorded({"x": ["a", "b", "c"], "y": []})
    channel = ranked_channels(mine)["recorded"]
    assert channel.top(["x", "y", "x"], 2) == [["a", "b"], [], ["a", "b"]]
    assert mine.asked == [(["x", "y"], 2)]
    channel.membership(["y", "x"], np.array([["a"], ["c"]], dtype=object), 1)
    assert len(mine.asked) == 1
    mine.tops["x"] = ["z"]  # frozen: what was found stays
    assert channel.ranks(["x"], np.array([["z", "b"]], dtype=object), 2).tolist() == [[0, 2]]
    assert channel.top(["x", "y"], 3) == [["z"], []]  # a longer Top-n is asked for
    assert mine.asked[1:] == [(["x", "y"], 3)]
    assert channel.top([], 3) == []


def test_lists_that_make_room_for_others_are_still_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "_CACHED_POSITIONS", 5)
    tops = {f"query {i}": [f"{i}{letter}" for letter in "abcd"] for i in range(6)}
    channel = ranked_channels(Recorded(tops))["recorded"]
    for _ in range(2):
        assert channel.top(list(tops), 4) == list(tops.values())
    assert len(channel._ranked) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([["a", "b", "c"]], r"channel 'recorded' gave \['a', 'b', 'c'\] as the Top-2 of 'x'; give at most 2 item ids"),
        ([["a", "a"]], "each once"),
        ([["a", ""]], "none empty"),
        ([], "gave 0 lists for 1 queries"),
    ],
)
def test_a_users_channel_that_answers_wrongly_is_named(
    answer: list[list[str]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Recorded({})
    monkeypatch.setattr(mine, "top", lambda queries, n: answer)
    with pytest.raises(ValueError, match=message):
        ranked_channels([mine])["recorded"].top(["x"], 2)


def test_what_is_no_set_of_channels_is_refused() -> None:
    bm25 = BM25Channel.build(["a"], ["red"])
    with pytest.raises(ValueError, match="two channels are called 'bm25'"):
        ranked_channels([bm25, RunChannel("bm25", {})])
    with pytest.raises(ValueError, match="no channel was given"):
        ranked_channels([])
    with pytest.raises(TypeError, match=r"'bm25' is no channel; a channel has a name and top"):
        ranked_channels(["bm25"])  # type: ignore[list-item]


# --- run files --------------------------------------------------------------------------------------------------------

ASKED = [Query("q1", "red shoe"), Query("q2", "blue shirt"), Query("q3", "green hat")]
ITEMS = ["a", "b", "c", "é/1"]


def run_file(tmp_path: Path, text: str | bytes, name: str = "other.trec") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_run_file_is_ordered_by_score_then_by_item_id_downwards(tmp_path: Path) -> None:
    text = (
        "q2 Q0 b 1 0.5 other\n"
        "q1\tQ0\ta\t1\t-1.5\tother\r\n"  # the rank says 1, the score says last
        "\n"
        "  q1   Q0  c  2  1e1   other  \n"
        "q2 Q0 a 2 .50 other\n"
        "q1 Q0 é/1 3 10 other\n"
        "q2 Q0 c 3 0.50000001 other\n"
        "q1 Q0 b 4 10.0 other"
    )
    channel = RunChannel.load(run_file(tmp_path, text), ASKED, ITEMS)
    assert channel.name == "other"
    assert channel.top(["blue shirt", "red shoe"], 10) == [["c", "b", "a"], ["é/1", "c", "b", "a"]]
    assert channel.top(["red shoe"], 2) == [["é/1", "c"]]
    assert channel.ranks(["blue shirt"], np.array([["a", "é/1", "c"]], dtype=object), 2).tolist() == [[0, 0, 1]]
    gz = run_file(tmp_path, gzip.compress(text.encode()), "zipped.run.gz")
    again = RunChannel.load(str(gz), ASKED, ITEMS)
    assert (again.name, again.top(["red shoe"], 9)) == ("zipped", channel.top(["red shoe"], 9))
    assert RunChannel.load(gz, ASKED, ITEMS, name="mine").name == "mine"


@given(
    st.dictionaries(
        st.sampled_from(["q1", "q2", "q3"]),
        st.dictionaries(st.sampled_from(ITEMS), st.sampled_from([-1.0, 0.0, -0.0, 0.1, 0.1000001, 1e300]), min_size=1),
        min_size=1,
    ),
    st.randoms(use_true_random=False),
)
def test_a_run_file_ranks_as_the_evaluation_does(run: dict[str, dict[str, float]], random: Random) -> None:
    lines = [f"{q} Q0 {item} 0 {score!r} t\n" for q, scores in run.items() for item, score in scores.items()]
    random.shuffle(lines)
    with TemporaryDirectory() as folder:
        channel = RunChannel.load(run_file(Path(folder), "".join(lines)), ASKED, ITEMS)
    texts = {query.id: query.text for query in ASKED}
    for query, scores in run.items():
        assert channel.top([texts[query]], 9) == [rank_query(scores, {}).ids]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q1 Q0 a 1 2.0 t\nq1 Q0 red shoe 2 1.0 t\n", r"other\.trec, line 2: 7 columns; a TREC run file has 6"),
        ("q1 a 1 2.0\n", "line 1: 4 columns"),
        ("q1,Q0,a,1,2.0,t\n", "line 1: 1 columns"),
        ("\n\nq1 Q0 a 1 high t\n", "line 3: the score 'high' is no finite number"),
        ("q1 Q0 a 1 nan t\n", "line 1: the score 'nan'"),
        ("zz Q0 a 1 -inf t\n", "line 1: the score '-inf'"),
        ("q1 Q0 a 2.0 1 t\nq1 Q0 b 1 2.0 t\nq2 Q0 a 1 3 t\nq1 Q0 a 3 1 t\n", "line 4: item 'a' comes twice for query 'q1'"),
        ("", r"other\.trec is empty"),
        ("\n \n", "is empty"),
        ("x1 Q0 a 1 2.0 t\n", "has none of the catalog's queries .its first is 'x1'.; it is of another catalog"),
        ("q1 Q0 A 1 2.0 t\nq2 Q0 B 1 2.0 t\n", "has none of the catalog's items .its first is 'A'."),
        (b"q1 Q0 \xff\xfe 1 2.0 t\n", "has none of the catalog's items"),
        (gzip.compress(b"q1 Q0 a 1 2.0 t\n"), "line 1: . columns"),
    ],
)  # fmt: skip
def test_a_bad_run_file_is_named_with_its_line(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        RunChannel.load(run_file(tmp_path, text), ASKED, ITEMS)


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b"q1 Q0 a%d 1 2.0 t\n" % i for i in range(1000)))
    for damaged in (whole[:-20], whole[:40] + b"\0\0\0\0" + whole[44:], b"q1 Q0 a 1 2.0 t\n"):
        with pytest.raises(ValueError, match=r"other\.trec\.gz is no whole gzip file"):
            RunChannel.load(run_file(tmp_path, damaged, "other.trec.gz"), ASKED, ITEMS)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.trec is no file; give a TREC run file"):
        RunChannel.load(tmp_path / "nowhere.trec", ASKED, ITEMS)


def test_what_the_catalog_lacks_is_left_out_and_counted(tmp_path: Path) -> None:
    path = run_file(tmp_path, "q1 Q0 gone 1 3 t\nq1 Q0 a 2 2 t\nq1 Q0 sold 3 1 t\nq1 Q0 b 4 0 t\nold Q0 new 1 1 t\n")
    with pytest.warns(UserWarning, match="left out") as caught:
        channel = RunChannel.load(path, ASKED, ITEMS)
    assert [str(warning.message).removeprefix(f"{path}: ") for warning in caught] == [
        "left out 1 queries that the catalog does not have, the first is 'old'",
        "left out 2 items that the catalog does not have, the first is 'gone'",
    ]
    assert {warning.filename for warning in caught} == {__file__}
    assert channel.top(["red shoe"], 2) == [["a", "b"]]  # what is left moves up


def test_a_query_that_is_not_in_the_run_is_named_and_not_taken_as_found_nothing(tmp_path: Path) -> None:
    path = run_file(tmp_path, "q1 Q0 a 1 3 t\nq2 Q0 - 0 0 t\n")
    channel = RunChannel.load(path, ASKED, ITEMS)
    assert channel.top(["red shoe", "blue shirt"], 3) == [["a"], []]  # found nothing, and says so
    with pytest.raises(
        ValueError, match=r"other\.trec has no entry for 1 of the queries asked for, the first is 'green hat'"
    ):
        channel.top(["green hat", "red shoe", "green hat"], 3)
    with pytest.raises(
        ValueError, match="channel 'mine' has no entry for 1 of the queries asked for, the first is 'x'"
    ):
        RunChannel("mine", {"": []}).membership(["x"], np.array([["a"]], dtype=object), 3)


def test_two_queries_of_one_text_must_agree(tmp_path: Path) -> None:
    same = [*ASKED, Query("q9", "red shoe")]
    both = "q1 Q0 a 1 3 t\nq1 Q0 b 2 2 t\n"
    assert RunChannel.load(run_file(tmp_path, both), same, ITEMS).top(["red shoe"], 3) == [["a", "b"]]
    agreeing = both + "q9 Q0 a 1 9 t\nq9 Q0 b 2 8 t\n"
    assert RunChannel.load(run_file(tmp_path, agreeing), same, ITEMS).top(["red shoe"], 3) == [["a", "b"]]
    with pytest.raises(ValueError, match="query 'q9' has the text 'red shoe' of another query and other results"):
        RunChannel.load(run_file(tmp_path, both + "q9 Q0 b 1 9 t\n"), same, ITEMS)


WORD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=" \t\n\r\f\v"), min_size=1, max_size=4)
ITEM = WORD.filter(lambda item: item != "-")


@given(st.dictionaries(WORD, st.lists(ITEM, unique=True, max_size=6), min_size=1, max_size=5), st.integers(1, 7))
def test_a_written_run_is_read_back(tops: dict[str, list[str]], n: int) -> None:
    queries = [Query(query_id, f"text of {query_id}") for query_id in tops]
    channel = RunChannel("my channel", dict(zip([query.text for query in queries], tops.values())))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "deep" / "frozen.trec"
        write_run(channel, queries, n, path)
        assert [file.name for file in path.parent.iterdir()] == ["frozen.trec"]
        again = RunChannel.load(path, queries, {item for top in tops.values() for item in top})
    assert again.top([query.text for query in queries], 9) == [top[:n] for top in tops.values()]


def test_a_written_run_is_what_other_tools_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest.importorskip("numba").config, "DISABLE_JIT", True)  # its compiler takes half a minute
    ranx = pytest.importorskip("ranx", reason="ranx is the oracle here")
    ids, texts = random_catalog(5)
    queries = [Query(f"q{i}", text) for i, text in enumerate(QUERIES)]
    bm25 = BM25Channel.build(ids, texts, name="the bm25")
    write_run(bm25, queries, 12, tmp_path / "bm25.trec")
    lines = [line.split() for line in (tmp_path / "bm25.trec").read_text().splitlines()]
    assert lines[0] == ["q0", "Q0", bm25.top(QUERIES, 1)[0][0], "1", "12", "the_bm25"]
    assert ["q2", "Q0", "-", "0", "0", "the_bm25"] in lines
    theirs = ranx.Run.from_file(str(tmp_path / "bm25.trec"), kind="trec").to_dict()
    expected = [top or ["-"] for top in bm25.top(QUERIES, 12)]
    assert [sorted(theirs[q.id], key=theirs[q.id].get, reverse=True) for q in queries] == expected

    scores = {q.id: dict(zip(ids, np.random.default_rng(i).permutation(40).tolist())) for i, q in enumerate(queries)}
    ranx.Run(scores).save(str(tmp_path / "theirs.trec"), kind="trec")
    channel = RunChannel.load(tmp_path / "theirs.trec", queries, ids)
    assert channel.top(QUERIES, 40) == [sorted(scores[q.id], key=scores[q.id].get, reverse=True) for q in queries]


def test_a_run_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = run_file(tmp_path, "mine")
    for query_id, item in (("q 1", "a"), ("q1", "red shoe"), ("q1", "-"), ("", "a")):
        with pytest.raises(ValueError, match="cannot be written in a TREC run file"):
            write_run(RunChannel("x", {"t": [item]}), [Query(query_id, "t")], 5, path)
    with pytest.raises(ValueError, match="leave out .gz"):
        write_run(RunChannel("x", {"t": ["a"]}), [Query("q", "t")], 5, tmp_path / "x.gz")
    with pytest.raises(ValueError, match="n must be 1 or more"):
        write_run(RunChannel("x", {"t": ["a"]}), [Query("q", "t")], 0, path)
    assert path.read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["other.trec"]


# --- other indexes ----------------------------------------------------------------------------------------------------

VECTORS = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]], dtype=np.float32)
TOWARDS = {"east": [1.0, 0.0], "north": [0.1, 0.9]}


def towards(queries: Sequence[str]) -> np.ndarray:
    return np.array([TOWARDS[query] for query in queries], dtype=np.float32)


@pytest.mark.filterwarnings("ignore:.*swigvarlink")
def test_every_index_can_be_a_channel(tmp_path: Path) -> None:
    store = EmbeddingStore(["e", "ne", "n"], [VECTORS], "fp")
    snapshots = Snapshots(tmp_path / "served")
    snapshots.publish(ExactIndex.build(store))
    live = LiveIndex(snapshots)
    for index in (ExactIndex.build(store), VectorIndex.build(store, "HNSW8"), live):
        channel = IndexChannel(index, towards, name="other", fingerprint="fp")
        assert channel.top(["north", "east"], 2) == [["n", "ne"], ["e", "ne"]]
        assert channel.top(["east"], 9) == [["e", "ne", "n"]]  # no more than there is, and no padding
        asked = np.array([["ne", "n", "", "x"]], dtype=object)
        assert channel.ranks(["east"], asked, 9).tolist() == [[2, 3, 0, 0]]


def test_an_index_channel_is_frozen_and_encodes_each_text_once() -> None:
    calls: list[list[str]] = []

    def encode(queries: Sequence[str]) -> np.ndarray:
        calls.append(list(queries))
        return towards(queries)

    index = ExactIndex(["e", "ne", "n"], VECTORS)
    channel = IndexChannel(index, encode)
    assert channel.name == "index"
    assert channel.top(["east", "east"], 1) == [["e"], ["e"]]
    index.remove(["e"])
    assert channel.top(["east", "north"], 1) == [["e"], ["n"]]
    assert calls == [["east"], ["north"]]


def test_an_index_of_another_encoder_is_refused() -> None:
    index = ExactIndex(["e", "ne", "n"], VECTORS, fingerprint="old")
    with pytest.raises(ValueError, match=r"the index was built with encoder old, the queries come from new"):
        IndexChannel(index, towards, fingerprint="new")
    IndexChannel(index, towards)  # nothing to compare with
    IndexChannel(ExactIndex(["e", "ne", "n"], VECTORS), towards, fingerprint="new")
    channel = IndexChannel(index, towards, fingerprint="old")
    index.fingerprint = "exchanged"
    with pytest.raises(ValueError, match="built with encoder exchanged"):
        channel.top(["east"], 1)
