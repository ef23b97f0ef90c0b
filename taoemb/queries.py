"""Training queries written from a catalog's own titles, brands, categories and attributes.

A shop with many items and few queries is the common case. Each draw takes a random item, a form and light noise, so
names that many items share come up often, as head queries do. The mix of forms, the noise and every number in this
module are our choice:

========== ===================================== =======================
form       example                               needs
========== ===================================== =======================
type       ``laser printer``                     a category, or titles that share words (see `Lexicon`)
brand type ``brother toner cartridge``           brands
attribute  ``black toner cartridge``             attribute values that several items share
phrase     ``wireless mouse``                    plain words that several titles share
brand      ``brother``                           brands
code       ``tn-2110``, ``brother tn-2110``      titles with model codes
fragment   ``toner cartridge original``          nothing: 1 to 5 neighbouring words of a title
========== ===================================== =======================

A form that an item has no words for falls back to a phrase, then to a fragment. Noise: another number (``printers``),
two words joined (``memorycard``), two letters swapped. Left out: questions, negations and synonyms, which need more
than a catalog.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from taoemb.catalog import Item, Items, Query, QuerySet
from taoemb.judge.lexicon import Lexicon, switches_and_values
from taoemb.judge.words import STOP_WORDS, category_names, is_word, normal, phrase, surface_words, title_runs

FORMS: Mapping[str, float] = {
    "type": 0.28, "brand type": 0.12, "attribute": 0.16, "phrase": 0.26, "brand": 0.03, "code": 0.05, "fragment": 0.1,
}  # fmt: skip
"""Share of the draws of each form (of distinct queries, short forms keep less: they repeat)."""
FRAGMENT_LENGTHS = {1: 0.1, 2: 0.42, 3: 0.3, 4: 0.13, 5: 0.05}
"""Share of the lengths of title fragments, in words."""
NUMBER_NOISE, JOIN_NOISE, SWAP_NOISE = 0.15, 0.03, 0.02
"""Chance of each noise per draw of the forms in `NOISY`."""
NOISY = frozenset({"type", "attribute", "phrase"})
VALUE_FIRST, VALUE_ALONE = 0.6, 0.15
"""Share of the attribute queries that say the value before the type, and that say nothing but the value."""
PATIENCE = 5_000
"""So many draws in a row without a new query mean that the catalog has no more to give."""


@dataclass(frozen=True)
class GeneratedQueries:
    """Queries (split ``train``, slice = form, frequency = draws) and their source items in the schema of ``clicks``."""

    queries: QuerySet
    clicks: pa.Table
    """``query_id``, ``item_id``, ``position`` (1 = drawn most often), ``clicks`` (times drawn)."""


@dataclass
class _Draft:
    """A query text while it is drawn."""

    form: str
    intent: dict[str, Any]
    sources: Counter[str] = field(default_factory=Counter)


def generate_queries(
    items: Items,
    n: int,
    seed: int = 0,
    *,
    forms: Mapping[str, float] = FORMS,
    noise: bool = True,
    allow_fewer: bool = False,
) -> GeneratedQueries:
    """Write ``n`` queries with distinct texts; the same items, ``n`` and seed give the same queries.

    ``forms`` weighs the forms of `FORMS`; ``noise=False`` leaves the words as the catalog has them. The ``intent`` of a
    query holds ``source`` (an item id) and, where the form knows them, ``type``, ``category``, ``brand`` and
    ``attributes``. With the same seed a smaller ``n`` gives the first of the same texts.

    Raises ValueError when ``n`` or ``forms`` make no sense, and when the catalog does not give ``n`` distinct queries
    (the message says how many it gives), unless ``allow_fewer`` and it gives at least one.
    """
    if n < 1:
        raise ValueError(f"n={n}: ask for at least 1 query")
    unknown = sorted(set(forms) - set(FORMS))
    if unknown or not any(weight > 0 for weight in forms.values()) or any(weight < 0 for weight in forms.values()):
        raise ValueError(f"forms={dict(forms)!r}: give weights of at least 0, one of them above, to some of {[*FORMS]}")
    writer = _Writer(items, random.Random(seed))
    names, weights = list(forms), list(forms.values())
    drafts: dict[str, _Draft] = {}
    idle = 0
    while len(drafts) < n and idle < PATIENCE:
        item = items[writer.random.randrange(len(items))]
        form, text, intent = writer.write(item, writer.random.choices(names, weights)[0], noise)
        idle += 1
        if text:
            if text not in drafts:
                drafts[text] = _Draft(form, {**intent, "source": item.id})
                idle = 0
            drafts[text].sources[item.id] += 1
    if len(drafts) < (1 if allow_fewer else n):
        raise ValueError(
            f"{len(items)} items give {len(drafts)} distinct queries (seed {seed}), not {n}; "
            f"ask for at most {len(drafts)} or add items"
        )
    return _collect(drafts)


def _collect(drafts: Mapping[str, _Draft]) -> GeneratedQueries:
    queries, clicks = [], []
    for number, (text, draft) in enumerate(drafts.items()):
        query_id = f"gen-{number:06d}"
        queries.append(Query(query_id, text, "train", draft.form, float(draft.sources.total()), draft.intent))
        ranked = draft.sources.most_common()
        clicks += [(query_id, item, position, count) for position, (item, count) in enumerate(ranked, start=1)]
    types = {"query_id": pa.string(), "item_id": pa.string(), "position": pa.int64(), "clicks": pa.int64()}
    columns = {name: pa.array([row[i] for row in clicks], kind) for i, (name, kind) in enumerate(types.items())}
    return GeneratedQueries(QuerySet(queries), pa.table(columns))


_Written = tuple[str, dict[str, Any]]


class _Writer:
    """Writes one query text for one item; every form returns "" when the item has no words for it."""

    def __init__(self, items: Items, rng: random.Random) -> None:
        self.lexicon, self.random = Lexicon(items), rng
        self._forms: dict[str, Callable[[Item], _Written]] = {
            "type": self._type, "brand type": self._brand_type, "attribute": self._attribute, "phrase": self._phrase,
            "brand": self._brand, "code": self._code, "fragment": self._fragment,
        }  # fmt: skip
        titles = Counter(text for item in self.lexicon.sampled(items) for text in set(self._phrases(item)))
        self._shared = frozenset(text for text, count in titles.items() if count >= self.lexicon.min_items)

    def write(self, item: Item, form: str, noise: bool) -> tuple[str, str, dict[str, Any]]:
        """Form, text and intent of one draw, with the form that was used in the end."""
        for tried in dict.fromkeys((form, "phrase", "fragment")):
            text, intent = self._forms[tried](item)
            if text:
                return tried, self._noisy(text) if noise and tried in NOISY else text, intent
        return form, "", {}

    def _type(self, item: Item) -> _Written:
        written = [" ".join(surface_words(name)) for name in category_names(item.category)[-2:]]
        named = list(filter(None, dict.fromkeys([*written, self.lexicon.title_head(item)])))
        if not named:
            return "", {}
        name = self.random.choice(named)
        intent = {"type": name}
        if item.category:
            intent["category"] = item.category
        return name, intent

    def _brand_type(self, item: Item) -> _Written:
        brand = " ".join(item.brand.lower().split())
        name, intent = self._type(item)
        if not brand or not name or phrase(brand) in phrase(name):
            return "", {}
        text = f"{brand} {name}" if self.random.random() < 0.85 else f"{name} {brand}"
        return text, {**intent, "brand": item.brand}

    def _brand(self, item: Item) -> _Written:
        brand = " ".join(item.brand.lower().split())
        return (brand, {"brand": item.brand}) if brand else ("", {})

    def _attribute(self, item: Item) -> _Written:
        name, intent = self._type(item)
        spoken = [
            (attribute, value)
            for attribute, values in switches_and_values(item.attributes)[0].items()
            for value in sorted(values)
            if value in self.lexicon.values and len(value.split()) <= 2 and len(value) <= 20
        ]
        # a value that the title or the type says too is what a shopper would say
        said = [pair for pair in spoken if f" {pair[1]} " in f" {phrase(item.title)} "]
        if not name or not spoken:
            return "", {}
        attribute, value = self.random.choice(said if said and self.random.random() < 0.7 else spoken)
        roll = self.random.random()
        if f" {value} " in f" {phrase(name)} " or roll < VALUE_ALONE:
            return value, {"attributes": {attribute: value}}
        text = f"{value} {name}" if roll < VALUE_ALONE + VALUE_FIRST else f"{name} {value}"
        return text, {**intent, "attributes": {attribute: value}}

    def _phrase(self, item: Item) -> _Written:
        shared = [text for text in self._phrases(item) if text in self._shared]
        return (self.random.choice(shared), {}) if shared else ("", {})

    def _phrases(self, item: Item) -> Iterator[str]:
        """Pieces of 1 to 3 plain words of a title that are not only values and units."""
        for run in title_runs(item, ()):
            for length in (1, 2, 3):
                for start in range(len(run) - length + 1):
                    piece = run[start : start + length]
                    named = any(len(w) > 2 and normal(w) not in self.lexicon.breakers for w in piece)
                    if named and not {piece[0], piece[-1]} & STOP_WORDS:
                        yield " ".join(piece)

    def _code(self, item: Item) -> _Written:
        pieces = [piece.strip("()[],;:.\"'").lower() for piece in item.title.split()]
        found = [p for p in pieces if len(p) <= 16 and _is_model_code(p)]
        if not found:
            return "", {}
        code, brand = found[0], " ".join(item.brand.lower().split())
        return (f"{brand} {code}", {"brand": item.brand}) if brand and self.random.random() < 0.5 else (code, {})

    def _fragment(self, item: Item) -> _Written:
        title = surface_words(item.title)
        length = self.random.choices(list(FRAGMENT_LENGTHS), list(FRAGMENT_LENGTHS.values()))[0]
        starts = [
            start
            for start in range(max(1, len(title) - length + 1))
            if (piece := title[start : start + length])
            and piece[0] not in STOP_WORDS
            and piece[-1] not in STOP_WORDS
            and any(is_word(w) and len(w) > 2 for w in piece)
        ]
        if not starts:  # a title of codes and numbers
            return " ".join(title[: max(FRAGMENT_LENGTHS)]), {}
        start = self.random.choice(starts)
        return " ".join(title[start : start + length]), {}

    def _noisy(self, text: str) -> str:
        parts = text.split()
        roll = self.random.random()
        if roll < NUMBER_NOISE and is_word(parts[-1]) and len(parts[-1]) > 2:
            parts[-1] = _other_number(parts[-1])
        elif NUMBER_NOISE <= roll < NUMBER_NOISE + JOIN_NOISE and len(parts) > 1 and is_word(parts[-1]):
            parts[-2:] = [parts[-2] + parts[-1]]
        elif roll >= 1 - SWAP_NOISE and len(parts[-1]) > 4 and is_word(parts[-1]):
            i = self.random.randrange(1, len(parts[-1]) - 2)
            word = parts[-1]
            parts[-1] = word[:i] + word[i + 1] + word[i] + word[i + 2 :]
        return " ".join(parts)


def _is_model_code(piece: str) -> bool:
    """At least 2 digits and a letter, and neither "500-sheet" nor "1280x800"."""
    digits = sum(c.isdigit() for c in piece)
    return (
        digits >= 2
        and len(piece) >= 5
        and any(c.isalpha() for c in piece)
        and re.fullmatch(r"[\d.,]+[-x]?([^\W\d_]+|[\d.,]+)", piece) is None
    )


def _other_number(word: str) -> str:
    """The plural of a singular and the other way round, by the rules of English spelling."""
    if normal(word) != word:
        return normal(word)
    if word.endswith("s") and not word.endswith("ss"):
        return word
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("ss", "x", "ch", "sh")) else "s")
