import hashlib
import json
import os
import subprocess
import sys
from collections import defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

import taoemb
from taoemb.catalog import Catalog, ItemTemplate
from taoemb.shop import Shop, Truth, generate_shop, load_ontology, verdicts
from taoemb.shop_rules import ATTRIBUTE_VERDICTS, CATEGORY_VERDICTS, ONTOLOGY_FOLDER

SMALL = {"train_queries": 300, "validation_queries": 30, "test_queries": 80}


@pytest.fixture(scope="module")
def small():
    return generate_shop(2000, seed=3, **SMALL)


@pytest.fixture(scope="module")
def large():
    return generate_shop(20_000, seed=0, train_queries=500, validation_queries=20, test_queries=200)


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_same_arguments_same_bytes_in_another_process(small, tmp_path):
    small.save(tmp_path / "here")
    code = f"from taoemb.shop import generate_shop; generate_shop(2000, 3, **{SMALL}).save({str(tmp_path / 'there')!r})"
    root = str(Path(taoemb.__file__).parent.parent)
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    here, there = digests(tmp_path / "here"), digests(tmp_path / "there")
    assert here == there
    assert sorted(here) == ["catalog.json", "clicks.parquet", "items.parquet", "qrels.parquet", "queries.parquet",
                            "truth.parquet"]  # fmt: skip


def test_another_seed_gives_another_shop(small):
    other = generate_shop(2000, seed=4, **SMALL)
    assert other.catalog.items.table.column("title") != small.catalog.items.table.column("title")
    assert set(other.catalog.queries.texts) != set(small.catalog.queries.texts)


