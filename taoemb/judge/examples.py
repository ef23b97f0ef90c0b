"""Labelled pairs with reasons for training a judge: from the generated shop by rule, or from your own tables.

A chain of reasons says what product is wanted and found, which condition holds, and the two verdicts that the label follows from
(query -> item -> category match -> attribute match -> verdict; TaoSR1, arXiv 2508.12365, in our own words). In post-CoT the label
comes first, so that a grade takes one forward pass; in pre-CoT it comes last; ``label`` has no reasons.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from taoemb.catalog import Catalog, Item, Query
from taoemb.judge.chains import ParsedChain
from taoemb.judge.schemes import GRADES_4, LabelScheme
from taoemb.shop import Shop
from taoemb.shop_rules import ATTRIBUTE_VERDICTS, CATEGORY_VERDICTS, Ontology, Truth, verdicts
from taoemb.types import MAX_GRADE

Style = Literal["post", "pre", "label"]
_LINE = re.compile(r"^(Category|Attributes): (\w+)\s*$", re.MULTILINE)
GRADE_LINE = "Grade:"
"""What the label's line begins with where reasons come first."""
LINES = ("Product:", "Conditions:", "Category:", "Attributes:")
"""What the lines of a chain begin with."""


@dataclass(frozen=True, slots=True)
class Example:
    """A pair, its grade 0..3 and, where they are known, its verdicts (positions in CATEGORY_VERDICTS and ATTRIBUTE_VERDICTS) and the
    reasons; and a chunk of context that the judge reads, if any."""

    query: Query
    item: Item
    grade: int
    category: int | None = None
    attribute: int | None = None
    reasons: str = ""
    context: str = ""

    def completion(self, style: Style = "post", scheme: LabelScheme = GRADES_4) -> str:
        """What a model is to write.

        >>> one = Example(Query("q", "mug"), Item("i", "Mug"), 3, 2, 2, "Product: mug")
        >>> one.completion("post"), one.completion("pre"), one.completion("label")
        ('4\\nProduct: mug', 'Product: mug\\nGrade: 4', '4')
        """
        answer = scheme.answers[scheme.of_grade[self.grade]]
        if style not in get_args(Style):
            raise ValueError(f"style={style!r}: give one of {', '.join(get_args(Style))}")
        if style == "label" or not self.reasons:
            return answer
        return f"{answer}\n{self.reasons}" if style == "post" else f"{self.reasons}\n{GRADE_LINE} {answer}"


def parse(text: str, style: Style = "post", scheme: LabelScheme = GRADES_4) -> ParsedChain:
    """Read a completion; ``ok`` when label and, but for the style ``label``, both verdicts are there, each once.

    >>> parse("4\\nCategory: exact\\nAttributes: match")
    ParsedChain(category=2, attribute=2, label=3, ok=True)
    """
    label = parse_label(text, style, scheme)
    if style == "label":
        return ParsedChain(None, None, label, False)
    found: dict[str, int | None] = {}
    for name, verdict in _LINE.findall(text):
        known = CATEGORY_VERDICTS if name == "Category" else ATTRIBUTE_VERDICTS
        found[name] = None if name in found or verdict not in known else known.index(verdict)
    category, attribute = found.get("Category"), found.get("Attributes")
    return ParsedChain(category, attribute, label, None not in (label, category, attribute))


def parse_label(text: str, style: Style = "post", scheme: LabelScheme = GRADES_4) -> int | None:
    """The label that a completion states in its place; None where it states none."""
    lines = text.strip().splitlines()
    if not lines:
        return None
    if style == "pre":
        stated = [line for line in lines if line.startswith(GRADE_LINE)]
        line = stated[-1].removeprefix(GRADE_LINE) if stated else ""
    else:
        line = lines[0]
    answers = [answer.strip() for answer in scheme.answers]
    return answers.index(line.strip()) if line.strip() in answers else None


