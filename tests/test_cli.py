import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

import taoemb
from taoemb.catalog import Catalog, Items, ItemTemplate, QuerySet
from taoemb.cli import app
from taoemb.encoder import Encoder
from taoemb.index.refresh import load_index
from taoemb.index.runs import RunChannel, write_run
from taoemb.index.snapshots import Snapshots
from taoemb.shop import Shop
from taoemb.store import EmbeddingStore

FEW_STEPS = [
    "trackers=[jsonl]", "stage1.steps=4", "stage1.batch_size=16", "stage1.global_negatives=16", "stage1.save_steps=2",
    "stage2.steps=3", "stage2.batch_size=8", "stage2.num_candidates=8", "stage2.global_negatives=8",
    "stage2.save_steps=2",
]  # fmt: skip


def taoemb_cli(*arguments):
    """Run a command in this process."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*arguments):
    """The message of a command that ends as a mistake of the caller."""
    result = taoemb_cli(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """Folder with the shop that ``taoemb demo --items 600`` looks for."""
    folder = tmp_path_factory.mktemp("cli") / "shop-600-0"
    result = taoemb_cli("data", "shop", "--out", folder, "--items", 600)
    assert result.exit_code == 0, result.output
    return folder, result.output


@pytest.fixture(scope="module")
def run(small_shop_folder, static_model, tmp_path_factory):
    """A finished run folder, its command, and what that printed."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    arguments = ["train", "--data", small_shop_folder, "--out", folder, f"model={static_model}", *FEW_STEPS]
    result = taoemb_cli(*arguments)
    assert result.exit_code == 0, result.output
    return folder, arguments, result.stdout


