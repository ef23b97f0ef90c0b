"""The main job on a small shop: what it leaves in the run folder, and that a stopped run ends as an uninterrupted one."""

import dataclasses
import json

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Router

from taoemb.backbone import BackboneConfig, prepare
from taoemb.catalog import Catalog, Items, QuerySet
from taoemb.config import load_config
from taoemb.encoder import Encoder
from taoemb.index.runs import RunChannel, write_run
from taoemb.job import TrainConfig, TrainJob
from taoemb.judge.build import JudgeConfig
from taoemb.rewards import RewardConfig
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


def test_the_backbone_holds_for_both_stages(config, small_shop, tmp_path):
    """With the query tower alone the items of all systems have the start model's vectors."""
    config = dataclasses.replace(config, backbone=BackboneConfig(tower="query_only"))
    TrainJob(config, tmp_path).run()
    encoders = [Encoder(tmp_path / folder) for folder in ("models/untrained", "models/stage1", "model")]
    items = [encoder.encode_document(small_shop.items) for encoder in encoders]
    queries = [encoder.encode_query(small_shop.queries.texts) for encoder in encoders]
    np.testing.assert_allclose(items[1], items[0], atol=1e-6)
    np.testing.assert_array_equal(items[2], items[1])
    assert np.abs(queries[1] - queries[0]).max() > 1e-3
    assert np.abs(queries[2] - queries[1]).max() > 1e-3
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["item_encodings"]["retrieval_grpo"] == len(small_shop.items)


def test_rewards_of_lists_by_the_settings(config, tmp_path):
    rewards = RewardConfig(exclusivity_mode="list", diversity=0.1)
    stage2 = dataclasses.replace(config.stage2, policy="pl_rloo", list_length=3, rewards=rewards)
    TrainJob(dataclasses.replace(config, stage2=stage2, systems=("stage1", "retrieval_grpo")), tmp_path).run()
    log = [json.loads(line) for line in (tmp_path / "logs" / "retrieval_grpo.jsonl").read_text().splitlines()]
    for reward in ("diversity", "list_exclusivity"):
        means = [line[f"reward/{reward}/mean"] for line in log]
        assert all(0 <= mean <= 1 for mean in means)
        assert max(means) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"matryoshka_dims": (64,)}, r"matryoshka_dims=\[64\]: give whole numbers from 1 to below the 16"),
        ({"rewards": RewardConfig(click_floor=0.5)}, None),
    ],
)
def test_what_cannot_work_is_said_before_stage_1(config, tmp_path, settings, message):
    config = dataclasses.replace(config, stage2=dataclasses.replace(config.stage2, **settings))
    if message is None:  # this shop has clicks
        TrainJob(dataclasses.replace(config, systems=("stage1", "retrieval_grpo")), tmp_path).run()
        return
    with pytest.raises(ValueError, match=message):
        TrainJob(config, tmp_path).run()
    assert not (tmp_path / "models" / "stage1").exists()


def test_a_row_that_cannot_work_is_said_at_once(config):
    rewards = RewardConfig(exclusivity_mode="list")
    stage2 = dataclasses.replace(config.stage2, policy="pl_rloo", rewards=rewards)
    with pytest.raises(ValueError, match="systems holds 'kl_distill': policy='kl_distill' rewards items"):
        dataclasses.replace(config, stage2=stage2, systems=("stage1", "retrieval_grpo", "kl_distill"))


