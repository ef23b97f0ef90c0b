"""Cheap judges against verdicts worked out by hand, planted rules, and counted noise."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from taoemb.catalog import Catalog, Item, Items, Query
from taoemb.judge import (
    BiEncoderJudge,
    EnsembleJudge,
    Interventions,
    Lexicon,
    MeanJudge,
    OracleJudge,
    PairFeatures,
    SoftLogicJudge,
)
from taoemb.judge import soft_logic as rules
from taoemb.judge.lexicon import items_fingerprint
from taoemb.judge.verdicts import ordered_probs, output
from taoemb.judge.words import title_runs
from taoemb.types import JudgeOutput, RelevanceJudge

SHOP = [  # id, title, brand, category, attributes, description
    ("mug-red", "Acme red mug", "Acme", "Kitchen > Mugs", {"colour": "red", "material": "clay"}, ""),
    ("mug-blue", "Borg mug blue", "Borg", "Kitchen > Mugs", {"colour": "blue", "material": "clay"}, ""),
    ("mug-plain", "Borg mug", "Borg", "Kitchen > Mugs", {}, "A mug in red or blue."),
    ("mug-none", "mug", "", "", {}, ""),
    ("lamp-red", "Acme red desk lamp", "Acme", "Lighting > Desk lamps", {"colour": "red", "dimmable": "true"}, ""),
    ("lamp-blue", "Borg desk lamp", "Borg", "Lighting > Desk lamps", {"colour": "blue", "dimmable": "false"}, ""),
    ("lamp-dim", "Borg desk lamp blue", "Borg", "Lighting > Desk lamps", {"colour": "blue", "dimmable": "true"}, ""),
    ("tree", "Acme mug tree", "Acme", "Kitchen > Mug trees", {"material": "wood"}, "Holds six mugs."),
    ("cream", "Nora cream without fragrance", "Nora", "Care > Creams", {"scent": "none"}, "Fragrance free."),
    ("cream-rose", "Nora rose cream", "Nora", "Care > Creams", {"scent": "rose"}, ""),
    ("cream-lily", "Vita cream", "Vita", "Care > Creams", {"scent": "rose, lily"}, ""),
    ("soap-lily", "Vita soap", "Vita", "Care > Soaps", {"scent": "lily"}, ""),
]


def catalog_of(rows):
    columns = ("id", "title", "brand", "category", "attributes", "description")
    table = {name: [row[i] for row in rows] for i, name in enumerate(columns)}
    table["attributes"] = [json.dumps(value) for value in table["attributes"]]
    return Catalog.from_tables(pa.table(table))


@pytest.fixture(scope="module")
def items() -> Items:
    return catalog_of(SHOP).items


@pytest.fixture(scope="module")
def judge(items) -> SoftLogicJudge:
    return SoftLogicJudge(items)


def item(items: Items, item_id: str) -> Item:
    return items[int(items.positions([item_id])[0])]


def relevance(judge: SoftLogicJudge, items: Items, text: str, item_id: str, **query) -> float:
    return float(judge.relevance([(Query("q", text, **query), item(items, item_id))])[0])


class ToyEncoder:
    """Embeds a text as counts of the letters a, b, c; counts its calls."""

    dimension = 3
    fingerprint = "letters"

    def __init__(self):
        self.encoded = []

    def encode_query(self, texts):
        self.encoded += texts
        return np.array([[t.count(letter) for letter in "abc"] for t in texts], dtype=np.float32)

    encode_document = encode_query


# ------------------------------------------------------------------------------------------------ verdict arithmetic


def test_ordered_probs_follow_the_ordered_logistic_model():
    probs = ordered_probs([0.4], cuts=(0.2, 0.4, 0.9), softness=0.1)[0]
    reached = [1 / (1 + np.exp(-(0.4 - cut) / 0.1)) for cut in (0.2, 0.4, 0.9)]
    expected = [1 - reached[0], reached[0] - reached[1], reached[1] - reached[2], reached[2]]
    np.testing.assert_allclose(probs, expected, atol=1e-6)


def test_output_is_the_expected_value_and_nan_abstains():
    verdict = output([[0.1, 0.2, 0.3, 0.4], [np.nan] * 4])
    assert verdict.score[0] == pytest.approx((0.2 * 1 + 0.3 * 2 + 0.4 * 3) / 3)
    assert np.isnan(verdict.score[1])
    assert verdict.grade.tolist() == [3, -1]


# ------------------------------------------------------------------------------------------------ oracle


def test_oracle_gives_labels_and_abstains_on_the_unjudged(items):
    pairs = [(Query("q", "mug"), item(items, name)) for name in ("mug-red", "lamp-red", "tree")]
    qrels = {"q": {"mug-red": 3, "tree": 1}}
    verdict = OracleJudge(qrels).score(pairs)
    np.testing.assert_array_equal(verdict.grade, [3, -1, 1])
    np.testing.assert_allclose(verdict.score, [1.0, np.nan, 1 / 3], rtol=1e-6)
    assert OracleJudge(qrels, unjudged=0).score(pairs).grade.tolist() == [3, 0, 1]


def test_oracle_noise_has_the_asked_rate_and_goes_evenly_to_the_other_grades():
    pairs = [(Query(f"q{i % 50}", "x"), Item(f"i{i}", "x")) for i in range(20_000)]
    qrels = {f"q{q}": {f"i{i}": 2 for i in range(q, 20_000, 50)} for q in range(50)}
    grades = OracleJudge(qrels, flip_noise=0.3, seed=1).score(pairs).grade
    counts = np.bincount(grades, minlength=4) / len(grades)
    np.testing.assert_allclose(counts, [0.1, 0.1, 0.7, 0.1], atol=0.012)  # 4 standard errors at most
    again = OracleJudge(qrels, flip_noise=0.3, seed=1).score(pairs[::-1]).grade[::-1]
    np.testing.assert_array_equal(again, grades)  # a pair's noise does not depend on its neighbours
    other = OracleJudge(qrels, flip_noise=0.3, seed=2).score(pairs).grade
    assert (other != grades).mean() > 0.2
    assert (OracleJudge(qrels, flip_noise=1.0).score(pairs).grade != 2).all()


@pytest.mark.parametrize("bad", [{"unjudged": 4}, {"flip_noise": 1.5}, {"qrels": {"q": {"i": 7}}}])
def test_oracle_refuses_what_makes_no_sense(bad):
    with pytest.raises(ValueError, match="use a"):
        OracleJudge(**{"qrels": {}, **bad})


# ------------------------------------------------------------------------------------------------ soft logic


def test_facets_are_recognised_by_the_catalogs_own_words(judge):
    found = {f.label: f.weight for f in judge.facets(Query("q", "Acme red mugs"))}
    assert found == {"brand:acme": 1.0, "attribute:red": 0.7, "type:mug": 1.0}


def test_all_facets_hold(judge, items):
    assert relevance(judge, items, "acme red mug", "mug-red") == pytest.approx(1.0)


def test_brand_mismatch_by_hand(judge, items):
    expected = rules.MISS**1.0 * rules.IN_TEXT**0.7 * 1.0  # another brand, "red" in the description only, a mug
    assert relevance(judge, items, "acme red mug", "mug-plain") == pytest.approx(expected, rel=1e-5)


def test_missing_fields_are_unknown_not_wrong(judge, items):
    expected = rules.UNKNOWN**1.0 * rules.UNKNOWN**0.7 * rules.FIELD
    assert relevance(judge, items, "acme red mug", "mug-none") == pytest.approx(expected, rel=1e-5)
    other_value = relevance(judge, items, "red mug", "mug-blue")
    assert other_value == pytest.approx(rules.MISS**0.7, rel=1e-5)
    assert other_value < relevance(judge, items, "red mug", "mug-none") < relevance(judge, items, "red mug", "mug-red")


def test_a_mention_in_the_title_is_not_what_the_item_is(judge, items):
    assert relevance(judge, items, "mug", "tree") == pytest.approx(rules.NOT_HEAD)
    assert relevance(judge, items, "mug", "lamp-red") == pytest.approx(rules.MISS)


def test_other_kinds_of_the_same_head(judge, items):
    assert relevance(judge, items, "desk lamp", "lamp-red") == pytest.approx(1.0)
    assert judge.explain(Query("q", "desk lamp"), Item("x", "floor lamp", category="Floor lamps")) == {
        "type:desk lamp": (rules.OTHER_KIND, "is called 'floor lamp'")
    }


@pytest.mark.parametrize("text", ["cream without rose", "cream no rose", "rose free cream", "rose-free cream"])
def test_negation_inverts_the_attribute(judge, items, text):
    assert [f.label for f in judge.facets(Query("q", text)) if f.negated] == ["attribute:not rose"]
    ruled_out = relevance(judge, items, text, "cream-rose")
    assert ruled_out == pytest.approx(rules.MISS**0.7, rel=1e-5)  # 1 - FIELD, at least MISS
    assert relevance(judge, items, text, "cream-lily") == pytest.approx(rules.MISS**0.7, rel=1e-5)  # one of its scents
    free, silent = (judge.explain(Query("q", text), item(items, name)) for name in ("cream", "tree"))
    assert free["attribute:not rose"] == (1.0, "the item rules it out")  # scent: none
    assert silent["attribute:not rose"] == (pytest.approx(1 - rules.UNKNOWN), "the item does not say")


def test_what_the_item_rules_out(judge, items):
    asked = judge.explain(Query("q", "cream without fragrance"), item(items, "cream"))
    assert asked["term:not fragrance"] == (1.0, "the item rules it out")
    scented = Item("x", "Nora fragrance cream", category="Care > Creams")
    assert judge.explain(Query("q", "cream without fragrance"), scented)["term:not fragrance"][0] == pytest.approx(
        1 - rules.IN_TITLE
    )
    assert judge.explain(Query("q", "cream no scent"), item(items, "cream"))["term:not scent"][0] == 1.0


def test_hands_free_is_no_negation():
    rows = [(f"{i}", f"hands free headset {i}", "", "", {}, "") for i in range(4)]
    judge = SoftLogicJudge(catalog_of(rows).items)
    assert not any(f.negated for f in judge.facets(Query("q", "hands free headset")))


def test_switches_count_by_name(judge, items):
    facet = judge.facets(Query("q", "dimmable desk lamp"))[0]
    assert facet.label == "attribute:dimmable"
    assert relevance(judge, items, "dimmable desk lamp", "lamp-red") == pytest.approx(1.0)
    assert relevance(judge, items, "dimmable desk lamp", "lamp-blue") == pytest.approx(rules.MISS**0.7, rel=1e-5)


def test_words_after_a_connector_are_not_the_type(judge, items):
    labels = [f.label for f in judge.facets(Query("q", "mug tree for mugs"))]
    assert labels[0] == "type:mug tree"
    assert "type:mug" not in labels


def test_intent_replaces_the_text_when_it_is_in_known_keys(judge, items):
    intent = {"type": "mug", "brand": "Acme", "attributes": {"colour": "red"}, "source": "mug-red"}
    labels = {f.label for f in judge.facets(Query("q", "smth else", intent=intent))}
    assert labels == {"type:mug", "brand:acme", "attribute:red"}
    foreign = Query("q", "blue lamp", intent={"type": "t_17", "required": {"colour": ["c_3"]}})
    assert "attribute:blue" in {f.label for f in judge.facets(foreign)}


def test_a_query_without_words_abstains(judge, items):
    verdict = judge.score([(Query("q", "?!"), items[0]), (Query("q2", "mug"), items[0])])
    assert np.isnan(verdict.score[0])
    assert verdict.grade.tolist() == [-1, 3]


def test_a_changed_item_or_query_is_not_served_from_the_cache(judge, items):
    assert relevance(judge, items, "red mug", "mug-red") == pytest.approx(1.0)
    swapped = Item("mug-red", "Acme desk lamp", category="Lighting > Desk lamps")
    assert float(judge.relevance([(Query("q", "red mug"), swapped)])[0]) < 0.1
    with_intent = Query("q", "red mug", intent={"type": "desk lamp"})
    assert float(judge.relevance([(with_intent, item(items, "mug-red"))])[0]) == pytest.approx(rules.MISS)


def test_types_without_a_category_come_from_title_heads():
    brands = ("Acme", "Borg", "Nora", "Vita")
    rows = [(f"l{i}", f"{brands[i % 4]} Z{i}00 laser printer 40 ppm", brands[i % 4], "", {}, "") for i in range(8)]
    rows += [(f"b{i}", f"{brands[i % 4]} bag for laser printer", brands[i % 4], "", {}, "") for i in range(8)]
    rows += [(f"a{i}", f"Acme Quattro {i}0 page scanner", "Acme", "", {}, "") for i in range(8)]
    items = catalog_of(rows).items
    lexicon = Lexicon(items)
    assert {"laser printer", "printer", "bag"} <= set(lexicon.types)
    assert not {"ppm", "laser", "quattro"} & set(lexicon.types)  # a unit, no head, one brand's line
    judge = SoftLogicJudge(items, lexicon)
    query = Query("q", "laser printers")
    printer, bag = (float(judge.relevance([(query, item(items, name))])[0]) for name in ("l0", "b0"))
    assert (printer, bag) == (pytest.approx(1.0), pytest.approx(rules.NOT_HEAD))


def test_title_runs_break_at_numbers_brands_signs_and_connectors():
    runs = title_runs(Item("1", "Acme X200 laser printer, duplex unit for Acme scanners", brand="Acme"), {"duplex"})
    assert runs == [["laser", "printer"], ["unit"]]


# ------------------------------------------------------------------------------------------------ interventions


def told(items, relations=(), weights=()):
    return SoftLogicJudge(items, interventions=Interventions(dict(relations), dict(weights)))


def test_a_relation_goes_before_the_rules(judge, items):
    mine = told(items, {"type:mug": {"lamp": 0.8, "mug tree": 0.1}, "attribute:red": {"blue": 0.5}})
    assert mine.explain(Query("q", "red mugs"), item(items, "lamp-blue")) == {
        "attribute:red": (0.5, "user: 'blue' counts 0.5"),
        "type:mug": (0.8, "user: 'lamp' counts 0.8"),
    }
    assert relevance(mine, items, "red mug", "lamp-blue") == pytest.approx(0.5**0.7 * 0.8, rel=1e-5)
    assert relevance(mine, items, "mug", "tree") == pytest.approx(0.1)  # lowered: the rules give NOT_HEAD
    for text, name in (("red mug", "mug-red"), ("mug", "mug-none"), ("acme cream", "lamp-blue")):  # nothing is told
        assert relevance(mine, items, text, name) == relevance(judge, items, text, name)


def test_the_best_entity_counts_and_words_are_folded(items):
    relations = {"type:Mugs": {"Desk  Lamps": 0.2, "dimmable": 0.6, "red": 0.4}}
    mine = told(items, relations)
    values = {name: relevance(mine, items, "mug", name) for name in ("lamp-red", "lamp-blue", "lamp-dim", "soap-lily")}
    # blue: the item says that it is not dimmable
    assert values == pytest.approx({"lamp-red": 0.6, "lamp-blue": 0.2, "lamp-dim": 0.6, "soap-lily": rules.MISS})


def test_an_entity_that_is_only_mentioned_is_no_type_and_no_brand(items):
    mine = told(items, {"type:cup": {"mug": 0.9}, "brand:zeta": {"acme": 0.7}, "attribute:sturdy": {"holds six": 1}})
    assert relevance(mine, items, "cup", "mug-red") == pytest.approx(0.9)
    assert relevance(mine, items, "cup", "tree") == pytest.approx(rules.MISS)  # called "mug tree"; its text says mugs
    case = Item("x", "Borg case for Acme mug", brand="Borg")
    assert mine.explain(Query("q", "zeta"), case)["brand:zeta"][0] == rules.MISS
    nameless = Item("y", "case of Acme")
    assert mine.explain(Query("q", "zeta"), nameless)["brand:zeta"] == (0.7, "user: 'acme' counts 0.7")
    assert mine.explain(Query("q", "sturdy"), item(items, "tree"))["attribute:sturdy"][0] == 1.0  # any phrase
    assert [f.label for f in mine.facets(Query("q", "zeta cups"))] == ["brand:zeta", "type:cup"]  # synonyms are known


def test_a_negated_facet_counts_one_minus_what_is_told(items):
    mine = told(items, {"attribute:rose": {"lily": 0.7, "soap": 1}})
    query = Query("q", "cream without rose")
    assert mine.explain(query, item(items, "cream-lily"))["attribute:not rose"] == (
        pytest.approx(0.3),
        "user: 'lily' counts 0.7",
    )
    ruled_out = mine.score([(query, item(items, "soap-lily"))])
    assert mine.relevance([(query, item(items, "soap-lily"))])[0] == 0.0  # a user's word may be final, a rule's is not
    assert ruled_out.grade.tolist() == [0]


def test_a_user_may_rule_out_and_say_yes(items):
    mine = told(items, {"type:mug": {"borg": 0, "acme": 1}})
    assert [relevance(mine, items, "mug", name) for name in ("mug-blue", "lamp-red")] == [0.0, 1.0]


def test_weights_of_facets_and_kinds(judge, items):
    text, name = "acme red mug", "mug-plain"  # another brand, "red" in the description
    mine = told(items, weights={"brand": 0.5, "attribute:red": 2, "attribute": 0.1})
    assert relevance(mine, items, text, name) == pytest.approx(rules.MISS**0.5 * rules.IN_TEXT**2, rel=1e-5)
    silent = told(items, weights={"brand": 0})
    assert "brand:acme" not in silent.explain(Query("q", text), item(items, name))
    assert relevance(silent, items, text, name) == pytest.approx(rules.IN_TEXT**0.7, rel=1e-5)
    assert np.isnan(relevance(silent, items, "acme", name))  # nothing is left of the query
    plain = {f.label: f.weight for f in judge.facets(Query("q", "six nice mugs"))}
    terms = told(items, weights={"term": 1.4, "term:nice": 0.25}).facets(Query("q", "six nice mugs"))
    assert {f.label: f.weight for f in terms} == {
        "term:six": pytest.approx(2 * plain["term:six"]),
        "term:nice": 0.25,
        "type:mug": 1.0,
    }


def test_interventions_are_part_of_the_fingerprint(judge, items):
    assert told(items).fingerprint == judge.fingerprint
    one, other = (
        {"type:mug": {"lamp": 0.8}, "type:lamp": {"mug": 1}},
        {"type:lamp": {"mug": 1.0}, "type:mugs": {"lamp": 0.8}},
    )
    assert told(items, one).fingerprint == told(items, other).fingerprint
    several = [
        {}, {"relations": one}, {"relations": {"type:mug": {"lamp": 0.7}}}, {"weights": {"brand": 1}},
        {"weights": {"brand": 0.9}}, {"relations": one, "weights": {"brand": 1}},
    ]  # fmt: skip
    assert len({told(items, **option).fingerprint for option in several}) == len(several)


@pytest.mark.parametrize(
    ("relations", "weights", "message"),
    [
        ({"type:mug": {"lamp": 1.1}}, {}, r"relations\.type:mug\.lamp is 1\.1; give a number from 0 to 1"),
        ({"type:mug": {"lamp": -0.1}}, {}, "from 0 to 1"),
        ({"type:mug": {"lamp": float("nan")}}, {}, "from 0 to 1"),
        ({"type:mug": {"lamp": True}}, {}, "from 0 to 1"),
        ({"type:mug": {"lamp": "0.5"}}, {}, "is '0.5'"),
        ({"type:mug": {"?!": 0.5}}, {}, "'\\?!' holds no word"),
        ({"type:mug": {"lamp": 0.5, "Lamps": 0.6}}, {}, "'Lamps' is given twice"),
        ({"type:mug": {}, "type:mugs": {}}, {}, "'type:mugs' is given twice"),
        ({"mug": {"lamp": 0.5}}, {}, "'mug' is no facet; give KIND:TEXT"),
        ({"kind:mug": {"lamp": 0.5}}, {}, "type, brand, attribute, term"),
        ({"type:": {"lamp": 0.5}}, {}, "has 0 words"),
        ({"type:a b c d e": {"lamp": 0.5}}, {}, "1 to 4"),
        ({"term:two words": {"lamp": 0.5}}, {}, "1 to 1"),
        ({"attribute:not red": {"lamp": 0.5}}, {}, "without 'not'"),
        ({}, {"brand": -1}, r"weights\.brand is -1; give a number of 0 or more"),
        ({}, {"brand": float("inf")}, "0 or more"),
        ({}, {"colour": 1}, "'colour' is no facet"),
    ],
)
def test_interventions_that_make_no_sense(relations, weights, message):
    with pytest.raises(ValueError, match=message):
        Interventions(relations, weights)


def test_interventions_come_from_a_file(items, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("relations:\n  type:Cups:\n    mug: 1\n    lamp: 0.25\nweights:\n  brand: 0.5\n")
    found = Interventions.load(file)
    assert found == Interventions({"type:cup": {"mug": 1.0, "lamp": 0.25}}, {"brand": 0.5})
    assert relevance(SoftLogicJudge(items, interventions=found), items, "cups", "lamp-red") == pytest.approx(0.25)
    file.write_text("")
    assert not Interventions.load(file)
    for text, message in (
        ("relation:\n  type:cup: {mug: 1}", "relation: unknown key; did you mean relations"),
        ("relations:\n  type:cup: 1", "relations.type:cup: got 1"),
        ("relations:\n  type:cup: {mug: much}", "relations.type:cup.mug: got 'much'"),
        ("relations:\n  type:cup: {mug: 2}", "relations.type:cup.mug is 2.0"),
        ("weights: {brand: 1, brand: 2}", "'brand' is given twice"),
        ("- a", "at its top level"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            Interventions.load(file)
    with pytest.raises(FileNotFoundError):
        Interventions.load(tmp_path / "nowhere.yaml")


# ------------------------------------------------------------------------------------------------ bi-encoder


def test_bi_encoder_is_the_mapped_cosine_and_encodes_a_query_once(items):
    model = ToyEncoder()
    vectors = np.zeros((len(items), 3), dtype=np.float32)
    vectors[0], vectors[1], vectors[2] = (1, 0, 0), (0, 2, 0), (3, 3, 0)  # rows need not be unit
    judge = BiEncoderJudge(model, items, vectors, low=0.2, high=0.8)
    pairs = [(Query("q", "a"), items[i]) for i in (0, 1, 2)]
    np.testing.assert_allclose(judge.cosines(pairs), [1.0, 0.0, np.sqrt(0.5)], rtol=1e-6)
    np.testing.assert_allclose(judge.relevance(pairs), [1.0, 0.0, (np.sqrt(0.5) - 0.2) / 0.6], rtol=1e-5)
    assert judge.score(pairs).grade.tolist() == [3, 0, 3]
    judge.score([*pairs, (Query("other", "b"), items[1])])
    assert model.encoded == ["a", "b"]


def test_bi_encoder_errors(items):
    vectors = np.ones((len(items), 3), dtype=np.float32)
    with pytest.raises(ValueError, match="shape"):
        BiEncoderJudge(ToyEncoder(), items, vectors[:-1])
    with pytest.raises(ValueError, match="below"):
        BiEncoderJudge(ToyEncoder(), items, vectors, low=0.5, high=0.5)
    with pytest.raises(KeyError, match="'nowhere' is not in the catalog"):
        BiEncoderJudge(ToyEncoder(), items, vectors).score([(Query("q", "a"), Item("nowhere", "a"))])


# ------------------------------------------------------------------------------------------------ features, ensemble


def test_features_by_hand(items):
    features = PairFeatures(items)
    row = dict(zip(features.names, features.matrix([(Query("q", "acme mug"), item(items, "tree"))])[0], strict=True))
    assert row["title_overlap"] == row["text_overlap"] == row["brand"] == 1.0
    assert row["phrase"] == 1.0  # "acme mug" stands in "Acme mug tree"
    assert row["title_start"] == 1.0
    assert row["head"] == row["code"] == 0.0
    assert row["query_words"] == pytest.approx(np.log(3))
    assert row["title_words"] == pytest.approx(np.log(4))
    lexicon, facts = features.soft_logic.lexicon, features.soft_logic.facts(item(items, "tree"))
    norm = 1.2 * (0.25 + 0.75 * facts.length / lexicon.mean_length)
    counts = {"acme": 2, "mug": 3}  # title and brand; title, category and description
    expected = sum(lexicon.idf(w) * n / (n + norm) for w, n in counts.items()) / sum(map(lexicon.idf, counts))
    assert row["bm25"] == pytest.approx(expected)


def test_model_codes_meet_whatever_their_signs():
    rows = [
        ("t", "Brother TN-2110 toner", "Brother", "", {}, ""),
        ("u", "Brother TN-3170 toner", "Brother", "", {}, ""),
    ]
    items = catalog_of(rows).items
    features = PairFeatures(items)
    code = features.matrix([(Query("q", text), i) for text in ("tn2110", "toner") for i in items])
    assert code[:, features.names.index("code")].tolist() == [1.0, -1.0, 0.0, 0.0]


def planted(count: int, seed: int):
    """Titles of one, two or three of the words of the query's three; the grade is drawn around that number."""
    rng = np.random.default_rng(seed)
    rows, pairs, grades, truth = [], [], [], []
    for q in range(count):
        asked = [f"w{q}x", f"w{q}y", f"w{q}z"]
        for i in range(12):
            held = int(rng.integers(0, 4))
            rows.append((f"{q}-{i}", " ".join(["thing", *asked[:held]]), "", "", {}, ""))
            probs = np.full(4, 0.1)
            probs[held] = 0.7
            truth.append(probs)
            grades.append(int(rng.choice(4, p=probs)))
            pairs.append((q, f"{q}-{i}"))
    items = catalog_of(rows).items
    asked = [Query(f"q{q}", f"w{q}x w{q}y w{q}z") for q in range(count)]
    return items, [(asked[q], item(items, i)) for q, i in pairs], grades, np.array(truth)