def files(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


# Version, help, starting ------------------------------------------------------------------------------------------------


def test_version():
    assert taoemb_cli("--version").output == f"taoemb {taoemb.__version__}\n"


def test_help_lists_every_command():
    output = taoemb_cli("--help").output
    assert all(name in output for name in ("demo", "data", "encode", "index", "search", "train", "evaluate"))


def test_starts_without_torch_and_as_a_module():
    code = "import sys, taoemb.cli; print(sorted({'torch', 'faiss', 'transformers'} & set(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": str(Path(taoemb.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    done = subprocess.run([sys.executable, "-m", "taoemb.cli", "data", "shop", "--items", "0", "--out", "x"], env=env,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: items=0")


def test_ctrl_c(monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("taoemb.shop.generate_shop", interrupted)
    result = CliRunner().invoke(app, ["data", "shop", "--out", str(tmp_path / "s")])
    assert result.exit_code == 130
    assert result.output.strip() == "interrupted"  # nothing to go on from


def test_a_bug_shows_its_traceback(monkeypatch, tmp_path):
    def broken(*_, **__):
        raise AssertionError("a bug")

    monkeypatch.setattr("taoemb.shop.generate_shop", broken)
    with pytest.raises(AssertionError, match="a bug"):
        taoemb_cli("data", "shop", "--out", tmp_path / "s")


# Data -----------------------------------------------------------------------------------------------------------------


def test_data_shop(generated, tmp_path):
    folder, output = generated
    shop = Shop.load(folder)
    assert len(shop.catalog.items) == 600
    assert "600 items" in output
    assert f"{len(shop.catalog.queries):,} queries" in output
    assert {q.split for q in shop.catalog.queries} == {"train", "validation", "test"}
    assert "at least 1 item" in refused("data", "shop", "--out", tmp_path, "--items", 0)


def test_data_queries(small_shop_folder, small_shop, tmp_path):
    command = ("data", "queries", small_shop_folder, "--n", 40, "--seed", 3)
    result = taoemb_cli(*command, "--out", tmp_path / "a")
    assert result.exit_code == 0, result.output
    queries = QuerySet.load(tmp_path / "a" / "queries.parquet")
    written = queries.texts[-40:]
    assert len(set(written)) == 40
    assert all(text in result.output for text in written[:5])
    whole = Catalog.load(tmp_path / "a")
    assert whole.items.ids == small_shop.items.ids
    assert whole.qrels == small_shop.qrels
    assert whole.queries.texts == [*small_shop.queries.texts, *queries.texts[-40:]]
    assert whole.clicks.num_rows > small_shop.clicks.num_rows
    small_shop.save(tmp_path / "b")
    for name in ("queries", "clicks", "qrels"):
        (tmp_path / "b" / f"{name}.parquet").unlink()
    taoemb_cli("data", "queries", tmp_path / "b", "--n", 40, "--seed", 3, "--out", tmp_path / "b")
    catalog = Catalog.load(tmp_path / "b")  # written into a catalog without queries, they belong to it
    assert catalog.queries.texts == written
    assert catalog.clicks is not None
    other = taoemb_cli("data", "queries", small_shop_folder, "--n", 40, "--seed", 4, "--out", tmp_path / "c")
    assert other.stdout != result.stdout


def test_data_queries_never_overwrite(small_shop, tmp_path):
    small_shop.save(tmp_path / "shop")
    before = files(tmp_path / "shop")
    message = refused("data", "queries", tmp_path / "shop", "--out", tmp_path / "shop", "--n", 10)
    assert "already holds queries" in message
    assert files(tmp_path / "shop") == before


# Encode, index ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", ["Flat", "HNSW8"])
def test_encode_and_index(factory, small_shop_folder, small_shop, static_model, tmp_path):
    encode = ("encode", static_model, "--data", small_shop_folder, "--out", tmp_path / "emb")
    assert "600 embeddings of 16 dimensions" in taoemb_cli(*encode).output
    store = EmbeddingStore.open(tmp_path / "emb")
    encoder = Encoder(static_model)
    wanted = encoder.encode_document(ItemTemplate().texts(small_shop.items))
    np.testing.assert_allclose(store.vectors, wanted, atol=1e-6)
    before = files(tmp_path / "emb")
    assert taoemb_cli(*encode).exit_code == 0
    assert files(tmp_path / "emb") == before
    built = taoemb_cli("index", "build", tmp_path / "emb", "--out", tmp_path / "index", "--factory", factory)
    assert "over 600 vectors" in built.output
    assert "recall@10" in built.output or factory == "Flat"
    info = taoemb_cli("index", "info", tmp_path / "index").stdout
    assert info.startswith(f"factory: {factory}")
    assert f"items: 600\ndimensions: 16\nfingerprint: {encoder.fingerprint}\n" in info


def test_encode_and_index_mistakes(small_shop_folder, static_model, tiny_bert, tmp_path):
    out = ("--out", tmp_path / "emb")
    assert "nowhere is not a folder" in refused("encode", static_model, "--data", tmp_path / "nowhere", *out)
    assert "'no/model' is neither a folder" in refused("encode", "no/model", "--data", small_shop_folder, *out)
    assert "is no store" in refused("index", "build", tmp_path / "emb", "--out", tmp_path / "index")
    taoemb_cli("encode", static_model, "--data", small_shop_folder, *out)
    assert "another encoder or catalog" in refused("encode", tiny_bert, "--data", small_shop_folder, *out)
    build = ("index", "build", tmp_path / "emb", "--factory")
    assert "factory='HNWS32'" in refused(*build, "HNWS32", "--out", tmp_path / "index")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for factory in ("Flat", "HNSW8"):
        assert "give another folder" in refused(*build, factory, "--out", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    assert "is no saved index" in refused("index", "info", tmp_path / "mine")


# Train ------------------------------------------------------------------------------------------------------------------


def test_train_makes_a_run_folder_and_prints_its_table(run, static_model):
    folder, _, output = run
    metrics = json.loads((folder / "metrics.json").read_text())
    head, *lines = output.splitlines()[: 1 + len(metrics["systems"])]
    assert sorted(line.split()[0] for line in lines) == list(metrics["systems"])
    for line in lines:
        system, *cells = line.split()
        row = dict(zip(head.replace("item encodings", "encodings").split(), cells, strict=True))
        assert row["ndcg@10"] == f"{metrics['systems'][system]['ndcg@10']:.3f}"
        assert row["encodings"] == f"{metrics['item_encodings'].get(system, 0):,.0f}"
    assert any(line.startswith("retrieval_grpo against, goodrate@10: bm25 ") for line in output.splitlines())
    assert (folder / "report.html").is_file()
    logs = [json.loads(line) for line in (folder / "logs" / "retrieval_grpo.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logs] == [0, 1, 2]
    assert Encoder(folder / "model").fingerprint != Encoder(static_model).fingerprint


def test_the_same_command_again_only_compares_again(run):
    folder, arguments, output = run
    before = files(folder / "model") | files(folder / "models") | files(folder / "index") | files(folder / "logs")
    again = taoemb_cli(*arguments)
    assert again.exit_code == 0, again.output
    assert {path: files(path.parent)[path] for path in before} == before
    assert again.stdout == output


def test_a_changed_setting_is_refused_by_name(run):
    folder, arguments, _ = run
    message = refused(*arguments, "stage2.beta=0.5")
    assert "other settings (stage2.beta differ)" in message
    assert "--out" in message
    assert "stage2.beta" not in (folder / "config.yaml").read_text().replace("beta: 0.5", "stage2.beta")


def test_an_unknown_setting_is_refused_with_the_nearest(run, tmp_path):
    arguments = [tmp_path / "new" if a == run[0] else a for a in run[1]]
    message = refused(*arguments, "stage2.num_candidate=8")
    assert "stage2.num_candidates" in message
    assert "unknown key" in message
    assert "stage1.steps" in refused(*arguments, "stage1.steps=many")
    assert not (tmp_path / "new").exists()


def test_train_mistakes(small_shop_folder, tmp_path):
    assert "--data" in refused("train", "--out", tmp_path / "r")
    assert "--out" in refused("train", "--data", small_shop_folder)
    assert "nowhere is not a folder" in refused("train", "--data", tmp_path / "nowhere", "--out", tmp_path / "r")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert "not empty" in refused("train", "--data", small_shop_folder, "--out", tmp_path / "mine")


def test_a_mistyped_data_folder_does_not_claim_the_run_folder(small_shop_folder, static_model, tmp_path):
    refused("train", "--data", tmp_path / "nowhere", "--out", tmp_path / "r", f"model={static_model}", *FEW_STEPS)
    right = ("train", "--data", small_shop_folder, "--out", tmp_path / "r", f"model={static_model}", *FEW_STEPS)
    assert taoemb_cli(*right).exit_code == 0


def test_settings_from_a_file(small_shop_folder, static_model, tmp_path):
    (tmp_path / "c.yaml").write_text("stage2: {beta: 0.125, steps: 3}\nsystems: [stage1, retrieval_grpo]\n")
    result = taoemb_cli("train", "--config", tmp_path / "c.yaml", "--data", small_shop_folder, "--out", tmp_path / "r",
                        f"model={static_model}", *[s for s in FEW_STEPS if s != "stage2.steps=3"])  # fmt: skip
    assert result.exit_code == 0, result.output
    config = (tmp_path / "r" / "config.yaml").read_text()
    assert "beta: 0.125" in config
    assert json.loads((tmp_path / "r" / "metrics.json").read_text())["systems"].keys() == {"stage1", "retrieval_grpo"}


def test_help_config_lists_every_setting():
    output = taoemb_cli("train", "--help-config").output
    lines = output.splitlines()
    keys, texts = lines[::2], lines[1::2]
    assert all(" (" in key and not key.startswith(" ") for key in keys)
    assert all(text.startswith("    ") and text.strip() for text in texts)  # each has its explanation
    for key in ("data", "model", "judge.kind", "stage1.learning_rate", "stage2.rewards.gate_threshold"):
        assert any(line.startswith(f"{key} (") for line in keys), key


def test_demo(generated, static_model):
    folder, _ = generated
    before = files(folder)
    result = taoemb_cli("demo", "--out", folder.parent / "run", "--items", 600, f"model={static_model}",
                        "systems=[bm25,untrained,stage1,retrieval_grpo]", *FEW_STEPS)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert files(folder) == before  # the shop that is there is used
    assert (folder.parent / "run" / "report.html").is_file()


# Search, evaluate -------------------------------------------------------------------------------------------------------


def test_search_prints_the_nearest_items(run, small_shop):
    folder = run[0]
    query = small_shop.queries.select("test").texts[0]
    lines = taoemb_cli("search", folder, query, "-k", 4).stdout.splitlines()
    encoder = Encoder(folder / "model")
    scores = encoder.encode_document(small_shop.items) @ encoder.encode_query([query])[0]
    best = np.argsort(-scores, kind="stable")[:4]
    assert [line.split()[:3] for line in lines] == [
        [str(rank), f"{scores[i]:.3f}", small_shop.items.ids[i]] for rank, i in enumerate(best, start=1)
    ]
    for line, i in zip(lines, best, strict=True):
        item = small_shop.items[int(i)]
        assert line.endswith(f"{item.title}  {item.brand}  {item.category}  {item.price:.2f}")


def test_search_mistakes(run, tmp_path, static_model):
    folder = run[0]
    assert "is no finished run folder" in refused("search", tmp_path, "mug")
    assert "the query is empty" in refused("search", folder, " ")
    assert "k=0" in refused("search", folder, "mug", "-k", 0)
    for name in ("index", "model", "config.yaml"):
        os.symlink(folder / name, tmp_path / name)
    assert taoemb_cli("search", tmp_path, "mug").exit_code == 0
    (tmp_path / "model").unlink()
    Encoder(static_model).save(tmp_path / "model")
    assert "the index was built with encoder" in refused("search", tmp_path, "mug")


def test_evaluate_prints_what_the_run_measured(run, small_shop_folder, static_model):
    folder = run[0]
    result = taoemb_cli("evaluate", folder / "model", static_model, "--data", small_shop_folder)
    assert result.exit_code == 0, result.output
    head, *rows = result.stdout.splitlines()
    systems = json.loads((folder / "metrics.json").read_text())["systems"]
    table = {row.split()[0]: dict(zip(head.split(), row.split()[1:], strict=True)) for row in rows}
    for name, system in ((folder / "model", "retrieval_grpo"), (static_model, "untrained"), ("bm25", "bm25")):
        assert table[str(name)]["ndcg@10"] == f"{systems[system]['ndcg@10']:.3f}"
        assert table[str(name)]["recall@100"] == f"{systems[system]['recall@100']:.3f}"


def test_evaluate_needs_graded_queries(small_shop, small_shop_folder, static_model, tmp_path):
    message = refused("evaluate", static_model, "--data", small_shop_folder, "--split", "dev")
    assert "no graded query of split 'dev'" in message
    assert "'test'" in message
    whole = taoemb_cli("evaluate", static_model, "--data", small_shop_folder, "--split", "")
    assert whole.exit_code == 0, whole.output
    Catalog(small_shop.items).save(tmp_path / "items")
    assert "no graded query" in refused("evaluate", static_model, "--data", tmp_path / "items")


def test_data_shop_does_not_replace_somebodys_catalog(tmp_path):
    (tmp_path / "items.parquet").write_bytes(b"mine")
    result = CliRunner().invoke(app, ["data", "shop", "--items", "600", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "has no truth.parquet" in result.output
    assert (tmp_path / "items.parquet").read_bytes() == b"mine"


def test_index_verify(tmp_path, run):
    folder = run[0] / "index"
    assert "is whole" in taoemb_cli("index", "verify", folder).stdout
    snapshots = Snapshots(tmp_path / "served")
    snapshots.publish(load_index(folder))
    assert "is whole" in taoemb_cli("index", "verify", tmp_path / "served").stdout
    file = tmp_path / "served" / "gen-000001" / "ids.parquet"
    file.write_bytes(file.read_bytes()[:-1])
    for one in (tmp_path / "served", file.parent):
        result = taoemb_cli("index", "verify", one)
        assert result.exit_code == 1
        assert "ids.parquet is corrupt" in result.output
    assert taoemb_cli("index", "verify", tmp_path).exit_code == 1


@pytest.mark.filterwarnings("ignore:.*swigvarlink")
def test_index_bench(run, tmp_path):
    result = taoemb_cli(
        "index", "bench", run[0] / "index", "--out", tmp_path / "b", "--factory", "exact", "--factory", "HNSW8"
    )
    assert result.exit_code == 0, result.output
    assert "recall@10 1.000" in result.output
    assert "HNSW8" in result.output
    assert (tmp_path / "b" / "bench.html").is_file()
    assert "no FAISS factory string" in refused(
        "index", "bench", run[0] / "index", "--out", tmp_path / "c", "--factory", "NOPE"
    )


def test_evaluate_takes_run_files_as_channels(small_shop, small_shop_folder, static_model, tmp_path):
    queries = small_shop.queries.select("test")
    everything = dict.fromkeys(queries.texts, small_shop.items.ids)
    write_run(RunChannel("all", everything), queries, 600, tmp_path / "all.trec")
    write_run(RunChannel("none", {text: [] for text in queries.texts}), queries, 1, tmp_path / "none.trec")

    def table(*options):
        result = taoemb_cli("evaluate", static_model, "--data", small_shop_folder, *options)
        assert result.exit_code == 0, result.output
        head, *rows = result.stdout.splitlines()
        return {row.split()[0]: dict(zip(head.split(), row.split()[1:], strict=True)) for row in rows}[
            str(static_model)
        ]

    alone, with_none = table(), table("--channel", tmp_path / "none.trec")
    assert "overlap@10/bm25" not in alone
    assert with_none["overlap@10/none"] == "0.000"
    assert with_none["overlap@10/bm25"] == with_none["overlap@10"] == alone["overlap@10"]
    assert with_none["exclusive_goodrate@10"] == alone["exclusive_goodrate@10"]
    both = table("--channel", tmp_path / "none.trec", "--channel", tmp_path / "all.trec")
    assert {"overlap@10/bm25", "overlap@10/none", "overlap@10/all"} <= both.keys()
    assert float(both["overlap@10"]) >= float(alone["overlap@10"])

    evaluate = ("evaluate", static_model, "--data", small_shop_folder, "--channel")
    assert "nowhere.trec is no file" in refused(*evaluate, tmp_path / "nowhere.trec")
    (tmp_path / "few.trec").write_text(f"{queries.ids[0]} Q0 {small_shop.items.ids[0]} 1 1 t\n")
    assert "few.trec has no entry for 29 of the queries asked for" in refused(*evaluate, tmp_path / "few.trec")
    (tmp_path / "bad.trec").write_text(f"{queries.ids[0]} Q0 {small_shop.items.ids[0]} 1 high t\n")
    assert "bad.trec, line 1: the score 'high' is no finite number" in refused(*evaluate, tmp_path / "bad.trec")
    twice = ("--channel", tmp_path / "all.trec", "--channel", tmp_path / "all.trec")
    assert "two channels are called 'all'" in refused(*evaluate[:-1], *twice)


# Refresh, search, serve-check --------------------------------------------------------------------------------------------


def edited(small_shop, folder, titles):
    """A catalog folder whose items with these positions have other titles."""
    table = small_shop.items.table
    column = table.column("title").to_pylist()
    for position, title in titles.items():
        column[position] = title
    items = Items(table.set_column(table.column_names.index("title"), "title", pa.array(column)))
    Catalog(items).save(folder)
    return folder


@pytest.mark.parametrize("options", [[], ["--factory", "HNSW8"], ["--factory", "SQ8", "--rescore", "4"],
                                     ["--factory", "Flat", "--truncate-dim", "12", "--rescore", "30"]])  # fmt: skip
def test_a_refresh_follows_the_catalog(options, small_shop, small_shop_folder, static_model, tmp_path):
    folder, model = tmp_path / "served", ("--model", static_model)
    first = taoemb_cli("index", "refresh", folder, *model, "--data", small_shop_folder, *options)
    assert first.exit_code == 0, first.output
    assert "generation 1, " in first.output
    assert "queries of the catalog" in first.output or not options
    text = ItemTemplate().texts(small_shop.items)[7]
    assert taoemb_cli("index", "search", folder, text, *model, "-k", 1).stdout.split()[2] == small_shop.items.ids[7]
    other = edited(small_shop, tmp_path / "other", {7: "something else"})
    assert "generation 2, " in taoemb_cli("index", "refresh", folder, *model, "--data", other, *options).output
    text = ItemTemplate().texts(Items.load(other))[7]
    assert taoemb_cli("index", "search", folder, text, *model, "-k", 1).stdout.split()[2] == small_shop.items.ids[7]
    info = taoemb_cli("index", "info", folder).stdout
    assert "generation: 2" in info
    assert "items: 600" in info
    assert taoemb_cli("index", "verify", folder).exit_code == 0
    checked = taoemb_cli("index", "serve-check", folder, *model, "--seconds", 0.2, "--threads", 2)
    assert checked.exit_code == 0, checked.output
    assert [line.split(":")[0] for line in checked.stdout.splitlines()] == ["ok    files", "ok    fingerprint", "ok    recall",
                                                                           "ok    load"]  # fmt: skip


def test_a_refresh_of_nothing_new_publishes_nothing(small_shop, small_shop_folder, static_model, tmp_path):
    arguments = ["index", "refresh", tmp_path / "served", "--model", static_model, "--data", small_shop_folder]
    assert "generation 1, " in taoemb_cli(*arguments).output
    assert "nothing has changed since generation 1" in taoemb_cli(*arguments).output
    assert "generation 2, " in taoemb_cli(*arguments, "--factory", "HNSW8").output
    (tmp_path / "served" / "CURRENT").unlink()
    assert "generation 3, " in taoemb_cli(*arguments, "--factory", "HNSW8").output


def test_an_index_that_finds_too_little_is_not_published(small_shop_folder, static_model, tmp_path):
    arguments = ["index", "refresh", tmp_path / "served", "--model", static_model, "--data", small_shop_folder]
    assert taoemb_cli(*arguments).exit_code == 0
    message = refused(*arguments, "--factory", "PQ2x2")
    assert "less than --min-recall 0.95; take another --factory" in message
    assert "generation: 1" in taoemb_cli("index", "info", tmp_path / "served").stdout
    assert taoemb_cli(*arguments, "--factory", "PQ2x2", "--min-recall", 0).exit_code == 0
    assert "min_recall=2" in refused(*arguments, "--min-recall", 2)


def test_index_search_mistakes(run, small_shop_folder, static_model, tmp_path):
    folder = run[0] / "index"
    assert "the query is empty" in refused("index", "search", folder, " ", "--model", run[0] / "model")
    assert "the index was built with encoder" in refused("index", "search", folder, "mug", "--model", static_model)
    assert "is no saved index" in refused("index", "search", tmp_path, "mug", "--model", static_model)


def test_encode_takes_types_and_updates(small_shop, small_shop_folder, static_model, tmp_path):
    out = ("--out", tmp_path / "emb")
    assert taoemb_cli("encode", static_model, "--data", small_shop_folder, *out, "--dtype", "int8").exit_code == 0
    assert EmbeddingStore.open(tmp_path / "emb").dtype == "int8"
    other = edited(small_shop, tmp_path / "other", {7: "something else"})
    assert "--update" in refused("encode", static_model, "--data", other, *out, "--dtype", "int8")
    done = taoemb_cli("encode", static_model, "--data", other, *out, "--dtype", "int8", "--update", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "dtype='half': give one of float32" in refused(
        "encode", static_model, "--data", other, *out, "--dtype", "half"
    )


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    """``taoemb ... | head``: no message, no traceback."""
    script = (
        "import typer\nfrom taoemb.cli_shared import told_apart\n"
        "def many():\n    for _ in range(100_000):\n        typer.echo('a line')\n"
        "typer.run(told_apart(many))\n"
    )
    (tmp_path / "many.py").write_text(script)
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(tmp_path / 'many.py'))} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "a line\n"
    assert done.stderr == ""
