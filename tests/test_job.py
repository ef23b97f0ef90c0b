"""The main job on a small shop: what it leaves in the run folder, and that a stopped run ends as an uninterrupted one."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from taoemb.catalog import Catalog, Items, QuerySet
from taoemb.config import load_config
from taoemb.encoder import Encoder
from taoemb.job import JudgeConfig, TrainConfig, TrainJob
from taoemb.trainer import RetrievalGRPOTrainer

SYSTEMS = ["bm25", "untrained", "stage1", "stage1_continued", "retrieval_grpo"]


@pytest.fixture
def config(small_shop_folder, static_model):
    return load_config(
        TrainConfig,
        None,
        [
            f"data={small_shop_folder}",
            f"model={static_model}",
            "trackers=[jsonl]",
            "stage1.steps=6",
            "stage1.batch_size=16",
            "stage1.global_negatives=16",
            "stage1.save_steps=4",
            "stage2.steps=7",
            "stage2.batch_size=8",
            "stage2.num_candidates=6",
            "stage2.global_negatives=8",
            "stage2.refresh_steps=3",
            "stage2.save_steps=2",
        ],
    )


def test_a_run_folder_holds_what_is_promised(config, tmp_path):
    run = tmp_path / "run"
    TrainJob(config, run).run()
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics["systems"]) == sorted(SYSTEMS)
    for system in SYSTEMS:
        assert {"ndcg@10", "recall@100", "goodrate@10", "quality@10"} <= metrics["systems"][system].keys()
    assert metrics["systems"]["bm25"]["exclusive_goodrate@10"] == 0  # nothing is exclusive against itself
    spent = metrics["item_encodings"]
    assert abs(spent["stage1_continued"] / spent["retrieval_grpo"] - 1) < 0.1
    assert "<html" in (run / "report.html").read_text()

    texts = ["red shoes", "garden chair without arms"]
    ours = Encoder(run / "model").encode_query(texts)
    np.testing.assert_allclose(SentenceTransformer(str(run / "model")).encode_query(texts), ours, atol=1e-6)

    before = (run / "metrics.json").read_bytes()
    TrainJob(config, run).run()  # everything is there: only the comparison is made again
    assert (run / "metrics.json").read_bytes() == before


@pytest.mark.parametrize("stop", [0, 3, 6])
def test_a_stopped_run_ends_as_an_uninterrupted_one(config, tmp_path, monkeypatch, stop):
    TrainJob(config, tmp_path / "whole").run()
    judge, calls = RetrievalGRPOTrainer.judge, 0

    def interrupted(self, group):
        nonlocal calls
        calls += 1
        if calls == stop + 1:
            raise KeyboardInterrupt
        return judge(self, group)

    monkeypatch.setattr(RetrievalGRPOTrainer, "judge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        TrainJob(config, tmp_path / "stopped").run()
    TrainJob(config, tmp_path / "stopped").run()
    weights = [load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "stopped")]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])

    def steps(run):
        lines = (tmp_path / run / "logs" / "retrieval_grpo.jsonl").read_text().splitlines()
        untimed = ("seconds/", "judge_")  # the judge's counters are of the process
        return [{k: v for k, v in json.loads(line).items() if not k.startswith(untimed)} for line in lines]

    assert steps("whole") == steps("stopped")


def test_other_settings_need_another_folder_once_there_is_something_in_it(config, tmp_path):
    TrainJob(dataclasses.replace(config, model="mistyped"), tmp_path)
    TrainJob(config, tmp_path)
    (tmp_path / "models").mkdir()
    changed = load_config(TrainConfig, tmp_path / "config.yaml", ["stage2.beta=0.5"])
    with pytest.raises(ValueError, match=r"other settings \(stage2\.beta differ\)"):
        TrainJob(changed, tmp_path)


def test_a_folder_with_other_things_is_not_touched(config, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and no run folder"):
        TrainJob(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_training_queries_are_written_when_there_are_none(small_shop, static_model, tmp_path):
    test_only = small_shop.queries.select(split="test")
    grades = {q: small_shop.qrels[q] for q in test_only.ids}
    Catalog(small_shop.items, test_only, grades, metadata={"unjudged": 0}).save(tmp_path / "shop")
    settings = [f"data={tmp_path / 'shop'}", f"model={static_model}", "generated_queries=50", "judge.kind=soft_logic"]
    job = TrainJob(load_config(TrainConfig, None, settings), tmp_path / "run")
    assert len(job.catalog.queries.select("train")) == 50
    assert job.catalog.clicks.num_rows >= 50
    assert set(job.test_queries.ids) == set(grades)
    again = TrainJob(job.config, tmp_path / "run")
    assert again.catalog.queries.texts == job.catalog.queries.texts


def test_a_policys_name_is_a_row_that_differs_in_the_policy_alone(config, tmp_path):
    rows = load_config(TrainConfig, None, [f"data={config.data}", "systems=[stage1,retrieval_grpo,paper,kl_distill]"])
    job = TrainJob(dataclasses.replace(config, systems=rows.systems), tmp_path / "run")
    job.run()
    alone = dataclasses.replace(config.stage2, policy="paper")
    encoder = job.encoder("stage1")
    RetrievalGRPOTrainer(encoder, job.catalog, *job._rewards(alone), alone, run_dir=tmp_path / "alone").train()
    assert job.encoder("paper").fingerprint == encoder.fingerprint
    systems = json.loads((tmp_path / "run" / "metrics.json").read_text())["systems"]
    assert set(systems) == {"stage1", "retrieval_grpo", "paper", "kl_distill"}
    assert systems["paper"] != systems["retrieval_grpo"]


def test_the_policy_of_retrieval_grpo_is_no_row_of_its_own(config):
    with pytest.raises(ValueError, match="'mixed', which is the policy of 'retrieval_grpo' already"):
        dataclasses.replace(config, systems=("stage1", "retrieval_grpo", "mixed"))


def test_a_catalog_that_changed_is_not_mixed_into_a_run(config, small_shop, tmp_path):
    small_shop.save(tmp_path / "shop")
    config = dataclasses.replace(config, data=str(tmp_path / "shop"))
    TrainJob(config, tmp_path / "run")
    (tmp_path / "run" / "models").mkdir()
    cheaper = small_shop.items.table.drop_columns(["rating"])
    dataclasses.replace(small_shop, items=Items(cheaper)).save(tmp_path / "shop")
    with pytest.raises(ValueError, match=r"items\.parquet in .* changed after"):
        TrainJob(config, tmp_path / "run")


def test_clicks_without_a_training_query_are_not_thrown_away(config, small_shop, tmp_path):
    queries = QuerySet(dataclasses.replace(q, split="") for q in small_shop.queries)
    dataclasses.replace(small_shop, queries=queries).save(tmp_path / "shop")
    with pytest.raises(ValueError, match="has clicks, but no query of split 'train'"):
        TrainJob(dataclasses.replace(config, data=str(tmp_path / "shop")), tmp_path / "run")


@pytest.mark.parametrize(("train", "test", "unjudged", "kind"), [
    (60, 30, 0, "oracle"), (60, 30, None, "ensemble"), (10, 30, 0, "ensemble"), (0, 30, None, "ensemble"), (0, 6, 0, "mean"),
])  # fmt: skip
def test_the_judge_that_auto_chooses(config, small_shop, tmp_path, train, test, unjudged, kind):
    """By how many of 100 training queries and of the test queries have grades, and whether the rest are known."""
    queries = [*small_shop.queries.select("train")[:100], *small_shop.queries.select("test")]
    graded = {q.id for q in queries[:train]} | {q.id for q in queries[100 : 100 + test]}
    grades = {q.id: small_shop.qrels.get(q.id, {small_shop.items.ids[0]: 1}) for q in queries if q.id in graded}
    metadata = {} if unjudged is None else {"unjudged": unjudged}
    Catalog(small_shop.items, QuerySet(queries), grades, metadata=metadata).save(tmp_path / "shop")
    config = dataclasses.replace(config, data=str(tmp_path / "shop"), judge=JudgeConfig(calibration_share=0.6))
    job = TrainJob(config, tmp_path / "run")
    assert job.judge_kind == kind
    assert len(job.calibration_queries) == (18 if kind == "ensemble" else 0)


def test_an_ensemble_without_enough_grades_says_what_is_missing(config, small_shop, tmp_path):
    few = small_shop.queries.select("test")[:6]
    queries = [*small_shop.queries.select("train"), *few]
    Catalog(small_shop.items, QuerySet(queries), {q.id: small_shop.qrels[q.id] for q in few}).save(tmp_path / "shop")
    asked = dataclasses.replace(config, data=str(tmp_path / "shop"), judge=JudgeConfig(kind="ensemble"))
    with pytest.raises(ValueError, match=r"2 of the 6 graded queries, .* it needs 5 with 50; .*use judge\.kind=mean"):
        _ = TrainJob(asked, tmp_path / "run").judge


def test_a_catalog_of_items_alone_is_trained_and_not_compared(config, small_shop, tmp_path):
    Catalog(small_shop.items, QuerySet([]), {}).save(tmp_path / "shop")
    config = dataclasses.replace(config, data=str(tmp_path / "shop"), judge=JudgeConfig(kind="soft_logic"))
    job = TrainJob(dataclasses.replace(config, generated_queries=100), tmp_path / "run")
    assert job.run() is None
    assert len(Encoder(tmp_path / "run" / "model").encode_query(["mug"])) == 1
    assert (tmp_path / "run" / "index" / "manifest.json").exists()
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_an_oracle_that_knows_no_training_query_is_refused(config, small_shop, tmp_path):
    grades = {q.id: small_shop.qrels[q.id] for q in small_shop.queries.select("test")}
    dataclasses.replace(small_shop, qrels=grades).save(tmp_path / "shop")
    asked = dataclasses.replace(config, data=str(tmp_path / "shop"), judge=JudgeConfig(kind="oracle"))
    with pytest.raises(ValueError, match="no training query has grades"):
        _ = TrainJob(asked, tmp_path / "run").judge
