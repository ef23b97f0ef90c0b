"""Surface text of the generated shop: what sellers write about items and what shoppers type."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from taoemb.shop_rules import Attribute, Intent, Ontology, ProductType, Truth, Value

T = TypeVar("T")


def pick(options: Sequence[T], u: float, skew: float = 1.0) -> T:
    """One of the options for a uniform ``u`` in [0, 1); ``skew`` above 1 prefers the first ones."""
    return options[int(u**skew * len(options))]


class Draws:
    """Uniform numbers in [0, 1), one after the other, from one row of a matrix."""

    __slots__ = ("_next",)

    def __init__(self, row: Sequence[float]) -> None:
        self._next: Callable[[], float] = iter(row).__next__

    def __call__(self) -> float:
        """The next number."""
        return self._next()


@dataclass(frozen=True, slots=True)
class ItemText:
    """The seller-facing columns of one item."""

    title: str
    description: str
    category: str
    brand: str
    attributes: str


class ItemWriter:
    """Writes the seller-facing text of items from their truth and random numbers."""

    def __init__(self, ontology: Ontology) -> None:
        self.ontology = ontology
        self.text = ontology.text
        self.shares: Mapping[str, float] = ontology.text["shares"]
        self.kinds = list(ontology.types.values())
        self.brands = ontology.brand_ids

    def write(self, truth: Truth, rows: Sequence[int], rng: np.random.Generator) -> Iterator[ItemText]:
        """Texts of some rows, in order."""
        uniforms = rng.random((len(rows), 40 + 12 * self.ontology.slots))  # more than the longest text needs
        for row, draws in zip(rows, uniforms, strict=True):
            kind = self.kinds[truth.types[row]]
            codes = truth.values[row, : len(kind.attributes)].tolist()
            yield self._item(kind, self.brands[truth.brands[row]], codes, Draws(draws.tolist()))

    def _item(self, kind: ProductType, brand: str, codes: Sequence[int], u: Draws) -> ItemText:
        share = self.shares
        title_forms: list[str] = []
        sentences: list[str] = []
        column: dict[str, str] = {}
        for (name, offered), code in zip(kind.attributes.items(), codes, strict=True):
            attribute = self.ontology.attributes[name]
            value = attribute.values[code]
            if u() < share["title_attribute"]:
                title_forms.append(pick(value.forms, u(), 1.5))
            if u() < share["description_attribute"]:
                sentences.append(self._sentence(attribute, value, u))
            if u() < share["column_attribute"]:
                seen = attribute.values[pick(offered, u())] if u() < share["wrong_attribute"] else value
                column[pick(attribute.labels, u(), 2)] = pick(seen.forms, u(), 1.3)
        named = u() < share["title_name"]
        title = self._title(kind, brand, title_forms, named, u)
        description = self._description(kind, sentences, named, u)
        return ItemText(title, description, self._category(kind, u), brand if u() < share["brand_column"] else "",
                        json.dumps(column, ensure_ascii=False) if column else "")  # fmt: skip

    def _title(self, kind: ProductType, brand: str, forms: list[str], named: bool, u: Draws) -> str:
        share, text = self.shares, self.text
        if u() < share["contradiction"]:
            name, offered = pick(list(kind.attributes.items()), u())
            forms.append(pick(self.ontology.attributes[name].values[pick(offered, u())].forms, u()))
        if u() < 0.5:
            forms.reverse()
        title = pick(text["titles"], u()).format(
            brand=brand if u() < share["title_brand"] or not named else "",
            name=pick(kind.names, u(), 1.4) if named else "",
            attributes=pick((" ", ", ", " "), u()).join(forms),
            code=_code(u()),
        )
        if u() < share["stuffing"]:
            others = [self.ontology.types[other].names[0] for other in kind.related]
            title += " " + pick(text["stuffing"], u()).format(names=" ".join(others))
        if u() < share["promotion"]:
            promotion = pick(text["promotions"], u())
            title = f"{promotion} {title}" if u() < 0.5 else f"{title} {promotion}"
        if u() < share["abbreviation"]:
            for long, short in text["abbreviations"].items():
                title = title.replace(f" {long} ", f" {short} ")
        title = _tidy(title)
        style = u()
        return title.upper() if style < 0.05 else string.capwords(title) if style < 0.45 else title

    def _description(self, kind: ProductType, sentences: list[str], named: bool, u: Draws) -> str:
        text = self.text
        parts = [pick(text["openings"], u())] if u() < 0.6 else []
        if not named or u() < self.shares["description_name"]:
            parts.append(pick(text["name_sentences"], u()).format(name=pick(kind.names, u())))
        parts += sentences if u() < 0.5 else sentences[::-1]
        if u() < 0.7:
            parts.append(pick(text["fillers"], u()))
        keep = not named or u() < self.shares["description"]
        return " ".join(parts) if keep else ""

    def _sentence(self, attribute: Attribute, value: Value, u: Draws) -> str:
        label, form = pick(attribute.labels, u()), pick(value.forms, u())
        template: str = pick(self.text["attribute_sentences"], u())
        return template.format(Label=_upper_first(label), form=form, Form=_upper_first(form))

    def _category(self, kind: ProductType, u: Draws) -> str:
        draw = u()
        if draw < self.shares["no_category"]:
            return ""
        if draw < self.shares["no_category"] + self.shares["wrong_category"]:
            kind = pick(self.kinds, u())
        return f"{kind.department} > {kind.family}"


def _code(u: float) -> str:
    number = int(u * 26 * 26 * 900)
    return f"{chr(65 + number % 26)}{chr(65 + number // 26 % 26)}-{100 + number // 676}"


def _upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def _tidy(text: str) -> str:
    """Remove what empty template fields leave behind."""
    text = " ".join(text.split())
    for before, after in ((" ,", ","), (",,", ","), ("| |", "|"), (" by -", " -")):
        text = text.replace(before, after)
    return text.strip(" ,|-")


_AFTER = ("for ", "with ", "in ", "without ", "against ", "from ", "contains ", "incl", "no ", "not ")


class QueryWriter:
    """Writes the text of a query for an intent and a slice."""

    def __init__(self, ontology: Ontology, rng: np.random.Generator) -> None:
        self.ontology, self.rng = ontology, rng
        self.templates: Mapping[str, Any] = ontology.text["queries"]
        self.typo_share: float = ontology.text["shares"]["typo"]

    def _pick(self, options: Sequence[T]) -> T:
        return options[int(self.rng.integers(len(options)))]

    def write(self, intent: Intent, slice_name: str) -> str:
        """One of many wordings."""
        kind = self.ontology.types[intent["type"]]
        name = self._pick(kind.names)
        forms = [self._pick(self._value(a, v[0]).forms) for a, v in intent.get("required", {}).items()]
        if slice_name == "negation":
            ((attribute, values),) = intent["excluded"].items()
            text = self._fill("negation", words=self._words(name, forms, intent), no=self._no(attribute, values[0]))
        elif slice_name == "alternatives":
            which = "other" if forms else "cheaper"
            text = self._fill(which, brand=intent["excluded_brand"], name=name, form=" ".join(forms))
        elif slice_name == "knowledge":
            need = self._pick(self.ontology.facts[intent["fact"]].says)
            text = self._fill("knowledge", words=self._words(name, forms, intent), need=need)
        elif slice_name == "question":
            (attribute, values), *_ = intent["required"].items()  # the first one is what the question asks for
            need = self._pick(self._value(attribute, values[0]).needs)
            text = self._fill("question", words=self._words(name, forms[1:], intent), need=need)
        else:
            text = self._words(name, forms, intent)
        text = " ".join(text.lower().split())
        return self._typo(text) if self.rng.random() < self.typo_share else text

    def _fill(self, template: str, **fields: str) -> str:
        return str(self._pick(self.templates[template])).format(**fields)

    def _value(self, attribute: str, value: str) -> Value:
        known = self.ontology.attributes[attribute]
        return known.values[known.codes([value])[0]]

    def _words(self, name: str, forms: Sequence[str], intent: Intent) -> str:
        before = [form for form in forms if not form.startswith(_AFTER) and self.rng.random() < 0.75]
        parts = [*before, name, *(form for form in forms if form not in before)]
        if "brand" in intent:
            parts.insert(0 if self.rng.random() < 0.8 else len(parts), intent["brand"])
        if "max_price" in intent:
            parts.append(self._pick(self.templates["price"]).format(price=f"{intent['max_price']:g}"))
        return " ".join(parts)

    def _no(self, attribute: str, value: str) -> str:
        known = self._value(attribute, value)
        if known.negations:
            return self._pick(known.negations)
        form = self._pick(known.forms)
        if form.startswith("with "):
            return f"without {form[5:]}"
        return f"{self._pick(('not', 'anything but', 'no'))} {form}"

    def _typo(self, text: str) -> str:
        spots = [i for i in range(1, len(text) - 2) if text[i : i + 2].isalpha()]
        if not spots:
            return text
        i = self._pick(spots)
        return text[:i] + text[i + 1] + text[i] + text[i + 2 :]
