"""benchmarks/ablation.py and hard_negatives.py on a small shop: rows of every kind from one run folder, and what is there is kept."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml

from taoemb.config import load_config
from taoemb.job import TrainConfig, TrainJob

FOLDER = Path(__file__).parents[1] / "benchmarks"

CONDITIONS = """
bm25: {model: bm25}
untrained: {model: untrained}
theirs: {model: "{models}/turn{seed}"}
paper: {policy: paper, distill_weight: 0}
erring: {noise: 0.3}
stage1 continued: {continued: default}
bm25 and default: {fused: default}
"""


@pytest.fixture
def script(monkeypatch):
    """``script(name)(*words)`` runs a script of the folder as its command line would."""

    def load(name):
        monkeypatch.syspath_prepend(str(FOLDER))
        spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)

        def call(*words):
            monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
            module.main()

        return call

    return load


@pytest.fixture(scope="module")
def run(small_shop_folder, static_model, tmp_path_factory):
    """A run folder of a few steps."""
    words = [f"data={small_shop_folder}", f"model={static_model}", "trackers=[jsonl]", "systems=[stage1,retrieval_grpo]", "stage1.steps=6",
             "stage1.batch_size=16", "stage1.global_negatives=16", "stage2.steps=4", "stage2.batch_size=8", "stage2.num_candidates=6",
             "stage2.global_negatives=8"]  # fmt: skip
    folder = tmp_path_factory.mktemp("runs") / "seed0"
    TrainJob(load_config(TrainConfig, None, words), folder).run()
    return folder


def test_rows_of_every_kind(script, run, tmp_path, capsys):
    (tmp_path / "conditions.yaml").write_text(CONDITIONS)
    models = tmp_path / "models"
    models.mkdir()
    (models / "turn0").symlink_to(run / "models" / "stage1")
    words = ["--runs", run, "--conditions", tmp_path / "conditions.yaml", "--models", models, "--out", tmp_path / "out"]
    script("ablation")(*words)
    found = json.loads((tmp_path / "out" / "ablation.json").read_text())
    rows, expected = found["rows"], json.loads((run / "metrics.json").read_text())["systems"]
    assert set(rows) == {"stage1", "default", *yaml.safe_load(CONDITIONS)}
    assert {"commit", "machine", "commits_of_rows"} <= found.keys()
    for name, system in (("stage1", "stage1"), ("default", "retrieval_grpo")):
        for metric in ("ndcg@10", "recall@100", "quality@10"):
            assert rows[name]["metrics"][metric]["mean"] == pytest.approx(expected[system][metric])
    assert rows["theirs"]["metrics"] == rows["stage1"]["metrics"]  # the same model
    assert rows["bm25"]["metrics"]["incremental_recall@100"]["mean"] == 0
    assert rows["bm25 and default"]["metrics"]["recall@100"]["mean"] != rows["default"]["metrics"]["recall@100"]["mean"]
    assert rows["default"]["metrics"]["ndcg@10"]["against"]["difference"] == 0
    assert abs(rows["stage1 continued"]["item_encodings"] / rows["default"]["item_encodings"] - 1) < 0.2
    assert rows["default"]["judge_lookups"] == rows["paper"]["judge_lookups"] >= rows["paper"]["judge_calls"] > 0
    stage1 = json.loads((run / "phases.json").read_text())["stage1"]["item_encodings"]
    assert rows["default"]["total_item_encodings"] - rows["default"]["item_encodings"] == stage1 > 0
    assert rows["stage1"]["total_item_encodings"] == stage1
    assert rows["theirs"]["total_item_encodings"] == 0
    assert not list((tmp_path / "out").glob("seed0/*/checkpoints"))
    parts = rows["paper"]["slices"].values()
    assert sum(part["queries"] for part in parts) == len(
        json.loads((tmp_path / "out/seed0/paper.json").read_text())["slices"]
    )

    (tmp_path / "conditions.yaml").write_text(CONDITIONS.replace("noise: 0.3", "noise: 0.1"))
    with pytest.raises(SystemExit, match=r"erring.json is of other settings, {'noise': 0.3}"):
        script("ablation")(*words, "--only", "erring")


def test_pipelines_of_mined_hard_negatives(script, run, tmp_path, capsys):
    words = [
        "--run",
        run,
        "--out",
        tmp_path,
        "--turns",
        1,
        "--steps",
        2,
        "--hard-steps",
        2,
        "--rounds",
        1,
        "--batch",
        8,
        "--every",
        2,
    ]
    script("hard_negatives")(*words)
    found = json.loads((tmp_path / "hard_negatives.json").read_text())
    assert set(found["against"]) == {"clicks", "grades", "stage1"}
    for name, test in found["against"].items():
        assert test["target"] == max(ndcg for _, ndcg in found["curves"][name][0])
        assert all(test["target"] - 0.05 < one["target"] < test["target"] for one in test["lower"])
        assert json.loads((tmp_path / name / "turn0" / "costs.json").read_text())["item_encodings"] > 0
        seconds = [spent for spent, _ in found["curves"][name][0]]
        assert seconds == sorted(seconds)
        mined = json.loads((tmp_path / "turn0" / f"{name}.json").read_text())
        assert len(mined["mined_rows"]) == 1
    times = {file: file.stat().st_mtime_ns for file in tmp_path.glob("turn0/*.json")}
    script("hard_negatives")(*words)
    assert times == {file: file.stat().st_mtime_ns for file in tmp_path.glob("turn0/*.json")}
    with pytest.raises(SystemExit, match="of other settings"):
        script("hard_negatives")(*words, "--sampling", "top")


def test_a_judge_row_of_other_settings_is_refused(script, tmp_path):
    script("judge_recipes")
    row = sys.modules["benchmarks_judge_recipes"].row
    (tmp_path / "seed0" / "SFT").mkdir(parents=True)
    (tmp_path / "seed0" / "SFT" / "graded.json").write_text('{"accuracy": 0.5}')
    given = argparse.Namespace(out=tmp_path, start={"post": tmp_path}, settings=["sft.steps=400"], pairs=10)
    conditions = {"SFT": {"start": "post", "stages": ["sft"]}}
    assert (
        row(given, None, None, conditions, "SFT", 0)
        == row(given, None, None, conditions, "SFT", 0)
        == {"accuracy": 0.5}
    )
    given.settings = ["sft.steps=500"]
    with pytest.raises(SystemExit, match="row of other settings.*sft.steps=400.*give another --out"):
        row(given, None, None, conditions, "SFT", 0)