@pytest.fixture(scope="module")
def graded():
    return planted(120, 0)


def test_ensemble_learns_a_planted_rule_and_is_calibrated(graded):
    items, pairs, grades, truth = graded
    judge = EnsembleJudge(PairFeatures(items), regularization=1.0)
    result = judge.cross_validate(pairs, grades)
    assert result.auc > 0.8  # 20 % of the grades are noise on the wrong side
    assert result.calibration_error < 0.06
    best = -np.mean(np.log(truth[np.arange(len(grades)), grades]))
    prior = np.bincount(grades, minlength=4) / len(grades)
    assert best < result.log_loss < best + 0.1 < -np.mean(np.log(prior[grades]))
    probs = judge.fit(pairs, grades).score(pairs).probs
    assert np.abs(probs - truth).mean() < 0.05
    np.testing.assert_allclose(probs.sum(axis=1), 1.0, atol=1e-5)


def test_cross_validation_keeps_a_query_in_one_fold_and_learns_nothing_from_noise(graded):
    items, pairs, _, _ = graded
    judge = EnsembleJudge(PairFeatures(items))
    # grades that depend on the query alone, in no relation to any feature
    rng = np.random.default_rng(3)
    of_query = {query.id: int(rng.integers(0, 4)) for query, _ in pairs}
    result = judge.cross_validate(pairs, [of_query[query.id] for query, _ in pairs], folds=6)
    for query_id in of_query:
        assert len({int(f) for f, (query, _) in zip(result.folds, pairs, strict=True) if query.id == query_id}) == 1
    assert np.bincount(result.folds).tolist() == [240] * 6
    assert result.balanced_accuracy < 0.35  # chance is .25; a leak would know the query's grade
    assert np.isnan(result.auc)  # no query has two grades
    with pytest.raises(RuntimeError, match="not fitted"):
        judge.score(pairs[:1])


