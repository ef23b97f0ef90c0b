"""Reasons from a teacher behind a real HTTP server, and judges that are trained on a graded catalog with them."""

import dataclasses
import json
import re
from collections import Counter

import pytest
from test_judge_openai_server import fail, send, server  # noqa: F401

from taoemb.catalog import Catalog, Item, Query
from taoemb.judge.agrl import Lattice
from taoemb.judge.chat_server import JudgeServerError
from taoemb.judge.examples import Example, catalog_examples
from taoemb.judge.prompts import JudgePrompt
from taoemb.judge.schemes import BINARY
from taoemb.judge.teacher import Teacher, TeacherConfig

CHAINS = {
    "1": "Category: mismatch\nAttributes: violated",
    "2": "Category: related\nAttributes: partial",
    "3": "Category: exact\nAttributes: partial",
    "4": "Category: exact\nAttributes: match",
}
PAIRS = [Example(Query(f"q{n}", f"mug {n}"), Item(f"i{n}", f"Mug {n}"), n % 4) for n in range(12)]


def written(text):
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}


def teach(handler, request):
    """A chain that leads to the label it is told, with talk around it."""
    label = re.search(r"\nLabel: (\d)", request["messages"][-1]["content"])[1]
    handler.reply(200, written(f"Sure!\n  Product: a mug is wanted, this is one\n{CHAINS[label]}\nI hope this helps."))


def teacher(server, **settings):  # noqa: F811
    return Teacher(TeacherConfig(url=server.url, model="m", **settings), JudgePrompt())


def test_reasons_are_the_lines_of_the_chain(server, tmp_path):  # noqa: F811
    server.always = teach
    given = [*PAIRS, Example(Query("r", "cup"), Item("r", "Cup"), 3, reasons="Category: exact")]
    found = teacher(server).write(given, tmp_path / "teacher.jsonl")
    product = "Product: a mug is wanted, this is one"
    assert [e.reasons for e in found] == [*(f"{product}\n{CHAINS[str(e.grade + 1)]}" for e in PAIRS), "Category: exact"]
    assert [(e.query, e.item, e.grade) for e in found] == [(e.query, e.item, e.grade) for e in given]
    assert len(server.requests) == len(PAIRS)
    request = next(r for r in server.requests if '"mug 3"' in r["messages"][-1]["content"])
    assert request["messages"][-1]["content"] == 'Query: "mug 3"\nItem: {"title": "Mug 3"}\nLabel: 4 - Excellent'
    assert "Category exact, attributes partial: 3 - Related" in request["messages"][0]["content"]
    assert (request["max_tokens"], request["temperature"]) == (256, 0.7)


def test_reasons_that_lead_elsewhere_are_asked_for_again_and_given_up(server, tmp_path):  # noqa: F811
    product = "Product: a mug is wanted, this is one"
    wrong = send(written(f"{product}\n{CHAINS['1']}"))
    server.script += [wrong, send(written("no idea")), send(written(f"{product}\n{CHAINS['4']}"))]
    pair = [Example(Query("q", "mug"), Item("i", "Mug"), 3)]
    assert teacher(server, concurrency=1).write(pair, tmp_path / "a.jsonl")[0].reasons == f"{product}\n{CHAINS['4']}"
    assert len(server.requests) == 3
    server.always = wrong
    asked = teacher(server, tries=2)
    assert asked.write(pair, tmp_path / "b.jsonl") == pair
    assert len(server.requests) == 5
    assert asked.write(pair, tmp_path / "b.jsonl") == pair  # known to have none
    assert len(server.requests) == 5


def test_what_models_write_besides_is_taken_off(server, tmp_path):  # noqa: F811
    def said(text):
        server.always = send(written(text))
        return teacher(server, tries=1).write([PAIRS[3]], tmp_path / f"{len(server.requests)}.jsonl")[0].reasons

    product, chain = "Product: a mug is wanted, this is one", CHAINS["4"]
    expected = f"{product}\n{chain}"
    assert (
        said(f"<think>\nCategory: mismatch\n</think>\n**Product:** a mug is wanted, this is one\n{chain}") == expected
    )
    assert said(f"{product}\nCategory: Exact.\nAttributes: **match**") == expected
    assert said(chain) == said(None) == said(f"{product}\n{chain}\n{product}") == ""  # no product, no text, two