def test_saves_and_loads_as_a_checked_catalog(small, tmp_path):
    small.save(tmp_path)
    loaded = Catalog.load(tmp_path)
    assert loaded.metadata == {"name": "shop", "seed": 3, "items": 2000, "unjudged": 0}
    assert loaded.qrels == small.catalog.qrels
    assert loaded.queries.to_table() == small.catalog.queries.to_table()
    assert Shop.load(tmp_path).truth == small.truth
    (tmp_path / "truth.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"truth\.parquet"):
        Shop.load(tmp_path)


# Hand-written verdicts --------------------------------------------------------------------------------------

ITEMS = [  # id, type, brand, price, attributes
    ("dry50", "face_cream", "Veloura", 30.0,
     {"fragrance": "free", "skin_type": "dry", "spf": "spf50", "animal": "vegan", "volume": "ml50"}),
    ("dry_scented", "face_cream", "Glowry", 8.0,
     {"fragrance": "scented", "skin_type": "dry", "spf": "none", "animal": "vegan", "volume": "ml50"}),
    ("oily", "face_cream", "Veloura", 12.0,
     {"fragrance": "free", "skin_type": "oily", "spf": "spf15", "animal": "conventional", "volume": "ml200"}),
    ("serum", "face_serum", "Veloura", 20.0, {"fragrance": "free", "skin_type": "dry", "animal": "vegan"}),
    ("serum_scented", "face_serum", "Glowry", 9.0,
     {"fragrance": "scented", "skin_type": "mature", "animal": "conventional"}),
    ("epoxy", "glue", "Fixwell", 9.0,
     {"glue_base": "epoxy", "solvent": "solvent_no", "pack": "single", "tool_grade": "diy"}),
    ("pva", "glue", "Fixwell", 4.0,
     {"glue_base": "pva", "solvent": "solvent_no", "pack": "single", "tool_grade": "diy"}),
    ("caulk", "sealant", "Ironwick", 6.0,
     {"glue_base": "silicone_g", "paint_place": "indoor", "color": "white", "solvent": "solvent_no"}),
]  # fmt: skip
IDS = [row[0] for row in ITEMS]

CASES = [
    ({"type": "face_cream"},
     {"dry50": "exact match 3", "oily": "exact match 3", "serum": "related match 2", "epoxy": "mismatch match 0"}),
    ({"type": "face_serum"}, {"serum": "exact match 3", "dry50": "related match 2"}),
    # one wanted attribute: it holds or the item fails
    ({"type": "face_cream", "required": {"skin_type": ["dry"]}},
     {"dry50": "exact match 3", "oily": "exact violated 1", "serum": "related match 2",
      "serum_scented": "related violated 0", "epoxy": "mismatch violated 0"}),
    # two wanted attributes: one miss is minor; a type that lacks the attribute misses it
    ({"type": "face_cream", "required": {"skin_type": ["dry"], "spf": ["spf50"]}},
     {"dry50": "exact match 3", "dry_scented": "exact partial 2", "oily": "exact violated 1",
      "serum": "related partial 1", "serum_scented": "related violated 0"}),
    # any of the listed values will do
    ({"type": "face_cream", "required": {"skin_type": ["dry", "oily"]}},
     {"dry50": "exact match 3", "oily": "exact match 3"}),
    # negation is hard
    ({"type": "face_cream", "excluded": {"fragrance": ["scented"]}},
     {"dry50": "exact match 3", "dry_scented": "exact violated 1", "serum": "related match 2",
      "serum_scented": "related violated 0"}),
    ({"type": "face_cream", "excluded": {"fragrance": ["scented"]}, "required": {"skin_type": ["dry"]}},
     {"dry_scented": "exact violated 1", "oily": "exact violated 1", "dry50": "exact match 3"}),
    # brand and price are hard
    ({"type": "face_cream", "brand": "Veloura"},
     {"dry50": "exact match 3", "dry_scented": "exact violated 1", "serum": "related match 2",
      "serum_scented": "related violated 0"}),
    ({"type": "face_cream", "excluded_brand": "Veloura", "max_price": 10.0},
     {"dry_scented": "exact match 3", "dry50": "exact violated 1", "serum_scented": "related match 2",
      "serum": "related violated 0"}),
    ({"type": "face_cream", "max_price": 12.0}, {"oily": "exact violated 1", "dry_scented": "exact match 3"}),
    # a fact resolves to values, for each type its own
    ({"type": "glue", "fact": "exhaust_joint"},
     {"epoxy": "exact match 3", "pva": "exact violated 1", "caulk": "related match 2", "serum": "mismatch violated 0"}),
    ({"type": "glue", "fact": "exhaust_joint", "required": {"pack": ["single"]}},
     {"pva": "exact partial 2", "caulk": "related partial 1"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def hand_truth():
    table = pa.table({
        "id": IDS, "type": [row[1] for row in ITEMS], "brand": [row[2] for row in ITEMS],
        "price": [row[3] for row in ITEMS], "attributes": [json.dumps(row[4]) for row in ITEMS],
    })  # fmt: skip
    return Truth.from_table(table)


@pytest.mark.parametrize(("intent", "expected"), CASES)
def test_verdicts_by_hand(hand_truth, intent, expected):
    got = verdicts(intent, hand_truth)
    said = {
        name: f"{CATEGORY_VERDICTS[c]} {ATTRIBUTE_VERDICTS[a]} {g}"
        for name, c, a, g in zip(IDS, got.category, got.attribute, got.grade, strict=True)
    }
    assert {name: said[name] for name in expected} == expected
    rows = np.array([4, 0])
    assert verdicts(intent, hand_truth, rows).grade.tolist() == got.grade[rows].tolist()


@pytest.mark.parametrize(
    ("intent", "word"),
    [
        ({"type": "spaceship"}, "spaceship"),
        ({}, "None"),
        ({"type": "glue", "colour": "red"}, "colour"),
        ({"type": "glue", "brand": "Nobody"}, "Nobody"),
        ({"type": "glue", "fact": "flies"}, "flies"),
        ({"type": "glue", "required": {"glue_base": ["jam"]}}, "jam"),
        ({"type": "glue", "excluded": {"taste": ["sweet"]}}, "taste"),
    ],
)
def test_an_intent_that_does_not_resolve(hand_truth, intent, word):
    with pytest.raises(ValueError, match=word):
        verdicts(intent, hand_truth)


def test_truth_survives_its_table(small):
    truth = Truth.from_table(small.truth)
    assert truth.to_table(small.truth.column("id").to_pylist()) == small.truth


# Grades of a whole shop, recomputed pair by pair from the table and the YAML -----------------------------------


def slow_grade(intent, item, types, facts):
    wanted = intent["type"]
    category = "exact" if item["type"] == wanted else "related" if item["type"] in types[wanted]["related"] else "no"
    has = item["attributes"]
    hard = (
        intent.get("brand", item["brand"]) == item["brand"]
        and intent.get("excluded_brand") != item["brand"]
        and item["price"] < intent.get("max_price", float("inf"))
        and not any(has.get(name) in values for name, values in intent.get("excluded", {}).items())
    )
    soft = [has.get(name) in values for name, values in intent.get("required", {}).items()]
    if "fact" in intent:
        soft.append(any(item["type"] in rule["types"] and has.get(rule["attribute"]) in rule["values"]
                        for rule in facts[intent["fact"]]["holds"]))  # fmt: skip
    if not hard or sum(soft) < len(soft) / 2:
        return {"exact": 1}.get(category, 0)
    return {"exact": 2, "related": 1}.get(category, 0) + (1 if all(soft) and category != "no" else 0)


def test_qrels_are_complete_and_equal_a_slow_recomputation():
    shop = generate_shop(400, seed=1, train_queries=100, validation_queries=10, test_queries=60)
    files = [yaml.safe_load(path.read_text()) for path in ONTOLOGY_FOLDER.glob("*.yaml")]
    types = {name: entry for file in files for name, entry in file.get("types", {}).items()}
    facts = {name: entry for file in files for name, entry in file.get("facts", {}).items()}
    items = [{**row, "attributes": json.loads(row["attributes"])} for row in shop.truth.to_pylist()]
    for query in shop.catalog.queries:
        slow = {item["id"]: slow_grade(query.intent, item, types, facts) for item in items}
        assert shop.catalog.qrels[query.id] == {name: grade for name, grade in slow.items() if grade > 0}, query


# Queries ----------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_and_have_their_slices(small):
    texts, intents, slices = set(), set(), defaultdict(set)
    for query in small.catalog.queries:
        intent = json.dumps(query.intent, sort_keys=True)
        assert query.text not in texts
        assert intent not in intents
        texts.add(query.text)
        intents.add(intent)
        slices[query.split].add(query.slice)
        assert query.text == query.text.lower()
        assert "{" not in query.text
    usual = {"head", "negation", "alternatives", "question", "knowledge"}
    assert slices == {"train": usual, "validation": usual, "test": usual | {"tail"}}


def pairs(query):
    wanted = [(a, v) for a, values in query.intent.get("required", {}).items() for v in values]
    return {(query.intent["type"], *sorted(pair)) for pair in combinations(sorted(wanted), 2)}


def test_tail_combinations_are_never_trained(large):
    queries = large.catalog.queries
    trained = set().union(*(pairs(q) for q in queries if q.split != "test"))
    tail = [pairs(q) for q in queries if q.slice == "tail"]
    assert len(tail) >= 30
    assert all(combination for combination in tail)
    assert not any(combination & trained for combination in tail)


def test_intents_fit_their_slices(large):
    for query in large.catalog.queries:
        assert ("excluded" in query.intent) == (query.slice == "negation")
        assert ("excluded_brand" in query.intent) == (query.slice == "alternatives")
        assert ("fact" in query.intent) == (query.slice == "knowledge")


def test_every_query_has_excellent_items_and_few_good_ones(large):
    excellent = [sum(g == 3 for g in grades.values()) for grades in large.catalog.qrels.values()]
    good = np.array([sum(g >= 2 for g in grades.values()) for grades in large.catalog.qrels.values()])
    assert len(excellent) == len(large.catalog.queries)
    assert min(excellent) >= 3
    assert good.max() <= 150
    assert np.mean(good >= 5) > 0.95


def test_frequency_follows_zipf(large):
    frequency = np.sort([query.frequency for query in large.catalog.queries])[::-1]
    slope = np.polyfit(np.log(np.arange(1, len(frequency) + 1)), np.log(frequency), 1)[0]
    assert slope == pytest.approx(-0.9, abs=0.01)
    by_slice = defaultdict(list)
    for query in large.catalog.queries:
        by_slice[query.slice].append(query.frequency)
    assert np.median(by_slice["head"]) > 2 * np.median(by_slice["question"]) > 2 * np.median(by_slice["tail"])


def test_neither_trivial_nor_hopeless_for_bm25(large):
    bm25s, stemmer = pytest.importorskip("bm25s"), pytest.importorskip("Stemmer").Stemmer("english")
    catalog, queries = large.catalog, large.catalog.queries.select(split="test")
    index = bm25s.BM25()
    texts = ItemTemplate().texts(catalog.items)
    index.index(bm25s.tokenize(texts, stemmer=stemmer, show_progress=False), show_progress=False)
    words = bm25s.tokenize(queries.texts, stemmer=stemmer, show_progress=False)
    top, _ = index.retrieve(words, k=10, show_progress=False)
    discount = 1 / np.log2(np.arange(2, 12))
    found = []
    for query, rows in zip(queries, top, strict=True):
        grades = catalog.qrels[query.id]
        gain = np.array([grades.get(catalog.items.ids[row], 0) for row in rows]) @ discount
        ideal = sorted(grades.values(), reverse=True)[:10]
        found.append(gain / (ideal @ discount[: len(ideal)]))
    assert 0.35 < np.mean(found) < 0.75


# Items ------------------------------------------------------------------------------------------------------


def test_truth_is_not_in_the_seller_columns(small):
    table = small.catalog.items.table
    assert table.column_names == ["id", "title", "description", "category", "brand", "attributes", "price", "rating",
                                  "reviews", "sales", "return_rate", "quality"]  # fmt: skip
    ontology = load_ontology()
    categories = set(table.column("category").to_pylist())
    assert "" in categories
    assert len(categories) < len(ontology.types) / 3
    wrong = [given != true and given != "" for given, true in
             zip(table.column("brand").to_pylist(), small.truth.column("brand").to_pylist(), strict=True)]  # fmt: skip
    assert not any(wrong)


def test_sellers_hide_and_contradict_some_attributes(large):
    ontology = load_ontology()
    texts = ItemTemplate(max_chars=2000).texts(large.catalog.items)
    shown = lied = total = 0
    for text, row in zip(texts[:3000], large.truth.to_pylist(), strict=False):
        column = {
            value.lower()
            for value in json.loads(large.catalog.items.table["attributes"][total].as_py() or "{}").values()
        }
        total += 1
        true = json.loads(row["attributes"])
        name = sorted(true)[0]
        values = {v.id: [form.lower() for form in v.forms] for v in ontology.attributes[name].values}
        shown += any(form in text.lower() for form in values[true[name]])
        lied += any(form in column for other, forms in values.items() if other != true[name] for form in forms)
    assert 0.7 < shown / total < 0.95
    assert 0.005 < lied / total < 0.10


def test_quality_formula_and_independence_of_relevance_and_length(large):
    items = large.catalog.items
    quality, rating = items.column("quality"), items.column("rating")
    sales, returns = items.column("sales"), items.column("return_rate")
    assert 0 <= quality.min() < 0.1
    assert 0.9 < quality.max() <= 1
    assert np.corrcoef(quality, rating)[0, 1] > 0.5
    assert np.corrcoef(rating, returns)[0, 1] < -0.1
    assert np.mean(sales) > 1.5 * np.median(sales)  # skew
    types = np.array(large.truth.column("type").to_pylist())
    mine = np.flatnonzero(types == types[0])

    def percentile(x):
        return np.array([(np.sum(x < v) + np.sum(x <= v) - 1) / 2 / (len(x) - 1) for v in x])

    expected = 0.5 * percentile(rating[mine]) + 0.3 * percentile(sales[mine]) + 0.2 * percentile(-returns[mine])
    np.testing.assert_allclose(quality[mine], expected, atol=6e-5)

    graded = [(grade, items.positions([item])[0]) for grades in list(large.catalog.qrels.values())[:300]
              for item, grade in grades.items()]  # fmt: skip
    grades, rows = np.array(graded).T
    assert abs(np.corrcoef(grades, quality[rows])[0, 1]) < 0.03
    lengths = [len(text) for text in ItemTemplate().texts(items)]
    assert abs(np.corrcoef(lengths, quality)[0, 1]) < 0.03


def test_a_part_of_quality_is_the_brands(large):
    quality = large.catalog.items.column("quality")
    brands = np.array(large.truth.column("brand").to_pylist())
    means = {brand: quality[brands == brand].mean() for brand in set(brands)}
    explained = np.var([means[brand] for brand in brands]) / np.var(quality)
    shuffled = np.random.default_rng(0).permutation(quality)
    chance = np.var([shuffled[brands == brand].mean() for brand in brands]) / np.var(quality)
    assert chance + 0.05 < explained < 0.35


# Clicks -----------------------------------------------------------------------------------------------------


def test_clicks_follow_position_popularity_and_grade(large):
    catalog = large.catalog
    sales = dict(zip(catalog.items.ids, catalog.items.column("sales"), strict=True))
    rows = catalog.clicks.to_pylist()
    assert {row["query_id"].split("-")[0] for row in rows} == {"train"}
    assert all(1 <= row["position"] <= 20 and row["clicks"] >= 1 for row in rows)
    grade = np.array([catalog.qrels[row["query_id"]].get(row["item_id"], 0) for row in rows])
    clicks, position = (np.array([row[name] for row in rows]) for name in ("clicks", "position"))
    good_share = clicks[grade >= 2].sum() / clicks.sum()
    assert 0.75 < good_share < 0.95
    excellent = grade == 3
    assert clicks[excellent & (position <= 2)].mean() > 1.5 * clicks[excellent & (position >= 10)].mean()
    clicked = np.mean([np.log1p(sales[row["item_id"]]) for row in rows])
    graded = np.mean([np.log1p(sales[i]) for grades in catalog.qrels.values() for i, g in grades.items() if g == 3])
    assert clicked > graded + 0.2
    per_query = np.unique([row["query_id"] for row in rows], return_counts=True)[1]
    assert 4 <= np.median(per_query) <= 15


# Ontology ---------------------------------------------------------------------------------------------------


def test_ontology_is_rich():
    ontology = load_ontology()
    assert len(ontology.types) >= 150
    assert len(ontology.brands) >= 10
    assert len(ontology.facts) >= 50
    assert all(len(kind.names) >= 2 and kind.related and len(kind.attributes) >= 3 for kind in ontology.types.values())
    assert all(len(value.forms) >= 2 for a in ontology.attributes.values() for value in a.values)
    used = {name for kind in ontology.types.values() for name in kind.attributes}
    assert used == set(ontology.attributes)
    every = {CATEGORY_VERDICTS[i]: row.tolist() for i, row in enumerate(ontology.grade_table)}
    assert every == {"mismatch": [0, 0, 0], "related": [0, 1, 2], "exact": [1, 2, 3]}


def broken(tmp_path, **changes):
    parts = {
        "attributes": {"size": {"labels": ["size"], "values": {"s": ["small", "tiny"], "l": ["large", "big"]}}},
        "types": {
            "cup": {
                "family": "F",
                "names": ["cup"],
                "related": ["mug"],
                "price": [1, 2],
                "attributes": {"size": "all"},
            },
            "mug": {
                "family": "F",
                "names": ["mug"],
                "related": ["cup"],
                "price": [1, 2],
                "attributes": {"size": ["s"]},
            },
        },
        "facts": {"fits": {"says": ["fits"], "holds": [{"types": ["cup"], "attribute": "size", "values": ["s"]}]}},
        "brands": {"Acmo": "mid"},
    }
    for path, value in changes.items():
        *keys, last = path.split("__")
        target = parts
        for key in keys:
            target = target[key]
        target[last] = value
    (tmp_path / "common.yaml").write_text(yaml.safe_dump({"attributes": parts.pop("attributes")}, sort_keys=False))
    (tmp_path / "d.yaml").write_text(yaml.safe_dump({"department": "D", **parts}, sort_keys=False))
    for name in ("rules", "text"):
        (tmp_path / f"{name}.yaml").write_text((ONTOLOGY_FOLDER / f"{name}.yaml").read_text())
    return tmp_path


def test_a_small_ontology_loads(tmp_path):
    ontology = load_ontology(broken(tmp_path))
    assert ontology.types["mug"].attributes == {"size": (0,)}
    assert ontology.facts["fits"].holds == {"cup": ("size", (0,))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"types__cup__related": ["jug"]}, "related type 'jug'"),
        ({"types__cup__attributes": {"hue": "all"}}, "attribute 'hue'"),
        ({"types__cup__attributes": {}}, "has no attributes"),
        ({"types__mug__attributes": {"size": ["xl"]}}, "'xl'"),
        ({"types__mug__names": ["Cup"]}, "stands for the types"),
        ({"attributes__size__values": {"s": ["small"], "l": ["Small"]}}, "stands for two values"),
        ({"facts__fits__holds": [{"types": ["pot"], "attribute": "size", "values": ["s"]}]}, "'pot'"),
        ({"facts__fits__holds": [{"types": ["cup"], "attribute": "size", "values": ["m"]}]}, "'m'"),
        ({"brands__Acmo": "royal"}, "royal"),
    ],
)
def test_a_reference_that_does_not_resolve_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_ontology(broken(tmp_path, **changes))


def test_a_folder_without_an_ontology(tmp_path):
    with pytest.raises(ValueError, match=r"rules\.yaml"):
        load_ontology(tmp_path)


def test_the_data_folder_is_no_package():
    assert not (ONTOLOGY_FOLDER / "__init__.py").exists()
    assert Path(sys.modules["taoemb.shop"].__file__).name == "shop.py"


# Arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{"items": 0}, {"seed": -1}, {"train_queries": -1}, {"test_queries": -5}])
def test_impossible_arguments(arguments):
    with pytest.raises(ValueError, match="at least 1 item"):
        generate_shop(**arguments)


def test_too_many_queries_for_the_items():
    with pytest.raises(ValueError, match="fewer test_queries or more items"):
        generate_shop(1, test_queries=500)


def test_one_item_without_queries():
    shop = generate_shop(1, train_queries=0, validation_queries=0, test_queries=0)
    assert len(shop.catalog.items) == 1
    assert len(shop.catalog.queries) == 0
