"""Queries, grades and clicks of the generated shop: intents sampled from items, complete qrels, simulated sessions."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from taoemb.catalog import Query
from taoemb.shop_rules import IntArray, Intent, ProductType, Truth, verdicts
from taoemb.shop_text import QueryWriter
from taoemb.types import GOOD_GRADE, MAX_GRADE

T = TypeVar("T")
TRAIN_SLICES = {"head": 0.45, "negation": 0.15, "alternatives": 0.14, "question": 0.14, "knowledge": 0.12}
TEST_SLICES = {"head": 0.32, "negation": 0.13, "alternatives": 0.12, "question": 0.13, "knowledge": 0.12, "tail": 0.18}
HEAD_PATTERNS = {"": 0.08, "a": 0.27, "aa": 0.26, "b": 0.11, "ab": 0.13, "ap": 0.10, "p": 0.05}
HELD_OUT_PERCENT = 15
TRIES = 400
SHOWN = 20
ATTRACTION = np.array([0.06, 0.20, 0.42, 0.60])


@dataclass(frozen=True, slots=True)
class GradedQuery:
    """A query with the rows of all items of grade >= 1 (rising) and their grades."""

    query: Query
    rows: IntArray
    grades: npt.NDArray[np.int8]


class IntentSampler:
    """Draws intents that existing items satisfy, so that every query has grade-3 items."""

    def __init__(self, truth: Truth, seed: int, rng: np.random.Generator) -> None:
        self.truth, self.seed, self.rng = truth, seed, rng
        self.ontology = truth.ontology
        self.min_excellent = min(3, max(1, len(truth) // 5_000))
        self.max_good = 150 * max(1.0, len(truth) / 20_000)
        self._rows: dict[str, IntArray] = {}

    def held_out(self, intent: Intent) -> bool:
        """Whether the intent combines two attribute values that training never sees together for its type."""
        pairs = [(a, v) for a, values in sorted(intent.get("required", {}).items()) for v in values]
        return any(
            self._held_pair(intent["type"], first, second)
            for i, first in enumerate(pairs)
            for second in pairs[i + 1 :]
            if first[0] != second[0]
        )

    def _held_pair(self, kind: str, first: tuple[str, str], second: tuple[str, str]) -> bool:
        text = f"{self.seed}|{kind}|{sorted((first, second))}"
        return zlib.crc32(text.encode()) % 100 < HELD_OUT_PERCENT

    def sample(self, slice_name: str) -> dict[str, Any] | None:
        """An intent of the slice that a random item satisfies, or None when that item gives none."""
        row = int(self.rng.integers(len(self.truth)))
        kind = self.ontology.types[self.ontology.type_ids[self.truth.types[row]]]
        constraints = getattr(self, f"_{slice_name}")(kind, row)
        if constraints is None or constraints.get("required", {}) is None:
            return None
        intent = {"type": kind.id, **constraints}
        return intent if self.held_out(intent) == (slice_name == "tail") else None

    def grade(self, intent: Intent) -> tuple[IntArray, npt.NDArray[np.int8]] | None:
        """Rows of grade >= 1 and their grades, or None when too few or too many items are good."""
        kind = intent["type"]
        if kind not in self._rows:
            self._rows[kind] = self.truth.rows_of([kind, *self.ontology.types[kind].related])
        rows = self._rows[kind]
        grades = verdicts(intent, self.truth, rows).grade
        if (grades == MAX_GRADE).sum() < self.min_excellent or (grades >= GOOD_GRADE).sum() > self.max_good:
            return None
        return rows[grades > 0], grades[grades > 0]

    def _choice(self, options: Sequence[T]) -> T:
        return options[int(self.rng.integers(len(options)))]

    def _required(self, kind: ProductType, row: int, n: int, taken: Sequence[str] = ()) -> dict[str, list[str]] | None:
        true = self.truth.attributes(row)
        free = [name for name in true if name not in taken]
        if len(free) < n:
            return None
        chosen = [free[i] for i in self.rng.permutation(len(free))[:n]]
        return {name: [true[name]] for name in chosen}

    def _brand_of(self, row: int) -> str:
        return self.ontology.brand_ids[int(self.truth.brands[row])]

    def _price_above(self, row: int) -> float:
        price = float(self.truth.price[row]) * (1.02 + 0.5 * self.rng.random())
        step = next(step for limit, step in ((10, 1), (50, 5), (200, 10), (1000, 50), (np.inf, 100)) if price < limit)
        return float(np.ceil(price / step) * step)

    def _head(self, kind: ProductType, row: int) -> dict[str, Any] | None:
        pattern = list(HEAD_PATTERNS)[int(self.rng.choice(len(HEAD_PATTERNS), p=list(HEAD_PATTERNS.values())))]
        intent: dict[str, Any] = {}
        if "a" in pattern:
            intent["required"] = self._required(kind, row, pattern.count("a"))
        if "b" in pattern:
            intent["brand"] = self._brand_of(row)
        if "p" in pattern:
            intent["max_price"] = self._price_above(row)
        return intent

    def _negation(self, kind: ProductType, row: int) -> dict[str, Any] | None:
        codes = self.truth.values[row].tolist()
        others = [
            (name, self.ontology.attributes[name].values[code])
            for (name, offered), mine in zip(kind.attributes.items(), codes, strict=False)
            for code in offered
            if code != mine
        ]
        natural = [(name, value) for name, value in others if value.negations]
        if natural and self.rng.random() < 0.85:
            others = natural
        if not others:
            return None
        name, value = self._choice(others)
        intent: dict[str, Any] = {"excluded": {name: [value.id]}}
        if self.rng.random() < 0.55:
            intent["required"] = self._required(kind, row, 1, taken=[name])
        return intent

    def _alternatives(self, kind: ProductType, row: int) -> dict[str, Any] | None:
        mates = self.truth.rows_of([kind.id])
        brand = int(self.truth.brands[int(self.rng.choice(mates))])
        if brand == self.truth.brands[row]:
            return None
        intent: dict[str, Any] = {"excluded_brand": self.ontology.brand_ids[brand]}
        if self.rng.random() < 0.5:
            limit = float(np.round(np.median(self.truth.price[mates[self.truth.brands[mates] == brand]]), 2))
            return {**intent, "max_price": limit} if self.truth.price[row] < limit else None
        return {**intent, "required": self._required(kind, row, 1)}

    def _question(self, kind: ProductType, row: int) -> dict[str, Any] | None:
        true = self.truth.attributes(row)
        asked = [name for name, value in true.items() if self._needs(name, value)]
        if not asked:
            return None
        name = self._choice(asked)
        return self._extended({"required": {name: [true[name]]}}, kind, row, taken=[name])

    def _needs(self, attribute: str, value: str) -> tuple[str, ...]:
        known = self.ontology.attributes[attribute]
        return known.values[known.codes([value])[0]].needs

    def _knowledge(self, kind: ProductType, row: int) -> dict[str, Any] | None:
        true = self.truth.attributes(row)
        holding = []
        for fact in self.ontology.facts.values():
            attribute, codes = fact.holds.get(kind.id, ("", ()))
            if attribute and true[attribute] in [self.ontology.attributes[attribute].values[c].id for c in codes]:
                holding.append((fact.id, attribute))
        if not holding:
            return None
        name, attribute = self._choice(holding)
        return self._extended({"fact": name}, kind, row, taken=[attribute])

    def _extended(
        self, intent: dict[str, Any], kind: ProductType, row: int, taken: Sequence[str]
    ) -> dict[str, Any] | None:
        """Add nothing, another attribute or a price limit."""
        draw = self.rng.random()
        if draw < 0.4:
            more = self._required(kind, row, 1, taken) or {}
            return {**intent, "required": {**intent.get("required", {}), **more}}
        return {**intent, "max_price": self._price_above(row)} if draw < 0.52 else intent

    def _tail(self, kind: ProductType, row: int) -> dict[str, Any] | None:
        true = list(self.truth.attributes(row).items())
        pairs = [(a, b) for i, a in enumerate(true) for b in true[i + 1 :] if self._held_pair(kind.id, a, b)]
        if not pairs:
            return None
        first, second = self._choice(pairs)
        return {"required": {first[0]: [first[1]], second[0]: [second[1]]}}


def write_queries(truth: Truth, seed: int, counts: Mapping[str, int]) -> list[GradedQuery]:
    """Queries of each split with complete grades; ``counts`` maps test, validation and train to a number.

    All intents and all texts differ. Raises ValueError when the items do not give that many queries.
    """
    graded: list[GradedQuery] = []
    intents, texts = set[str](), set[str]()
    for stream, (split, n) in enumerate(counts.items()):
        rng = np.random.default_rng([seed, 2, stream])
        sampler, writer = IntentSampler(truth, seed, rng), QueryWriter(truth.ontology, rng)
        shares = TEST_SLICES if split == "test" else TRAIN_SLICES
        for number, name in enumerate(_slices(shares, n, rng)):
            found = _one_query(sampler, writer, name, intents, texts)
            if found is None:
                raise ValueError(
                    f"{len(truth)} items gave {number} distinct {split} queries, not {n}; "
                    f"ask for fewer {split}_queries or more items"
                )
            intent, text, (rows, grades) = found
            query = Query(f"{split}-{number:05d}", text, split, name, 1.0, intent)
            graded.append(GradedQuery(query, rows, grades))
    return list(_with_frequency(graded, np.random.default_rng([seed, 3])))


def _slices(shares: Mapping[str, float], n: int, rng: np.random.Generator) -> list[str]:
    edges = np.cumsum(list(shares.values())) / sum(shares.values())
    names = [list(shares)[int(i)] for i in np.searchsorted(edges, (np.arange(n) + 0.5) / max(n, 1))]
    return [names[i] for i in rng.permutation(n)]


def _one_query(
    sampler: IntentSampler, writer: QueryWriter, name: str, intents: set[str], texts: set[str]
) -> tuple[dict[str, Any], str, tuple[IntArray, npt.NDArray[np.int8]]] | None:
    for _ in range(TRIES):
        intent = sampler.sample(name)
        if intent is None or (key := json.dumps(intent, sort_keys=True)) in intents:
            continue
        graded = sampler.grade(intent)
        text = writer.write(intent, name) if graded is not None else ""
        if graded is None or text in texts:
            continue
        intents.add(key)
        texts.add(text)
        return intent, text, graded
    return None


def _with_frequency(graded: Sequence[GradedQuery], rng: np.random.Generator) -> Iterator[GradedQuery]:
    """Zipf's law (exponent 0.9) over all queries; head queries come first with noise, tail queries last."""
    prior = {"head": 2.0, "tail": -4.0}
    score = np.array([prior.get(g.query.slice, 0.0) for g in graded]) + rng.gumbel(size=len(graded))
    rank = np.empty(len(graded))
    rank[np.argsort(-score, kind="stable")] = np.arange(1, len(graded) + 1)
    for one, place in zip(graded, rank, strict=True):
        yield replace(one, query=replace(one.query, frequency=float(np.round(10_000 / place**0.9, 2))))