def test_held_out_scores_do_not_see_their_own_grades(graded):
    items, pairs, grades, _ = graded
    judge = EnsembleJudge(PairFeatures(items))
    result = judge.cross_validate(pairs, grades)
    held = result.folds == 0
    lied = [3 - g if h else g for g, h in zip(grades, held.tolist(), strict=True)]
    np.testing.assert_array_equal(judge.cross_validate(pairs, lied).scores[held], result.scores[held])


def test_ensemble_saves_and_loads_without_pickle(graded, tmp_path):
    items, pairs, grades, _ = graded
    features = PairFeatures(items)
    judge = EnsembleJudge(features).fit(pairs, grades)
    judge.save(tmp_path / "judge.json")
    loaded = EnsembleJudge.load(tmp_path / "judge.json", PairFeatures(items))
    np.testing.assert_array_equal(loaded.score(pairs).probs, judge.score(pairs).probs)
    assert loaded.fingerprint == judge.fingerprint
    assert set(judge.coefficients) == set(features.names)
    encoder = BiEncoderJudge(ToyEncoder(), items, np.ones((len(items), 3), dtype=np.float32))
    with pytest.raises(ValueError, match="was fitted on the features"):
        EnsembleJudge.load(tmp_path / "judge.json", PairFeatures(items, [encoder]))


