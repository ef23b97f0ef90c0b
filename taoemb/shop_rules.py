"""The ontology of the generated shop and the rules that grade every (query, item) pair exactly.

An *intent* is what a query means, in truth vocabulary (every key but ``type`` may be missing)::

    {"type": "face_cream",                                # wanted product type
     "brand": "Veloura", "excluded_brand": "Glowry",      # hard
     "max_price": 20.0,                                   # hard: the price must be below it
     "required": {"skin_type": ["dry"]},                  # soft: one of the values of each attribute
     "excluded": {"fragrance": ["scented"]},              # hard: none of the values
     "fact": "baby_skin"}                                 # soft: knowledge that the ontology resolves to values

Category verdict: exact | related | mismatch. Attribute verdict: violated when a hard constraint fails or fewer than
``partial_share`` of the soft ones hold, match when all hold, else partial. The grade is looked up in ``rules.yaml``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import yaml

Intent = Mapping[str, Any]
IntArray = npt.NDArray[np.int64]

CATEGORY_VERDICTS = ("mismatch", "related", "exact")
ATTRIBUTE_VERDICTS = ("violated", "partial", "match")
INTENT_KEYS = ("type", "brand", "excluded_brand", "max_price", "required", "excluded", "fact")
ONTOLOGY_FOLDER = Path(__file__).parent / "shop"


@dataclass(frozen=True, slots=True)
class Value:
    """One value of an attribute: its surface forms, how shoppers negate it and how they ask for it."""

    id: str
    forms: tuple[str, ...]
    negations: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Attribute:
    """A property of items; the position of a value in ``values`` is its code."""

    id: str
    labels: tuple[str, ...]
    values: tuple[Value, ...]

    def codes(self, values: Sequence[str]) -> list[int]:
        """Codes of value ids; raises ValueError that names an unknown one."""
        known = [value.id for value in self.values]
        unknown = [value for value in values if value not in known]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no value of attribute {self.id!r}; its values are {known}")
        return [known.index(value) for value in values]


@dataclass(frozen=True, slots=True)
class ProductType:
    """A kind of product; ``attributes`` maps attribute ids to the codes of the values it comes in."""

    id: str
    department: str
    family: str
    names: tuple[str, ...]
    related: tuple[str, ...]
    price: tuple[float, float]
    attributes: dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Fact:
    """World knowledge: for each type, the attribute and the value codes that satisfy ``says``."""

    id: str
    says: tuple[str, ...]
    holds: dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Ontology:
    """Everything the YAML files say, checked."""

    types: dict[str, ProductType]
    attributes: dict[str, Attribute]
    brands: dict[str, dict[str, str]]
    """department -> brand -> tier"""
    facts: dict[str, Fact]
    rules: dict[str, Any]
    text: dict[str, Any]

    @cached_property
    def type_ids(self) -> list[str]:
        """Type ids; the position is the code."""
        return list(self.types)

    @cached_property
    def brand_ids(self) -> list[str]:
        """Brands of all departments; the position is the code."""
        return [brand for brands in self.brands.values() for brand in brands]

    @cached_property
    def slots(self) -> int:
        """The largest number of attributes that a type has."""
        return max(len(kind.attributes) for kind in self.types.values())

    @cached_property
    def slot_of(self) -> dict[str, npt.NDArray[np.int8]]:
        """Attribute id -> for each type code the slot that holds it, -1 where the type lacks it."""
        table = {a: np.full(len(self.types), -1, np.int8) for a in self.attributes}
        for code, kind in enumerate(self.types.values()):
            for slot, attribute in enumerate(kind.attributes):
                table[attribute][code] = slot
        return table

    @cached_property
    def grade_table(self) -> npt.NDArray[np.int8]:
        """``[category verdict, attribute verdict]`` -> grade."""
        grades = self.rules["grades"]
        return np.array([[grades[c][a] for a in ATTRIBUTE_VERDICTS] for c in CATEGORY_VERDICTS], np.int8)

    def check_intent(self, intent: Intent) -> None:
        """Raise ValueError when an intent uses a key, type, brand, attribute, value or fact that does not exist."""
        unknown = [key for key in intent if key not in INTENT_KEYS]
        if unknown:
            raise ValueError(f"intent key {unknown[0]!r} is unknown; use {INTENT_KEYS}")
        _known(intent.get("type"), self.types, "type")
        for key in ("brand", "excluded_brand"):
            if key in intent:
                _known(intent[key], self.brand_ids, "brand")
        if "fact" in intent:
            _known(intent["fact"], self.facts, "fact")
        for key in ("required", "excluded"):
            for attribute, values in intent.get(key, {}).items():
                _known(attribute, self.attributes, "attribute")
                self.attributes[attribute].codes(values)


def _known(name: Any, among: Collection[str], what: str) -> None:
    if name not in among:
        example = next(iter(among))
        raise ValueError(f"{name!r} is no {what} of the shop's ontology ({len(among)} known, such as {example!r})")


@lru_cache(maxsize=4)
def load_ontology(folder: Path = ONTOLOGY_FOLDER) -> Ontology:
    """Read and check the YAML files of a folder; raises ValueError that names the entry which does not resolve."""
    files = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.yaml"))}
    missing = [name for name in ("rules", "text", "common") if name not in files]
    if missing:
        raise ValueError(f"{folder} holds no {missing[0]}.yaml; an ontology needs rules, text, common and departments")
    rules, text = files.pop("rules"), files.pop("text")
    raw: dict[str, dict[str, Any]] = {"attributes": {}, "types": {}, "facts": {}}
    brands: dict[str, dict[str, str]] = {}
    for name, content in files.items():
        for kind, entries in raw.items():
            for entry, value in content.get(kind, {}).items():
                if entry in entries:
                    raise ValueError(f"{name}.yaml: {kind[:-1]} {entry!r} is defined twice")
                entries[entry] = {**value, "department": content.get("department", "")}
        if "department" in content:
            brands[content["department"]] = content["brands"]
    attributes = {name: _attribute(name, entry) for name, entry in raw["attributes"].items()}
    types = {name: _type(name, entry, attributes) for name, entry in raw["types"].items()}
    facts = {name: _fact(name, entry, types, attributes) for name, entry in raw["facts"].items()}
    _check_references(types, brands, rules)
    return Ontology(types, attributes, brands, facts, rules, text)


def _attribute(name: str, entry: Mapping[str, Any]) -> Attribute:
    values, seen = [], set[str]()
    for value, content in entry["values"].items():
        content = {"forms": content} if isinstance(content, list) else content
        for form in content["forms"]:
            if form.lower() in seen:
                raise ValueError(f"attribute {name!r}: the form {form!r} stands for two values")
            seen.add(form.lower())
        values.append(
            Value(value, tuple(content["forms"]), tuple(content.get("not", ())), tuple(content.get("ask", ())))
        )
    return Attribute(name, tuple(entry["labels"]), tuple(values))


def _type(name: str, entry: Mapping[str, Any], attributes: Mapping[str, Attribute]) -> ProductType:
    offered: dict[str, tuple[int, ...]] = {}
    for attribute, values in entry["attributes"].items():
        if attribute not in attributes:
            raise ValueError(f"type {name!r}: attribute {attribute!r} is not defined")
        known = attributes[attribute]
        offered[attribute] = tuple(range(len(known.values))) if values == "all" else tuple(known.codes(values))
    if not offered:
        raise ValueError(f"type {name!r} has no attributes")
    low, high = entry["price"]
    return ProductType(name, entry["department"], entry["family"], tuple(entry["names"]), tuple(entry["related"]),
                       (float(low), float(high)), offered)  # fmt: skip


def _fact(
    name: str, entry: Mapping[str, Any], types: Mapping[str, ProductType], attributes: Mapping[str, Attribute]
) -> Fact:
    holds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for rule in entry["holds"]:
        for kind in rule["types"]:
            if kind not in types or rule["attribute"] not in types[kind].attributes:
                raise ValueError(f"fact {name!r}: {kind!r} is no type with attribute {rule['attribute']!r}")
            holds[kind] = (rule["attribute"], tuple(attributes[rule["attribute"]].codes(rule["values"])))
    return Fact(name, tuple(entry["says"]), holds)


def _check_references(
    types: Mapping[str, ProductType], brands: Mapping[str, Mapping[str, str]], rules: Mapping[str, Any]
) -> None:
    names = dict[str, str]()
    for kind in types.values():
        for other in kind.related:
            if other not in types or other == kind.id:
                raise ValueError(f"type {kind.id!r}: related type {other!r} is not defined")
        for name in kind.names:
            if names.setdefault(name.lower(), kind.id) != kind.id:
                raise ValueError(f"the name {name!r} stands for the types {names[name.lower()]!r} and {kind.id!r}")
    seen = set[str]()
    for department, tiers in brands.items():
        for brand, tier in tiers.items():
            if tier not in rules["tiers"] or brand in seen:
                raise ValueError(f"{department}: brand {brand!r} is defined twice or has the unknown tier {tier!r}")
            seen.add(brand)


@dataclass(frozen=True)
class Truth:
    """What the items really are, ``N`` rows in catalog order.

    ``types`` and ``brands`` are codes ``[N]``, ``price`` is ``[N]``, ``values`` ``[N, slots]`` holds the value code of
    each attribute of the item's type (-1 where the type has fewer attributes).
    """

    ontology: Ontology
    types: npt.NDArray[np.int16]
    brands: npt.NDArray[np.int16]
    price: npt.NDArray[np.float64]
    values: npt.NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.types)

    @cached_property
    def _by_type(self) -> list[IntArray]:
        order = np.argsort(self.types, kind="stable").astype(np.int64)
        edges = np.searchsorted(self.types[order], np.arange(len(self.ontology.types) + 1))
        return [order[edges[t] : edges[t + 1]] for t in range(len(self.ontology.types))]

    def rows_of(self, types: Sequence[str]) -> IntArray:
        """Rows of the items of some types, rising."""
        codes = [self.ontology.type_ids.index(kind) for kind in types]
        return np.sort(np.concatenate([self._by_type[code] for code in codes]))

    def attributes(self, row: int) -> dict[str, str]:
        """Attribute id -> value id of one item."""
        kind = self.ontology.types[self.ontology.type_ids[self.types[row]]]
        return {
            name: self.ontology.attributes[name].values[self.values[row, slot]].id
            for slot, name in enumerate(kind.attributes)
        }

    def to_table(self, ids: Sequence[str]) -> pa.Table:
        """The columns id, type, brand, price and attributes (JSON object: attribute id -> value id)."""
        types, brands = np.array(self.ontology.type_ids), np.array(self.ontology.brand_ids)
        return pa.table({
            "id": pa.array(ids, pa.string()),
            "type": pa.array(types[self.types], pa.string()),
            "brand": pa.array(brands[self.brands], pa.string()),
            "price": self.price,
            "attributes": pa.array((json.dumps(self.attributes(i)) for i in range(len(self))), pa.string()),
        })  # fmt: skip

    @classmethod
    def from_table(cls, table: pa.Table, ontology: Ontology | None = None) -> Truth:
        """The inverse of `to_table`; raises ValueError on a type, brand, attribute or value the ontology lacks."""
        ontology = ontology or load_ontology()
        kinds, brands = table.column("type").to_pylist(), table.column("brand").to_pylist()
        for name, among, what in [*((k, ontology.types, "type") for k in sorted(set(kinds))),
                                  *((b, ontology.brand_ids, "brand") for b in sorted(set(brands)))]:  # fmt: skip
            _known(name, among, what)
        type_code = {name: i for i, name in enumerate(ontology.type_ids)}
        brand_code = {name: i for i, name in enumerate(ontology.brand_ids)}
        values = np.full((table.num_rows, ontology.slots), -1, np.int8)
        for row, (kind, text) in enumerate(zip(kinds, table.column("attributes").to_pylist(), strict=True)):
            for name, value in json.loads(text).items():
                _known(name, ontology.attributes, "attribute")
                values[row, ontology.slot_of[name][type_code[kind]]] = ontology.attributes[name].codes([value])[0]
        return cls(ontology, np.array([type_code[k] for k in kinds], np.int16),
                   np.array([brand_code[b] for b in brands], np.int16),
                   table.column("price").to_numpy().astype(np.float64), values)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Verdicts on ``M`` items, int8 ``[M]``: positions in CATEGORY_VERDICTS and ATTRIBUTE_VERDICTS, grade 0..3."""

    category: npt.NDArray[np.int8]
    attribute: npt.NDArray[np.int8]
    grade: npt.NDArray[np.int8]


