"""Calibration of a judge's probabilities on graded pairs, after the cache: what it calls 80 % sure is to be right in 80 %."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from taoemb.catalog import Item, Query
from taoemb.config import from_dict
from taoemb.files import read_json, write_json
from taoemb.judge.schemes import LabelScheme, ScoreFn, scheme_of
from taoemb.judge.verdicts import fingerprint
from taoemb.types import JudgeOutput, RelevanceJudge

Method = Literal["temperature", "vector", "isotonic"]
Probs = npt.NDArray[np.float64]
MIN_PAIRS = 50
"""Fewer labelled pairs are refused; our choice."""
_FLOOR = 1e-6  # of a probability before its logarithm
_RIDGE = 1e-3  # on vector scaling, so that a label that is never seen keeps a finite bias; our choice
FORMAT = 1


@dataclass(frozen=True)
class Calibration:
    """A fitted map from label probabilities ``[N, C]`` to better ones.

    ``temperature``: ``softmax(log p / T)``; ``vector``: ``softmax(w * log p + b)`` with a weight and a bias for each label (both Guo et
    al., ICML 2017); ``isotonic``: for each label but the lowest, ``P(label >= k)`` through the rising step function that fits best
    (Zadrozny and Elkan, 2002), made to fall with k.
    """

    method: Method
    scheme: LabelScheme
    parameters: dict[str, list[Any]]

    @classmethod
    def fit(cls, probs_NC: npt.ArrayLike, labels_N: npt.ArrayLike, method: Method, scheme: LabelScheme) -> Calibration:
        """Fit on labels ``[N]`` (0 .. C - 1); rows of NaN are left out.

        Raises ValueError on fewer than 50 rows, on labels of one kind only or out of range, and on an unknown method.
        """
        if method not in get_args(Method):
            raise ValueError(f"calibration={method!r}: give one of {', '.join(get_args(Method))}")
        probs = np.asarray(probs_NC, dtype=np.float64).reshape(-1, len(scheme))
        labels = np.asarray(labels_N, dtype=np.int64)
        if len(labels) != len(probs):
            raise ValueError(f"{len(probs)} rows of probabilities, {len(labels)} labels: give one label for each")
        known = ~np.isnan(probs).any(1)
        probs, labels = probs[known], labels[known]
        if len(labels) < MIN_PAIRS:
            raise ValueError(f"{len(labels)} labelled pairs are too few to calibrate on; give at least {MIN_PAIRS}")
        if labels.min() < 0 or labels.max() >= len(scheme) or labels.min() == labels.max():
            raise ValueError(
                f"labels from {labels.min()} to {labels.max()}: give two kinds or more, from 0 to {len(scheme) - 1}"
            )
        fit = {"temperature": _fit_temperature, "vector": _fit_vector, "isotonic": _fit_isotonic}[method]
        return cls(method, scheme, fit(probs, labels))

    def __call__(self, probs_NC: npt.ArrayLike) -> Probs:
        """Calibrated probabilities ``[N, C]``; a row that holds NaN stays so."""
        probs = np.asarray(probs_NC, dtype=np.float64).reshape(-1, len(self.scheme))
        values = {name: np.array(value, dtype=np.float64) for name, value in self.parameters.items() if name != "steps"}
        if self.method == "temperature":
            found = _softmax(_log(probs) / values["temperature"])
        elif self.method == "vector":
            found = _softmax(_log(probs) * values["weights"] + values["biases"])
        else:
            found = self._isotonic(probs)
        found[np.isnan(probs).any(1)] = np.nan
        return found

    def _isotonic(self, probs: Probs) -> Probs:
        reached = _reached(probs)
        for k, (xs, ys) in enumerate(self.parameters["steps"]):
            reached[:, k] = np.interp(reached[:, k], xs, ys)
        reached = np.minimum.accumulate(reached, axis=1)
        edges = np.hstack([np.ones((len(probs), 1)), reached, np.zeros((len(probs), 1))])
        return edges[:, :-1] - edges[:, 1:]

    def save(self, file: str | Path) -> None:
        """Write it as JSON."""
        write_json(
            Path(file),
            {"format": FORMAT, "method": self.method, "scheme": asdict(self.scheme), "parameters": self.parameters},
        )

    @classmethod
    def load(cls, file: str | Path) -> Calibration:
        """Read `save`'s file; raises ValueError when it is none."""
        value = read_json(Path(file))
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ValueError(f"{file} is no calibration that this version reads")
        return cls(value["method"], from_dict(LabelScheme, value["scheme"]), value["parameters"])


