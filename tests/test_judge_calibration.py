"""Calibrations against the truth that made the data, scikit-learn, and a grid."""

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from taoemb.catalog import Item, Query
from taoemb.judge import CalibratedJudge, calibrate
from taoemb.judge.calibration import Calibration
from taoemb.judge.schemes import BINARY, GRADES_4


def softmax(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


@pytest.fixture(scope="module")
def data():
    """True logits, labels drawn from them, and probabilities that are too sure and lean to the top."""
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=1.5, size=(6000, 4))
    labels = (softmax(logits).cumsum(1) > rng.random((6000, 1))).argmax(1)
    return logits, labels


def loss(probs, labels):
    return -np.log(np.maximum(probs[np.arange(len(labels)), labels], 1e-12)).mean()


def test_temperature_finds_how_much_too_sure_it_is(data):
    logits, labels = data
    fitted = Calibration.fit(softmax(2.5 * logits), labels, "temperature", GRADES_4)
    assert fitted.parameters["temperature"][0] == pytest.approx(2.5, rel=0.08)
    probs = softmax(2.5 * logits)
    grid = [loss(softmax(np.log(np.maximum(probs, 1e-6)) / t), labels) for t in np.linspace(1, 5, 401)]
    assert loss(fitted(probs), labels) <= min(grid) + 1e-6


def test_vector_takes_weights_and_biases_back(data):
    logits, labels = data
    bent = softmax(logits * [1, 2, 1, 0.5] + [0, 1, -1, 0.5])
    raw, fitted = loss(bent, labels), Calibration.fit(bent, labels, "vector", GRADES_4)
    temperature = Calibration.fit(bent, labels, "temperature", GRADES_4)
    assert loss(fitted(bent), labels) < loss(temperature(bent), labels) < raw
    assert loss(fitted(bent), labels) < loss(softmax(logits), labels) + 0.1


def test_isotonic_is_scikit_learns_of_each_threshold(data):
    logits, labels = data
    probs = softmax(2.5 * logits)
    fitted = Calibration.fit(probs, labels, "isotonic", GRADES_4)
    for k in (1, 2, 3):
        reached = probs[:, k:].sum(1)
        expected = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(reached, labels >= k).predict(reached)
        if k == 1:  # the others may be lowered to fall with k
            np.testing.assert_allclose(fitted(probs)[:, k:].sum(1), expected, atol=1e-9)
        assert (fitted(probs)[:, k:].sum(1) <= expected + 1e-9).all()
    found = fitted(probs)
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(1), 1)
    assert loss(np.maximum(found, 1e-4), labels) < loss(probs, labels)


@pytest.mark.parametrize("method", ["temperature", "vector", "isotonic"])
def test_it_is_saved_and_knows_what_it_does_not_know(data, method, tmp_path):
    logits, labels = data
    probs = softmax(3 * logits)
    probs[5] = np.nan
    fitted = Calibration.fit(probs, labels, method, GRADES_4)
    fitted.save(tmp_path / "calibration.json")
    loaded = Calibration.load(tmp_path / "calibration.json")
    np.testing.assert_array_equal(loaded(probs), fitted(probs))
    assert np.isnan(fitted(probs)[5]).all()
    assert np.isfinite(np.delete(fitted(probs), 5, 0)).all()
    sure = np.eye(4)
    assert np.isfinite(fitted(sure)).all()
    assert fitted(np.zeros((0, 4))).shape == (0, 4)


def test_mistakes_are_named(data, tmp_path):
    logits, labels = data
    probs = softmax(logits)
    for arguments, message in [
        ((probs, labels, "platt", GRADES_4), "give one of temperature, vector, isotonic"),
        ((probs[:9], labels[:9], "vector", GRADES_4), "9 labelled pairs are too few"),
        ((probs, labels[:9], "vector", GRADES_4), "give one label for each"),
        ((probs, np.ones(len(probs)), "vector", GRADES_4), "two kinds or more"),
        ((probs, labels + 1, "vector", GRADES_4), "from 0 to 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            Calibration.fit(*arguments)
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="no calibration"):
        Calibration.load(tmp_path / "x.json")


def test_a_calibrated_judge(data):
    logits, labels = data

    class Sure:
        name, fingerprint, scheme, score_fn = "sure", "sure", GRADES_4, "p_good"

        def score(self, pairs):
            rows = [int(item.id) for _, item in pairs]
            return GRADES_4.output(softmax(3 * logits[rows]), "p_good", np.ones(len(rows), np.float32))

    pairs = [(Query("q", "q"), Item(str(i), "t")) for i in range(500)]
    judge = calibrate(Sure(), pairs, labels[:500])
    found = judge.score(pairs)
    np.testing.assert_allclose(found.score, found.probs[:, 2:].sum(1), atol=1e-6)
    assert found.label_mass.tolist() == [1.0] * 500
    assert loss(found.probs, labels[:500]) < loss(Sure().score(pairs).probs, labels[:500])
    assert judge.fingerprint != "sure"
    with pytest.raises(ValueError, match="fit it anew"):
        CalibratedJudge(Sure(), Calibration("temperature", BINARY, {"temperature": [1.0]}))
