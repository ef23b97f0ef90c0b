"""The run report on a synthetic run folder: every number below is made up."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from taoemb.evaluation import paired_bootstrap
from taoemb.report import write_report

SKILL = {"bm25": 0.52, "untrained": 0.5, "stage1": 0.66, "stage1_continued": 0.69, "kl_distill": 0.705,
         "retrieval_grpo": 0.74}  # fmt: skip
SLICES = ("head", "negation", "alternatives", "question", "knowledge")
NAMES = (
    "ndcg@10",
    "recall@100",
    "hit_rate@100",
    "mrr@10",
    "goodrate@10",
    "quality@10",
    "good_quality@10",
    "overlap@10",
    "exclusive_goodrate@10",
)
SCRIPT = "<script>alert(1)</script>"
VOID = {"meta", "wbr", "br", "hr", "img", "link", "input"}


def make_run(folder: Path, *, steps: int = 400, queries: int = 150, skill: dict[str, float] = SKILL) -> Path:
    """A complete run folder with made-up numbers, the same for the same arguments."""
    rng = np.random.default_rng(7)
    (folder / "logs").mkdir(parents=True)
    difficulty = rng.normal(0, 0.18, queries)
    values = {s: {m: _values(rng, s, m, skill[s], difficulty) for m in NAMES} for s in skill}
    tests = {
        m: {s: _test(values["retrieval_grpo"][m], values[s][m]) for s in skill if s != "retrieval_grpo"} for m in NAMES
    }
    metrics = {
        "systems": {s: {m: float(v.mean()) for m, v in row.items()} for s, row in values.items()},
        "tests": tests,
        "item_encodings": {"untrained": 0, "stage1": 383_120, "stage1_continued": 401_220, "kl_distill": 398_000,
                           "retrieval_grpo": 402_113},
        "seconds": {"untrained": 31.2, "stage1": 48.0, "retrieval_grpo": 211.5, "kl_distill": 205.1,
                    "stage1_continued": 51.3},
        "meta": {"items": 20_000, "train_queries": 12_000, "test_queries": queries, "seed": 0, "version": "0.1.0",
                 "judge": "ensemble", "evaluated_by": "exact rules", "policy": "mixed", "model": "static:minilm",
                 "data": "shop"},
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics))
    slices = [SLICES[q % len(SLICES)] for q in range(queries)]
    rows: dict[str, list[Any]] = {"system": [], "query_id": [], "slice": []}
    for system, row in values.items():
        rows["system"] += [system] * queries
        rows["query_id"] += [f"q{i}" for i in range(queries)]
        rows["slice"] += slices
        for metric, column in row.items():
            rows.setdefault(metric, []).extend(column.tolist())
    pq.write_table(pa.table(rows), folder / "per_query.parquet")
    for system in ("stage1", "stage1_continued"):
        lines = [
            {
                "step": i,
                "loss": 3 * math.exp(-i / 120) + 1 + rng.normal(0, 0.1),
                "learning_rate": 1e-3 * (1 - i / steps),
                "grad_norm": 0.6,
                "item_encodings": 600 * i,
            }
            for i in range(steps)
        ]
        _write_log(folder, system, lines)
    for system in ("retrieval_grpo", "kl_distill"):
        _write_log(folder, system, _stage2_lines(rng, steps, skill[system]))
    (folder / "examples.json").write_text(json.dumps([_example(rng, i) for i in range(12)]))
    (folder / "config.yaml").write_text("data: shop\nstage2:\n  policy: mixed  # a & b < c\n")
    return folder


def _values(rng: np.random.Generator, system: str, metric: str, skill: float, difficulty: np.ndarray) -> np.ndarray:
    shift = {
        "recall@100": 0.15,
        "hit_rate@100": 0.12,
        "mrr@10": 0.1,
        "quality@10": -0.15,
        "good_quality@10": -0.12,
        "exclusive_goodrate@10": -0.3,
        "overlap@10": -0.35,
    }.get(metric, 0.0)
    mean = (
        1.0 if (system, metric) == ("bm25", "overlap@10") else 0.9 - skill if metric == "overlap@10" else skill + shift
    )
    if (system, metric) == ("bm25", "exclusive_goodrate@10"):
        mean = -1.0
    return np.clip(mean + difficulty + rng.normal(0, 0.08, len(difficulty)), 0, 1)


def _test(ours: np.ndarray, other: np.ndarray) -> dict[str, float]:
    test = paired_bootstrap(ours, other, samples=2000)
    return {"difference": test.difference, "ci_low": test.ci_low, "ci_high": test.ci_high, "p_value": test.p_value}


def _stage2_lines(rng: np.random.Generator, steps: int, skill: float) -> list[dict[str, Any]]:
    lines = []
    for i in range(steps):
        done, age, noise = 1 - math.exp(-i / 100), i % 20, rng.normal(0, 1, 11).tolist()
        line: dict[str, Any] = {
            "step": i, "loss": 0.4 - 0.2 * done + 0.05 * noise[0], "kl": 0.08 * done + 0.01 * abs(noise[1]),
            "entropy": 3.2 - 0.6 * done + 0.05 * noise[2], "grad_norm": 0.6, "ratio": 1.0, "clip_share": 0.0,
            "infonce": 0.9 + 0.08 * noise[3], "effective_rank": 29 - 3 * done + 0.4 * noise[4],
            "cosine_to_reference": 1 - 0.12 * done, "zero_variance_share": max(0.0, 0.06 + 0.03 * noise[5]),
            "hubness_skew": 2.1 + 0.3 * noise[6], "overlap@K": 0.99 - 0.006 * age + 0.005 * noise[7], "index_age": age,
            "judge_calls": 900 * i**0.9, "judge_cache_hit_rate": 0.5 * done, "item_encodings": 3900 * i,
            "seconds/retrieve": 0.05, "seconds/forward": 0.2, "seconds/judge": 0.22 - 0.1 * done, "seconds/backward": 0.15,
            "learning_rate": 1e-3,
        }  # fmt: skip
        ends = {"relevance": skill, "quality": 0.58, "exclusivity": 0.4}
        for k, (name, end) in enumerate(ends.items(), 8):
            line |= {f"reward/{name}/mean": 0.45 + (end - 0.45) * done + 0.03 * noise[k], f"reward/{name}/std": 0.3,
                     f"reward/{name}/abstained": 0.01 if name == "relevance" else 0.0}  # fmt: skip
        if age == 0 and i:
            line["seconds/refresh"] = 3.5
        if i % 50 == 7:
            line["reward/quality/mean"] = None
        lines.append(line)
    return lines


def _write_log(folder: Path, system: str, lines: list[dict[str, Any]]) -> None:
    (folder / f"logs/{system}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _example(rng: np.random.Generator, i: int) -> dict[str, Any]:
    words = (
        "wireless",
        "noise cancelling",
        "over-ear",
        "black",
        "USB-C",
        "waterproof",
        "compact",
        "kids",
        "gaming",
        "pro",
    )
    pool: list[dict[str, Any]] = [
        {
            "id": f"i{j}",
            "title": f"Brand {j} {' '.join(rng.permutation(words)[:6])} headphones model {j:03}, 2 years",
            "grade": None if j % 9 == 8 else int(rng.integers(0, 4)),
            "score": 0.9 - 0.02 * j,
            "quality": None if j % 7 == 6 else float(rng.random()),
            "in_channel": bool(rng.random() < 0.4),
        }
        for j in range(14)
    ]
    pool[0]["title"] = f"{SCRIPT} & co"
    pool[0]["in_channel"] = False
    good = sorted(pool, key=lambda item: -(item["grade"] or 0))[:10]
    return {
        "query_id": f"q{i}",
        "query": f"headphones that are not wireless {i} <b>",
        "slice": SLICES[i % 5],
        "before": {"system": "stage1", "ndcg@10": 0.52, "items": pool[:10]},
        "after": {"system": "retrieval_grpo", "ndcg@10": 0.95 if i % 4 else 0.5, "items": good},
    }


class Page(HTMLParser):
    """Parses strictly: every tag that is opened must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def page_of(folder: Path) -> str:
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def edit(folder: Path, **changes: object) -> None:
    """Replace parts of metrics.json."""
    path = folder / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def verdict(text: str) -> tuple[str, str]:
    found = re.search(r'<div class="verdict (\w+)">(.*?)</div>', text)
    assert found
    return found[1], found[2]


