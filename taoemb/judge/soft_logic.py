"""Soft logic: a query is a conjunction of facets, and each facet holds for an item to a degree that can be read.

The form is that of entity-based relevance (EBRM, arXiv 2307.00370): query facets against item entities, the best entity
counts (max), facets are joined by a product t-norm. There the relevances are learned; here they are the constants
below, which are our choice, over words mined from the catalog (`Lexicon`). Nothing is trained and nothing is graded.
What a user knows better is told as `Interventions`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from taoemb.catalog import Item, Items, Query
from taoemb.judge.interventions import Interventions
from taoemb.judge.lexicon import MAX_PHRASE_WORDS, ItemFacts, Lexicon
from taoemb.judge.verdicts import CUTS, SOFTNESS, fingerprint, ordered_probs, output
from taoemb.judge.words import (
    CONNECTORS,
    NEGATES_NEXT,
    NO,
    STOP_WORDS,
    YES,
    attribute_values,
    category_names,
    phrase,
    words,
)
from taoemb.types import FloatArray, JudgeOutput

MISS = 0.05
"""Nothing says so, or another value is said. Above 0, because words and vocabularies miss synonyms."""
UNKNOWN = 0.3
"""The item does not speak of the attribute (or names no brand)."""
FIELD, IN_TITLE, IN_TEXT = 1.0, 0.9, 0.6
"""An attribute value or a free word: in a field, in the title, in description or attributes."""
BROADER, OTHER_KIND, NOT_HEAD, TYPE_IN_TEXT = 0.6, 0.3, 0.4, 0.25
"""A type: the item is called more broadly ("printer" for "laser printer"), shares the last word only ("ink printer"),
the title says it but means something else ("laptop bag" for "laptop"), only the description says it."""
BRAND_IN_TITLE, BRAND_IN_TEXT = 0.8, 0.4
"""A brand that is not the item's own, as in "case for Acme phones"."""
WEIGHTS = {"type": 1.0, "brand": 1.0, "attribute": 0.7, "term": 0.7}
"""Exponents of the facets in the product; the words of a query that are no facet share theirs by idf."""
_RULES = (
    MISS, UNKNOWN, FIELD, IN_TITLE, IN_TEXT, BROADER, OTHER_KIND, NOT_HEAD, TYPE_IN_TEXT, BRAND_IN_TITLE, BRAND_IN_TEXT,
)  # fmt: skip
INTENT_KEYS = frozenset({"type", "category", "brand", "attributes", "source"})
"""An intent is read when it holds nothing else (as `taoemb.queries` writes it); others may use words of their own."""
_FACTS_CACHE, _QUERY_CACHE = 16_384, 65_536


@dataclass(frozen=True, slots=True)
class Facet:
    """One condition of a query; ``kind`` is type, brand, attribute or term, ``text`` is a phrase."""

    kind: str
    text: str
    weight: float
    negated: bool = False
    names: frozenset[str] = frozenset()
    """For an attribute: the folded names of the attributes that the value belongs to."""

    @property
    def label(self) -> str:
        """``kind:text``, with ``not`` before a negated one."""
        return f"{self.kind}:{'not ' if self.negated else ''}{self.text}"

    @property
    def asked(self) -> str:
        """``kind:text``, negated or not."""
        return f"{self.kind}:{self.text}"


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """What is recognised in a query: the catalog's words and the facets that interventions name."""

    brands: frozenset[str]
    types: frozenset[str]
    values: Mapping[str, frozenset[str]]
    switches: frozenset[str]


