"""What a user tells a `SoftLogicJudge`: verdicts on facets that take precedence over its rules, and weights of facets.

The idea is that of EBRM (arXiv 2307.00370, section on interventions): relevance is made of relations between facets of the
query and entities of the item, so a wrong verdict can be read, traced to one relation and corrected there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from taoemb.config import load_config
from taoemb.judge.lexicon import MAX_PHRASE_WORDS
from taoemb.judge.words import phrase

T = TypeVar("T")
KINDS = ("type", "brand", "attribute", "term")


@dataclass(frozen=True)
class Interventions:
    """Relations and weights; words are folded as everywhere ("Sneakers" is "sneaker").

    A facet is named as `SoftLogicJudge.explain` names it, ``kind:text`` with the kind type, brand, attribute or term, and is
    never negated: a query that rules it out counts one minus its relevance. The facets named here are known in queries even
    where the catalog does not speak of them, so a synonym is a relation.

    Raises ValueError that names the key when a facet, an entity or a number is not one.

    >>> told = Interventions({"type:sneakers": {"running shoe": 0.9}}, {"brand": 0.5, "attribute:vegan": 2})
    >>> told.relations_of("type:sneaker"), told.weight_of("brand:acme"), told.weight_of("type:sneaker")
    ({'running shoe': 0.9}, 0.5, None)
    """

    relations: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Facet -> entity -> relevance in [0, 1]. The facet holds to that degree for items that have the entity: a type, a brand, an
    attribute value or any phrase of the item. Where an item has several of them, the highest counts (max over entities)."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Facet, or kind of facets -> exponent in the product, 0 or more, in the place of `soft_logic.WEIGHTS`; the facet's own
    goes before its kind's. 0: as if the query did not say it."""

    def __post_init__(self) -> None:
        relations = {}
        for label, told in self.relations.items():
            key = f"relations.{label}"
            entities = {e: (phrase(e), _number(f"{key}.{e}", value, 1.0)) for e, value in told.items()}
            relations[label] = (_facet(key, label), _folded(key, entities))
        weights = {}
        for label, value in self.weights.items():
            key = f"weights.{label}"
            weights[label] = (label if label in KINDS else _facet(key, label), _number(key, value, math.inf))
        object.__setattr__(self, "relations", _folded("relations", relations))
        object.__setattr__(self, "weights", _folded("weights", weights))

    @classmethod
    def load(cls, path: str | Path) -> Interventions:
        """Read a YAML file with the keys ``relations`` and ``weights``, both of which may be missing:

        .. code-block:: yaml

            relations:
              type:sneaker:
                running shoe: 0.9
                sandal: 0
            weights:
              brand: 0.5

        Raises ConfigError, a ValueError, that names the key where one is unknown, given twice or has a wrong value, and
        FileNotFoundError.
        """
        return load_config(cls, path)

    def __bool__(self) -> bool:
        return bool(self.relations or self.weights)

    def parts(self) -> tuple[object, ...]:
        """What a fingerprint is made of; the order in which things were told does not matter."""
        relations = sorted((label, sorted(told.items())) for label, told in self.relations.items())
        return relations, sorted(self.weights.items())

    def named(self, kind: str) -> Iterator[str]:
        """The texts of the facets of a kind that are named."""
        labels = (label.partition(":") for label in [*self.relations, *self.weights])
        return (text for found, _, text in labels if found == kind and text)

    def relations_of(self, label: str) -> Mapping[str, float]:
        """Entity -> relevance of a facet; empty where nothing is told."""
        return self.relations.get(label, {})

    def weight_of(self, label: str) -> float | None:
        """The weight of a facet or else of its kind; None where nothing is told."""
        return self.weights.get(label, self.weights.get(label.partition(":")[0]))


def _facet(key: str, label: str) -> str:
    kind, colon, raw = label.partition(":")
    text = phrase(raw)
    most = 1 if kind == "term" else MAX_PHRASE_WORDS
    if kind not in KINDS or not colon:
        raise ValueError(
            f"{key}: {label!r} is no facet; give KIND:TEXT with the kind {', '.join(KINDS)}, such as type:laptop"
        )
    if raw.lower().split()[:1] == ["not"]:
        raise ValueError(
            f"{key}: give the facet without 'not'; a query that rules it out counts one minus its relevance"
        )
    if not 1 <= len(text.split()) <= most:
        raise ValueError(f"{key}: {label!r} has {len(text.split())} words; a facet of kind {kind} has 1 to {most}")
    return f"{kind}:{text}"


def _folded(key: str, entries: Mapping[str, tuple[str, T]]) -> dict[str, T]:
    """The values by their folded names; ``entries`` holds both by the name that was given."""
    found: dict[str, T] = {}
    for given, (name, value) in entries.items():
        if not name:
            raise ValueError(f"{key}: {given!r} holds no word")
        if name in found:
            raise ValueError(f"{key}: {given!r} is given twice (it is read as {name!r})")
        found[name] = value
    return found


def _number(key: str, value: Any, most: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= most or math.isinf(value):
        raise ValueError(f"{key} is {value!r}; give a number {'from 0 to 1' if most == 1.0 else 'of 0 or more'}")
    return float(value)