def cells(text: str, system: str) -> list[str]:
    """The cells of a system's row in the table of results, without its name."""
    table = re.search(r'<table class="results">.*?</table>', text, re.S)
    assert table
    row = next(r for r in re.findall(r"<tr.*?</tr>", table[0]) if f"</span>{system}</td>" in r)
    return re.findall(r"<td>(.*?)</td>", row)[1:]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "run", steps=120, queries=60)


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    return page_of(run)


def simple(folder: Path, values: dict[str, float], p: float | None = None, metric: str = "ndcg@10") -> Path:
    """A run folder with metrics.json alone; retrieval_grpo is tested against every other system with the same p."""
    folder.mkdir(parents=True, exist_ok=True)
    ours = values.get("retrieval_grpo", 0.0)
    tests = {s: {"difference": ours - v, "ci_low": 0.0, "ci_high": 0.0, "p_value": p} for s, v in values.items()}
    metrics = {"systems": {s: {metric: v} for s, v in values.items()}, "tests": {metric: tests} if p else {}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_the_page_is_well_formed_small_and_has_every_part(run: Path, text: str) -> None:
    page = Page(text)
    assert len(text.encode()) < 2_000_000
    for word in (
        *SKILL,
        *NAMES,
        *SLICES,
        "ensemble",
        "exact rules",
        "20,000",
        "402,113",
        "3 min 32 s",
        "paired bootstrap",
    ):
        assert word in page.text + " ".join(str(a) for _, a in page.tags), word
    for chart in (
        "Reward: relevance",
        "Reward: exclusivity",
        "Loss of stage1",
        "KL to the reference",
        "Entropy",
        "Effective rank",
        "Cosine to the reference",
        "Groups without a signal",
        "Hubness skew",
        "Judge calls",
        "Judge cache hits",
        "Time shares: retrieval_grpo",
        "Quality against relevance",
        "Exclusivity",
    ):
        assert chart in page.text, chart
    assert "data: shop" in page.text
    assert 'class="missing"' not in text
    assert list(run.glob("*.tmp")) == []


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs(text: str) -> None:
    page = Page(text)
    assert {tag for tag, _ in page.tags} & {
        "script",
        "link",
        "iframe",
        "img",
        "object",
        "embed",
        "base",
        "form",
    } == set()
    for tag, attributes in page.tags:
        assert not {"src", "href", "srcset", "action"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "http:" not in text
    assert "https:" not in text


def test_text_of_the_data_is_escaped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=20, queries=10)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["systems"]["<i>mine"] = {"ndcg@10": 0.1, "<u>odd": 0.5}
    metrics["meta"] |= {"judge": "<b>judge", "<s>key": "<s>value"}
    metrics["seconds"]["<em>phase"] = 3.0
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "logs" / "<q>mine.jsonl").write_text('{"step": 0, "loss": 1.0, "reward/<p>/mean": 0.5, "<sub>": 1}\n')
    text = page_of(folder)
    Page(text)
    for raw in (
        SCRIPT,
        "<i>mine",
        "<u>odd",
        "<b>judge",
        "<s>key",
        "<s>value",
        "<em>phase",
        "<q>mine",
        "<p>/",
        "<sub>",
        "wireless 0 <b>",
    ):
        assert raw not in text, raw
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in text