class SoftLogicJudge:
    """Rule-based judge over a catalog's own vocabulary.

    Score of a pair: ``prod_f r_f ** w_f`` over the query's facets, ``r_f`` in [0.05, 1] from `explain`; a negated facet
    ("without X", "no X", "X free" where X is an attribute value) counts as ``1 - r_f``. Facets come from the text of
    the query, or from its intent where `INTENT_KEYS` are all that it holds. The judge abstains on a query of which no
    word says anything. ``interventions`` go before the rules; what they say may be anything in [0, 1].
    """

    name = "soft_logic"

    def __init__(
        self, items: Items, lexicon: Lexicon | None = None, interventions: Interventions | None = None
    ) -> None:
        self.lexicon = lexicon if lexicon is not None else Lexicon(items)
        self.interventions = told = interventions or Interventions()
        self._vocabulary = _Vocabulary(
            self.lexicon.brands | set(told.named("brand")),
            frozenset(self.lexicon.types) | set(told.named("type")),
            {**dict.fromkeys(told.named("attribute"), frozenset()), **self.lexicon.values},
            self.lexicon.switches,
        )
        parts = (self.name, self.lexicon.fingerprint, _RULES, sorted(WEIGHTS.items()), CUTS, SOFTNESS)
        self.fingerprint = fingerprint(*parts, *([told.parts()] if told else []))
        """Changes with the catalog, the rules and the interventions."""
        self._facts: dict[str, ItemFacts] = {}
        self._queries: dict[tuple[str, str], tuple[Query, tuple[Facet, ...]]] = {}

    def score(self, pairs: Sequence[tuple[Query, Item]]) -> JudgeOutput:
        """Judge ``N`` pairs."""
        return output(ordered_probs(self.relevance(pairs)))

    def relevance(self, pairs: Sequence[tuple[Query, Item]]) -> FloatArray:
        """The conjunction in [0, 1] of ``N`` pairs, before it is turned into grades; NaN abstains."""
        return np.array([self._conjunction(self.facets(q), self.facts(i)) for q, i in pairs], dtype=np.float32)

    def explain(self, query: Query, item: Item) -> dict[str, tuple[float, str]]:
        """Facet -> (relevance, evidence), for example ``{"type:laptop": (0.4, "title mentions it")}``; the evidence of an
        intervention begins with ``user:``."""
        facts = self.facts(item)
        return {facet.label: self._judge_facet(facet, facts) for facet in self.facets(query)}

    def facts(self, item: Item) -> ItemFacts:
        """What is known about an item (cached)."""
        facts = self._facts.get(item.id)
        if facts is None or (facts.item is not item and facts.item != item):
            if len(self._facts) >= _FACTS_CACHE:
                self._facts.clear()
            facts = self._facts[item.id] = self.lexicon.facts(item)
        return facts

    def facets(self, query: Query) -> tuple[Facet, ...]:
        """The facets of a query (cached), in the order of the text."""
        cached = self._queries.get((query.id, query.text))
        if cached is None or (cached[0] is not query and cached[0] != query):
            if len(self._queries) >= _QUERY_CACHE:
                self._queries.clear()
            found = _read_text(words(query.text), self._vocabulary, switches=True)
            if not any(facet.kind == "type" for facet in found):  # "usb hub" alone is no monitor that has one
                found = _read_text(words(query.text), self._vocabulary, switches=False)
            if query.intent and INTENT_KEYS.issuperset(query.intent):
                found = _read_intent(query.intent, found) or found
            weighed = _reweigh(_weigh_terms(found, self.lexicon), self.interventions)
            cached = self._queries[(query.id, query.text)] = (query, weighed)
        return cached[1]

    def _conjunction(self, facets: tuple[Facet, ...], facts: ItemFacts) -> float:
        if not facets:
            return math.nan
        relevances = [self._judge_facet(facet, facts)[0] for facet in facets]
        if min(relevances) == 0.0:  # a user's; the rules give MISS at least
            return 0.0
        return math.exp(sum(f.weight * math.log(r) for f, r in zip(facets, relevances, strict=True)))

    def _judge_facet(self, facet: Facet, facts: ItemFacts) -> tuple[float, str]:
        told = self.interventions.relations_of(facet.asked)
        held = [(relevance, entity) for entity, relevance in told.items() if self._has(facts, entity)]
        if not held:
            return _facet_relevance(facet, facts)
        relevance, entity = max(held)
        return (1.0 - relevance if facet.negated else relevance), f"user: {entity!r} counts {relevance:g}"

    def _has(self, facts: ItemFacts, entity: str) -> bool:
        """Whether an item has an entity. One that is called otherwise, or has another brand, does not have a type or a brand
        that its texts mention: a laptop bag is no laptop."""
        if entity in facts.negated:
            return False
        if entity == facts.brand or entity in facts.values:
            return True
        if any(named == entity or named.endswith(f" {entity}") for named in facts.types):
            return True
        otherwise = (facts.types and entity in self.lexicon.types) or (facts.brand and entity in self.lexicon.brands)
        return not otherwise and (_says(facts.title, entity) or _says(facts.text, entity))


