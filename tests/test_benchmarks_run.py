"""benchmarks/run.py: what is run within a budget, what is compared, and README's tables against the results."""

import doctest
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
spec = importlib.util.spec_from_file_location("benchmarks_run", FOLDER / "run.py")
run = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = run  # dataclasses look their module up
spec.loader.exec_module(run)

WRITES = """python -c "import json, pathlib; pathlib.Path('{out}', 'scores.json').write_text(json.dumps({{'a': [1, {{'b': {seed} + 1.0}}]}}))" """


def record(**changed):
    return run.Record(
        **{
            "what": "a test",
            "command": WRITES,
            "seeds": (0, 2),
            "scores": {"scores.json": {"a/1/b": (2.0, 0.1)}},
            **changed,
        }
    )


@pytest.fixture
def known(monkeypatch):
    """``known(name=record, ...)``: these are the records."""
    return lambda **records: monkeypatch.setattr(run, "records", lambda: records)


def test_the_pages_say_what_the_results_say(capsys):
    assert run.main(["table", "--check"]) == 0, capsys.readouterr().out


def test_the_records_of_the_project_can_be_read_and_listed(capsys):
    assert run.main(["list"]) == 0
    assert (
        len(capsys.readouterr().out.splitlines())
        == len(run.records())
        == len(list((FOLDER / "conditions").glob("*.yaml")))
    )


def test_a_record_that_cannot_be_read_is_named(monkeypatch, tmp_path):
    (tmp_path / "conditions").mkdir()
    (tmp_path / "conditions" / "half.yaml").write_text("what: a test\ncommand: x {out}\n")
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    with pytest.raises(SystemExit, match=r"half\.yaml: scores"):
        run.main(["list"])


def test_check_compares_the_mean_over_the_seeds(known, tmp_path, capsys):
    known(good=record(), bad=record(scores={"scores.json": {"a/1/b": (2.5, 0.1)}}))
    assert run.main(["check", "--only", "good", "--out", str(tmp_path)]) == 0
    assert "| good | a/1/b | 2 ± 0.1 | 2.0000 | ok |" in capsys.readouterr().out
    result = json.loads((tmp_path / "good" / "result.json").read_text())
    assert result["scores"]["scores.json: a/1/b"] == {"found": 2.0, "seeds": [1.0, 3.0]}
    assert {"versions", "cpu", "date"} <= {*result["machine"]}
    assert "commit" in result["made_by"]
    assert run.main(["check", "--out", str(tmp_path)]) == 1
    assert "| bad | a/1/b | 2.5 ± 0.1 | 2.0000 | OUT OF TOLERANCE |" in capsys.readouterr().out


@pytest.fixture
def no_more_runs(monkeypatch):
    """From its call on a command that is run fails; the code counts as what it is now."""

    def stop(code=None):
        now = code or run.code()
        monkeypatch.setattr(run, "code", lambda: now)
        monkeypatch.setattr(run.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout="", returncode=9))

    return stop