def test_pairs_that_read_the_same_are_asked_once(server, tmp_path):  # noqa: F811
    server.script += [teach]
    server.always = send(written("no"))
    found = teacher(server).write([PAIRS[3], PAIRS[3]], tmp_path / "teacher.jsonl")
    assert len(server.requests) == 1
    assert found[0].reasons == found[1].reasons != ""


def test_an_error_in_the_loop_ends_the_asking(server, tmp_path, monkeypatch):  # noqa: F811
    server.always = teach
    asked = teacher(server, concurrency=2)
    monkeypatch.setattr(asked, "readable", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        asked.write(
            [Example(Query(f"q{n}", f"mug {n}"), Item("i", "Mug"), 3) for n in range(200)], tmp_path / "t.jsonl"
        )
    assert len(server.requests) < 50


def test_two_labels_take_the_chains_of_their_grades(server, tmp_path):  # noqa: F811
    """With good and bad alone, any verdicts that lead to a good grade will do."""
    chain = f"Product: a mug is wanted, this is one\n{CHAINS['3']}"
    server.always = send(written(chain))
    asked = Teacher(TeacherConfig(url=server.url, model="m", tries=1), JudgePrompt(BINARY))
    found = asked.write([PAIRS[1], PAIRS[3]], tmp_path / "teacher.jsonl")
    assert [e.reasons for e in found] == ["", chain]


def test_reasons_are_held_against_the_lattice_that_is_given(server, tmp_path):  # noqa: F811
    chain = f"Product: a mug is wanted, this is one\n{CHAINS['3']}"
    server.always = send(written(chain))
    grades = Lattice.load().grades | {"exact": {"match": 2, "partial": 3, "violated": 1}}
    asked = Teacher(TeacherConfig(url=server.url, model="m", tries=1), JudgePrompt(), Lattice(grades))
    assert [e.reasons for e in asked.write([PAIRS[2], PAIRS[3]], tmp_path / "teacher.jsonl")] == ["", chain]
    assert "Category exact, attributes partial: 4 - Excellent" in server.requests[0]["messages"][0]["content"]


def test_a_server_that_fails_loses_no_answer(server, tmp_path):  # noqa: F811
    file = tmp_path / "teacher.jsonl"
    server.script += [teach] * 5
    server.always = fail(400, {"error": {"message": "no more"}})
    with pytest.raises(JudgeServerError, match="no more"):
        teacher(server, concurrency=1).write(PAIRS, file)
    assert len(file.read_text().splitlines()) == 5
    file.write_bytes(file.read_bytes()[:-10])  # a kill cut it
    server.always = teach
    server.requests.clear()
    found = teacher(server).write(PAIRS, file)
    assert len(server.requests) == 8
    assert all(e.reasons for e in found)
    assert teacher(server).write(PAIRS, file) == found
    assert len(server.requests) == 8
    server.always = send({"choices": []})
    with pytest.raises(
        JudgeServerError, match=r"without choices\[0\].message.content: .*; check that it is a chat model"
    ):
        teacher(server, temperature=0).write(PAIRS, file)  # asked otherwise: asked anew


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"url": "http://host/v1"}, "a teacher needs both"),
        ({"model": "m"}, "a teacher needs both"),
        ({"tries": 0}, "tries=0"),
        ({"temperature": -1.0}, "temperature=-1.0: give 0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        TeacherConfig(**changed)


@pytest.fixture
def catalog(tmp_path):
    items = [Item(f"i{n}", f"Mug {n}") for n in range(40)]
    queries = [Query(f"q{n}", f"mug {n}", split="train" if n < 4 else "test") for n in range(5)]
    qrels = {
        q.id: {f"i{n}": 3 if n == 0 else n % 3 for n in range(m, m + 10)}
        for q, m in zip(queries, range(0, 50, 10), strict=False)
    }
    folder = tmp_path / "catalog"
    folder.mkdir()
    rows = {
        "items": [{"id": i.id, "title": i.title} for i in items],
        "queries": [{"id": q.id, "query": q.text, "split": q.split} for q in queries],
        "qrels": [{"query_id": q, "item_id": i, "grade": g} for q, of in qrels.items() if q != "q4" for i, g in of.items()],
    }  # fmt: skip
    for name, listed in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    return folder


def test_a_graded_catalog_gives_pairs(catalog):
    loaded = Catalog.load(catalog)
    whole = catalog_examples(dataclasses.replace(loaded, metadata={"unjudged": 0}), 80)
    assert Counter(e.grade for e in whole)[0] > Counter(e.grade for e in catalog_examples(loaded, 80))[0]
    assert all(loaded.qrels[e.query.id].get(e.item.id, 0) == e.grade for e in whole)
    found = catalog_examples(loaded, 16)
    assert Counter(e.grade for e in found) == {0: 4, 1: 4, 2: 4, 3: 1}  # there is one alone
    assert all(loaded.qrels[e.query.id][e.item.id] == e.grade for e in found)
    assert catalog_examples(loaded, 16) == found != catalog_examples(loaded, 16, seed=1)
    assert len({(e.query.id, e.item.id) for e in catalog_examples(loaded, 100, balance=False)}) == 40
    with pytest.raises(
        ValueError, match="no query of split 'test' has grades; those with grades are of split train: give"
    ):
        catalog_examples(loaded, 4, split="test")


def test_a_judge_is_trained_on_a_catalog_with_a_teacher(server, catalog, tiny_chat_llm, tmp_path, monkeypatch):  # noqa: F811
    pytest.importorskip("trl")
    from test_judge_train import Seen, settings
    from transformers import AutoTokenizer

    from taoemb.judge.train import JudgeTrainer
    from taoemb.judge.train_config import SFTConfig

    server.always = teach
    seen, told = Seen(monkeypatch), []
    config = settings(tiny_chat_llm, data=str(catalog), examples=16, style="post", sft=SFTConfig(1, 2, 1e-3),
                      teacher=TeacherConfig(url=server.url, model="m"))  # fmt: skip
    JudgeTrainer(config, tmp_path / "run", say=told.append).run()
    assert "13 examples, 13 of them with reasons" in told
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_llm)
    for row in seen.trainers["sft"].train_dataset:
        completion = tokenizer.decode([token for token in row["labels"] if token != -100])
        label = completion[0]
        assert completion == f"{label}\nProduct: a mug is wanted, this is one\n{CHAINS[label]}<|im_end|>\n"
    asked = len(server.requests)
    moved = settings(tiny_chat_llm, data=str(catalog), examples=16, style="post", sft=SFTConfig(1, 2, 1e-3),
                     teacher=TeacherConfig(url=f"{server.url}/", model="m"))  # fmt: skip
    JudgeTrainer(moved, tmp_path / "run").run()  # finished: nothing is asked
    assert len(server.requests) == asked
    JudgeTrainer(settings(tiny_chat_llm, data=str(catalog), examples=16, style="post", sft=SFTConfig(1, 2, 1e-3)),
                 tmp_path / "labels", say=told.append).run()  # fmt: skip
    assert told[-3:-1] == [
        "13 examples, 0 of them with reasons",
        "no example has reasons: style=label in the place of post",
    ]
    row = seen.trainers["sft"].train_dataset[0]
    assert tokenizer.decode([token for token in row["labels"] if token != -100])[1:] == "<|im_end|>\n"
    server.always = send(written("no"))
    with pytest.raises(
        ValueError, match="the teacher 'm' wrote no reasons that can be read and lead to the grade for any of 13 pairs"
    ):
        JudgeTrainer(config, tmp_path / "untaught").run()


def test_labels_alone_are_not_taught_among_reasons(server, catalog, tiny_chat_llm, tmp_path, monkeypatch):  # noqa: F811
    pytest.importorskip("trl")
    from test_judge_train import Seen, settings

    from taoemb.judge.train import JudgeTrainer
    from taoemb.judge.train_config import SFTConfig

    def sometimes(handler, request):
        good = "Label: 4" in request["messages"][-1]["content"] or "Label: 1" in request["messages"][-1]["content"]
        teach(handler, request) if good else handler.reply(200, written("I do not know."))

    server.always, seen = sometimes, Seen(monkeypatch)
    config = settings(tiny_chat_llm, data=str(catalog), examples=16, style="pre", sft=SFTConfig(1, 2, 1e-3),
                      teacher=TeacherConfig(url=server.url, model="m", tries=1))  # fmt: skip
    trainer = JudgeTrainer(config, tmp_path / "run")
    trainer.run()
    assert len(trainer.examples) == 13
    assert len(seen.trainers["sft"].train_dataset) == sum(e.grade in (0, 3) for e in trainer.examples) == 5
