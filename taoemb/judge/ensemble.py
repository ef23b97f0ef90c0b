"""Judges that join others: a plain mean, and an ensemble calibrated on human grades.

On small machines the strong judge on real text is the calibrated one: frozen encoders, lexical match and soft logic
as features of a multinomial logistic regression. Its probabilities are those of the grades it was fitted on (no class
weights), so pairs that are picked differently from those need a new fit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from taoemb.catalog import Item, Query
from taoemb.evaluation import evaluate
from taoemb.files import write_json
from taoemb.judge.features import PairFeatures
from taoemb.judge.verdicts import GRADES, fingerprint, output
from taoemb.types import MAX_GRADE, JudgeOutput, RelevanceJudge

MIN_PAIRS = 50
"""Fewer graded pairs are refused; our choice."""
FOLDS = 5
"""Folds of a cross-validation; a calibration needs at least as many queries."""
FORMAT = 1
_ARRAYS = ("mean", "scale", "coefficients", "intercepts")
Pairs = Sequence[tuple[Query, Item]]


class MeanJudge:
    """The weighted mean of the members' probabilities; a member that abstains is left out of the pair's mean.

    The judge to use where there are no grades to calibrate on. Raises ValueError when there are no members or a weight
    is not positive.
    """

    name = "mean"

    def __init__(self, members: Sequence[RelevanceJudge], weights: Sequence[float] | None = None) -> None:
        self.members = tuple(members)
        self.weights = tuple(weights) if weights is not None else (1.0,) * len(self.members)
        if not self.members or len(self.weights) != len(self.members) or min(self.weights) <= 0:
            raise ValueError(
                f"{len(self.members)} members, weights {self.weights}: give a member and a weight above 0 for each"
            )

    @property
    def fingerprint(self) -> str:
        """Changes with any member and the weights."""
        return fingerprint(self.name, self.weights, [member.fingerprint for member in self.members])

    def score(self, pairs: Pairs) -> JudgeOutput:
        """Judge ``N`` pairs; a pair on which every member abstains stays open."""
        probs = np.stack([np.asarray(member.score(pairs).probs, dtype=np.float64) for member in self.members])
        weight = np.asarray(self.weights)[:, None, None] * ~np.isnan(probs)
        total = weight.sum(axis=0)
        summed = (weight * np.nan_to_num(probs)).sum(axis=0)
        return output(np.divide(summed, total, out=np.full_like(summed, np.nan), where=total > 0))


@dataclass(frozen=True, slots=True)
class CrossValidation:
    """Scores on queries that the fit did not see.

    ``auc`` is the mean over queries of the AUC of grade 3 against grade 0 (NaN when no query has both),
    ``balanced_accuracy`` the mean recall of the grades, ``log_loss`` in nats, ``calibration_error`` the expected gap
    between the probability of the chosen grade and how often it is right (10 bins); ``scores`` ``[N]`` are the held-out
    relevances, ``folds`` ``[N]`` the fold of each pair.
    """

    auc: float
    balanced_accuracy: float
    log_loss: float
    calibration_error: float
    scores: npt.NDArray[np.float64]
    folds: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Model:
    """Standardisation and a softmax over the grades that were seen."""

    mean: npt.NDArray[np.float64]
    scale: npt.NDArray[np.float64]
    coefficients: npt.NDArray[np.float64]
    intercepts: npt.NDArray[np.float64]
    grades: npt.NDArray[np.int64]

    def probs(self, features: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        logits = (features - self.mean) / self.scale @ self.coefficients.T + self.intercepts
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        probs = np.zeros((len(features), GRADES))
        probs[:, self.grades] = shifted / shifted.sum(axis=1, keepdims=True)
        probs[np.isnan(features).any(axis=1)] = np.nan
        return probs


class EnsembleJudge:
    """Multinomial logistic regression on `PairFeatures`, fitted on human grades.

    ``regularization`` is scikit-learn's ``C`` on standardised features; .1 is our choice,
    because with tens of queries the features that are constant within a query overfit. A grade that the fit never saw
    keeps probability 0. `score` raises RuntimeError before `fit` or `load`.
    """

    name = "ensemble"

    def __init__(self, features: PairFeatures, regularization: float = 0.1) -> None:
        if not regularization > 0:
            raise ValueError(f"regularization={regularization!r} must be above 0")
        self.features, self.regularization = features, regularization
        self._model: _Model | None = None

    @property
    def fingerprint(self) -> str:
        """Changes with the features and the fitted coefficients."""
        model = self._fitted()
        return fingerprint(self.name, self.features.fingerprint, _to_json(model))

    @property
    def coefficients(self) -> dict[str, list[float]]:
        """Feature -> coefficient of each grade 0..3, on standardised features."""
        model = self._fitted()
        table = np.zeros((GRADES, len(self.features.names)))
        table[model.grades] = model.coefficients
        return {name: table[:, i].tolist() for i, name in enumerate(self.features.names)}

    def fit(self, pairs: Pairs, grades: Sequence[int]) -> EnsembleJudge:
        """Fit on graded pairs and return the judge.

        Raises ValueError on fewer than 50 usable pairs, grades outside 0..3, or a single grade.
        """
        _check_grades(pairs, grades)
        self._model = _fit(self.features.matrix(pairs), np.asarray(grades), self.regularization)
        return self

    def cross_validate(self, pairs: Pairs, grades: Sequence[int], folds: int = FOLDS) -> CrossValidation:
        """Fit on all folds but one, judge that one; a query is in one fold only. The judge itself stays as it is.

        Raises ValueError as `fit` does, and when there are fewer queries than folds.
        """
        _check_grades(pairs, grades)
        features, labels = self.features.matrix(pairs), np.asarray(grades)
        fold_of = _query_folds([query.id for query, _ in pairs], folds)
        probs = np.empty((len(pairs), GRADES))
        for fold in range(folds):
            held = fold_of == fold
            probs[held] = _fit(features[~held], labels[~held], self.regularization).probs(features[held])
        return _validate(pairs, labels, probs, fold_of)

    def score(self, pairs: Pairs) -> JudgeOutput:
        """Judge ``N`` pairs."""
        return output(self._fitted().probs(self.features.matrix(pairs)))

    def save(self, path: str | Path) -> None:
        """Write coefficients and feature names as JSON; the features themselves are rebuilt from the catalog."""
        value = {"format": FORMAT, "features": list(self.features.names), **_to_json(self._fitted())}
        write_json(Path(path), {**value, "regularization": self.regularization})

    @classmethod
    def load(cls, path: str | Path, features: PairFeatures) -> EnsembleJudge:
        """Read `save`'s file; raises ValueError when it was fitted on other features."""
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if value.get("format") != FORMAT:
            raise ValueError(f"{Path(path).name}: format {value.get('format')!r}, this version reads {FORMAT}")
        if tuple(value["features"]) != features.names:
            known = list(features.names)
            raise ValueError(f"{Path(path).name} was fitted on the features {value['features']}, not {known}")
        judge = cls(features, value["regularization"])
        mean, scale, coefficients, intercepts = (np.array(value[key], dtype=np.float64) for key in _ARRAYS)
        judge._model = _Model(mean, scale, coefficients, intercepts, np.array(value["grades"], dtype=np.int64))
        return judge

    def _fitted(self) -> _Model:
        if self._model is None:
            raise RuntimeError("the ensemble is not fitted: call fit(pairs, grades) or load a fit, or use MeanJudge")
        return self._model


