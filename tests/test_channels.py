"""The BM25 channel against the formula computed the slow way, sets computed by hand, and itself after save and load."""

from __future__ import annotations

import logging
import math
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from taoemb.index import channels
from taoemb.index.channels import BM25Channel, Channel

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