def test_half_a_surrogate_pair_in_a_title_does_not_stop_the_report(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=5, queries=10)
    path = folder / "examples.json"
    path.write_text(path.read_text().replace("headphones model 001", "headphones \\ud83d"))
    assert "headphones ?" in page_of(folder)


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    pages = [write_report(make_run(tmp_path / name, steps=60, queries=20)).read_bytes() for name in "ab"]
    assert pages[0] == pages[1] == write_report(tmp_path / "a").read_bytes()


# ------------------------------------------------------------------------------------------------------------ verdict


def test_verdict_leads_the_best_other_system(tmp_path: Path) -> None:
    values = {"stage1": 0.70, "stage1_continued": 0.72, "untrained": 0.5, "retrieval_grpo": 0.741}
    text = page_of(simple(tmp_path, values, p=0.0003))
    assert verdict(text) == ("lead", "retrieval_grpo leads stage1_continued by +.021 nDCG@10 (p = .0003).")


def test_verdict_says_that_it_does_not_lead(tmp_path: Path) -> None:
    values = {"stage1": 0.70, "kl_distill": 0.753, "retrieval_grpo": 0.741}
    text = page_of(simple(tmp_path, values, p=0.00001))
    assert verdict(text) == (
        "behind",
        "retrieval_grpo does not lead: it is behind kl_distill, −.012 nDCG@10 (p &lt; .0001).",
    )


