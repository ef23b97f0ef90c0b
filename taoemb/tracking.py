"""One ``log(step, metrics)`` in front of the console, a JSON-lines file, tensorboard, trackio and wandb.

Steps count from 0. A resumed run passes the step it goes on with as ``start_step``: the JSON-lines file and tensorboard
drop what an earlier process logged from that step on, so that a killed and resumed run has every step once there.
Learning curves are read from the JSON-lines file; the other backends are for looking on.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, SupportsFloat, get_args

from tqdm import tqdm

from taoemb.files import write_text

Backend = Literal["console", "jsonl", "tensorboard", "trackio", "wandb"]


class Tracker:
    """Sends each step's metrics to the chosen backends.

    Args:
        backends: any of ``console``, ``jsonl``, ``tensorboard``, ``trackio``, ``wandb``; each once.
        run_dir: the run folder; everything local is written below ``run_dir/logs``.
        name: names the log, such as the system that is trained; ``run_dir/logs/NAME.jsonl``.
        config: settings to show beside the curves (tensorboard, trackio, wandb).
        start_step: the first step that will be logged; larger than 0 where a run resumes.
        total_steps: the length of the run, for the console's progress bar; None where it is not known.
        console_every: the console prints the metrics of every so many steps, and of the last one.
        console_keys: the metrics that the console prints; None prints all.

    Raises:
        ValueError: an unknown or repeated backend, or a name that cannot name a file.
        ModuleNotFoundError: a backend's package is not installed; the message names the extra that brings it.

    >>> with Tracker(["jsonl"], run_dir=getfixture("tmp_path"), name="stage1") as tracker:
    ...     tracker.log(0, {"loss": 2.5})
    >>> print((getfixture("tmp_path") / "logs/stage1.jsonl").read_text(), end="")
    {"step": 0, "loss": 2.5}
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        run_dir: str | os.PathLike[str],
        name: str,
        config: Mapping[str, Any] | None = None,
        *,
        start_step: int = 0,
        total_steps: int | None = None,
        console_every: int = 10,
        console_keys: Sequence[str] | None = None,
    ) -> None:
        unknown = [backend for backend in backends if backend not in get_args(Backend)]
        if unknown or len(set(backends)) != len(backends):
            allowed = ", ".join(get_args(Backend))
            raise ValueError(f"got the tracking backends {list(backends)}; allowed: any of {allowed}, each once")
        if not name or Path(name).name != name:
            raise ValueError(f"got the log name {name!r}; allowed: text that can name a file")
        if console_every < 1:
            raise ValueError(f"got console_every={console_every}; allowed: 1 or more")
        logs = Path(run_dir) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        run = _Run(logs, name, dict(config or {}), start_step, total_steps, console_every, console_keys)
        with ExitStack() as opened:  # closes the backends already open where a later one cannot be opened
            self._backends: list[_Backend] = []
            for backend in backends:
                self._backends.append(_OPEN[backend](run))
                opened.callback(self._backends[-1].close)
            self._opened = opened.pop_all()
        self._closed = False

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Log the metrics of a step: whatever ``float`` takes, scalar tensors and NaN included.

        Raises:
            ValueError: the tracker is closed, or a metric is called ``step``.
            TypeError: a metric is not a number.
        """
        if self._closed:
            raise ValueError("this tracker is closed; open another one with start_step set to the next step")
        if "step" in metrics:
            raise ValueError("a metric cannot be called 'step'; that key holds the step itself")
        numbers = {key: _number(key, value) for key, value in metrics.items()}
        for backend in self._backends:
            backend.log(step, numbers)

    def close(self) -> None:
        """Close every backend; a second call does nothing."""
        self._closed = True
        self._opened.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class _Run:
    """What a backend may want to know."""

    logs: Path
    name: str
    config: dict[str, Any]
    start_step: int
    total_steps: int | None
    console_every: int
    console_keys: Sequence[str] | None


class _Backend(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _Console:
    """A progress bar (on a terminal only) and a line every so many steps, both on stderr."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._bar = tqdm(
            desc=run.name, total=run.total_steps, initial=run.start_step, unit="step", file=sys.stderr, disable=None
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._bar.update(max(0, step + 1 - self._bar.n))
        if step % self._run.console_every == 0 or step + 1 == self._run.total_steps:
            keys = (
                metrics if self._run.console_keys is None else [key for key in self._run.console_keys if key in metrics]
            )
            values = "  ".join(f"{key} {metrics[key]:.4g}" for key in keys)
            tqdm.write(f"{self._run.name} step {step}  {values}", file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


class _Jsonl:
    """``NAME.jsonl``: one object per log call, flushed, so that a killed process loses at most a torn last line."""

    def __init__(self, run: _Run) -> None:
        path = run.logs / f"{run.name}.jsonl"
        write_text(path, "".join(_lines_before(path, run.start_step)))
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _lines_before(path: Path, start_step: int) -> list[str]:
    """The lines of the steps before ``start_step``, without the torn last line that a killed process leaves."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if start_step > 0 and path.exists() else []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [line for line in lines if json.loads(line)["step"] < start_step]


class _Tensorboard:
    """Event files below ``logs/tensorboard/NAME``; steps of an earlier process are purged by tensorboard itself."""

    def __init__(self, run: _Run) -> None:
        summary_writer = _require("torch.utils.tensorboard", "tensorboard", "tracking").SummaryWriter
        folder = run.logs / "tensorboard" / run.name
        self._writer = summary_writer(str(folder), purge_step=run.start_step or None)
        if run.config:
            self._writer.add_text("config", f"```json\n{json.dumps(run.config, indent=2, default=str)}\n```")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    """The local trackio store (``TRACKIO_DIR``, or trackio's cache); nothing is sent to a server."""

    def __init__(self, run: _Run) -> None:
        self._trackio = _require("trackio", "trackio", "tracking")
        remote = [name for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL") if os.environ.get(name)]
        if remote:
            raise ValueError(f"{' and '.join(remote)} would send the metrics away; unset it to track with trackio")
        self._trackio.init(
            project="taoemb",
            name=_run_name(run),
            config=run.config,
            resume="allow" if run.start_step else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._trackio.log(dict(metrics), step=step)

    def close(self) -> None:
        self._trackio.finish()


class _Wandb:
    """Weights & Biases; offline or not as its own settings (``WANDB_MODE``) say."""

    def __init__(self, run: _Run) -> None:
        wandb = _require("wandb", "wandb", "wandb")
        self._run = wandb.init(
            project="taoemb",
            id=_run_name(run),
            name=_run_name(run),
            dir=str(run.logs),
            config=run.config,
            resume="allow" if run.start_step else None,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


_OPEN: dict[str, Callable[[_Run], _Backend]] = {
    "console": _Console,
    "jsonl": _Jsonl,
    "tensorboard": _Tensorboard,
    "trackio": _Trackio,
    "wandb": _Wandb,
}


def _run_name(run: _Run) -> str:
    """The same for a resumed run: the run folder's name and the log's."""
    return f"{run.logs.resolve().parent.name}-{run.name}"


def _number(key: str, value: SupportsFloat) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metric {key!r}: got {value!r} ({type(value).__name__}); allowed: a number") from error


def _require(module: str, package: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'tracking with {package} needs the package {package}: pip install "taoemb[{extra}]"', name=error.name
        ) from error
