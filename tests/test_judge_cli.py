"""``taoemb judge`` as a user calls it, and any judge by name in a run's settings."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from taoemb.catalog import Catalog
from taoemb.cli import app
from taoemb.config import load_config
from taoemb.job import TrainConfig, TrainJob
from taoemb.judge import CrossEncoderJudge, OracleJudge
from taoemb.judge.build import JudgeBuilder, JudgeConfig
from taoemb.judge.calibration import CalibratedJudge
from taoemb.shop import generate_shop

pytestmark = pytest.mark.filterwarnings("ignore:judge .* gives its labels")  # random weights


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop") / "shop"
    generate_shop(600, seed=1, train_queries=120, validation_queries=20, test_queries=30).save(folder)
    return folder


def run(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def test_score_writes_verdicts_and_goes_on(shop, tiny_chat_llm, tmp_path):
    words = [
        "judge",
        "score",
        "--data",
        shop,
        "--out",
        tmp_path / "v",
        "--judge",
        f"kind=hf_causal model={tiny_chat_llm}",
    ]
    (tmp_path / "top.run").write_text(
        "".join(f"test-0000{n} Q0 i000000{i} 1 {9 - i} x\n" for n in range(3) for i in range(4))
    )
    assert "12 verdicts of hf_causal" in run(*words, "--pairs", tmp_path / "top.run")
    table = pq.read_table(tmp_path / "v" / "verdicts.parquet")
    assert table.column_names[:4] == ["query_id", "item_id", "label", "score"]
    probs = np.column_stack([table.column(f"p_{name}") for name in ("irrelevant", "mismatch", "related", "excellent")])
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(table.column("score"), probs @ np.array([0, 1 / 3, 2 / 3, 1]), atol=1e-6)
    assert {"label_mass"} < set(table.column_names)
    before = (tmp_path / "v" / "verdicts.parquet").read_bytes()
    run(*words, "--pairs", tmp_path / "top.run")
    assert (tmp_path / "v" / "verdicts.parquet").read_bytes() == before
    assert "holds verdicts of" in run(*words[:-1], "kind=soft_logic", "--pairs", tmp_path / "top.run", code=2)
    oracle = ["judge", "score", "--data", shop, "--out", tmp_path / "o", "--judge", "kind=oracle"]
    run(*oracle)
    graded = pq.read_table(shop / "qrels.parquet")
    assert pq.read_table(tmp_path / "o" / "verdicts.parquet").num_rows == graded.num_rows


def test_eval_compares_judges(shop, tiny_chat_llm, tmp_path):
    judges = ["kind=oracle", "kind=soft_logic", f"kind=hf_causal model={tiny_chat_llm}"]
    options = [word for judge in judges for word in ("--judge", judge)]
    words = [
        "judge",
        "eval",
        "--data",
        shop,
        "--out",
        tmp_path,
        *options,
        "--pairs",
        80,
        "--attacks",
        10,
        "--reasons",
        2,
    ]
    text = run(*words)
    assert "keyword_stuffing" in text
    found = json.loads((tmp_path / "judge.json").read_text())
    oracle, soft, llm = found["judges"]
    assert oracle["overall"]["values"]["macro_f1"] == oracle["overall"]["values"]["good_f1"] == 1
    assert soft["overall"]["values"]["macro_f1"] < 1
    assert llm["labels"] == soft["labels"]
    assert set(llm["generated"]) >= {"pass@1", "pass@2", "format_failure"}
    assert not soft["generated"]
    assert "<script" not in (tmp_path / "judge.html").read_text()


def test_eval_takes_queries_without_a_split(tmp_path):
    (tmp_path / "cat").mkdir()
    titles = ["red mug", "blue mug", "desk lamp", "running shoe"]
    (tmp_path / "cat" / "items.csv").write_text(
        "id,title\n" + "".join(f"i{n},{title}\n" for n, title in enumerate(titles))
    )
    (tmp_path / "cat" / "queries.csv").write_text("id,query\nq0,mug\nq1,lamp\n")
    (tmp_path / "cat" / "qrels.csv").write_text(
        "query_id,item_id,grade\n" + "".join(f"q{q},i{i},{3 * (i // 2 == q)}\n" for q in (0, 1) for i in (0, 1, 2))
    )
    words = ["judge", "eval", "--data", tmp_path / "cat", "--judge", "kind=soft_logic", "--attacks", 0]
    assert "6 pairs" in run(*words, "--out", tmp_path / "a")
    assert "grades no query of split 'test'" in run(*words, "--out", tmp_path / "b", "--split", "test", code=2)


def test_eval_refuses_what_does_not_compare(shop, tiny_chat_llm, tmp_path):
    words = [
        "judge",
        "eval",
        "--data",
        shop,
        "--out",
        tmp_path,
        "--pairs",
        40,
        "--attacks",
        0,
        "--judge",
        "kind=soft_logic",
    ]
    assert "given twice" in run(*words, "--judge", "kind=soft_logic", code=2)
    text = run(*words, "--judge", f"kind=hf_causal model={tiny_chat_llm} scheme=binary", code=2)
    assert "gives the labels No, Yes" in text
    assert (
        json.loads((tmp_path / "judge.json").read_text())["judges"][0]["judge"] == "soft_logic"
    )  # what was done is there


def test_eval_leaves_out_what_a_judge_is_fitted_on(shop, static_model, tmp_path):
    options = ["--judge", f"kind=ensemble encoder={static_model} calibration_share=.5", "--pairs", 400, "--attacks", 0]
    run("judge", "eval", "--data", shop, "--out", tmp_path, *options)
    found = json.loads((tmp_path / "judge.json").read_text())
    assert found["judges"][0]["overall"]["queries"] <= 15


def test_train_and_distil_and_use(shop, tiny_chat_llm, tiny_bert, static_model, tmp_path):
    settings = [
        "style=label",
        "rules=Judge.",
        "max_chars=60",
        "examples=40",
        "sft.steps=2",
        "sft.batch_size=4",
        "max_new_tokens=3",
    ]
    words = [
        "judge",
        "train",
        "--data",
        shop,
        "--model",
        tiny_chat_llm,
        "--stages",
        "sft",
        "--out",
        tmp_path / "llm",
        *settings,
    ]
    assert "judge.kind=hf_causal" in run(*words)
    assert "is there" in run(*words)
    assert "sft.steps differ" in run(*words, "sft.steps=3", code=2)
    run(*words, "grpo.balance=false")  # of a stage that was not begun
    judge = tmp_path / "llm" / "sft" / "model"
    distil = ["judge", "distill", "--data", shop, "--out", tmp_path / "ce", "--judge", f"kind=hf_causal model={judge}", "--model", tiny_bert,
              "--per-query", 2, "steps=3", "batch_size=4", "save_steps=3"]  # fmt: skip
    assert "judge.kind=cross_encoder" in run(*distil)
    student = tmp_path / "ce" / "judges" / "cross_encoder"
    assert CrossEncoderJudge(student).scheme.name == "taobao4"
    named = JudgeBuilder(
        load_config(JudgeConfig, None, ["kind=hf_causal", f"model={judge}"]), Catalog.load(shop), tmp_path / "j"
    ).judge
    assert named.judge.prompt.rules == "Judge."  # what it was trained with
    for kind, model in (("hf_causal", judge), ("cross_encoder", student)):
        out = tmp_path / f"run-{kind}"
        config = load_config(TrainConfig, None, [
            f"data={shop}", f"model={static_model}", "systems=[stage1,retrieval_grpo]", "trackers=[jsonl]", "stage1.steps=2",
            "stage2.steps=2", "stage2.batch_size=2", "stage2.num_candidates=3", f"judge.kind={kind}", f"judge.model={model}",
        ])  # fmt: skip
        assert TrainJob(config, out).run() is not None
        assert (out / "judge" / "verdicts.sqlite").exists()
        text = run("evaluate", out / "model", "--data", shop, "--judge", f"kind={kind} model={model}", "--pool", 2)
        assert f"the judge {kind} that evaluates also gave the reward" in text
        assert "warning" not in run(
            "evaluate", out / "model", "--data", shop, "--judge", "kind=soft_logic", "--pool", 2
        )


def test_the_reward_from_grades_is_said(shop, static_model, tmp_path):
    config = load_config(TrainConfig, None, [
        f"data={shop}", f"model={static_model}", "systems=[stage1,retrieval_grpo]", "trackers=[jsonl]", "stage1.steps=2",
        "stage2.steps=2", "stage2.batch_size=2", "stage2.num_candidates=3",
    ])  # fmt: skip
    TrainJob(config, tmp_path / "run").run()
    assert "read its gains as an upper bound" in run("evaluate", tmp_path / "run" / "model", "--data", shop)


def test_judges_by_name(small_shop, static_model, tiny_chat_llm, tmp_path):
    def built(*words):
        return JudgeBuilder(load_config(JudgeConfig, None, list(words)), small_shop, tmp_path / "j").judge

    assert isinstance(built("kind=auto"), OracleJudge)
    cascade = built(
        "kind=cascade",
        "cheap=bi_encoder",
        f"encoder={static_model}",
        f"model={tiny_chat_llm}",
        "calibration=temperature",
        "calibration_share=.7",
    )
    assert isinstance(cascade, CalibratedJudge)
    pairs = [(small_shop.queries[0], item) for item in small_shop.items[:5]]
    assert cascade.score(pairs).probs.shape == (5, 4)
    (tmp_path / "rules.yaml").write_text("relations: {'type:mug': {cup: 0.5}}\n")
    assert (
        built("kind=soft_logic", f"interventions={tmp_path / 'rules.yaml'}").fingerprint
        != built("kind=soft_logic").fingerprint
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("kind=hf_causal", "say which model"),
        ("kind=openai_server model=m", "say where the server is"),
        ("kind=soft_logic calibration=vector", "has none"),
        ("kind=cascade cheap=cross_encoder model=m", "make one of them"),
        ("kind=mean scheme=stars", "taobao4"),
        ("kind=cascade cheap=ensemble model=m calibration=vector", "fitted to the same grades"),
        ("kind=mean sure=2", "from 0 to 1"),
        ("kind=mean batch_size=0", "at least 1"),
        ("kind=llama", "kind"),
    ],
)
def test_mistakes_are_named(words, message, shop, tmp_path):
    assert message in run("judge", "score", "--data", shop, "--out", tmp_path / "o", "--judge", words, code=2)
    assert not (tmp_path / "o").exists()


def test_serve_says_what_to_run(tiny_chat_llm):
    text = run("judge", "serve", "some/hub-id", "--max-model-len", "2048", code=2)
    assert "vllm serve some/hub-id --served-model-name some/hub-id --enable-prefix-caching --max-model-len 2048" in text
    assert "pip install vllm" in text
    local = run("judge", "serve", tiny_chat_llm, code=2)
    assert re.search(r"--served-model-name tiny_chat_llm-[0-9a-f]{8} ", local)  # other weights, another name
    assert f"judge.prompt={tiny_chat_llm}" in local
    assert "examples (" in run("judge", "train", "--help-config")
