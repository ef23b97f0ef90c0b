"""Chains written by rule, read back; drawn pairs against the shop's own grades."""

from collections import Counter

import numpy as np
import pytest

from taoemb.judge.chains import ParsedChain
from taoemb.judge.examples import Example, parse, parse_label, shop_examples
from taoemb.judge.schemes import BINARY, GRADES_4
from taoemb.shop import Truth, generate_shop
from taoemb.shop_rules import load_ontology, verdicts


@pytest.fixture(scope="module")
def shop():
    return generate_shop(600, seed=1, train_queries=120, validation_queries=20, test_queries=30)


@pytest.fixture(scope="module")
def examples(shop):
    return shop_examples(shop, 200, seed=3)


def test_grades_and_verdicts_are_the_shops(shop, examples):
    truth, table = Truth.from_table(shop.truth), load_ontology().grade_table
    for example in examples:
        assert example.grade == shop.catalog.qrels.get(example.query.id, {}).get(example.item.id, 0)
        row = shop.catalog.items.positions([example.item.id])
        found = verdicts(example.query.intent, truth, row)
        assert (example.category, example.attribute) == (found.category[0], found.attribute[0])
        assert table[example.category, example.attribute] == example.grade
        assert example.query.split == "train"
    assert len({(e.query.id, e.item.id) for e in examples}) == 200


def test_balance(shop, examples):
    assert Counter(e.grade for e in examples) == dict.fromkeys(range(4), 50)
    assert sum(e.category > 0 for e in examples if e.grade == 0) > 5  # near ones too
    natural = Counter(e.grade for e in shop_examples(shop, 200, seed=3, balance=False))
    assert natural[0] == 100
    assert natural[1] > natural[3]
    tail = shop_examples(shop, 40, split="test", slices=["head", "tail"])
    assert {e.query.slice for e in tail} == {"head", "tail"}


def test_the_same_seed_draws_the_same(shop, examples):
    assert shop_examples(shop, 200, seed=3) == examples
    assert shop_examples(shop, 200, seed=4) != examples


def test_reasons_say_each_condition(examples):
    conditions = {"required": 1, "excluded": 1, "brand": 1, "excluded_brand": 1, "max_price": 1, "fact": 1}
    seen = Counter()
    for example in examples:
        intent = example.query.intent
        lines = dict(line.split(": ", 1) for line in example.reasons.splitlines())
        told = lines.get("Conditions", "").split("; ") if "Conditions" in lines else []
        asked = sum(len(intent[key]) if isinstance(intent[key], dict) else 1 for key in conditions if key in intent)
        assert len(told) == asked
        no = sum(text.endswith(": no") for text in told)
        assert (lines["Attributes"] == "match") == (no == 0)
        seen.update(key for key in conditions if key in intent)
    assert set(seen) == set(conditions)


@pytest.mark.parametrize("scheme", [GRADES_4, BINARY], ids=["four", "two"])
@pytest.mark.parametrize("style", ["post", "pre"])
def test_what_is_written_can_be_read(examples, style, scheme):
    for example in examples:
        label = scheme.of_grade[example.grade]
        text = example.completion(style, scheme)
        assert parse(text, style, scheme) == ParsedChain(example.category, example.attribute, label, True)
        assert parse_label(example.completion("label", scheme), "label", scheme) == label


@pytest.mark.parametrize(
    ("text", "style", "expected"),
    [
        ("4\nCategory: exact\nAttributes: match", "post", (2, 2, 3, True)),
        ("4\nCategory: exact", "post", (2, None, 3, False)),
        ("4\nCategory: exact\nCategory: related\nAttributes: match", "post", (None, 2, 3, False)),
        ("4\nCategory: perfect\nAttributes: match", "post", (None, 2, 3, False)),
        ("5\nCategory: exact\nAttributes: match", "post", (2, 2, None, False)),
        ("4 4 4", "post", (None, None, None, False)),
        ("", "post", (None, None, None, False)),
        ("Category: related\nAttributes: violated\nGrade: 1", "pre", (1, 0, 0, True)),
        ("Grade: 1\nGrade: 2", "pre", (None, None, 1, False)),
        ("1", "pre", (None, None, None, False)),
        (" 2 \n", "label", (None, None, 1, False)),
    ],
)
def test_unreadable_completions(text, style, expected):
    assert parse(text, style) == ParsedChain(*expected)


def test_mistakes_are_named(shop):
    with pytest.raises(ValueError, match="no query of split 'train' and slices"):
        shop_examples(shop, 10, slices=["tail"])
    with pytest.raises(ValueError, match="ask for fewer"):
        shop_examples(shop, 10**6)
    with pytest.raises(ValueError, match="give one of post, pre, label"):
        shop_examples(shop, 4)[0].completion("after")
    bare = Example(shop.catalog.queries[0], shop.catalog.items[0], 2)
    assert bare.completion("post") == bare.completion("label") == "3"
    assert np.array_equal(sorted({e.grade for e in shop_examples(shop, 4)}), range(4))