@pytest.mark.parametrize(("ours", "gap"), [(0.723, "+.003"), (0.719, "−.001"), (0.72, "±.000")])
def test_verdict_of_a_difference_within_chance(tmp_path: Path, ours: float, gap: str) -> None:
    text = page_of(simple(tmp_path, {"stage1_continued": 0.72, "retrieval_grpo": ours}, p=0.31))
    said = (
        f"retrieval_grpo does not lead: the difference to stage1_continued, {gap} nDCG@10, is within chance (p = .31)."
    )
    assert verdict(text) == ("level", said)


def test_no_verdict_without_a_test_or_a_rival_or_the_system_itself(tmp_path: Path) -> None:
    untested = verdict(page_of(simple(tmp_path / "a", {"stage1": 0.7, "retrieval_grpo": 0.75})))
    assert untested == (
        "level",
        "No verdict: the difference to stage1 is +.050 nDCG@10, but no paired test was recorded.",
    )
    alone = verdict(page_of(simple(tmp_path / "b", {"retrieval_grpo": 0.75})))
    assert alone == ("level", "No verdict: retrieval_grpo was evaluated alone, .750 nDCG@10.")
    absent = verdict(page_of(simple(tmp_path / "c", {"stage1": 0.7, "bm25": 0.6})))
    assert absent == ("level", "No verdict: retrieval_grpo was not evaluated. Best is stage1, .700 nDCG@10.")


def test_incomplete_labels_put_the_verdict_on_condensed_ndcg(tmp_path: Path) -> None:
    folder = simple(tmp_path, {"bm25": 0.7, "retrieval_grpo": 0.8}, p=0.001, metric="condensed_ndcg@10")
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["systems"]["bm25"] |= {"ndcg@10": 0.9, "judged@10": 1.0}  # the plain figure flatters what was graded
    metrics["systems"]["retrieval_grpo"] |= {"ndcg@10": 0.5, "judged@10": 0.4}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    text = page_of(folder)
    assert verdict(text) == ("lead", "retrieval_grpo leads bm25 by +.100 condensed nDCG@10 (p = .001).")
    assert "labels are incomplete" in text
    assert "<b>" not in cells(text, "bm25")[2]  # judged@10 is not a merit
    assert "<b>.900</b>" in cells(text, "bm25")[1]


# -------------------------------------------------------------------------------------------------------------- table


def test_best_of_each_column_is_bold_also_when_shared(tmp_path: Path) -> None:
    text = page_of(
        simple(tmp_path, {"stage1": 0.7001, "kl_distill": 0.7004, "bm25": 0.6, "retrieval_grpo": 0.69}, p=0.5)
    )
    bold = {system: "<b>" in cells(text, system)[0] for system in ("bm25", "stage1", "kl_distill", "retrieval_grpo")}
    assert bold == {"bm25": False, "stage1": True, "kl_distill": True, "retrieval_grpo": False}


def test_cells_show_difference_to_stage1_and_marks_of_significance(tmp_path: Path) -> None:
    folder = simple(tmp_path, {"bm25": 0.6, "stage1": 0.7, "untrained": 0.5, "retrieval_grpo": 0.8}, p=0.5)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["tests"]["ndcg@10"]["bm25"]["p_value"] = 0.009
    metrics["tests"]["ndcg@10"]["stage1"]["p_value"] = 0.049
    (folder / "metrics.json").write_text(json.dumps(metrics))
    text = page_of(folder)
    stripped = {
        s: re.sub(r"<sup.*?>", "^", cells(text, s)[0]) for s in ("bm25", "stage1", "untrained", "retrieval_grpo")
    }
    assert stripped == {
        "bm25": ".600^**</sup><small>−.100</small>",
        "stage1": ".700^*</sup>",
        "untrained": ".500<small>−.200</small>",
        "retrieval_grpo": "<b>.800</b><small>+.100</small>",
    }
    assert "paired bootstrap over queries" in text


def test_unknown_systems_and_metrics_are_shown_and_never_bold(tmp_path: Path) -> None:
    folder = simple(tmp_path, {"stage1": 0.7, "retrieval_grpo": 0.8}, p=0.01)
    systems = {"stage1": {"ndcg@10": 0.7, "overlap@10/other": 0.2}, "zeta": {"latency_ms": 1234.5, "ndcg@10": 0.6},
               "retrieval_grpo": {"ndcg@10": 0.8, "auc": None, "latency_ms": "fast"}}  # fmt: skip
    edit(folder, systems=systems)
    text = page_of(folder)
    assert [name in text for name in ("zeta", "latency_ms", "Overlap<wbr>@10/other", "AUC")] == [True] * 4
    assert cells(text, "zeta") == [".600<small>−.100</small>", "–", "–", "1234", "–"]
    assert "nan" not in Page(text).text.lower()