def simulate_clicks(graded: Sequence[GradedQuery], sales: npt.NDArray[np.float64], ids: npt.NDArray[np.object_],
                    seed: int) -> pa.Table:  # fmt: skip
    """Clicks of the train queries, columns query_id, item_id, position (1-based) and clicks (>= 1).

    The engine of the log ranks by grade, popularity (log sales) and a fixed error for each item; every session shows
    the first 20. A click needs examination (``position ** -0.6``) and attraction, which grows with the grade.
    All constants are our choice.
    """
    rng = np.random.default_rng([seed, 4])
    popularity = np.log1p(sales)
    popularity = (popularity - popularity.mean()) / (popularity.std() or 1.0)
    examined = np.arange(1, SHOWN + 1) ** -0.6
    columns: dict[str, list[Any]] = {"query_id": [], "item_id": [], "position": [], "clicks": []}
    for one in graded:
        if one.query.split != "train":
            continue
        extra = np.setdiff1d(rng.integers(len(sales), size=40), one.rows)
        rows = np.concatenate([one.rows, extra])
        grades = np.concatenate([one.grades, np.zeros(len(extra), np.int8)])
        score = grades + 0.6 * popularity[rows] + rng.normal(scale=1.4, size=len(rows))
        shown = np.argsort(-score, kind="stable")[:SHOWN]
        sessions = int(np.ceil(2.2 * one.query.frequency**0.25))
        clicks = rng.binomial(sessions, examined[: len(shown)] * ATTRACTION[grades[shown]])
        positions = np.flatnonzero(clicks)
        columns["query_id"] += [one.query.id] * len(positions)
        columns["item_id"] += ids[rows[shown[positions]]].tolist()
        columns["position"] += (positions + 1).tolist()
        columns["clicks"] += clicks[positions].tolist()
    kinds = {"query_id": pa.string(), "item_id": pa.string(), "position": pa.int64(), "clicks": pa.int64()}
    return pa.table(columns, schema=pa.schema(list(kinds.items())))
