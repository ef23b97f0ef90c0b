"""A generative step reward model (TaoSR-SHE, arXiv 2510.07972): a language model that is asked whether the last step of a chain is right.

That a model rewards the steps is published; what it is asked and how it is trained is our design: it learns from correct chains, and from chains in
which one line is that of another example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from taoemb.catalog import Item, Query
from taoemb.judge.causal import CausalJudge
from taoemb.judge.examples import Example


class StepJudge:
    """A `taoemb.judge.srpo.StepModel`. ``judge`` reads labels of two, the second for a right step."""

    def __init__(self, judge: CausalJudge) -> None:
        if len(judge.scheme) != 2:
            raise ValueError(
                f"a step is right or wrong, and the judge's scheme {judge.scheme.name!r} has {len(judge.scheme)} labels"
            )
        self.judge = judge

    def __call__(
        self, pairs: Sequence[tuple[Query, Item]], before: Sequence[str], steps: Sequence[str]
    ) -> list[float | None]:
        """The probability that each step is right; None where the model gives no number."""
        contexts = [begin + step for begin, step in zip(before, steps, strict=True)]
        right = self.judge.score(pairs, contexts).probs[:, 1]
        return [None if np.isnan(value) else float(value) for value in right]


def step_examples(examples: Sequence[Example], seed: int = 0) -> list[Example]:
    """One pair to learn from for each example with reasons: a correct chain up to a line drawn at random (grade 3), or in half of the
    cases the same with the line of that name of another example in its place (grade 0). Their context is the chain; for `JudgeTrainer` with
    ``scheme=step``.

    Raises ValueError when no example has reasons.
    """
    rng = np.random.default_rng([seed, 13])
    reasoned = [e for e in examples if e.reasons]
    if not reasoned:
        raise ValueError("no example has reasons to make steps of")
    lines = [e.reasons.splitlines() for e in reasoned]
    by_name: dict[str, list[str]] = {}
    for line in dict.fromkeys(line for chain in lines for line in chain):
        by_name.setdefault(line.partition(":")[0], []).append(line)
    found = []
    for example, chain in zip(reasoned, lines, strict=True):
        place = int(rng.integers(len(chain)))
        others = by_name[chain[place].partition(":")[0]]
        other = others[int(rng.integers(len(others)))]
        wrong = bool(rng.random() < 0.5) and other != chain[place]
        context = "\n".join([*chain[:place], other if wrong else chain[place]])
        found.append(
            replace(example, grade=0 if wrong else 3, category=None, attribute=None, reasons="", context=context)
        )
    return found
