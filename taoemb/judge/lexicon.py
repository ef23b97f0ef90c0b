"""What a catalog talks about: types, brands, attribute values and how rare its words are.

Everything is mined from the catalog itself; no word list of a trade is built in.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from taoemb.catalog import Item, Items
from taoemb.judge.words import (
    NEGATES_NEXT,
    NO,
    STOP_WORDS,
    YES,
    attribute_values,
    category_names,
    codes,
    is_word,
    measured_words,
    negated_words,
    normal,
    phrase,
    surface_words,
    title_runs,
    words,
)

MAX_PHRASE_WORDS = 4
"""Longest brand, type or attribute value that is recognised in a query; our choice."""
MINED_ITEMS = 100_000
"""Vocabularies are mined from at most so many evenly spaced items; our choice."""
MIN_VALUE_SHARE, MIN_UNIT_SHARE, MAX_UNIT_LETTERS = 0.3, 0.7, 5
MIN_HEAD_SHARE, MIN_ALONE_SHARE, MAX_BRAND_SHARE, MIN_CATEGORY_SHARE = 0.4, 0.1, 0.9, 0.3
"""Thresholds of the mining, explained where they are used; our choice."""
_NO_HEADS = STOP_WORDS | NEGATES_NEXT | {"free"}


@dataclass(frozen=True, slots=True)
class ItemFacts:
    """One item as the judges read it; made once per item and cached."""

    item: Item
    title: str
    """Folded title words with a space around each, so that a phrase is found by ``in``."""
    title_words: frozenset[str]
    text: str
    """The same for description and attributes."""
    counts: Mapping[str, int]
    """Occurrences of each folded word in title, brand, category, attributes and description."""
    length: int
    types: tuple[str, ...]
    """What the item is: its category names and the head of its title."""
    brand: str
    attributes: Mapping[str, frozenset[str]]
    """Folded attribute name to its folded values; a switch that is on has its own name as value."""
    values: frozenset[str]
    negated: frozenset[str]
    """Words and switches that the item rules out: "without X", "X free", ``X: false``."""
    codes: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Mined:
    """One item while vocabularies are mined."""

    item: Item
    title: list[str]
    attributes: dict[str, frozenset[str]]


def _longest_end(run: Sequence[str], types: Collection[str]) -> list[str]:
    """The longest piece of 1 to 3 words at the end of a run that is a type; empty when none is."""
    ends = (run[-length:] for length in (3, 2, 1) if len(run) >= length)
    return next((list(end) for end in ends if " ".join(map(normal, end)) in types), [])


class Lexicon:
    """Types, brands, attribute values and document frequencies of a catalog.

    A *type* is what an item is called ("laser printer"): the names in ``category``, and the 1 to 3 words that end a run
    of plain words in the titles (`title_runs`) of enough items, of more than one brand, mostly of few categories,
    and often end one where they occur.
    Raises ValueError when there are no items.
    """

    def __init__(self, items: Items) -> None:
        if not len(items):
            raise ValueError("there are no items to mine words from")
        self.fingerprint = items_fingerprint(items)
        self.size = min(len(items), MINED_ITEMS)
        self.min_items = max(2, round(self.size / 5_000))
        """A type or value must be on so many items; our choice."""
        sample = []
        for item in self.sampled(items):
            sample.append(_Mined(item, surface_words(item.title), switches_and_values(item.attributes)[0]))
        self.brands = frozenset(phrase(b) for b in _column(items, "brand") if b and b.strip()) - {""}
        self._count_words(sample)
        self.values = self._mine_values(sample)
        self.breakers: frozenset[str] = self._value_words(sample) | self._units(sample)
        """Words that say how an item is or how much of it there is, never what it is."""
        self.types = self._mine_types(sample)

    @staticmethod
    def sampled(items: Items) -> Iterator[Item]:
        """The evenly spaced items that vocabularies are mined from."""
        positions = np.linspace(0, len(items) - 1, min(len(items), MINED_ITEMS)).astype(int)
        return (items[int(i)] for i in positions)

    def idf(self, word: str) -> float:
        """Inverse document frequency of a folded word, ``ln(1 + (N - n + 0.5) / (n + 0.5))`` as in BM25."""
        n = self._document_frequency.get(word, 0)
        return float(np.log1p((self.size - n + 0.5) / (n + 0.5)))

    def facts(self, item: Item) -> ItemFacts:
        """What the judges look up about one item."""
        attributes, off = switches_and_values(item.attributes)
        title, described, worded = words(item.title), words(item.description), _attribute_words(item)
        brand, named = phrase(item.brand), [phrase(name) for name in category_names(item.category)]
        counts = Counter([*title, *described, *worded, *brand.split(), *" ".join(named).split()])
        types = set(filter(None, [*named, phrase(self.title_head(item))]))
        specific = [t for t in types if not any(other.endswith(f" {t}") for other in types)]  # "desk lamp" over "lamp"
        return ItemFacts(
            item=item,
            title=f" {' '.join(title)} ",
            title_words=frozenset(title),
            text=f" {' '.join(described)} | {' '.join(worded)} ",
            counts=dict(counts),
            length=sum(counts.values()),
            types=tuple(sorted(specific)),
            brand=brand,
            attributes=attributes,
            values=frozenset().union(*attributes.values()),
            negated=off | negated_words(title) | negated_words(described),
            codes=codes(f"{item.title} {item.description}"),
        )

    def title_head(self, item: Item) -> str:
        """The type that a title names, as it is written there but in lower case; "" when it names none."""
        ends = (_longest_end(run, self.types) for run in title_runs(item, self.breakers))
        return " ".join(next(filter(None, ends), []))

    def _count_words(self, sample: Sequence[_Mined]) -> None:
        frequency: Counter[str] = Counter()
        length = 0
        for mined in sample:
            item = mined.item
            found = words(f"{item.title} {item.brand} {item.category} {item.description}") + _attribute_words(item)
            length += len(found)
            frequency.update(set(found))
        self._document_frequency = frequency
        self.mean_length = max(1.0, length / len(sample))

    def _mine_values(self, sample: Sequence[_Mined]) -> dict[str, frozenset[str]]:
        """Attribute value -> names of the attributes that usually (at least one time in five) hold it."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for mined in sample:
            for name, held in mined.attributes.items():
                for value in held:
                    counts[value][name] += 1
        values = {}
        self.switches = frozenset(value for value, names in counts.items() if names[value] == sum(names.values()))
        """Values that are names of attributes which are on or off."""
        for value, names in counts.items():
            parts = value.split()
            worded = len(parts) <= MAX_PHRASE_WORDS and any(is_word(w) and w not in STOP_WORDS for w in parts)
            if worded and max(names.values()) >= self.min_items and value not in self.brands:
                total = sum(names.values())
                values[value] = frozenset(name for name, count in names.items() if count >= 0.2 * total)
        return values

    @staticmethod
    def _value_words(sample: Sequence[_Mined]) -> frozenset[str]:
        """Words that, where a title holds them, are often a value of that item's attributes ("black")."""
        seen: Counter[str] = Counter()
        valued: Counter[str] = Counter()
        for mined in sample:
            title = set(map(normal, mined.title))
            cells = [value.split() for values in mined.attributes.values() for value in values]
            held = {word for cell in cells for word in (cell[:-1] or cell)}  # "rechargeable battery" ends with its noun
            seen.update(title)
            valued.update(title & held)
        return frozenset(word for word, count in valued.items() if count >= MIN_VALUE_SHARE * seen[word])

    @staticmethod
    def _units(sample: Sequence[_Mined]) -> frozenset[str]:
        """Short words that mostly follow a number ("gb", "mm", "pcs")."""
        seen: Counter[str] = Counter()
        counted: Counter[str] = Counter()
        for mined in sample:
            seen.update(map(normal, mined.title))
            measured = map(normal, measured_words(mined.item.title))
            counted.update(word for word in measured if len(word) <= MAX_UNIT_LETTERS)
        return frozenset(word for word, count in counted.items() if count >= MIN_UNIT_SHARE * seen[word])

    def _mine_types(self, sample: Sequence[_Mined]) -> dict[str, int]:
        """Type -> number of mined items that are named so."""
        brands: dict[str, Counter[str]] = defaultdict(Counter)
        categories: dict[str, Counter[str]] = defaultdict(Counter)
        anywhere: Counter[str] = Counter()
        runs_of = [[[normal(w) for w in run] for run in title_runs(m.item, self.breakers)] for m in sample]
        for mined, runs in zip(sample, runs_of, strict=True):
            anywhere.update({gram for run in runs for gram in _grams(run)})
            for end in {" ".join(run[-n:]) for run in runs for n in (1, 2, 3) if n <= len(run)}:
                brands[end][mined.item.brand] += 1
                categories[end][mined.item.category] += 1
        types: Counter[str] = Counter()
        for text, by_brand in brands.items():
            count = sum(by_brand.values())
            # a name that one brand alone uses is a product line, and one that is in every category is a property
            shared = not self.brands or max(by_brand.values()) <= MAX_BRAND_SHARE * count
            at_home = max(categories[text].values()) >= MIN_CATEGORY_SHARE * count
            heading = count >= self.min_items and count >= MIN_HEAD_SHARE * anywhere[text]
            named = len(text) > 2 and text not in self.brands and text.rpartition(" ")[2] not in _NO_HEADS
            if shared and at_home and heading and named:
                types[text] = count
        for text in _companions(runs_of, types):
            del types[text]
        for mined in sample:
            types.update(filter(None, map(phrase, category_names(mined.item.category))))
        return dict(types)


