"""Generated queries: distinct, deterministic, short, in the words of their source item, from any catalog."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from taoemb.catalog import Catalog
from taoemb.judge.lexicon import Lexicon
from taoemb.judge.words import phrase, words
from taoemb.queries import FORMS, generate_queries

TYPES = ("laser printer", "toner cartridge", "desk lamp", "coffee mug", "usb hub", "phone case", "memory card")
BRANDS = ("Acme", "Borg", "Nora Home", "Vita", "Zuse")
COLOURS = ("Black", "White", "Light Blue", "Red")


def catalog(count: int = 700, *, rich: bool = True) -> Catalog:
    rng = np.random.default_rng(5)
    rows = []
    for i in range(count):
        kind, brand, colour = (str(rng.choice(choices)) for choices in (TYPES, BRANDS, COLOURS))
        code = f"{brand[:2].upper()}-{rng.integers(1000, 9999)}"
        row = {"id": f"i{i}", "title": f"{brand} {code} {kind} {colour}"}
        if rich:
            row |= {"brand": brand, "attributes": json.dumps({"colour": colour, "weight": float(rng.integers(1, 9))})}
        rows.append(row)
    return Catalog.from_tables(pa.Table.from_pylist(rows))


@pytest.fixture(scope="module")
def rich() -> Catalog:
    return catalog()


@pytest.fixture(scope="module")
def generated(rich):
    return generate_queries(rich.items, 600, seed=1)


def test_distinct_training_queries_that_a_catalog_takes(rich, generated):
    queries = generated.queries
    assert len(queries) == len(set(queries.texts)) == len(set(queries.ids)) == 600
    assert {q.split for q in queries} == {"train"}
    assert all(text == text.lower().strip() and text for text in queries.texts)
    again = Catalog.from_tables(rich.items.table, queries.to_table(), clicks=generated.clicks)
    assert again.queries.texts == queries.texts


def test_deterministic_for_a_seed_and_a_smaller_n_is_a_prefix(rich, generated):
    same = generate_queries(rich.items, 600, seed=1)
    assert same.queries.to_table().equals(generated.queries.to_table())
    assert same.clicks.equals(generated.clicks)
    assert generate_queries(rich.items, 100, seed=1).queries.texts == generated.queries.texts[:100]
    assert generate_queries(rich.items, 600, seed=2).queries.texts != generated.queries.texts


def test_clicks_name_the_source_items(rich, generated):
    by_query: dict[str, list[dict]] = {}
    for row in generated.clicks.to_pylist():
        by_query.setdefault(row["query_id"], []).append(row)
    assert set(by_query) == set(generated.queries.ids)
    for query in generated.queries:
        rows = by_query[query.id]
        assert [row["position"] for row in rows] == list(range(1, len(rows) + 1))
        assert sorted((row["clicks"] for row in rows), reverse=True) == [row["clicks"] for row in rows]
        assert sum(row["clicks"] for row in rows) == query.frequency
        assert query.intent["source"] in {row["item_id"] for row in rows}


def test_words_come_from_every_source_item(rich):
    plain = generate_queries(rich.items, 400, noise=False)
    text = {i.id: set(words(f"{i.title} {i.brand} {' '.join(i.attributes.values())}")) for i in rich.items}
    of_query = {query.id: set(words(query.text)) for query in plain.queries}
    for row in plain.clicks.to_pylist():
        assert of_query[row["query_id"]] <= text[row["item_id"]], row


def test_noise_keeps_most_words(rich, generated):
    text = {i.id: set(words(f"{i.title} {i.brand} {' '.join(i.attributes.values())}")) for i in rich.items}
    known = [set(words(q.text)) <= text[q.intent["source"]] for q in generated.queries]
    assert 0.9 < np.mean(known) < 1.0


def test_most_queries_are_short_and_every_form_occurs(generated):
    lengths = np.array([len(text.split()) for text in generated.queries.texts])
    assert (lengths <= 3).mean() > 0.6
    assert lengths.max() <= 7
    assert {query.slice for query in generated.queries} == set(FORMS)
    draws = Counter()
    for query in generated.queries:
        draws[query.slice] += query.frequency
    assert draws["type"] / draws.total() == pytest.approx(FORMS["type"], abs=0.06)


def test_head_queries_name_types_and_are_drawn_most_often(rich, generated):
    named = {phrase(kind) for kind in TYPES} | {word for kind in TYPES for word in kind.split()}
    frequent = sorted(generated.queries, key=lambda q: -q.frequency)[:10]
    assert {phrase(q.text) for q in frequent} <= named | {phrase(text) for text in (*BRANDS, *COLOURS)}
    assert set(TYPES) <= set(Lexicon(rich.items).types)


def test_intents_match_the_source_item(rich, generated):
    items = {item.id: item for item in rich.items}
    kinds = Counter()
    for query in generated.queries:
        source = items[query.intent["source"]]
        kinds.update(list(query.intent))
        if "brand" in query.intent:
            assert query.intent["brand"] == source.brand
        if "type" in query.intent:
            assert query.intent["type"] in source.title
        for name, value in query.intent.get("attributes", {}).items():
            assert value == phrase(source.attributes[name])
    assert all(kinds[key] > 20 for key in ("type", "brand", "attributes"))


def test_forms_can_be_chosen(rich):
    only = generate_queries(rich.items, 50, forms={"brand type": 1.0}, noise=False)
    brands = {brand.lower() for brand in BRANDS}
    assert all(any(brand in q.text for brand in brands) for q in only.queries if q.slice == "brand type")
    assert sum(q.slice == "brand type" for q in only.queries) > 25


def test_titles_alone_are_enough():
    bare = catalog(rich=False)
    generated = generate_queries(bare.items, 300, seed=0)
    assert len(set(generated.queries.texts)) == 300
    assert set(TYPES) <= set(generated.queries.texts)
    assert np.mean([len(text.split()) <= 3 for text in generated.queries.texts]) > 0.5


@pytest.mark.parametrize("title", ["mug", "X1 200", "the for with", "Ünïcode Becher", "???"])
def test_a_single_odd_title(title):
    items = Catalog.from_tables(pa.table({"id": ["1"], "title": [title]})).items
    if title == "???":
        with pytest.raises(ValueError, match="0 distinct queries"):
            generate_queries(items, 1)
    else:
        assert generate_queries(items, 1).queries.texts[0]


def test_a_catalog_that_cannot_give_so_many_says_how_many_it_gives():
    items = catalog(8).items
    with pytest.raises(ValueError, match=r"8 items give \d+ distinct queries \(seed 3\), not 100000") as error:
        generate_queries(items, 100_000, seed=3)
    most = int(str(error.value).split(" give ")[1].split()[0])
    assert len(generate_queries(items, most, seed=3).queries) == most
    assert len(generate_queries(items, 100_000, seed=3, allow_fewer=True).queries) == most


@pytest.mark.parametrize("bad", [{"n": 0}, {"n": 5, "forms": {"riddle": 1.0}}, {"n": 5, "forms": {"type": 0.0}}])
def test_arguments_are_checked(rich, bad):
    with pytest.raises(ValueError, match="at least"):
        generate_queries(rich.items, **bad)
