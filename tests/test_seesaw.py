"""benchmarks/seesaw.py: hypervolume against Monte Carlo and by hand, seesaw index, Pareto front, seeds that are paired."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def seesaw():
    file = Path(__file__).parents[1] / "benchmarks" / "seesaw.py"
    spec = importlib.util.spec_from_file_location("seesaw", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", range(5))
def test_hypervolume_is_the_share_of_random_points_that_are_dominated(seesaw, seed):
    rng = np.random.default_rng(seed)
    points = rng.uniform(-0.2, 1, size=(12, 3))  # some are below the reference in one figure
    drawn = rng.uniform(size=(200_000, 3))
    inside = (drawn[:, None] <= points[(points > 0).all(1)]).all(2).any(1).mean()
    assert seesaw.hypervolume(points) == pytest.approx(inside, abs=0.006)


def test_hypervolume_by_hand(seesaw):
    assert seesaw.hypervolume([[2, 3, 4]]) == 24
    assert seesaw.hypervolume([[2, 3, 4], [1, 3, 4], [2, 3, 4]]) == 24  # dominated and equal points add nothing
    assert seesaw.hypervolume([[1, 1, 2], [2, 1, 1]]) == 3
    assert seesaw.hypervolume([[5, 5, -0.1], [0, 5, 5]]) == 0


def test_seesaw_index_by_hand(seesaw):
    assert seesaw.seesaw([1, 2, 3]) == 0
    assert seesaw.seesaw([-1, -2, 0]) == 1
    assert seesaw.seesaw([3, -1, 0]) == 0.25
    assert seesaw.seesaw([0, 0, 0]) == 0


def test_front_against_every_pair(seesaw):
    rng = np.random.default_rng(0)
    points = {str(i): row for i, row in enumerate(rng.integers(0, 5, size=(40, 3)).tolist())}
    expected = [
        name
        for name, a in points.items()
        if not any(np.greater_equal(b, a).all() and np.greater(b, a).any() for b in points.values())
    ]
    assert seesaw.pareto_front(points) == expected
    assert 1 < len(expected) < 40


def test_a_condition_is_compared_on_its_own_seeds(seesaw, tmp_path):
    """Seed 1 starts far lower; a condition that has seed 0 alone must not gain from it."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0.4, 0.6, size=50)

    def write(run, name, shift, **more):
        values = {metric: (base + shift + more.get(metric, 0.0)).tolist() for metric in seesaw.SHOWN}
        (tmp_path / run).mkdir(exist_ok=True)
        (tmp_path / run / f"{name}.json").write_text(json.dumps({"per_query": values}))

    write("seed0", "stage1", 0.0)
    write("seed1", "stage1", -0.2)
    write("seed0", "once", 0.1, **{"quality@10": -0.15})
    write("seed0", "twice", 0.1)
    write("seed1", "twice", 0.1)
    rows = seesaw.compared(seesaw.read(tmp_path))
    assert [rows[name]["seeds"] for name in ("stage1", "once", "twice")] == [2, 1, 2]
    tests = rows["once"]["tests"]
    assert tests["relevance"]["difference"] == pytest.approx(0.1)
    assert tests["quality"]["difference"] == pytest.approx(-0.05)
    assert rows["twice"]["tests"]["relevance"]["difference"] == pytest.approx(0.2)
    assert rows["once"]["relative"]["overlap@10"] == pytest.approx(0.1 / base.mean())
    assert rows["once"]["seesaw"] == pytest.approx(0.2)
    assert rows["once"]["hypervolume"] == 0
    assert rows["twice"]["hypervolume"] == pytest.approx((2 / base.std()) ** 3)
    assert [name for name, row in rows.items() if row["front"]] == ["twice"]


def test_unknown_names_and_folders(seesaw, tmp_path):
    with pytest.raises(ValueError, match="give the --out of"):
        seesaw.read(tmp_path)
    with pytest.raises(ValueError, match="no condition is called 'b'; there are a"):
        seesaw.of_set(["b"], {"a": {"units": [1, 1, 1]}})
