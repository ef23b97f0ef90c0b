"""Systems side by side where most pairs have no grade."""

import numpy as np
import pyarrow as pa
import pytest

from taoemb.catalog import Catalog, ItemTemplate
from taoemb.comparison import compare
from taoemb.encoder import Encoder
from taoemb.evaluation import evaluate, rank_query
from taoemb.index.channels import BM25Channel
from taoemb.index.exact import ExactIndex
from taoemb.index.runs import RunChannel
from taoemb.store import encode_corpus


@pytest.fixture
def pooled(static_model):
    """150 items; q1 has no word of any title, q2 has; of each query three items are graded."""
    titles = [f"red shoe {i}" for i in range(149)] + ["green hat"]
    items = pa.table({"id": [f"i{i}" for i in range(150)], "title": titles})
    queries = pa.table({"id": ["q1", "q2"], "query": ["sneaker", "green hat"], "split": ["test", "test"]})
    qrels = pa.table({"query_id": ["q1"] * 3 + ["q2"] * 3, "item_id": ["i3", "i4", "i140", "i149", "i7", "i8"],
                      "grade": [3, 0, 3, 3, 0, 2]})  # fmt: skip
    catalog = Catalog.from_tables(items, queries, qrels)
    encoder = Encoder(str(static_model))
    index = ExactIndex.build(encode_corpus(encoder, catalog.items))
    bm25 = BM25Channel.build(catalog.items.ids, ItemTemplate().texts(catalog.items))
    quality = np.full(150, 0.5)
    return catalog, encoder, index, compare(catalog, catalog.queries, {"dense": (encoder, index)}, bm25, channels=[bm25],
                                            quality_N=quality, top_n=100)  # fmt: skip


def test_bm25_gets_nothing_for_what_it_did_not_find(pooled):
    bm25 = pooled[3].evaluations["bm25"].per_query
    for metric in ("ndcg@10", "condensed_ndcg@10", "recall@100", "mrr@10", "goodrate@10", "exclusive_goodrate@10"):
        assert bm25[metric][0] == 0, metric
    assert np.isnan(bm25["judged@10"][0])  # nothing is shown
    assert bm25["auc"].tolist() == [0.5, 1.0]  # all at score 0; the hat before the shoes
    assert bm25["condensed_ndcg@10"][1] == pytest.approx(3 / (3 + 2 / np.log2(3)))  # the shoe of grade 2 is not found


def test_condensed_ndcg_and_auc_read_graded_items_below_the_cut(pooled):
    catalog, encoder, index, comparison = pooled
    found, scores = index.search(encoder.encode_query(catalog.queries.texts), 150)
    run = {
        q: dict(zip(i, s, strict=True)) for q, i, s in zip(["q1", "q2"], found.tolist(), scores.tolist(), strict=True)
    }
    whole = evaluate(run, catalog.qrels, metrics=["condensed_ndcg@10", "auc"], unjudged=None)
    for metric, values in whole.per_query.items():
        np.testing.assert_allclose(comparison.evaluations["dense"].per_query[metric], values)
    assert len(comparison.lists["dense"][0][0]) == 10


def test_several_channels_know_what_any_of_them_finds(pooled):
    catalog, encoder, index, alone = pooled
    dense = {"dense": (encoder, index)}
    result = index.search(encoder.encode_query(catalog.queries.texts), 100)
    shown = [rank_query(dict(zip(i, s)), {}).ids[:10] for i, s in zip(*(column.tolist() for column in result))]
    bm25 = BM25Channel.build(catalog.items.ids, ItemTemplate().texts(catalog.items))
    other = RunChannel("other", {"sneaker": shown[0][:3], "green hat": []})
    options = {"quality_N": np.full(150, 0.5), "top_n": 100}
    several = compare(catalog, catalog.queries, dense, bm25, channels=[bm25, other], **options)
    found = several.evaluations["dense"].per_query
    hat = alone.evaluations["dense"].per_query["overlap@10"][1]
    assert found["overlap@10/bm25"].tolist() == [0, hat]  # "sneaker" is no word of any title
    assert found["overlap@10/other"].tolist() == [0.3, 0]
    assert found["overlap@10"].tolist() == [0.3, hat]
    assert several.channel_top["q1"] == set(shown[0][:3])
    for query, ids in zip(("q1", "q2"), shown):
        good = [i for i in ids if catalog.qrels[query].get(i, 0) >= 2 and i not in several.channel_top[query]]
        assert found["exclusive_goodrate@10"][catalog.queries.ids.index(query)] == len(good) / 10
    everything = dict.fromkeys(catalog.queries.texts, catalog.items.ids)
    nothing_new = compare(catalog, catalog.queries, dense, None, channels=[bm25, RunChannel("all", everything)],
                          quality_N=options["quality_N"], top_n=150)  # fmt: skip
    assert nothing_new.evaluations["dense"].per_query["overlap@10"].tolist() == [1, 1]
    assert nothing_new.evaluations["dense"].per_query["exclusive_goodrate@10"].tolist() == [0, 0]
    assert "overlap@10/all" in nothing_new.text()


def test_a_channel_that_cannot_answer_is_named(pooled):
    catalog = pooled[0]
    options = {"quality_N": np.full(150, 0.5), "top_n": 100}
    with pytest.raises(
        ValueError, match="channel 'other' has no entry for 1 of the queries asked for, the first is 'green hat'"
    ):
        compare(catalog, catalog.queries, {}, None, channels=[RunChannel("other", {"sneaker": []})], **options)
    with pytest.raises(ValueError, match="no channel was given"):
        compare(catalog, catalog.queries, {}, None, channels=[], **options)