def shop_examples(
    shop: Shop, n: int, seed: int = 0, *, split: str = "train", balance: bool = True, slices: Sequence[str] = ()
) -> list[Example]:
    """``n`` distinct graded pairs of the generated shop with correct chains, in random order.

    With ``balance`` each grade has the same share (as TaoSR1 draws for its last stage); without, pairs are those that the words of
    a query would bring up: half of them graded 1 to 3 as they come, half 0. An item of grade 0 is in half of the cases near the
    query: of a related product, or of the right one with a condition broken.

    Raises ValueError when the shop has not so many pairs, or no query of that split (and slice).
    """
    rng = np.random.default_rng([seed, 8])
    truth, catalog = Truth.from_table(shop.truth), shop.catalog
    queries = [q for q in catalog.queries if q.split == split and (not slices or q.slice in slices)]
    if not queries:
        raise ValueError(f"no query of split {split!r}{f' and slices {list(slices)}' if slices else ''} in the shop")
    graded: list[list[tuple[int, int]]] = [[] for _ in range(MAX_GRADE + 1)]
    for number, query in enumerate(queries):
        listed = catalog.qrels.get(query.id, {})
        for row, grade in zip(catalog.items.positions(listed).tolist(), listed.values(), strict=True):
            graded[grade].append((number, row))
    if balance:
        wanted = [n * (g + 1) // 4 - n * g // 4 for g in range(MAX_GRADE + 1)]
    else:
        positive = [pair for level in graded[1:] for pair in level]
        drawn = rng.choice(len(positive), min(n - n // 2, len(positive)), replace=False)
        counts = np.bincount(
            [catalog.qrels[queries[q].id][catalog.items.ids[r]] for q, r in (positive[i] for i in drawn)], minlength=4
        )
        wanted = [n // 2, *counts[1:].tolist()]
    for grade in range(1, MAX_GRADE + 1):
        if len(graded[grade]) < wanted[grade]:
            raise ValueError(f"the shop has {len(graded[grade])} pairs of grade {grade} in split {split!r}, {wanted[grade]} are asked for; "
                             "ask for fewer or generate a larger shop")  # fmt: skip
    chosen = list(_zeros(queries, truth, catalog.qrels, catalog.items.ids, wanted[0], rng))
    for grade in range(1, MAX_GRADE + 1):
        chosen += [graded[grade][i] for i in rng.choice(len(graded[grade]), wanted[grade], replace=False)]
    return [
        _example(queries[q], catalog.items[r], truth, r) for q, r in (chosen[i] for i in rng.permutation(len(chosen)))
    ]


def catalog_examples(
    catalog: Catalog, n: int, seed: int = 0, *, split: str = "train", balance: bool = True
) -> list[Example]:
    """At most ``n`` graded pairs that a catalog lists for the queries of a split, without reasons, in random order; with ``balance``
    as many of each grade, of one that is too rare all. Where the catalog says that an ungraded pair is worth 0, such pairs are drawn too:
    of ``n`` as many as are missing to a quarter, without ``balance`` to a half.

    Raises ValueError when none is graded.
    """
    chosen = [q for q in catalog.queries if q.split == split and catalog.qrels.get(q.id)]
    pairs = [(query, item_id, grade) for query in chosen for item_id, grade in catalog.qrels[query.id].items()]
    if not pairs:
        have = sorted({q.split or "(none)" for q in catalog.queries if catalog.qrels.get(q.id)})
        raise ValueError(
            f"no query of split {split!r} has grades; those with grades are of split {', '.join(have) or '(none)'}: give the "
            f"queries that a judge may learn from split={split!r} in queries"
        )
    rng, items = np.random.default_rng([seed, 8]), catalog.items
    listed = sum(grade == 0 for _, _, grade in pairs)
    if catalog.unjudged == 0:
        wanted = n // (4 if balance else 2) - listed
        drawn = {(int(rng.integers(len(chosen))), int(rng.integers(len(items)))) for _ in range(max(0, wanted))}
        pairs += [
            (chosen[q], items.ids[row], 0)
            for q, row in sorted(drawn)
            if items.ids[row] not in catalog.qrels[chosen[q].id]
        ]
    order = rng.permutation(len(pairs)).tolist()
    if balance:
        grades = [[i for i in order if pairs[i][2] == grade] for grade in range(MAX_GRADE + 1)]
        order = rng.permutation(
            [i for g, rows in enumerate(grades) for i in rows[: n * (g + 1) // 4 - n * g // 4]]
        ).tolist()
    found = [pairs[i] for i in order[:n]]
    rows = items.positions([item_id for _, item_id, _ in found]).tolist()
    return [Example(query, items[row], grade) for (query, _, grade), row in zip(found, rows, strict=True)]


def _zeros(
    queries: Sequence[Query],
    truth: Truth,
    qrels: Mapping[str, Mapping[str, int]],
    ids: Sequence[str],
    n: int,
    rng: np.random.Generator,
) -> Iterator[tuple[int, int]]:
    """Distinct pairs of grade 0, half of them near."""
    seen: set[tuple[int, int]] = set()
    for trial in range(50 * n + 1000):
        if len(seen) == n:
            return
        number = int(rng.integers(len(queries)))
        query = queries[number]
        intent = query.intent or {}
        kind = truth.ontology.types[intent["type"]]
        rows = truth.rows_of([kind.id, *kind.related]) if trial % 2 else np.arange(len(truth))
        row = int(rows[rng.integers(len(rows))]) if len(rows) else 0
        if len(rows) and (number, row) not in seen and not qrels.get(query.id, {}).get(ids[row], 0):
            seen.add((number, row))
            yield number, row
    if len(seen) < n:
        raise ValueError(
            f"found {len(seen)} pairs of grade 0, {n} are asked for; ask for fewer or generate a larger shop"
        )


def _example(query: Query, item: Item, truth: Truth, row: int) -> Example:
    intent = query.intent or {}
    found = verdicts(intent, truth, np.array([row]))
    category, attribute = int(found.category[0]), int(found.attribute[0])
    kind = truth.ontology.types[truth.ontology.type_ids[truth.types[row]]]
    wanted = truth.ontology.types[intent["type"]]
    lines = [f"Product: {wanted.names[0]} is wanted, this is {kind.names[0]}"]
    conditions = "; ".join(_conditions(intent, truth, row))
    if conditions:
        lines.append(f"Conditions: {conditions}")
    lines += [f"Category: {CATEGORY_VERDICTS[category]}", f"Attributes: {ATTRIBUTE_VERDICTS[attribute]}"]
    return Example(query, item, int(found.grade[0]), category, attribute, "\n".join(lines))


def _conditions(intent: Mapping[str, Any], truth: Truth, row: int) -> Iterator[str]:
    """``what is asked: yes | no`` for each condition of an intent."""
    ontology, mine = truth.ontology, truth.attributes(row)
    brand = ontology.brand_ids[int(truth.brands[row])]
    for name, values in intent.get("required", {}).items():
        yield _said(_forms(ontology, name, values), mine.get(name) in values)
    for name, values in intent.get("excluded", {}).items():
        yield _said(f"not {_forms(ontology, name, values)}", mine.get(name) not in values)
    if "brand" in intent:
        yield _said(f"by {intent['brand']}", brand == intent["brand"])
    if "excluded_brand" in intent:
        yield _said(f"not by {intent['excluded_brand']}", brand != intent["excluded_brand"])
    if "max_price" in intent:
        yield _said(f"under {intent['max_price']:g}", truth.price[row] < intent["max_price"])
    if "fact" in intent:
        fact = ontology.facts[intent["fact"]]
        held = fact.holds.get(ontology.type_ids[truth.types[row]])
        holds = held is not None and mine.get(held[0]) in [
            ontology.attributes[held[0]].values[code].id for code in held[1]
        ]
        yield _said(fact.says[0], holds)


def _forms(ontology: Ontology, name: str, values: Sequence[str]) -> str:
    attribute = ontology.attributes[name]
    return " or ".join(attribute.values[code].forms[0] for code in attribute.codes(values))


def _said(condition: str, holds: bool) -> str:
    return f"{condition}: {'yes' if holds else 'no'}"
