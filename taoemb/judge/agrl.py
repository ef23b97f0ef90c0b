"""TaoSR-AGRL (arXiv 2510.08048): rewards shaped by the rules, and guided replay of groups that are mostly wrong.

Published are the two ideas, without formulas or constants: dense rewards from intermediate steps and rule adherence behind a hard gate,
and ground-truth guidance for groups of low accuracy. The formulas and constants here are our design.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from taoemb.config import load_config
from taoemb.judge.chains import ParsedChain
from taoemb.judge.examples import GRADE_LINE, Example, Style
from taoemb.judge.schemes import GRADES_4, LabelScheme
from taoemb.shop_rules import ATTRIBUTE_VERDICTS, CATEGORY_VERDICTS, load_ontology
from taoemb.types import MAX_GRADE

Gate = Literal["hard", "soft", "none"]
HINT_LEVELS = 3
SOFT_GATE = 0.5
"""What is left of the rewards of a chain whose label does not follow from its own verdicts, by the soft gate."""


@dataclass(frozen=True)
class Lattice:
    """The rules by which a grade follows from the two verdicts of a chain.

    Raises ValueError unless every pair of verdicts has a grade.
    """

    grades: dict[str, dict[str, int]]
    """Category verdict -> attribute verdict -> grade 0 to 3."""

    def __post_init__(self) -> None:
        asked = [("grades", CATEGORY_VERDICTS, [*self.grades])]
        asked += [(f"grades.{category}", ATTRIBUTE_VERDICTS, [*of]) for category, of in self.grades.items()]
        for name, known, given in asked:
            if {*given} != {*known}:
                raise ValueError(f"{name}: {', '.join(given) or 'nothing'} given; give each of {', '.join(known)}")
        for category, of in self.grades.items():
            for attribute, grade in of.items():
                if not 0 <= grade <= MAX_GRADE:
                    raise ValueError(f"grades.{category}.{attribute}={grade}: give 0 to {MAX_GRADE}")

    @classmethod
    def load(cls, file: str | Path = "") -> Lattice:
        """From a YAML file with the key ``grades``; by default the generated shop's (``taoemb/shop/rules.yaml``).

        Raises FileNotFoundError, or ValueError for a file that says something else.
        """
        return load_config(cls, file) if str(file) else cls(load_ontology().rules["grades"])

    @cached_property
    def table(self) -> npt.NDArray[np.int64]:
        """Grades, ``[category verdict, attribute verdict]``."""
        return np.array([[self.grades[c][a] for a in ATTRIBUTE_VERDICTS] for c in CATEGORY_VERDICTS], dtype=np.int64)


@dataclass(frozen=True)
class ShapingConfig:
    """Reward of a chain: ``format * [readable] + gate * (label * [label right] + category * [verdict right] + attribute * [verdict right])``,
    by default TaoSR1's: 1 for the right label in a readable chain. Other constants are ours."""

    format: float = 0.0
    """Of a chain that can be read."""
    label: float = 1.0
    """Of the right label."""
    category: float = 0.0
    """Of the right category verdict."""
    attribute: float = 0.0
    """Of the right attribute verdict."""
    gate: Gate = "none"
    """What a chain earns whose label does not follow from its own verdicts by the rules: ``hard`` its format alone, ``soft`` half of the rest
    too, ``none`` all."""

    def __post_init__(self) -> None:
        if self.gate not in get_args(Gate):
            raise ValueError(f"gate={self.gate!r}: give one of {', '.join(get_args(Gate))}")
        for name in ("format", "label", "category", "attribute"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name}={getattr(self, name)}: give 0, for none, or a number greater than 0")
        if not self.label:
            raise ValueError("label=0: the label is what a judge is for; give it a weight")


@dataclass(frozen=True)
class ReplayConfig:
    """Guided replay. All constants are ours."""

    share: float = 0.0
    """Share of a group that hinted completions may replace, the worst first; 0: no replay."""
    accuracy: float = 0.125
    """Groups with at most this share of right labels are replayed."""
    weight: float = 1.0
    """Of the advantage of a hinted completion at the first step; it falls linearly to 0 at the last."""

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(
                f"share={self.share}: give 0, for no replay, or a share below 1: some completions stay its own"
            )
        for name in ("accuracy", "weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 0 to 1")


def shaped_rewards(
    chains: Sequence[ParsedChain], labels: Sequence[int], verdicts: Sequence[tuple[int | None, int | None]], table: npt.ArrayLike,
    config: ShapingConfig,
) -> npt.NDArray[np.float64]:  # fmt: skip
    """Reward of each of ``N`` chains, see `ShapingConfig`; 0 where a chain cannot be read.

    ``labels`` and ``verdicts`` (category, attribute; None where it is not known, which earns nothing) are the truth; ``table`` ``[category
    verdict, attribute verdict]`` holds labels: ``scheme.labels(Lattice.load().table)``.

    >>> rules = [[0, 0, 0], [0, 1, 2], [1, 2, 3]]
    >>> shaped_rewards([ParsedChain(2, 2, 3, True), ParsedChain(2, 0, 3, True)], [3, 3], [(2, 2)] * 2, rules, ShapingConfig(.1, gate="hard"))
    array([1.1, 0.1])
    """
    rules = np.asarray(table)
    rewards = np.zeros(len(chains))
    for n, (chain, label, (category, attribute)) in enumerate(zip(chains, labels, verdicts, strict=True)):
        if not chain.ok:
            continue
        earned = config.label * (chain.label == label)
        earned += config.category * (category is not None and chain.category == category)
        earned += config.attribute * (attribute is not None and chain.attribute == attribute)
        follows = rules[chain.category, chain.attribute] == chain.label
        rewards[n] = (
            config.format + (1.0 if follows else {"hard": 0.0, "soft": SOFT_GATE, "none": 1.0}[config.gate]) * earned
        )
    return rewards


def hint(example: Example, level: int, style: Style = "post", scheme: LabelScheme = GRADES_4) -> str:
    """The guidance of a level, 1 to `HINT_LEVELS`: the two verdicts; the label beside them; the whole completion. An example without
    verdicts begins with the label, one without reasons ends there.

    Raises ValueError for another level.
    """
    if not 1 <= level <= HINT_LEVELS:
        raise ValueError(f"level={level}: give 1 to {HINT_LEVELS}")
    if level == HINT_LEVELS and example.reasons:
        return example.completion(style, scheme)
    lines = []
    if example.category is not None and example.attribute is not None:
        lines += [
            f"Category: {CATEGORY_VERDICTS[example.category]}",
            f"Attributes: {ATTRIBUTE_VERDICTS[example.attribute]}",
        ]
    if level > 1 or not lines:
        lines.append(f"{GRADE_LINE} {scheme.answers[scheme.of_grade[example.grade]]}")
    return "\n".join(lines)