def test_missing_values_are_dashes(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=30, queries=10)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["systems"]["stage1"]["quality@10"] = math.nan
    del metrics["tests"]["quality@10"]
    metrics["tests"]["ndcg@10"]["stage1"] = {"difference": None, "ci_low": None, "ci_high": None, "p_value": None}
    metrics["seconds"]["stage1"] = None
    (folder / "metrics.json").write_text(json.dumps(metrics))
    path = folder / "logs" / "retrieval_grpo.jsonl"
    path.write_text(path.read_text() + '{"step": 30, "loss": null, "kl": NaN, "entropy": Infinity}\n')
    text = page_of(folder)
    assert cells(text, "stage1")[NAMES.index("quality@10")] == "–"
    assert re.search(r"\b(nan|inf|none)\b", Page(text).text, re.IGNORECASE) is None
    assert re.search(r'="[^"]*\b(nan|inf)\b', text) is None


# ------------------------------------------------------------------------------------------------------ who evaluated


@pytest.mark.parametrize(
    ("judge", "evaluated_by", "warned"),
    [
        ("qwen", "qwen", True),
        ("qwen", "grades by QWEN", True),
        ("qwen", "human grades", False),
        ("ensemble", "exact rules", False),
        ("exact rules", "exact rules", False),
        ("oracle", "the catalog's grades", False),
        ("mean", "meaning", False),
        ("", "human grades", True),
        ("qwen", "", True),
    ],
)
def test_warns_when_the_judge_of_the_reward_evaluates(
    tmp_path: Path, judge: str, evaluated_by: str, warned: bool
) -> None:
    folder = simple(tmp_path, {"stage1": 0.7, "retrieval_grpo": 0.8}, p=0.01)
    edit(folder, meta={"judge": judge, "evaluated_by": evaluated_by})
    text = page_of(folder)
    assert ('class="warn"' in text) is warned
    assert ("upper bound" in text) is (judge in ("oracle", "exact rules"))


# ------------------------------------------------------------------------------------------------------------- slices


def test_slices_hold_the_mean_of_their_queries(tmp_path: Path) -> None:
    folder = simple(tmp_path, {"stage1": 0.45, "retrieval_grpo": 0.55}, p=0.01)
    table = {"system": ["stage1"] * 4 + ["retrieval_grpo"] * 4, "query_id": list("abcd") * 2,
             "slice": ["head", "head", "tail", ""] * 2, "ndcg@10": [0.2, 0.4, 0.6, None, 0.5, 0.7, 0.4, 0.9]}  # fmt: skip
    pq.write_table(pa.table(table), folder / "per_query.parquet")
    text = page_of(folder)
    figures = dict(re.findall(r"<figcaption>([^<]*)<.*?(<svg.*?)</figure>", text))
    values = {name: re.findall(r">([+−]?\.\d+\**|–)</text>", figures[name]) for name in ("head", "tail", "(no slice)")}
    assert values == {"head": [".300", ".600"], "tail": [".600", ".400"], "(no slice)": ["–", ".900"]}
    gaps = re.findall(
        r'>([^<]+)</text>(?:<g.*?</g>)<text class="end ink"[^>]*>([^<]+)<', figures["retrieval_grpo minus stage1"]
    )
    assert [(name, gap.rstrip("*")) for name, gap in gaps] == [("head", "+.300"), ("tail", "−.200")]


# ------------------------------------------------------------------------------------------------------ missing parts


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("per_query.parquet", "No per_query.parquet in the run folder"),
        ("examples.json", "No examples.json in the run folder"),
        ("config.yaml", "No config.yaml in the run folder"),
        ("logs/retrieval_grpo.jsonl", "No logs/retrieval_grpo.jsonl in the run folder"),
        ("logs/*.jsonl", "No logs/*.jsonl in the run folder"),
    ],
)
def test_a_missing_part_is_said(tmp_path: Path, gone: str, said: str) -> None:
    folder = make_run(tmp_path / "run", steps=20, queries=10)
    for path in folder.glob(gone):
        path.unlink()
    text = page_of(folder)
    assert said in Page(text).text
    assert text.count('class="missing"') == 1