@pytest.mark.parametrize("stop", [0, 3, 6])
def test_a_stopped_run_ends_as_an_uninterrupted_one(config, tmp_path, monkeypatch, stop):
    TrainJob(config, tmp_path / "whole").run()
    judge, calls = RetrievalGRPOTrainer.judge, 0

    def interrupted(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == stop + 1:
            raise KeyboardInterrupt
        return judge(self, *arguments)

    monkeypatch.setattr(RetrievalGRPOTrainer, "judge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        TrainJob(config, tmp_path / "stopped").run()
    TrainJob(config, tmp_path / "stopped").run()
    whole, stopped = (Encoder(tmp_path / run / "model") for run in ("whole", "stopped"))
    assert whole.fingerprint == stopped.fingerprint
    texts = Catalog.load(config.data).queries.texts[:3]
    assert whole.encode_query(texts).tolist() != whole.encode_document(texts).tolist()  # two towers, parted

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


def test_towers_part_where_more_than_relevance_is_rewarded(config, tmp_path):
    def parted(name, quality):
        rewards = dataclasses.replace(config.stage2.rewards, quality=quality, exclusivity=0.0)
        whole = dataclasses.replace(config, stage2=dataclasses.replace(config.stage2, rewards=rewards))
        job = TrainJob(whole, tmp_path / name)
        job._model("untrained", job._start_model)
        return [isinstance(job._prepared("untrained", stage).model[0], Router) for stage in (1, 2)]

    assert parted("relevance", 0.0) == [False, False]
    assert parted("both", 0.5) == [False, True]


def test_a_policys_name_is_a_row_of_that_policy_by_itself(config, tmp_path):
    rows = load_config(TrainConfig, None, [f"data={config.data}", "systems=[stage1,retrieval_grpo,paper,kl_distill]"])
    job = TrainJob(dataclasses.replace(config, systems=rows.systems), tmp_path / "run")
    job.run()
    alone = dataclasses.replace(config.stage2, policy="paper", distill_weight=0.0)
    encoder = job.encoder("stage1")
    assert not isinstance(encoder.model[0], Router)  # towers part in stage 2
    prepare(encoder, config.backbone)
    RetrievalGRPOTrainer(encoder, job.catalog, *job._rewards(alone), alone, run_dir=tmp_path / "alone").train()
    assert job.encoder("paper").fingerprint == encoder.fingerprint
    systems = json.loads((tmp_path / "run" / "metrics.json").read_text())["systems"]
    assert set(systems) == {"stage1", "retrieval_grpo", "paper", "kl_distill"}
    assert systems["paper"] != systems["retrieval_grpo"]


def test_the_policy_of_retrieval_grpo_is_no_row_of_its_own(config):
    plain = dataclasses.replace(config.stage2, distill_weight=0.0)
    with pytest.raises(ValueError, match="'mixed', which is the policy of 'retrieval_grpo' already"):
        dataclasses.replace(config, stage2=plain, systems=("stage1", "retrieval_grpo", "mixed"))


def test_a_catalog_that_changed_is_not_mixed_into_a_run(config, small_shop, tmp_path):
    small_shop.save(tmp_path / "shop")
    config = dataclasses.replace(config, data=str(tmp_path / "shop"))
    TrainJob(config, tmp_path / "run")
    (tmp_path / "run" / "models").mkdir()
    cheaper = small_shop.items.table.drop_columns(["rating"])
    dataclasses.replace(small_shop, items=Items(cheaper)).save(tmp_path / "shop")
    with pytest.raises(ValueError, match=r"shop/items\.parquet changed after"):
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
    assert job.judging.kind == kind
    assert len(job.judging.calibration_queries) == (18 if kind == "ensemble" else 0)


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


def a_run_of(catalog, path, n=100):
    """A channel that finds the first items of the catalog for every query, as a run file."""
    tops = dict.fromkeys(catalog.queries.texts, catalog.items.ids[:n])
    write_run(RunChannel("first", tops), catalog.queries, n, path)
    return path


def test_run_files_are_channels_of_the_reward_and_of_the_figures(config, small_shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_run_of(small_shop, tmp_path / "first.trec")
    config = load_config(TrainConfig, None, [f"data={config.data}", "channels=[bm25,first.trec]", f"model={config.model}",
                                             "systems=[bm25,stage1,retrieval_grpo]", "trackers=[jsonl]",
                                             "stage1.steps=2", "stage2.steps=2", "stage2.batch_size=8",
                                             "stage2.num_candidates=6"])  # fmt: skip
    job = TrainJob(config, tmp_path / "run")
    assert list(job.channels) == ["bm25", "first"]
    exclusivity = job._rewards(config.stage2)[0][2]
    query, items = small_shop.queries[0], [small_shop.items[i] for i in (0, 99, 100, 599)]
    bm25 = job.bm25.top([query.text], 100)[0]
    asked = {"queries": [query] * 4, "items": items, "item_positions": np.array([0, 99, 100, 599])}
    assert exclusivity(**asked).tolist() == [0, 0, *(float(item.id not in bm25) for item in items[2:])]
    job.run()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["meta"]["channels"] == "bm25, first"
    for row in metrics["systems"].values():
        assert max(row["overlap@10/bm25"], row["overlap@10/first"]) <= row["overlap@10"]
        assert row["overlap@10"] <= row["overlap@10/bm25"] + row["overlap@10/first"] + 1e-9
    assert metrics["systems"]["bm25"]["overlap@10/first"] > 0
    assert "overlap@10/first" in (tmp_path / "run" / "report.html").read_text()

    before = (tmp_path / "run" / "metrics.json").read_bytes()
    TrainJob(config, tmp_path / "run").run()
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before
    a_run_of(small_shop, tmp_path / "first.trec", n=99)
    with pytest.raises(ValueError, match=r"first\.trec changed after .*run was started; give another folder"):
        TrainJob(config, tmp_path / "run")
    with pytest.raises(ValueError, match=r"other settings \(channels differ\)"):
        TrainJob(dataclasses.replace(config, channels=("bm25",)), tmp_path / "run")


def test_a_run_file_that_cannot_be_used_is_refused_before_training(config, small_shop, tmp_path):
    def job(*channels, **changed):
        return TrainJob(dataclasses.replace(config, channels=channels, **changed), tmp_path / "run")

    with pytest.raises(
        FileNotFoundError, match=r"channels: .*nowhere\.trec is no file; give 'bm25' or a TREC run file"
    ):
        job("bm25", str(tmp_path / "nowhere.trec"))
    assert not (tmp_path / "run").exists()

    test_only = dataclasses.replace(small_shop, queries=small_shop.queries.select("test"))
    path = str(a_run_of(test_only, tmp_path / "other.trec"))
    with pytest.raises(ValueError, match=r"other\.trec has no entry for 120 of the queries asked for"):
        job("bm25", path)
    rewards = dataclasses.replace(config.stage2.rewards, exclusivity=0.0)
    job(path, stage2=dataclasses.replace(config.stage2, rewards=rewards))  # figures of the test queries alone
    a_run_of(small_shop, tmp_path / "other.trec")
    job("bm25", path)  # nothing was trained: what was wrong may be mended
    a_run_of(small_shop, tmp_path / "bm25.trec")
    with pytest.raises(ValueError, match="two channels are called 'bm25'"):
        job("bm25", str(tmp_path / "bm25.trec"))
    (tmp_path / "other.trec").write_text("q1 Q0 a\n")
    with pytest.raises(ValueError, match=r"other\.trec, line 1: 3 columns"):
        job(path)


def test_channels_that_make_no_sense_are_refused(config):
    lexical = dataclasses.replace(config.stage2.rewards, exclusivity_mode="lexical")
    for channels in ((), ("bm25", "bm25")):
        with pytest.raises(ValueError, match="give 'bm25', TREC run files or both, each once"):
            dataclasses.replace(config, channels=channels)
    stage2 = dataclasses.replace(config.stage2, rewards=lexical)
    dataclasses.replace(config, stage2=stage2)
    with pytest.raises(ValueError, match=r"channels=\['bm25', 'x'\].*compares words with BM25 alone; use membership"):
        dataclasses.replace(config, stage2=stage2, channels=("bm25", "x"))