# ------------------------------------------------------------------------------------------------ reading queries


def _read_text(text: Sequence[str], vocabulary: _Vocabulary, switches: bool) -> list[Facet]:
    """Facets of folded query words: the longest known phrase at each place, brand before type before attribute."""
    found: list[Facet] = []
    start, negate, ended = 0, False, False
    while start < len(text):
        kind, length = _longest(text, start, vocabulary, switches)
        piece = " ".join(text[start : start + length])
        if kind == "term" and (piece in NEGATES_NEXT or piece in STOP_WORDS):
            negate = negate or piece in NEGATES_NEXT
            ended = ended or piece in CONNECTORS
        elif kind == "term" and piece == "free" and found and found[-1].text in vocabulary.values:
            denied = found.pop().text
            found.append(Facet("attribute", denied, WEIGHTS["attribute"], True, vocabulary.values[denied]))
        else:
            if kind == "type" and (ended or negate):  # "case for laptop": the type came before the connector
                kind = "attribute" if piece in vocabulary.values else "term"
            names = vocabulary.values.get(piece, frozenset()) if kind == "attribute" else frozenset()
            if kind == "term":
                found += [Facet("term", word, 0.0, negate) for word in piece.split() if word not in STOP_WORDS]
            else:
                found.append(Facet(kind, piece, WEIGHTS[kind], negate, names))
            negate = False
        start += length
    return _one_type(found)


def _longest(text: Sequence[str], start: int, vocabulary: _Vocabulary, switches: bool) -> tuple[str, int]:
    for length in range(min(MAX_PHRASE_WORDS, len(text) - start), 0, -1):
        piece = " ".join(text[start : start + length])
        for kind, known in (("brand", vocabulary.brands), ("type", vocabulary.types), ("attribute", vocabulary.values)):
            if piece in known and (switches or kind != "attribute" or piece not in vocabulary.switches):
                return kind, length
    return "term", 1


def _one_type(found: list[Facet]) -> list[Facet]:
    """Keep the last type (English puts the head last, "laptop *case*"); the words of the others become terms."""
    types = [i for i, facet in enumerate(found) if facet.kind == "type"]
    kept = types[-1:]
    facets: list[Facet] = []
    for i, facet in enumerate(found):
        if facet.kind == "type" and i not in kept:
            facets += [Facet("term", word, 0.0) for word in facet.text.split()]
        else:
            facets.append(facet)
    return list({facet.label: facet for facet in facets}.values())


def _weigh_terms(found: list[Facet], lexicon: Lexicon) -> tuple[Facet, ...]:
    """Share the weight of the free words by their idf."""
    total = sum(lexicon.idf(facet.text) for facet in found if facet.kind == "term")
    return tuple(
        Facet("term", f.text, WEIGHTS["term"] * lexicon.idf(f.text) / total, f.negated) if f.kind == "term" else f
        for f in found
    )


def _reweigh(found: tuple[Facet, ...], told: Interventions) -> tuple[Facet, ...]:
    """The weights that the user tells; a term's is its share of that of all terms, unless it is its own."""
    if not told.weights:
        return found
    weighed = []
    for facet in found:
        weight = told.weight_of(facet.asked)
        if weight is not None and facet.kind == "term" and facet.asked not in told.weights:
            weight *= facet.weight / WEIGHTS["term"]
        weighed.append(facet if weight is None else replace(facet, weight=weight))
    return tuple(facet for facet in weighed if facet.weight > 0)