class CalibratedJudge:
    """A judge with a calibration behind it. Raises ValueError when the two have different schemes."""

    def __init__(self, judge: RelevanceJudge, calibration: Calibration, score_fn: ScoreFn | None = None) -> None:
        self.judge, self.calibration, self.scheme = judge, calibration, scheme_of(judge)
        if self.scheme != calibration.scheme:
            raise ValueError(
                f"the judge's scheme is {self.scheme.name!r}, the calibration's {calibration.scheme.name!r}; fit it anew"
            )
        self.name = judge.name
        self.score_fn: ScoreFn = score_fn if score_fn is not None else getattr(judge, "score_fn", "expected")

    @property
    def fingerprint(self) -> str:
        """Changes with the judge and the calibration."""
        return fingerprint(self.judge.fingerprint, self.calibration.method, self.calibration.parameters, self.score_fn)

    def score(self, pairs: Sequence[tuple[Query, Item]]) -> JudgeOutput:
        """Judge ``N`` pairs."""
        found = self.judge.score(pairs)
        return self.scheme.output(self.calibration(found.probs), self.score_fn, found.label_mass)


def calibrate(
    judge: RelevanceJudge, pairs: Sequence[tuple[Query, Item]], labels_N: npt.ArrayLike, method: Method = "temperature"
) -> CalibratedJudge:
    """The judge, calibrated on labelled pairs (labels of its scheme, ``[N]``); raises ValueError as `Calibration.fit` does."""
    return CalibratedJudge(judge, Calibration.fit(judge.score(pairs).probs, labels_N, method, scheme_of(judge)))


def _log(probs: Probs) -> Probs:
    return np.asarray(np.log(np.maximum(probs, _FLOOR)))


def _softmax(logits: Probs) -> Probs:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def _reached(probs: Probs) -> Probs:
    """``P(label >= k)`` for k = 1 .. C - 1."""
    return probs[:, :0:-1].cumsum(1)[:, ::-1].copy()


def _fit_temperature(probs: Probs, labels: npt.NDArray[np.int64]) -> dict[str, list[Any]]:
    from scipy.optimize import minimize_scalar

    logs, rows = _log(probs), np.arange(len(labels))

    def cost(log_temperature: float) -> float:
        return float(-_log(_softmax(logs / np.exp(log_temperature)))[rows, labels].mean())

    best = minimize_scalar(cost, bounds=(-4.0, 4.0), method="bounded", options={"xatol": 1e-6})
    return {"temperature": [float(np.exp(best.x))]}


def _fit_vector(probs: Probs, labels: npt.NDArray[np.int64]) -> dict[str, list[Any]]:
    from scipy.optimize import minimize

    logs, C = _log(probs), probs.shape[1]
    targets = np.eye(C)[labels]

    def cost(parameters: Probs) -> tuple[float, Probs]:
        weights, biases = parameters[:C], parameters[C:]
        found = _softmax(logs * weights + biases)
        gap = (found - targets) / len(labels)
        penalty = _RIDGE * ((weights - 1) ** 2).sum() + _RIDGE * (biases**2).sum()
        value = -(targets * _log(found)).sum() / len(labels) + penalty
        gradient = np.concatenate([(gap * logs).sum(0) + 2 * _RIDGE * (weights - 1), gap.sum(0) + 2 * _RIDGE * biases])
        return float(value), gradient

    best = minimize(cost, np.concatenate([np.ones(C), np.zeros(C)]), jac=True, method="L-BFGS-B").x
    return {"weights": best[:C].tolist(), "biases": best[C:].tolist()}


def _fit_isotonic(probs: Probs, labels: npt.NDArray[np.int64]) -> dict[str, list[Any]]:
    from sklearn.isotonic import IsotonicRegression

    steps = []
    for k, reached in enumerate(_reached(probs).T, start=1):
        fitted = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(
            reached, (labels >= k).astype(float)
        )
        steps.append([fitted.X_thresholds_.tolist(), fitted.y_thresholds_.tolist()])
    return {"steps": steps}
