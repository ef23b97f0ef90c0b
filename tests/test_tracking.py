import json
import math
import re
import sqlite3
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from taoemb.tracking import Tracker


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_has_one_flushed_object_per_step(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "stage1.jsonl"
    with Tracker(["jsonl"], tmp_path, "stage1") as tracker:
        tracker.log(0, {"loss": 2.5, "reward/quality/mean": np.float32(0.5)})
        assert read_jsonl(path) == [{"step": 0, "loss": 2.5, "reward/quality/mean": 0.5}]  # before it is closed
        tracker.log(1, {"loss": torch.tensor(1.25)})
    assert read_jsonl(path)[1] == {"step": 1, "loss": 1.25}


def test_jsonl_keeps_values_that_are_not_finite_as_null(tmp_path: Path) -> None:
    with Tracker(["jsonl", "console"], tmp_path, "x") as tracker:
        tracker.log(0, {"a": math.nan, "b": -math.inf, "c": 1.0})
    assert read_jsonl(tmp_path / "logs" / "x.jsonl") == [{"step": 0, "a": None, "b": None, "c": 1.0}]


def test_a_resumed_run_has_every_step_once_and_no_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "x.jsonl"
    with Tracker(["jsonl"], tmp_path, "x") as tracker:
        for step in range(5):
            tracker.log(step, {"loss": 1.0})
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # killed here
    with Tracker(["jsonl"], tmp_path, "x", start_step=3) as tracker:
        for step in range(3, 6):
            tracker.log(step, {"loss": 2.0})
    assert [(line["step"], line["loss"]) for line in read_jsonl(path)] == [
        (0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0),
    ]  # fmt: skip


def test_a_torn_line_goes_even_where_its_step_would_stay(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "x.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1}')
    Tracker(["jsonl"], tmp_path, "x", start_step=2).close()
    assert read_jsonl(path) == [{"step": 0, "loss": 1.0}]


def test_a_run_from_the_start_drops_the_log_of_an_earlier_one_but_no_other(tmp_path: Path) -> None:
    for name in ("x", "y"):
        with Tracker(["jsonl"], tmp_path, name) as tracker:
            tracker.log(0, {"loss": 1.0})
    Tracker(["jsonl"], tmp_path, "x").close()
    assert read_jsonl(tmp_path / "logs" / "x.jsonl") == []
    assert len(read_jsonl(tmp_path / "logs" / "y.jsonl")) == 1


def test_the_console_prints_every_so_many_steps_and_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Tracker(["console"], tmp_path, "stage1", total_steps=8, console_every=3) as tracker:
        for step in range(8):
            tracker.log(step, {"loss": step / 7, "kl": 1e-9})
    captured = capsys.readouterr()
    assert captured.out == ""  # results go to stdout, progress does not
    assert captured.err.splitlines() == [
        "stage1 step 0  loss 0  kl 1e-09",
        "stage1 step 3  loss 0.4286  kl 1e-09",
        "stage1 step 6  loss 0.8571  kl 1e-09",
        "stage1 step 7  loss 1  kl 1e-09",
    ]


def test_the_console_has_a_progress_bar_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Tracker(["console"], tmp_path, "stage1", start_step=4, total_steps=8) as tracker:
        for step in range(4, 8):
            tracker.log(step, {"loss": 1.0})
    assert re.search(r"stage1: 100%\|.*\| 8/8 \[", capsys.readouterr().err)


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:tensorboard")
def test_tensorboard_reads_back_what_was_logged_and_purges_what_a_resume_repeats(tmp_path: Path) -> None:
    with Tracker(["tensorboard"], tmp_path, "x", {"lr": 0.1}) as tracker:
        for step in range(4):
            tracker.log(step, {"loss": step + 0.5, "reward/quality/mean": math.nan})
    with Tracker(["tensorboard"], tmp_path, "x", start_step=2) as tracker:
        tracker.log(2, {"loss": 10.0})
    folder = tmp_path / "logs" / "tensorboard" / "x"
    assert scalars(folder, "loss") == [(0, 0.5), (1, 1.5), (2, 10.0)]
    assert math.isnan(scalars(folder, "reward/quality/mean")[0][1])


@pytest.fixture
def trackio_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """trackio reads its folder when it is imported, so it is imported anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path / "trackio"
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        del sys.modules[name]


def trackio_rows(folder: Path) -> list[tuple[str, int, float]]:
    rows = []
    connection = sqlite3.connect(folder / "taoemb.db")
    for name, step, metrics in connection.execute("select run_name, step, metrics from metrics order by id"):
        rows.append((name, step, json.loads(metrics)["loss"]))
    connection.close()
    return rows


def test_trackio_keeps_a_run_in_its_local_store(tmp_path: Path, trackio_folder: Path) -> None:
    run_dir = tmp_path / "shop"
    with Tracker(["trackio"], run_dir, "x", {"lr": 0.1}) as tracker:
        tracker.log(0, {"loss": 1.5, "kl": math.inf})
        tracker.log(1, {"loss": 1.25})
    with Tracker(["trackio"], run_dir, "x", start_step=2) as tracker:
        tracker.log(2, {"loss": 0.5})
    assert trackio_rows(trackio_folder) == [("shop-x", 0, 1.5), ("shop-x", 1, 1.25), ("shop-x", 2, 0.5)]


def test_trackio_refuses_to_send_metrics_away(
    tmp_path: Path, trackio_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/space")
    with pytest.raises(ValueError, match="TRACKIO_SPACE_ID would send the metrics away"):
        Tracker(["trackio"], tmp_path, "x")


class StubWandb(types.ModuleType):
    """The part of wandb's interface that is used: ``init(...)`` gives a run with ``log`` and ``finish``."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[Any, ...]] = []

    def init(self, **settings: Any) -> "StubWandb":
        self.calls.append(("init", settings))
        return self

    def log(self, data: dict[str, float], step: int | None = None) -> None:
        self.calls.append(("log", data, step))

    def finish(self) -> None:
        self.calls.append(("finish",))


def test_wandb_gets_every_step_under_a_name_that_a_resume_finds_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = StubWandb()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    for start in (0, 1):
        with Tracker(["wandb"], tmp_path / "shop", "x", {"lr": 0.1}, start_step=start) as tracker:
            tracker.log(start, {"loss": 1.0})
    kinds = [call[0] for call in stub.calls]
    assert kinds == ["init", "log", "finish"] * 2
    first, second = (call[1] for call in stub.calls if call[0] == "init")
    assert first["id"] == second["id"] == "shop-x"
    assert (first["resume"], second["resume"]) == (None, "allow")
    assert stub.calls[4] == ("log", {"loss": 1.0}, 1)


@pytest.mark.parametrize(
    ("backend", "module", "extra"),
    [
        ("tensorboard", "torch.utils.tensorboard", "tracking"),
        ("trackio", "trackio", "tracking"),
        ("wandb", "wandb", "wandb"),
    ],
)
def test_a_missing_package_is_named_with_its_extra_and_opened_backends_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Any, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # import fails as if it were not there
    with pytest.raises(ModuleNotFoundError, match=re.escape(f'pip install "taoemb[{extra}]"')):
        Tracker(["jsonl", backend], tmp_path, "x")  # an open file left behind would be a ResourceWarning


@pytest.mark.parametrize(
    ("backends", "name", "every", "problem"),
    [
        (["jsnl"], "x", 1, "got the tracking backends ['jsnl']; allowed: any of console, jsonl"),
        (["jsonl", "jsonl"], "x", 1, "each once"),
        (["jsonl"], "../x", 1, "got the log name '../x'"),
        (["jsonl"], "", 1, "got the log name ''"),
        (["jsonl"], "x", 0, "got console_every=0"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, backends: Any, name: str, every: int, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        Tracker(backends, tmp_path, name, console_every=every)


def test_wrong_metrics_are_refused(tmp_path: Path) -> None:
    tracker = Tracker(["jsonl"], tmp_path, "x")
    with pytest.raises(TypeError, match=r"metric 'loss': got 'low' \(str\); allowed: a number"):
        tracker.log(0, {"loss": "low"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="cannot be called 'step'"):
        tracker.log(0, {"step": 1.0})
    tracker.close()
    tracker.close()
    with pytest.raises(ValueError, match="closed"):
        tracker.log(0, {"loss": 1.0})
    assert read_jsonl(tmp_path / "logs" / "x.jsonl") == []