def verdicts(intent: Intent, truth: Truth, rows: IntArray | None = None) -> Verdicts:
    """Judge the items of ``rows`` (all by default) for an intent; raises ValueError when it does not resolve."""
    ontology = truth.ontology
    ontology.check_intent(intent)
    rows = np.arange(len(truth), dtype=np.int64) if rows is None else rows
    types = truth.types[rows]
    wanted = ontology.types[intent["type"]]
    related = [ontology.type_ids.index(name) for name in wanted.related]
    category = np.where(types == ontology.type_ids.index(wanted.id), 2, np.isin(types, related)).astype(np.int8)

    hard = np.ones(len(rows), bool)
    for attribute, values in intent.get("excluded", {}).items():
        hard &= ~_has(truth, rows, attribute, ontology.attributes[attribute].codes(values))
    if "brand" in intent:
        hard &= truth.brands[rows] == ontology.brand_ids.index(intent["brand"])
    if "excluded_brand" in intent:
        hard &= truth.brands[rows] != ontology.brand_ids.index(intent["excluded_brand"])
    if "max_price" in intent:
        hard &= truth.price[rows] < intent["max_price"]

    soft = list(_soft(intent, truth, rows))
    share = np.mean(soft, axis=0) if soft else np.ones(len(rows))
    attribute_verdict = np.where(share == 1, 2, share >= ontology.rules["partial_share"]).astype(np.int8)
    attribute_verdict[~hard] = 0
    return Verdicts(category, attribute_verdict, ontology.grade_table[category, attribute_verdict])


def _soft(intent: Intent, truth: Truth, rows: IntArray) -> Iterator[npt.NDArray[np.bool_]]:
    ontology = truth.ontology
    for attribute, values in intent.get("required", {}).items():
        yield _has(truth, rows, attribute, ontology.attributes[attribute].codes(values))
    if "fact" in intent:
        holds = np.zeros(len(rows), bool)
        for kind, (attribute, codes) in ontology.facts[intent["fact"]].holds.items():
            mine = truth.types[rows] == ontology.type_ids.index(kind)
            holds[mine] = _has(truth, rows[mine], attribute, codes)
        yield holds


def _has(truth: Truth, rows: IntArray, attribute: str, codes: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Whether the items have one of the values; False where their type lacks the attribute."""
    slot = truth.ontology.slot_of[attribute][truth.types[rows]]
    return (slot >= 0) & np.isin(truth.values[rows, slot], list(codes))