def test_ensemble_on_two_grades_gives_the_probability_of_scikit_learn(graded):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    items, pairs, grades, _ = graded
    binary = [3 if g >= 2 else 0 for g in grades]
    features = PairFeatures(items)
    scaled = StandardScaler().fit_transform(features.matrix(pairs))
    expected = LogisticRegression(C=0.1, max_iter=1_000).fit(scaled, binary).predict_proba(scaled)
    probs = EnsembleJudge(features).fit(pairs, binary).score(pairs).probs
    np.testing.assert_allclose(probs[:, [0, 3]], expected, atol=1e-5)
    assert not probs[:, 1:3].any()


def test_ensemble_refuses_grades_it_cannot_learn_from(graded):
    items, pairs, grades, _ = graded
    judge = EnsembleJudge(PairFeatures(items))
    with pytest.raises(RuntimeError, match="not fitted"):
        judge.score(pairs)
    with pytest.raises(ValueError, match="too few"):
        judge.fit(pairs[:20], grades[:20])
    with pytest.raises(ValueError, match="two different ones"):
        judge.fit(pairs, [2] * len(pairs))
    with pytest.raises(ValueError, match="use 0 to 3"):
        judge.fit(pairs, [5, *grades[1:]])
    with pytest.raises(ValueError, match="1440 pairs but 3 grades"):
        judge.fit(pairs, grades[:3])
    with pytest.raises(ValueError, match="use 2 to 120 folds"):
        judge.cross_validate(pairs, grades, folds=121)