def _companions(runs_of: Sequence[Sequence[Sequence[str]]], types: Collection[str]) -> list[str]:
    """Single words that hardly ever are the only type in a title ("molded"): they describe the other one."""
    seen: Counter[str] = Counter()
    alone: Counter[str] = Counter()
    for runs in runs_of:
        ends = {end[-1] for run in runs if (end := _longest_end(run, types))}
        seen.update(ends)
        if len(ends) == 1:
            alone.update(ends)
    return [word for word, count in seen.items() if word in types and alone[word] < MIN_ALONE_SHARE * count]


def items_fingerprint(items: Items) -> str:
    """Hex digest of the item table; changes with any cell."""
    digest = hashlib.blake2b(str(items.table.schema.remove_metadata()).encode(), digest_size=16)
    for batch in items.table.replace_schema_metadata(None).to_batches(max_chunksize=65_536):
        digest.update(batch.serialize())
    return digest.hexdigest()


def switches_and_values(attributes: Mapping[str, str]) -> tuple[dict[str, frozenset[str]], frozenset[str]]:
    """Folded attribute name -> folded values, and the names of the switches that are off.

    >>> switches_and_values({"Colours": "red/blue", "Touchscreen": "true", "Fragrance": "none"})[1]
    frozenset({'fragrance'})
    """
    folded: dict[str, frozenset[str]] = {}
    off = set()
    for raw_name, raw in attributes.items():
        name, switch = phrase(raw_name), raw.strip().lower()
        if switch in NO:
            off.add(name)
        else:
            folded[name] = frozenset({name} if switch in YES else attribute_values(raw))
    return folded, frozenset(off)


def _attribute_words(item: Item) -> list[str]:
    return " ".join(f"{phrase(name)} {phrase(value)}" for name, value in item.attributes.items()).split()


def _column(items: Items, name: str) -> Iterable[str | None]:
    return items.table.column(name).unique().to_pylist() if name in items.table.column_names else ()


def _grams(run: Sequence[str]) -> Iterator[str]:
    for n in (1, 2, 3):
        for i in range(len(run) - n + 1):
            yield " ".join(run[i : i + n])