def _read_intent(intent: Mapping[str, Any], from_text: Sequence[Facet]) -> list[Facet]:
    """Facets of a structured intent, and what the text negates; empty when the intent has none."""
    facets: list[Facet] = []
    denied = {facet.text for facet in from_text if facet.negated}
    named = [intent["type"]] if intent.get("type") else category_names(intent.get("category") or "")
    if named and phrase(named[-1]):
        facets.append(Facet("type", phrase(named[-1]), WEIGHTS["type"]))
    if phrase(intent.get("brand") or ""):
        facets.append(Facet("brand", phrase(intent["brand"]), WEIGHTS["brand"]))
    for name, value in (intent.get("attributes") or {}).items():
        switch, folded = str(value).strip().lower(), phrase(str(name))
        for text in (folded,) if switch in YES | NO else attribute_values(str(value)):
            negated = switch in NO or text in denied
            facets.append(Facet("attribute", text, WEIGHTS["attribute"], negated, frozenset({folded})))
    known = {facet.text for facet in facets}
    return facets + [f for f in from_text if f.negated and f.text not in known] if facets else []


# ------------------------------------------------------------------------------------------------ judging facets


def _facet_relevance(facet: Facet, facts: ItemFacts) -> tuple[float, str]:
    relevance, evidence = _RELEVANCE[facet.kind](facet, facts)
    return (max(MISS, 1.0 - relevance), evidence) if facet.negated else (max(MISS, relevance), evidence)


def _says(text: str, phrase_text: str) -> bool:
    return f" {phrase_text} " in text


def _type_relevance(facet: Facet, facts: ItemFacts) -> tuple[float, str]:
    wanted = facet.text
    best, evidence = MISS, "not named"
    for named in facts.types:
        if named == wanted or named.endswith(" " + wanted):
            return FIELD, f"is called {named!r}"
        if wanted.endswith(" " + named):
            rest = wanted[: -len(named)].split()
            if all(word in facts.counts for word in rest):
                best, evidence = IN_TITLE, f"is called {named!r} and speaks of {' '.join(rest)!r}"
            elif best < BROADER:
                best, evidence = BROADER, f"is called {named!r}"
        elif best < OTHER_KIND and named.rpartition(" ")[2] == wanted.rpartition(" ")[2]:
            best, evidence = OTHER_KIND, f"is called {named!r}"
    if best < IN_TITLE and not facts.types and _says(facts.title, wanted):
        return IN_TITLE, "title says it and names no other type"
    if best < NOT_HEAD and facts.title_words.issuperset(wanted.split()):
        return NOT_HEAD, "title mentions it"
    if best < TYPE_IN_TEXT and _says(facts.text, wanted):
        return TYPE_IN_TEXT, "description mentions it"
    return best, evidence


def _brand_relevance(facet: Facet, facts: ItemFacts) -> tuple[float, str]:
    if facts.brand == facet.text:
        return FIELD, "is the brand"
    if _says(facts.title, facet.text):
        return BRAND_IN_TITLE, "title mentions it"
    if _says(facts.text, facet.text):
        return BRAND_IN_TEXT, "description mentions it"
    return (MISS, f"the brand is {facts.brand!r}") if facts.brand else (UNKNOWN, "the item names no brand")


def _attribute_relevance(facet: Facet, facts: ItemFacts) -> tuple[float, str]:
    wanted = facet.text
    if wanted in facts.negated or (facet.names and facet.names <= facts.negated):
        return 0.0, "the item rules it out"
    others: list[str] = []
    for name in facet.names:
        held = facts.attributes.get(name, frozenset())
        if wanted in held or any(_says(f" {value} ", wanted) for value in held):
            return FIELD, f"attribute {name!r}"
        others += sorted(held)
    if wanted in facts.values:
        return IN_TITLE, "value of another attribute"
    if _says(facts.title, wanted):
        return IN_TITLE, "title mentions it"
    if _says(facts.text, wanted):
        return IN_TEXT, "description mentions it"
    return (MISS, f"has {', '.join(others)!r}") if others else (UNKNOWN, "the item does not say")


def _term_relevance(facet: Facet, facts: ItemFacts) -> tuple[float, str]:
    word = facet.text
    if facet.negated and word in facts.negated:
        return 0.0, "the item rules it out"
    if word in facts.values or word == facts.brand or any(word in named.split() for named in facts.types):
        return FIELD, "a field says it"
    if word in facts.title_words:
        return IN_TITLE, "title mentions it"
    return (IN_TEXT, "description mentions it") if word in facts.counts else (MISS, "not mentioned")


_RELEVANCE = {
    "type": _type_relevance, "brand": _brand_relevance, "attribute": _attribute_relevance, "term": _term_relevance,
}  # fmt: skip