def test_mean_judge_weighs_members_and_skips_those_that_abstain(items):
    pairs = [(Query("q", "mug"), item(items, name)) for name in ("mug-red", "tree", "cream")]
    first, second = OracleJudge({"q": {"mug-red": 3, "tree": 0}}), OracleJudge({"q": {"mug-red": 0}})
    verdict = MeanJudge([first, second], [3.0, 1.0]).score(pairs)
    np.testing.assert_allclose(verdict.probs[0], [0.25, 0, 0, 0.75])
    np.testing.assert_allclose(verdict.score, [0.75, 0.0, np.nan])
    with pytest.raises(ValueError, match="give a member"):
        MeanJudge([])


# ------------------------------------------------------------------------------------------------ all judges


def test_judges_follow_the_protocol_and_their_verdicts_do_not_depend_on_the_batch(graded):
    items, pairs, grades, _ = graded
    encoder = BiEncoderJudge(ToyEncoder(), items, np.random.default_rng(0).normal(size=(len(items), 3)))
    qrels: dict[str, dict[str, int]] = {}
    for (query, one), grade in zip(pairs, grades, strict=True):
        qrels.setdefault(query.id, {})[one.id] = grade
    soft = SoftLogicJudge(items)
    fitted = EnsembleJudge(PairFeatures(items, [encoder], soft)).fit(pairs, grades)
    for judge in (OracleJudge(qrels), soft, encoder, MeanJudge([soft, encoder]), fitted):
        assert isinstance(judge, RelevanceJudge)
        together = judge.score(pairs[:40])
        assert isinstance(together, JudgeOutput)
        assert together.probs.shape == (40, 4)
        assert together.probs.dtype == together.score.dtype == np.float32
        alone = np.concatenate([judge.score([pair]).probs for pair in pairs[:40]])
        np.testing.assert_allclose(alone, together.probs, atol=1e-6)
        assert judge.score([]).probs.shape == (0, 4)


def test_fingerprints_change_with_what_changes_verdicts(items):
    changed = catalog_of([("mug-red", "Acme red cup", "Acme", "", {}, ""), *SHOP[1:]]).items
    assert items_fingerprint(items) == items_fingerprint(catalog_of(SHOP).items)
    assert SoftLogicJudge(items).fingerprint != SoftLogicJudge(changed).fingerprint
    vectors = np.ones((len(items), 3), dtype=np.float32)
    prints = {
        BiEncoderJudge(ToyEncoder(), items, v, low=low).fingerprint for v in (vectors, 2 * vectors) for low in (0, 0.1)
    }
    assert len(prints) == 4
    oracles = {OracleJudge({"q": {"i": g}}, flip_noise=n).fingerprint for g in (0, 1) for n in (0.0, 0.5)}
    assert len(oracles) == 4


def test_importing_the_package_loads_no_heavy_library():
    heavy = "[m for m in ('torch', 'faiss', 'sklearn') if m in sys.modules]"
    code = f"import sys, taoemb.judge as j; j.OracleJudge; j.EnsembleJudge; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