def _to_json(model: _Model) -> dict[str, Any]:
    return {key: getattr(model, key).tolist() for key in (*_ARRAYS, "grades")}


def _check_grades(pairs: Pairs, grades: Sequence[int]) -> None:
    if len(pairs) != len(grades):
        raise ValueError(f"{len(pairs)} pairs but {len(grades)} grades")
    if len(pairs) < MIN_PAIRS:
        few = f"{len(pairs)} graded pairs are too few to calibrate on"
        raise ValueError(f"{few}; give at least {MIN_PAIRS} or use MeanJudge")
    odd = [grade for grade in grades if grade not in range(GRADES)]
    if odd:
        raise ValueError(f"grade {odd[0]!r}: use 0 to {MAX_GRADE}")


def _fit(features: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], regularization: float) -> _Model:
    from sklearn.linear_model import LogisticRegression

    usable = ~np.isnan(features).any(axis=1)
    features, labels = features[usable], labels[usable]
    seen = np.unique(labels)
    if len(seen) < 2:
        raise ValueError(f"the usable pairs have the grades {seen.tolist()} only; two different ones are needed")
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale[scale < 1e-9] = 1.0
    model = LogisticRegression(C=regularization, max_iter=1_000).fit((features - mean) / scale, labels)
    coefficients, intercepts = model.coef_, model.intercept_
    if len(seen) == 2:  # scikit-learn keeps one row for two classes; a softmax needs the other one too
        coefficients = np.vstack([np.zeros_like(coefficients), coefficients])
        intercepts = np.append(0.0, intercepts)
    return _Model(mean, scale, np.asarray(coefficients), np.asarray(intercepts), seen.astype(np.int64))


def _query_folds(query_ids: Sequence[str], folds: int) -> npt.NDArray[np.int64]:
    """Fold of each pair: queries, largest first, go to the fold that has the fewest pairs so far."""
    names, sizes = np.unique(query_ids, return_counts=True)
    if folds < 2 or len(names) < folds:
        raise ValueError(f"folds={folds} with {len(names)} queries: use 2 to {len(names)} folds")
    load = np.zeros(folds, dtype=np.int64)
    fold: dict[str, int] = {}
    for i in np.argsort(-sizes, kind="stable"):
        fold[str(names[i])] = int(load.argmin())
        load[fold[str(names[i])]] += sizes[i]
    return np.array([fold[query_id] for query_id in query_ids], dtype=np.int64)


def _validate(
    pairs: Pairs, labels: npt.NDArray[np.int64], probs: npt.NDArray[np.float64], folds: npt.NDArray[np.int64]
) -> CrossValidation:
    scores = probs @ (np.arange(GRADES) / MAX_GRADE)
    qrels: dict[str, dict[str, int]] = {}
    run: dict[str, dict[str, float]] = {}
    for (query, item), grade, score in zip(pairs, labels.tolist(), scores.tolist(), strict=True):
        if score == score:  # an abstention is no rank
            qrels.setdefault(query.id, {})[item.id] = grade
            run.setdefault(query.id, {})[item.id] = score
    usable = ~np.isnan(scores)
    labels, probs = labels[usable], probs[usable]
    chosen = probs.argmax(axis=1)
    sure, right = probs.max(axis=1), chosen == labels
    bins = np.minimum((sure * 10).astype(int), 9)
    gaps = [abs(sure[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return CrossValidation(
        auc=float(evaluate(run, qrels, metrics=("auc",), unjudged=None).mean()["auc"]),
        balanced_accuracy=float(np.mean([right[labels == grade].mean() for grade in np.unique(labels)])),
        log_loss=float(-np.log(np.maximum(probs[np.arange(len(labels)), labels], 1e-12)).mean()),
        calibration_error=float(np.sum(gaps)),
        scores=scores,
        folds=folds,
    )
