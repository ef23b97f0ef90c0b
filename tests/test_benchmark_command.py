"""``taoemb benchmark``: figures against brute force on a small catalog, the page, the sheet for people, mistakes."""

import csv
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_cli import refused, taoemb_cli

from taoemb.benchmark import CURVE, fuse, sources_of
from taoemb.benchmark_report import write_page
from taoemb.catalog import Catalog
from taoemb.encoder import Encoder
from taoemb.evaluation import paired_bootstrap
from taoemb.gsb import score_sheet

WORDS = ["red", "blue", "shoe", "hat", "mug", "lamp"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder of 40 items and 12 queries without slices, every pair judged; and run files of two other systems."""
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    rng = np.random.default_rng(0)
    titles = [" ".join(rng.choice(WORDS, 3)) for _ in range(40)]
    items = pa.table({"id": [f"i{n:02}" for n in range(40)], "title": titles, "quality": rng.random(40)})
    texts = [f"{a} {b}" for a in ("red", "blue", "=red") for b in ("shoe", "hat", "mug", "lamp")]
    queries = pa.table({"id": [f"q{n:02}" for n in range(12)], "query": texts, "split": ["test"] * 12})
    pairs = []
    for q, text in enumerate(texts):
        for i, title in enumerate(titles):
            shared = len(set(text.strip("=").split()) & set(title.split()))
            pairs.append((f"q{q:02}", f"i{i:02}", int(rng.integers(4)) if rng.random() < 0.15 else (0, 2, 3)[shared]))
    columns = zip(*pairs, strict=True)
    qrels = pa.table(dict(zip(("query_id", "item_id", "grade"), columns, strict=True)))
    Catalog.from_tables(items, queries, qrels, metadata={"unjudged": 0}).save(folder)
    for name, reverse in (("good", True), ("bad", False)):
        lines = []
        for query in queries.column("id").to_pylist():
            ranked = sorted((p for p in pairs if p[0] == query), key=lambda p: (p[2], p[1]), reverse=reverse)
            lines += [f"{query} Q0 {item} {r} {40 - r} {name}" for r, (_, item, _) in enumerate(ranked)]
        (folder.parent / f"{name}.trec").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def bench(tiny, static_model, tmp_path_factory):
    """A finished benchmark, its command, what it printed, and its ``benchmark.json``."""
    out = tmp_path_factory.mktemp("bench") / "out"
    arguments = [
        "benchmark",
        static_model,
        tiny.parent / "good.trec",
        tiny.parent / "bad.trec",
        "--data",
        tiny,
        "--out",
        out,
    ]
    result = taoemb_cli(*arguments)
    assert result.exit_code == 0, result.output
    return out, arguments, result, json.loads((out / "benchmark.json").read_text())


def files(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir() if p.is_file()}


# Figures ----------------------------------------------------------------------------------------------------------------


def dcg(grades):
    return sum(g / np.log2(rank + 2) for rank, g in enumerate(grades))


def test_figures_are_those_of_brute_force(bench, tiny, static_model):
    out, _, _, raw = bench
    assert raw["order"] == ["bm25", "static", "good", "bad", "bm25+static"]
    assert raw["against"] == "static"
    catalog, encoder = Catalog.load(tiny), Encoder(static_model)
    items_ND, rows = encoder.encode_document(catalog.items), pq.read_table(out / "per_query.parquet").to_pylist()
    found = {(row["system"], row["query_id"]): row for row in rows}
    assert len(found) == len(rows) == 5 * 12
    quality = dict(zip(catalog.items.ids, catalog.items.column("quality"), strict=True))
    shown = Counter()
    for query in catalog.queries:
        scores = items_ND @ encoder.encode_query([query.text])[0]
        order = [catalog.items.ids[i] for i in np.lexsort((-np.arange(40), -scores))]
        grades = catalog.qrels[query.id]
        row = found["static", query.id]
        ideal = sorted(grades.values(), reverse=True)
        assert row["ndcg@10"] == pytest.approx(dcg([grades[i] for i in order[:10]]) / dcg(ideal[:10]))
        good = {i for i, grade in grades.items() if grade >= 2}
        for k in (k for k in CURVE if k <= 1000):
            assert row[f"recall@{k}"] == pytest.approx(len(good & set(order[:k])) / len(good)), k
        assert row["goodrate@10"] == pytest.approx(len(good & set(order[:10])) / 10)
        assert row["quality@10"] == pytest.approx(np.mean([quality[i] for i in order[:10]]))
        assert found["good", query.id]["ndcg@10"] == pytest.approx(1)
        assert found["bad", query.id]["ndcg@10"] == pytest.approx(dcg(ideal[::-1][:10]) / dcg(ideal[:10]))
        shown.update(order[:10])
    counts = np.array(list(shown.values()), dtype=float)
    skew = ((counts - counts.mean()) ** 3).mean() / counts.std() ** 3
    assert raw["systems"]["static"]["hubness@10"] == pytest.approx(skew)
    column = {s: np.array([found[s, q]["ndcg@10"] for q in catalog.queries.ids]) for s in raw["order"]}
    test = paired_bootstrap(column["good"], column["static"])
    assert raw["tests"]["ndcg@10"]["good"] == {
        "difference": test.difference, "ci_low": test.ci_low, "ci_high": test.ci_high, "p_value": test.p_value,
    }  # fmt: skip
    assert raw["slices"].keys() == {"(no slice)"}
    assert raw["slices"]["(no slice)"]["systems"]["good"]["ndcg@10"] == pytest.approx(column["good"].mean())
    assert raw["recall_curve"]["static"]["20"] == pytest.approx(
        np.mean([found["static", q]["recall@20"] for q in catalog.queries.ids])
    )
    assert "good" in raw["pareto"]["front"]
    assert "bad" not in raw["pareto"]["front"]


def test_fusion_is_by_reciprocal_rank(bench):
    lists = [[["a", "b", "c"], ["x"]], [["c", "d"], []]]
    worth = {"a": 1 / 61, "b": 1 / 62, "c": 1 / 63 + 1 / 61, "d": 1 / 62}
    assert fuse(lists, 3) == [sorted(worth, key=lambda i: (-worth[i], i))[:3], ["x"]]


def test_costs_are_those_of_what_was_encoded(bench):
    cost = bench[3]["cost"]
    assert cost["bm25"]["item_encodings"] == 0
    assert cost["static"]["item_encodings"] == cost["bm25+static"]["item_encodings"] == 40
    assert cost["static"]["index_mb"] == pytest.approx(40 * 16 * 4 / 1e6)
    assert set(cost["good"].values()) == {None}
    for name in ("prepare_seconds", "query_ms", "index_mb"):
        assert cost["bm25"][name] > 0
        assert cost["bm25+static"][name] == pytest.approx(cost["bm25"][name] + cost["static"][name])


def test_the_table_has_every_system_and_metric(bench):
    head, *rows = bench[2].stdout.splitlines()
    assert head.split() == bench[3]["order"]
    line = next(row for row in rows if row.startswith("nDCG@10"))
    assert line.split()[3].startswith("1.000*")
    assert f"p < .05 / {sum(map(len, bench[3]['tests'].values()))}" in rows[-1]


# Page and files ---------------------------------------------------------------------------------------------------------


class Closed(HTMLParser):
    """Every tag is closed in its turn."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_loads_nothing_and_shows_every_part(bench):
    page = (bench[0] / "benchmark.html").read_text()
    parser = Closed()
    parser.feed(re.sub(r"<path[^>]*/>|<rect[^>]*/>|<circle[^>]*/>", "", page))
    assert not parser.open
    assert not re.search(r"<script|https?://|url\(|src=", page)
    for part in ("Results", "Quality and cost", "Objectives", "Query slices", "Result lists", "Ask people"):
        assert f"<h2>{part}" in page, part
    assert "good is best" in page
    assert "=red shoe" in page or "=red" not in json.dumps(bench[3]["examples"])
    assert str(bench[0].parent) not in page


def test_the_same_command_encodes_nothing_again_and_writes_the_same_bytes(bench, monkeypatch):
    out, arguments, _, _ = bench
    before = files(out)
    monkeypatch.setattr(Encoder, "encode_document", lambda *_, **__: pytest.fail("encoded again"))
    assert taoemb_cli(*arguments).exit_code == 0
    assert {p: b for p, (_, b) in files(out).items()} == {p: b for p, (_, b) in before.items()}
    page = (out / "benchmark.html").read_bytes()
    write_page(out)
    assert (out / "benchmark.html").read_bytes() == page


def test_ctrl_c_keeps_what_was_encoded(tiny, static_model, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    arguments = ["benchmark", static_model, "--data", tiny, "--out", tmp_path / "b"]
    with monkeypatch.context() as patched:
        patched.setattr("taoemb.comparison.Comparison.table", interrupted)
        result = taoemb_cli(*arguments)
    assert result.exit_code == 130
    assert "the same command goes on" in result.output
    costs = (tmp_path / "b" / "encodings" / "costs.json").read_text()
    monkeypatch.setattr(Encoder, "encode_document", lambda *_, **__: pytest.fail("encoded again"))
    assert taoemb_cli(*arguments).exit_code == 0
    assert (tmp_path / "b" / "encodings" / "costs.json").read_text() == costs


def test_an_interrupted_encode_adds_its_times_up(tiny, static_model, tmp_path, monkeypatch):
    encode, arguments = Encoder.encode_document, ["benchmark", static_model, "--data", tiny, "--out", tmp_path / "b"]
    clock = iter(range(0, 10_000, 7))
    monkeypatch.setattr("taoemb.benchmark.time.perf_counter", lambda: next(clock))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Encoder, "encode_document", interrupted)
    assert taoemb_cli(*arguments).exit_code == 130
    monkeypatch.setattr(Encoder, "encode_document", encode)
    assert taoemb_cli(*arguments).exit_code == 0
    assert json.loads((tmp_path / "b" / "benchmark.json").read_text())["cost"]["static"]["prepare_seconds"] == 14


def test_a_run_folder_stands_for_its_model(tiny, static_model, tmp_path):
    for run in ("a/run", "b/run", "one"):
        shutil.copytree(static_model, tmp_path / run / "model")
    one, two = tmp_path / "a" / "run", tmp_path / "b" / "run"
    assert sources_of([str(tmp_path / "one"), str(one)]) == {
        "one": str(tmp_path / "one" / "model"),
        "run": str(one / "model"),
    }
    assert sources_of([str(one), str(two)]) == {str(one): str(one / "model"), str(two): str(two / "model")}
    assert list(sources_of([str(one / "model"), "org/name"])) == ["run", "org/name"]
    (tmp_path / "bm25.trec").write_text("")
    assert list(sources_of([str(tmp_path / "bm25.trec")])) == [str(tmp_path / "bm25.trec")]
    result = taoemb_cli("benchmark", one, "--data", tiny, "--out", tmp_path / "out", "--depth", 10, "--against", "bm25")
    assert result.exit_code == 0, result.output
    raw = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert raw["order"] == ["bm25", "run", "bm25+run"]
    assert raw["against"] == "bm25"
    assert "recall@100" not in raw["systems"]["run"]


def test_unjudged_pairs_are_told(static_model, tiny, tmp_path):
    catalog = Catalog.load(tiny)
    some = {q: dict(list(graded.items())[::3]) for q, graded in catalog.qrels.items()}
    Catalog(catalog.items, catalog.queries, some).save(tmp_path / "pooled")
    arguments = ["benchmark", tiny.parent / "good.trec", static_model, "--data", tmp_path / "pooled"]
    result = taoemb_cli(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    raw = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert raw["systems"]["good"]["condensed_ndcg@10"] == pytest.approx(1)
    assert raw["systems"]["good"]["auc"] == 1
    assert 0 < raw["systems"]["static"]["judged@10"] < 1
    page = (tmp_path / "out" / "benchmark.html").read_text()
    assert "condensed nDCG" in page
    assert "Not every pair has a grade" in page
    judged = taoemb_cli(
        *arguments, "--out", tmp_path / "judged", "--judge", "kind=soft_logic", "--channel", tiny.parent / "bad.trec"
    )
    assert judged.exit_code == 0, judged.output
    raw = json.loads((tmp_path / "judged" / "benchmark.json").read_text())
    assert raw["meta"]["graded_by"] == "judge (kind=soft_logic)"
    assert raw["systems"]["bm25+static"]["judged@10"] == 1  # the fusion's own Top is graded too
    assert "overlap@10/bad" in raw["systems"]["static"]


def test_where_only_good_pairs_are_listed_the_others_are_irrelevant(static_model, tiny, tmp_path):
    catalog = Catalog.load(tiny)
    good = {q: {i: 2 for i, grade in graded.items() if grade >= 2} for q, graded in catalog.qrels.items()}
    Catalog(catalog.items, catalog.queries, good).save(tmp_path / "good")
    result = taoemb_cli("benchmark", static_model, "--data", tmp_path / "good", "--out", tmp_path / "out")
    assert "every graded pair is good: pairs without a grade count as irrelevant" in result.output
    raw = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert not {"condensed_ndcg@10", "auc", "judged@10"} & raw["systems"]["static"].keys()
    assert 0 < raw["systems"]["static"]["goodrate@10"] < 1
    assert raw["meta"]["unjudged"] == "irrelevant"


# The sheet --------------------------------------------------------------------------------------------------------------


def filled(bench, folder, verdict):
    """A copy of the sheet in which ``verdict`` says what people said; gives its path and its rows."""
    folder.mkdir(exist_ok=True)
    for name in ("gsb.csv", "gsb_key.json"):
        shutil.copy(bench[0] / name, folder)
    sheet = folder / "gsb.csv"
    with sheet.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["verdict"] = verdict(row)
    write(sheet, rows)
    return sheet, rows


def write(sheet, rows, delimiter=","):
    with sheet.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def test_the_sheet_is_blind_and_holds_both_lists(bench, tiny):
    out, _, _, _ = bench
    sheet, rows = out / "gsb.csv", None
    text = sheet.read_text(encoding="utf-8-sig")
    key = json.loads((out / "gsb_key.json").read_text())
    assert (key["system"], key["against"]) == ("good", "static")
    assert not re.search(r"static|good|trec", text)
    rows = list(csv.DictReader(text.splitlines(keepends=True)))
    assert {row["query_id"] for row in rows} == set(key["left"])
    assert set(key["left"].values()) == {"good", "static"}
    catalog = Catalog.load(tiny)
    for row in rows:
        best = sorted(catalog.qrels[row["query_id"]].items(), key=lambda p: (p[1], p[0]), reverse=True)
        side = "left" if key["left"][row["query_id"]] == "good" else "right"
        title = catalog.items[int(catalog.items.positions([best[0][0]])[0])].title
        assert row[side].splitlines()[0] == f"1. {title}"
        assert len(row["left"].splitlines()) == len(row["right"].splitlines()) == 10
        assert row["verdict"] == ""
        assert not row["query"].startswith("=")


def test_a_filled_sheet_is_scored(bench, tmp_path):
    key = json.loads((bench[0] / "gsb_key.json").read_text())
    wanted = iter(["good"] * 6 + ["same"] * 2 + ["bad"] * 3 + [""])

    def verdict(row):
        said = next(wanted)
        if said in ("same", ""):
            return said
        left = key["left"][row["query_id"]] == "good"
        return " Left" if left == (said == "good") else "right"

    sheet, rows = filled(bench, tmp_path / "gsb", verdict)
    found = score_sheet(sheet)
    assert (found.good, found.same, found.bad, found.asked) == (6, 2, 3, 12)
    assert found.score == pytest.approx(3 / 11)
    test = paired_bootstrap([1] * 6 + [0] * 2 + [-1] * 3, np.zeros(11))
    assert found.ci_low <= found.score <= found.ci_high
    assert found.ci_high - found.ci_low == pytest.approx(test.ci_high - test.ci_low, abs=0.1)
    result = taoemb_cli("benchmark", "--gsb-score", tmp_path / "gsb")
    assert result.exit_code == 0, result.output
    assert "G : S : B = 6 : 2 : 3" in result.stdout
    assert "11 of 12 queries have a verdict" in result.stdout
    write(sheet, rows, delimiter=";")
    assert score_sheet(sheet) == found
    sheet.write_text(sheet.read_text(), encoding="utf-16")
    assert "not UTF-8" in refused("benchmark", "--gsb-score", sheet)


def test_identical_lists_are_not_asked(bench, tiny, tmp_path):
    good = (tiny.parent / "good.trec").read_text().splitlines()
    bad = (tiny.parent / "bad.trec").read_text().splitlines()
    half = [line for line in good if line < "q06"] + [line for line in bad if line >= "q06"]
    (tmp_path / "half.trec").write_text("\n".join(half))
    two = ("benchmark", tiny.parent / "good.trec", tmp_path / "half.trec", "--gsb", "half", "--data", tiny)
    assert taoemb_cli(*two, "--out", tmp_path / "b").exit_code == 0
    sheet = tmp_path / "b" / "gsb.csv"
    rows = list(csv.DictReader(sheet.read_text(encoding="utf-8-sig").splitlines(keepends=True)))
    assert sorted(row["query_id"] for row in rows) == [f"q{n:02}" for n in range(6, 12)]
    key = json.loads((tmp_path / "b" / "gsb_key.json").read_text())
    write(sheet, [{**row, "verdict": "right" if key["left"][row["query_id"]] == "half" else "left"} for row in rows])
    text = score_sheet(tmp_path / "b").text()
    assert "G : S : B = 0 : 0 : 6" in text
    assert "50 % of the queries have two identical lists" in text
    assert "the score is -0.500" in text
    again = taoemb_cli(*two, "--out", tmp_path / "b", "--seed", 1)
    assert "6 verdicts are filled in" in " ".join(again.output.split())
    assert score_sheet(tmp_path / "b").bad == 6
    shutil.copy(tiny.parent / "good.trec", tmp_path / "twin.trec")
    same = taoemb_cli(
        "benchmark",
        tiny.parent / "good.trec",
        tmp_path / "twin.trec",
        "--data",
        tiny,
        "--out",
        tmp_path / "c",
        "--gsb",
        "twin",
    )
    assert "show the same Top-10 for every query" in same.output


def test_sheet_mistakes(bench, tmp_path):
    score = ("benchmark", "--gsb-score")
    assert "the column verdict is empty" in refused(*score, bench[0])
    sheet, rows = filled(bench, tmp_path / "a", lambda row: "lft" if row["query_id"] == "q03" else "same")
    message = refused(*score, sheet)
    assert "1 verdicts are none of left, same, right (or empty): 'lft' for query 'q03'" in message
    write(sheet, [{**row, "verdict": "same", "sheet": "0123"} for row in rows])
    assert "is sheet '0123'" in refused(*score, sheet)
    write(sheet, [{**rows[0], "verdict": "same"}] * 2)
    assert "is twice in it" in refused(*score, sheet)
    write(sheet, [{k: v for k, v in row.items() if k != "verdict"} for row in rows])
    assert "has no column verdict" in refused(*score, sheet)
    write(sheet, rows)
    (tmp_path / "a" / "gsb_key.json").write_text("{}")
    assert "is no key of a sheet" in refused(*score, sheet)
    (tmp_path / "a" / "gsb_key.json").unlink()
    assert "gsb_key.json does not exist" in refused(*score, sheet)
    assert "does not exist" in refused(*score, tmp_path / "nowhere")


# Mistakes ---------------------------------------------------------------------------------------------------------------


def test_mistakes(bench, tiny, static_model, small_shop_folder, tmp_path):
    out = ("--out", tmp_path / "out")
    data = ("--data", tiny)
    assert "--data and a folder to write with --out" in refused("benchmark", static_model)
    assert "give at least one system" in refused("benchmark", *data, *out)
    assert "is given twice" in refused("benchmark", static_model, static_model, *data, *out)
    assert "nowhere.trec is no file" in refused("benchmark", "nowhere.trec", *data, *out)
    message = refused("benchmark", static_model, *data, *out, "--against", "mine")
    assert "--against 'mine' takes no part; give one of static, bm25, bm25+static" in message
    assert "give another one" in refused("benchmark", static_model, *data, *out, "--gsb", "static")
    assert "depth=3" in refused("benchmark", static_model, *data, *out, "--depth", 3)
    assert "Settings in one word look like" in refused("benchmark", static_model, *data, *out, "--judge", "kind=nope")
    assert "pool=0" in refused("benchmark", static_model, *data, *out, "--pool", 0)
    assert "no graded query of split 'train'" in refused("benchmark", static_model, *data, *out, "--split", "train")
    assert "holds something that is no benchmark" in refused("benchmark", static_model, *data, "--out", tiny)
    assert not (tmp_path / "out").exists()
    (tmp_path / "beir").mkdir()
    (tmp_path / "beir" / "corpus.jsonl").write_text("{}\n")
    assert "`taoemb data import beir" in refused("benchmark", static_model, "--data", tmp_path / "beir", *out)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    assert "is a run folder without a model/" in refused("benchmark", tmp_path / "run", *data, *out)
    few = tmp_path / "few.trec"
    few.write_text("q00 Q0 i00 1 1 t\n")
    assert "few.trec has no entry for 11 of the queries" in refused("benchmark", few, *data, *out)
    other = ("benchmark", static_model, "--data", small_shop_folder, "--out", bench[0])
    assert "cannot be used for this catalog" in refused(*other)
    (tmp_path / "page").mkdir()
    with pytest.raises(FileNotFoundError, match="run `taoemb benchmark`"):
        write_page(tmp_path / "page")
    (tmp_path / "page" / "benchmark.json").write_text('{"kind": "other"}')
    with pytest.raises(ValueError, match="run it again"):
        write_page(tmp_path / "page")


def test_evaluate_is_the_short_form(bench, tiny, static_model):
    result = taoemb_cli("evaluate", static_model, tiny.parent / "good.trec", "--data", tiny)
    assert result.exit_code == 0, result.output
    head, *rows = result.stdout.splitlines()
    table = {row.split()[0]: dict(zip(head.split(), row.split()[1:], strict=True)) for row in rows}
    assert list(table) == ["bm25", str(static_model), str(tiny.parent / "good.trec")]
    for name, system in ((str(static_model), "static"), (str(tiny.parent / "good.trec"), "good")):
        for metric in ("ndcg@10", "recall@100", "overlap@10", "quality@10"):
            assert table[name][metric] == f"{bench[3]['systems'][system][metric]:.3f}"


def test_one_query_without_a_good_item_is_no_error(tiny, static_model, tmp_path):
    items = Catalog.load(tiny).items.table.select(["id", "title"])
    query = pa.table({"id": ["q"], "query": ["zebra"], "split": ["test"]})
    qrels = pa.table({"query_id": ["q"], "item_id": ["i00"], "grade": [0]})
    Catalog.from_tables(items, query, qrels).save(tmp_path / "one")
    result = taoemb_cli("benchmark", static_model, "--data", tmp_path / "one", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "no test, because fewer than two queries have a value" in result.stdout
    page = (tmp_path / "out" / "benchmark.html").read_text()
    assert "No verdict" in page
    assert "there is no recall" in page