def test_metrics_alone_make_a_page(tmp_path: Path) -> None:
    text = page_of(simple(tmp_path, {"stage1": 0.7, "retrieval_grpo": 0.8}, p=0.01))
    Page(text)
    missing = re.findall(r'<p class="missing">(.*?)</p>', text)
    assert len(missing) == 7  # times, per query, two trade-offs, logs, examples, config
    assert sum("goodrate" in line.lower() for line in missing) == 2


def test_a_torn_log_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=20, queries=10)
    with (folder / "logs/stage1.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')
    assert "Lines that are not JSON were left out of stage1.jsonl" in page_of(folder)


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.json does not exist: run the evaluation first"):
        write_report(tmp_path)
    for bad in ("{", "[]", "{}", '{"systems": {}}', '{"systems": {"stage1": 3}}'):
        (tmp_path / "metrics.json").write_text(bad)
        with pytest.raises(ValueError, match=r"metrics\.json .*run the evaluation again"):
            write_report(tmp_path)
    simple(tmp_path, {"stage1": 0.7})
    for bad in ("{}", "[1]", '[{"before": {}}]', '[{"before": {}, "after": 3}]'):
        (tmp_path / "examples.json").write_text(bad)
        with pytest.raises(ValueError, match=r"examples\.json is not a list"):
            write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


# ------------------------------------------------------------------------------------------------------- result lists


def test_result_lists_tell_grades_moves_and_reach(tmp_path: Path) -> None:
    def item(name: str, grade: int | None, known: bool) -> dict[str, Any]:
        return {"id": name, "title": name, "grade": grade, "score": 0.5, "quality": 0.25, "in_channel": known}

    before = [item("A", 1, True), item("B", 3, True), item("C", None, False)]
    after = [item("B", 3, True), item("D", 2, False), item("A", 1, True)]
    folder = simple(tmp_path, {"stage1": 0.7, "retrieval_grpo": 0.8}, p=0.01)
    example = {"query_id": "q", "query": "red shoes", "slice": "head", "before": {"system": "stage1", "ndcg@10": 0.5, "items": before},
               "after": {"system": "retrieval_grpo", "ndcg@10": None, "items": after}}  # fmt: skip
    (folder / "examples.json").write_text(json.dumps([example]))
    text = page_of(folder)
    tables = re.findall(r"<table><thead>.*?<tbody>(.*?)</tbody>", text)
    rows = [
        [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td.*?</td>", row)]
        for t in tables
        for row in t.split("</tr>")[:-1]
    ]
    assert rows == [
        ["1", "1", "A", ".25", "BM25", ""], ["2", "3", "B", ".25", "BM25", ""], ["3", "–", "C", ".25", "not BM25", "gone"],
        ["1", "3", "B", ".25", "BM25", "▲1"], ["2", "2", "D", ".25", "not BM25", "new"], ["3", "1", "A", ".25", "BM25", "▼2"],
    ]  # fmt: skip
    assert "nDCG@10 .50 → – " in Page(text).text


# ------------------------------------------------------------------------------------------------------------- curves


def test_curves_hold_at_most_the_points_that_can_be_seen(tmp_path: Path) -> None:
    folder = simple(tmp_path, {"retrieval_grpo": 0.8})
    (folder / "logs").mkdir()
    _write_log(folder, "retrieval_grpo", [{"step": i, "reward/relevance/mean": i % 2} for i in range(20_000)])
    text = page_of(folder)
    assert len(text) < 60_000
    line = re.search(r'class="line" d="([^"]*)"', text)
    assert line
    heights = [float(y) for y in re.findall(r" ([\d.]+)", line[1])]
    assert 250 < len(heights) <= 300
    assert max(heights) - min(heights) < 1  # the running mean of 0, 1, 0, 1 is flat


def test_time_shares_are_those_of_the_log(tmp_path: Path) -> None:
    folder = simple(tmp_path, {"retrieval_grpo": 0.8})
    (folder / "logs").mkdir()
    lines = [{"step": i, "seconds/judge": 1.0, "seconds/forward": 2.0, "seconds/own": 1.0} for i in range(50)]
    _write_log(folder, "retrieval_grpo", lines)
    words = Page(page_of(folder)).text
    assert "judge 25 %forward 50 %own 25 %" in words
    assert "3 min 20 s in 50 steps, 4 s per step" in words
