"""What a language model's written reasons are worth: pass@k, rule adherence, right steps with a wrong label.

A chain of reasons states a category verdict, an attribute verdict and a label; by the shop's rules the label follows from the
two verdicts (``label = table[category, attribute]``), so each step can be checked alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from taoemb.shop_rules import ATTRIBUTE_VERDICTS, CATEGORY_VERDICTS

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ParsedChain:
    """What was read out of a chain: positions in CATEGORY_VERDICTS and ATTRIBUTE_VERDICTS, and a label.

    ``ok`` says that all three were found; else the chain is a format failure, and what was found is not looked at.

    Raises ValueError when ``ok`` and one of them is missing or out of range.
    """

    category: int | None
    attribute: int | None
    label: int | None
    ok: bool

    def __post_init__(self) -> None:
        for name, value, size in (("category", self.category, len(CATEGORY_VERDICTS)),
                                  ("attribute", self.attribute, len(ATTRIBUTE_VERDICTS)),
                                  ("label", self.label, math.inf)):  # fmt: skip
            if self.ok and (value is None or not 0 <= value < size):
                raise ValueError(f"{name}={value!r} in a chain that is ok; give its number, from 0 on, or ok=False")


def pass_at_k(correct: npt.ArrayLike, k: int) -> float:
    """Chance that at least one of ``k`` answers is right, from ``n`` answers to each of ``N`` pairs, bool ``[N, n]``.

    The unbiased estimator ``mean_i 1 - C(n - c_i, k) / C(n, k)``, ``c_i`` right answers (Chen et al., arXiv 2107.03374).

    Raises ValueError without answers, for values that are not bool, and for ``k`` outside 1 to ``n``.

    >>> pass_at_k([[True, False, False, False]], 2)
    0.5
    """
    right = np.asarray(correct)
    if right.dtype != np.bool_ or right.ndim != 2 or not right.size:
        raise ValueError(
            f"correct is {right.dtype} of shape {right.shape}; give bool [pairs, answers], at least one of each"
        )
    n = right.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k={k} of {n} answers for each pair; give 1 to {n}")
    chance = np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)])
    return float(chance[right.sum(axis=1)].mean())


def format_failure(chains: Sequence[ParsedChain]) -> float:
    """Share of chains that are not ``ok``. Raises ValueError without chains."""
    if not chains:
        raise ValueError("there are no chains; give at least one")
    return sum(not chain.ok for chain in chains) / len(chains)


def rule_adherence(chains: Sequence[ParsedChain], table: npt.ArrayLike) -> float:
    """Share of the chains that could be read whose label follows from their own verdicts, right or wrong.

    ``table`` ``[category verdict, attribute verdict]`` holds labels: ``scheme.labels(ontology.grade_table)``. NaN when no chain
    could be read. Raises ValueError without chains or for another shape of table.

    >>> rules = [[0, 0, 0], [0, 1, 2], [1, 2, 3]]
    >>> rule_adherence([ParsedChain(2, 2, 3, True), ParsedChain(2, 0, 3, True)], rules)
    0.5
    """
    category, attribute, label = _read(chains).T
    return _mean(_rules(table)[category, attribute] == label)


def discriminative_hallucination(
    chains: Sequence[ParsedChain], true_category: npt.ArrayLike, true_attribute: npt.ArrayLike, table: npt.ArrayLike
) -> float:
    """Share of the chains that could be read whose verdicts are both right and whose label is wrong all the same.

    ``true_category`` and ``true_attribute`` are ``[N]``, aligned with ``chains``; the true label follows from them by ``table``
    (see `rule_adherence`). The name is that of TaoSR1 (arXiv 2508.12365). NaN when no chain could be read.

    Raises ValueError without chains, for other numbers of verdicts, verdicts out of range or another shape of table.
    """
    right, label, wanted = _against(chains, true_category, true_attribute, table)
    return _mean(right & (label != wanted))


def chain_metrics(
    chains: Sequence[ParsedChain], true_category: npt.ArrayLike, true_attribute: npt.ArrayLike, table: npt.ArrayLike
) -> dict[str, float]:
    """All of the above but pass@k, and ``step_accuracy``, the share of the chains that could be read with both verdicts right.

    Made for ``JudgeEvaluation.generated``. Raises ValueError as `discriminative_hallucination`.
    """
    right, _, _ = _against(chains, true_category, true_attribute, table)
    return {
        "format_failure": format_failure(chains),
        "step_accuracy": _mean(right),
        "rule_adherence": rule_adherence(chains, table),
        "discriminative_hallucination": discriminative_hallucination(chains, true_category, true_attribute, table),
    }


def _read(chains: Sequence[ParsedChain]) -> IntArray:
    """Category, attribute and label of the chains that are ok, ``[M, 3]``."""
    if not chains:
        raise ValueError("there are no chains; give at least one")
    rows = [(chain.category, chain.attribute, chain.label) for chain in chains if chain.ok]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def _rules(table: npt.ArrayLike) -> IntArray:
    rules = np.asarray(table, dtype=np.int64)
    wanted = (len(CATEGORY_VERDICTS), len(ATTRIBUTE_VERDICTS))
    if rules.shape != wanted:
        raise ValueError(f"table has shape {rules.shape}, not {wanted}; give scheme.labels(ontology.grade_table)")
    return rules


def _against(
    chains: Sequence[ParsedChain], true_category: npt.ArrayLike, true_attribute: npt.ArrayLike, table: npt.ArrayLike
) -> tuple[npt.NDArray[np.bool_], IntArray, IntArray]:
    """Of the chains that are ok: whether both verdicts are right, the label, the true label."""
    category, attribute, label = _read(chains).T
    true = np.array([np.asarray(true_category), np.asarray(true_attribute)])
    if true.shape != (2, len(chains)):
        raise ValueError(f"{len(chains)} chains but true verdicts of shape {true.shape[1:]}: give each chain both")
    sizes = np.array([[len(CATEGORY_VERDICTS)], [len(ATTRIBUTE_VERDICTS)]])
    if ((true < 0) | (true >= sizes)).any():
        raise ValueError("a true verdict is out of range; give positions in CATEGORY_VERDICTS and ATTRIBUTE_VERDICTS")
    true = true.astype(np.int64)[:, [chain.ok for chain in chains]]
    right = (category == true[0]) & (attribute == true[1])
    return right, label, _rules(table)[true[0], true[1]]


def _mean(values: npt.NDArray[np.bool_]) -> float:
    return float(values.mean()) if values.size else math.nan