def test_what_is_finished_is_not_run_again_but_may_be_asked_for_more(known, tmp_path, capsys, no_more_runs):
    known(one=record())
    assert run.main(["run", "one", "--out", str(tmp_path)]) == 0
    no_more_runs()
    known(one=record(scores={"scores.json": {"a/0": (1.5, 0.1)}}))
    assert run.main(["check", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "| one | a/0 | 1.5 ± 0.1 | 1.0000 | OUT OF TOLERANCE |" in said
    assert "one: read from" in said


def test_results_of_another_command_or_code_are_refused(known, tmp_path, capsys, no_more_runs):
    known(one=record())
    run.main(["run", "one", "--out", str(tmp_path)])
    known(one=record(command=f"{WRITES} ", seeds=(0,)))
    assert run.main(["check", "--out", str(tmp_path)]) == 1
    assert "one is of another command, seeds; give another --out" in capsys.readouterr().err
    known(one=record())
    no_more_runs({"commit": "another", "changes": ""})
    assert run.main(["check", "--out", str(tmp_path)]) == 1
    assert "one is of another commit" in capsys.readouterr().err


def test_seeds_of_two_commits_are_not_averaged(known, tmp_path, capsys, no_more_runs):
    """The second seed fails; after another commit the first one's files do not count."""
    known(one=record(command=WRITES.replace("{seed} + 1.0", "1.0 / (2 - {seed})")))
    assert run.main(["run", "one", "--out", str(tmp_path)]) == 1
    assert "one, seed 2: the command ended with 1" in capsys.readouterr().err
    assert (tmp_path / "one" / "seed0" / "scores.json").exists()
    no_more_runs({"commit": "another", "changes": ""})
    assert run.main(["run", "one", "--out", str(tmp_path)]) == 1
    assert "one is of another commit" in capsys.readouterr().err


def test_folders_are_found_from_anywhere(known, tmp_path, monkeypatch):
    known(one=record())
    monkeypatch.chdir(tmp_path)
    assert run.main(["run", "one", "--out", "a folder"]) == 0
    assert (tmp_path / "a folder" / "one" / "seed2" / "scores.json").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [("mine", "give NAME=FOLDER"), ("other=.", "with a name of mine"), ("mine=no/such", "is no folder")],
)
def test_paths_that_are_none(known, word, message):
    known(one=record(data=run.Data(path="mine")))
    with pytest.raises(SystemExit, match=message):
        run.main(["check", "--path", word])


def test_the_budget_takes_the_shortest_and_says_what_it_leaves_out(known, tmp_path, capsys):
    known(
        long=record(minutes=30.0),
        short=record(minutes=2.0),
        middle=record(minutes=5.0),
        mine=record(data=run.Data(path="mine")),
    )
    assert run.chosen(None, 10.0, {}) == ["short", "middle"]
    said = capsys.readouterr().out
    assert "left out: long (30 minutes are beyond the budget)" in said
    assert "left out: mine (give --path mine=FOLDER)" in said
    assert run.chosen(None, 60.0, {"mine": tmp_path}) == ["mine", "short", "middle", "long"]
    with pytest.raises(SystemExit, match="nothing to run"):
        run.chosen(None, 0.5, {})


def test_commands_that_fail_say_how_and_do_not_hide_the_others(known, tmp_path, capsys):
    failing = "python -c \"raise SystemExit('no such thing {out}')\""
    known(one=record(command=failing, seeds=(0,)), two=record(scores={"scores.json": {"a/7": (1.0, 1.0)}}),
          three=record(scores={"no.json": {"a": (1.0, 1.0)}}), four=record())  # fmt: skip
    assert run.main(["check", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "| four | a/1/b | 2 ± 0.1 | 2.0000 | ok |" in said.out
    assert "one, seed 0: the command ended with 1" in said.err
    assert "no such thing" in said.err
    assert "scores.json has no a/7" in said.err
    assert "the command wrote no" in said.err
    assert not (tmp_path / "one" / "result.json").exists()
    for budget in ("20", "1.2.3m"):
        with pytest.raises(SystemExit, match="give a number with s, m or h"):
            run.main(["check", "--budget", budget])


def test_ctrl_c_stops_and_reports_what_is_there(known, tmp_path, capsys, monkeypatch):
    known(one=record(minutes=1.0), two=record(minutes=2.0))
    real = run.command
    monkeypatch.setattr(
        run,
        "command",
        lambda name, *rest: real(name, *rest) if name == "one" else (_ for _ in ()).throw(KeyboardInterrupt),
    )
    assert run.main(["check", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "| one | a/1/b | 2 ± 0.1 | 2.0000 | ok |" in said.out
    assert "two: stopped; the same command goes on" in said.err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scores": {}}, "name at least one"),
        ({"scores": {"f.json": {"a": (1.0,)}}}, r"scores.f.json.a=\[1.0\]: give \[expected, tolerance\]"),
        ({"scores": {"f.json": {"a": (1.0, 0.0)}}}, "a finite tolerance above 0"),
        ({"scores": {"f.json": {"a": (1.0, float("inf"))}}}, "a finite tolerance above 0"),
        ({"command": "python x.py --out {out}"}, "with several seeds {seed}"),
        ({"command": "python x.py {seed}"}, "it needs {out}"),
        ({"seeds": ()}, "at least one seed"),
    ],
)
def test_records_without_a_check_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        record(**changed)


def test_a_shop_is_generated_once(known, tmp_path, monkeypatch):
    data = run.Data(items=200, seed=1, queries=(20, 5, 10))
    folder = run.prepared(data, tmp_path, {})
    assert (folder / "truth.parquet").exists()
    monkeypatch.setattr(run, "generate_shop", None)
    assert run.prepared(data, tmp_path, {}) == folder
    with pytest.raises(SystemExit, match="give --path mine=FOLDER"):
        run.prepared(run.Data(path="mine"), tmp_path, {})


def test_examples_in_docstrings():
    found = doctest.testmod(run)
    assert found.attempted
    assert not found.failed


def test_tables_need_their_marks():
    with pytest.raises(ValueError, match="no marks"):
        run.with_tables("# no table here\n", {"shop": {}})


def test_a_record_may_take_several_commands_and_packages(known, tmp_path, capsys):
    first = "python -c \"import pathlib; pathlib.Path('{out}', 'first').write_text('1')\""
    second = WRITES.replace(
        "import json, pathlib;", "import json, pathlib; assert pathlib.Path('{out}', 'first').exists();"
    )
    known(one=record(command=f"{first}\n{second}"), other=record(needs=("no-such-package", "numpy")))
    assert run.main(["check", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "| one | a/1/b | 2 ± 0.1 | 2.0000 | ok |" in said
    assert "left out: other (pip install no-such-package)" in said


def test_a_finished_command_is_not_repeated_for_the_next_ones_failure(known, tmp_path, capsys, monkeypatch):
    first = (
        "python -c \"import os, pathlib; pathlib.Path('{out}', 'said').open('a').write(os.environ['OMP_NUM_THREADS'])\""
    )
    missing = "python -c \"import pathlib; pathlib.Path('{out}', 'there').read_text(); print('{seed}')\""
    known(one=record(command=f"{first}\n\n{missing}\n{WRITES}", threads=3))
    assert run.main(["run", "one", "--out", str(tmp_path)]) == 1
    assert "No such file" in capsys.readouterr().err
    for seed in (0, 2):
        (tmp_path / "one" / f"seed{seed}").mkdir(exist_ok=True)
        (tmp_path / "one" / f"seed{seed}" / "there").write_text("now")
    assert run.main(["run", "one", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "one" / "seed0" / "said").read_text() == "3"
    known(one=record(needs=("no-such-package",)))
    assert run.main(["run", "one", "--out", str(tmp_path)]) == 1
    assert "pip install no-such-package" in capsys.readouterr().err


def test_columns_of_a_table(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    rows = {
        "ours": {"seconds": 90.0, "metrics": {"m": {"mean": 0.5, "deviation": 0.001, "against": {"difference": 0.0, "p_value": 1.0}}},
                 "slices": {"tail": {"queries": 3, "m": {"mean": 0.25, "deviation": 0.0}}}},
        "theirs": {"metrics": {"m": {"mean": 0.25, "deviation": 0.0, "against": {"difference": -0.25, "p_value": 0.0123}}},
                   "slices": {"tail": {"queries": 3, "m": {"mean": 0.75, "deviation": 0.0}}}},
    }  # fmt: skip
    (tmp_path / "results" / "file.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    columns = {
        "m": {"metric": "m", "best": "high"},
        "against": {"metric": "m", "test": True},
        "tail": {"metric": "m", "slice": "tail", "best": "high"},
        "minutes": {"cost": "seconds", "unit": 60, "digits": 1},
        "none": {"metric": "absent", "best": "low"},
    }
    lines = run.markdown({"file": "file.json", "rows": {"**us**": "ours", "them": "theirs"}, "columns": columns})
    assert lines.splitlines()[2:] == [
        "| **us** | **.500** ± .001 |  | .250 | 1.5 |  |",
        "| them | .250 | -.250 (p = .012) | **.750** |  |  |",
    ]
