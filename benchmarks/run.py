"""Benchmarks that anyone can rerun: what is run, on what, and what it gave.

    python benchmarks/run.py list
    python benchmarks/run.py run shop --out runs/benchmarks
    python benchmarks/run.py check --budget 20m                      # reruns what fits, and fails where a score is out of its tolerance
    python benchmarks/run.py check --only chorus --path chorus=my/folder
    python benchmarks/run.py table                                   # writes the pages' tables from benchmarks/results

A record is a file ``benchmarks/conditions/NAME.yaml``: ``what`` it shows, the ``command`` as it is typed (``{data}``, ``{out}``, ``{seed}`` filled in;
several, one a line), what it ``needs`` beside the project's own packages, ``threads``, its ``data`` (a generated ``shop`` by its size and seed, or a ``path`` that you give), ``seeds``, ``minutes`` on the ``hardware`` class, and ``scores``:
file that the command writes -> path in it -> [expected, tolerance], means over the seeds. ``run`` writes
``OUT/NAME/result.json`` with the commit, the versions and the machine; what the same command has finished with the same code is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from taoemb.config import ConfigError, load_config
from taoemb.files import read_json, write_json, write_text
from taoemb.shop import generate_shop

FOLDER = Path(__file__).parent
PACKAGES = ("taoemb", "torch", "transformers", "sentence-transformers", "faiss-cpu", "numpy", "trl")


@dataclass(frozen=True)
class Data:
    """A generated shop, or a folder that you have."""

    items: int = 0
    """Of a generated shop."""
    seed: int = 0
    """Of it."""
    queries: tuple[int, ...] = ()
    """Training, validation and test queries of it; by default its own."""
    path: str = ""
    """Name of a folder that is given with ``--path NAME=FOLDER``."""


@dataclass(frozen=True)
class Record:
    """One benchmark."""

    what: str
    """What it shows."""
    command: str
    """As it is typed in the project's folder; several commands in their order, one a line."""
    needs: tuple[str, ...] = ()
    """Packages to install for it."""
    data: Data = field(default_factory=Data)
    """What it runs on."""
    seeds: tuple[int, ...] = (0,)
    """Of the training."""
    threads: int = 1
    """Of torch, faiss and all that reads ``OMP_NUM_THREADS``."""
    hardware: Literal["cpu", "gpu"] = "cpu"
    """Class of machine."""
    minutes: float = 1.0
    """On two shared cores, or the GPU that is named in the results."""
    scores: dict[str, dict[str, tuple[float, ...]]] = field(default_factory=dict)
    """File -> path in it, ``/`` between the keys -> expected score and tolerance."""

    def __post_init__(self) -> None:
        if not self.scores:
            raise ValueError("scores: name at least one, or nothing is checked")
        for file, paths in self.scores.items():
            for path, pair in paths.items():
                if len(pair) != 2 or not 0 < pair[1] < math.inf:
                    raise ValueError(
                        f"scores.{file}.{path}={list(pair)}: give [expected, tolerance], a finite tolerance above 0"
                    )
        if "{out}" not in self.command or (len(self.seeds) > 1 and "{seed}" not in self.command):
            raise ValueError(f"command={self.command!r}: it needs {{out}}, and with several seeds {{seed}}")
        if not self.seeds or self.minutes <= 0:
            raise ValueError(
                f"seeds={list(self.seeds)}, minutes={self.minutes}: give at least one seed, and minutes above 0"
            )


def main(words: list[str] | None = None) -> int:
    """Exit code: 1 where a score is out of its tolerance or a command failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="do", required=True)
    commands.add_parser("list", help="the records")
    commands.add_parser("table", help="write the tables of README and the result pages").add_argument(
        "--check", action="store_true", help="only say whether they differ"
    )
    for name, text in (("run", "run records"), ("check", "run records and compare with what is expected")):
        one = commands.add_parser(name, help=text)
        one.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
        one.add_argument("--path", action="append", default=[], metavar="NAME=FOLDER")
        if name == "run":
            one.add_argument("names", nargs="+", choices=sorted(records()))
        else:
            one.add_argument("--only", nargs="+", choices=sorted(records()))
            one.add_argument(
                "--budget", default="20m", help="how long in all, such as 90s, 20m or 2h; by the records' minutes"
            )
    arguments = parser.parse_args(words)
    if arguments.do == "list":
        for name, record in records().items():
            print(f"{name:16} {record.minutes:5.1f} min  {record.hardware}  {record.what}")
        return 0
    if arguments.do == "table":
        return tables(arguments.check)
    paths, known = folders(arguments.path), records()
    names = arguments.names if arguments.do == "run" else chosen(arguments.only, minutes(arguments.budget), paths)
    results, failed = {}, []
    for name in names:  # one that fails does not hide what the others found
        try:
            results[name] = run(name, known[name], arguments.out.resolve(), paths)
        except SystemExit as error:
            failed.append(f"{name}: {error}")
        except KeyboardInterrupt:
            failed.append(f"{name}: stopped; the same command goes on")
            break
    wrong = report(results)
    print("\n".join(failed), file=sys.stderr)
    return int(bool(wrong or failed))


def folders(given: list[str]) -> dict[str, Path]:
    """``NAME=FOLDER`` words. Raises SystemExit for one that is none, a name that no record has, a folder that is not there."""
    names = sorted({record.data.path for record in records().values()} - {""})
    found = {}
    for word in given:
        name, equals, folder = word.partition("=")
        if not equals or name not in names:
            raise SystemExit(f"--path {word}: give NAME=FOLDER with a name of {', '.join(names)}")
        found[name] = Path(folder).expanduser().resolve()
        if not found[name].is_dir():
            raise SystemExit(f"--path {word}: {found[name]} is no folder")
    return found


def records() -> dict[str, Record]:
    """By name. Raises SystemExit for a file that holds none."""
    found = {}
    for file in sorted((FOLDER / "conditions").glob("*.yaml")):
        try:
            found[file.stem] = load_config(Record, file)
        except ConfigError as error:
            raise SystemExit(f"{file}: {error}") from None
    return found


def minutes(text: str) -> float:
    """
    >>> minutes("90s"), minutes("20m"), minutes("2h")
    (1.5, 20.0, 120.0)
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh])", text)
    if not found:
        raise SystemExit(f"--budget {text!r}: give a number with s, m or h, such as 20m")
    return float(found[1]) * {"s": 1 / 60, "m": 1.0, "h": 60.0}[found[2]]


def chosen(only: list[str] | None, budget: float, paths: dict[str, Path]) -> list[str]:
    """The shortest first, as far as the budget goes; those whose data or hardware are not here are named and left out."""
    found, spent = [], 0.0
    for name, record in sorted(records().items(), key=lambda pair: pair[1].minutes):
        if only and name not in only:
            continue
        why = ""
        if record.data.path and record.data.path not in paths:
            why = f"give --path {record.data.path}=FOLDER"
        elif record.hardware == "gpu" and not gpu():
            why = "there is no GPU"
        elif missing := [package for package in record.needs if not installed(package)]:
            why = f"pip install {' '.join(missing)}"
        elif spent + record.minutes > budget:
            why = f"{record.minutes:g} minutes are beyond the budget"
        if why:
            print(f"left out: {name} ({why})")
            continue
        found.append(name)
        spent += record.minutes
    if not found:
        raise SystemExit("nothing to run")
    return found


def installed(package: str) -> bool:
    """Whether it is, by the name that pip knows."""
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def gpu() -> bool:
    """Whether there is one."""
    import torch

    return bool(torch.cuda.is_available())


def run(name: str, record: Record, out: Path, paths: dict[str, Path]) -> dict[str, Any]:
    """Its result. What is finished is not run again, but read again: other scores may be asked of it.

    Raises SystemExit where the folder is of another command, other data or other code, where a command fails and where a score is missing.
    """
    if missing := [package for package in record.needs if not installed(package)]:
        raise SystemExit(f"{name} needs more packages: pip install {' '.join(missing)}")
    folder = out / name
    data = prepared(record.data, out / "data", paths)
    made_by = {
        "command": record.command,
        "data": str(data),
        "seeds": list(record.seeds),
        "threads": record.threads,
        **code(),
    }
    mark, file = folder / "made_by.json", folder / "result.json"
    if mark.exists() and (known := read_json(mark)) != made_by:
        differs = ", ".join(key for key in made_by if made_by[key] != known.get(key))
        raise SystemExit(f"{folder} is of another {differs}; give another --out, or delete it")
    write_json(mark, made_by)  # before anything runs: seeds of two commits must not be averaged
    if file.exists():
        result: dict[str, Any] = dict(read_json(file))
        print(f"{name}: read from {file}, of {result['machine']['date']}")
    else:
        done, finished = folder / "finished.json", {}
        if done.exists():
            finished = read_json(done)
        for seed in record.seeds:
            for line in filter(str.strip, record.command.splitlines()):
                words = [word.format(data=data, out=folder / f"seed{seed}", seed=seed) for word in shlex.split(line)]
                if shlex.join(words) not in finished:
                    finished[shlex.join(words)] = command(name, words, seed, folder, record.threads)
                    write_json(done, finished)
        result = {"name": name, "made_by": made_by, "minutes": sum(finished.values()) / 60, "machine": machine()}
        write_json(file, result)
    scores = {}
    for part, wanted in record.scores.items():
        for path in wanted:
            values = [at(folder / f"seed{seed}" / part, path) for seed in record.seeds]
            scores[f"{part}: {path}"] = {"found": float(np.mean(values)), "seeds": values}
    result["scores"] = scores
    write_json(file, result)
    return result


def command(name: str, words: list[str], seed: int, folder: Path, threads: int) -> float:
    """Run one, its output in a log beside its folder; its seconds. Raises SystemExit with the end of the log where it fails."""
    begin = time.perf_counter()
    (folder / f"seed{seed}").mkdir(parents=True, exist_ok=True)
    file = folder / f"seed{seed}.log"
    print(f"{name}, seed {seed}: {shlex.join(words)}", flush=True)
    with file.open("ab") as log:
        done = subprocess.run(
            [sys.executable if word == "python" else word for word in words], stdout=log, stderr=subprocess.STDOUT, cwd=FOLDER.parent,
            env=environment(threads), check=False,
        )  # fmt: skip
    if done.returncode:
        tail = file.read_text(errors="replace")[-1500:]
        raise SystemExit(f"{name}, seed {seed}: the command ended with {done.returncode}; {file} ends with\n{tail}")
    return time.perf_counter() - begin


def prepared(data: Data, folder: Path, paths: dict[str, Path]) -> Path | str:
    """Its folder; a shop is generated where it is missing."""
    if data.path:
        if data.path not in paths:
            raise SystemExit(f"the record needs a folder: give --path {data.path}=FOLDER")
        return paths[data.path]
    if not data.items:
        return ""
    sizes = dict(zip(("train_queries", "validation_queries", "test_queries"), data.queries, strict=False))
    found = (folder / "-".join(map(str, ("shop", data.items, data.seed, *data.queries)))).resolve()
    if not (found / "truth.parquet").exists():
        generate_shop(data.items, seed=data.seed, **sizes).save(found)
    return found


def environment(threads: int) -> dict[str, str]:
    """Where `taoemb` is a command, also when the environment is not activated."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }


def at(file: Path, path: str) -> float:
    """The number at a path in a file; keys of dictionaries, positions of lists. Raises SystemExit where there is none."""
    if not file.exists():
        raise SystemExit(f"the command wrote no {file}")
    read = read_json(file)
    for key in path.split("/"):
        try:
            read = read[int(key)] if isinstance(read, list) else read[key]
        except (KeyError, IndexError, ValueError, TypeError):
            raise SystemExit(f"{file} has no {path} (at {key!r})") from None
    if not isinstance(read, int | float):
        raise SystemExit(f"{file}: {path} is {read!r}, no number")
    return float(read)


def said(*words: str) -> str:
    """What a command prints, in the project's folder; nothing where it is not installed or fails."""
    try:
        return subprocess.run(words, capture_output=True, text=True, cwd=FOLDER.parent, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def code() -> dict[str, str]:
    """The last commit of the code, and a hash of what was changed since; pages, results and records are none. Without git, a hash of the files."""
    what = [
        "--",
        "pyproject.toml",
        "taoemb",
        "index",
        "benchmarks",
        *(f":!benchmarks/{page}" for page in ("results", "LOG.md", "tables.yaml")),
        ":(exclude,glob)benchmarks/conditions/*.yaml",  # a record's command counts, its expected scores do not
    ]
    if not said("git", "rev-parse", "HEAD"):
        files = sorted(
            file for part in ("taoemb", "index", "benchmarks") for file in (FOLDER.parent / part).rglob("*.py")
        )
        return {"commit": "", "changes": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]}
    changes = said("git", "diff", "HEAD", *what)
    for new in said("git", "ls-files", "--others", "--exclude-standard", *what).splitlines():
        changes += new + (FOLDER.parent / new).read_text(encoding="utf-8", errors="replace")
    return {
        "commit": said("git", "log", "-1", "--format=%H", *what),
        "changes": hashlib.sha256(changes.encode()).hexdigest()[:12] if changes else "",
    }


def machine() -> dict[str, Any]:
    """What a result is worth nothing without."""
    versions = {package: importlib.metadata.version(package) for package in PACKAGES if installed(package)}
    cpu = (
        re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if Path("/proc/cpuinfo").exists()
        else None
    )
    return {
        "versions": versions,
        "python": platform.python_version(), "cpu": cpu[1] if cpu else platform.processor(), "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", ""), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def report(results: dict[str, dict[str, Any]]) -> int:
    """Print found against expected."""
    wrong = 0
    print("| record | score | expected | found | |\n| --- | --- | --- | --- | --- |")
    for name, result in results.items():
        for file, paths in records()[name].scores.items():
            for path, (expected, tolerance) in paths.items():
                found = result["scores"][f"{file}: {path}"]["found"]
                fine = abs(found - expected) <= tolerance
                wrong += not fine
                verdict = "ok" if fine else "OUT OF TOLERANCE"
                print(f"| {name} | {path} | {expected:g} ± {tolerance:g} | {found:.4f} | {verdict} |")
    print(f"{wrong} out of tolerance" if wrong else "all within tolerance")
    return int(wrong > 0)


def tables(check: bool) -> int:
    """The pages' tables from the results; 1 where ``check`` finds a difference."""
    wrong = 0
    for page, found in by_page().items():
        file = FOLDER.parent / page
        text = file.read_text(encoding="utf-8")
        made = with_tables(text, found)
        if made != text and check:
            print(f"{page} differs from benchmarks/results: run `python benchmarks/run.py table`")
            wrong = 1
        elif made != text:
            write_text(file, made)
    return wrong


def by_page() -> dict[str, dict[str, Any]]:
    """Page -> name -> table of ``benchmarks/tables.yaml``."""
    found: dict[str, dict[str, Any]] = {}
    for name, table in yaml.safe_load((FOLDER / "tables.yaml").read_text(encoding="utf-8")).items():
        found.setdefault(table.get("page", "README.md"), {})[name] = table
    return found


def with_tables(text: str, found: dict[str, Any]) -> str:
    """A page with tables between their marks. Raises ValueError for one without marks."""
    for name, table in found.items():
        begin, end = f"<!-- table: {name} -->\n", "<!-- end of table -->"
        head, mark, rest = text.partition(begin)
        if not mark or end not in rest:
            raise ValueError(
                f"the page has no marks {begin.strip()!r} and {end!r}; put them where the table is to stand"
            )
        text = head + begin + markdown(table) + end + rest.partition(end)[2]
    return text


def markdown(table: dict[str, Any]) -> str:
    """One table: rows of results, the best figure of each column in bold where ``best`` says which end is better.

    A column is a ``metric`` with its deviation, of all queries or of a ``slice``; with ``test: true`` what the row has more than the row that it was
    tested against, and the p-value; or a ``cost`` with its ``unit``.
    """
    results = read_json(FOLDER / "results" / table["file"])["rows"]
    rows = {label: results[name] for label, name in table["rows"].items()}
    lines = ["| system | " + " | ".join(table["columns"]) + " |", "| --- |" + " --- |" * len(table["columns"])]
    columns = [cells(column, list(rows.values())) for column in table["columns"].values()]
    return (
        "\n".join(
            lines
            + [
                f"| {label} | " + " | ".join(row) + " |"
                for label, row in zip(rows, zip(*columns, strict=True), strict=True)
            ]
        )
        + "\n"
    )


def cells(column: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """A column of a table, a row's cell empty where it has no such figure."""
    if "cost" in column:
        found = [row.get(column["cost"]) for row in rows]
        return [
            f"{value / column['unit']:.{column.get('digits', 0)}f}{column.get('sign', '')}" if value else ""
            for value in found
        ]
    places = [row.get("slices", {}).get(column["slice"], {}) if "slice" in column else row["metrics"] for row in rows]
    values = [place.get(column["metric"]) for place in places]
    if column.get("test"):
        return [tested(value and value.get("against", value)) for value in values]
    best = {"high": max, "low": min}.get(column.get("best", ""))
    top = best((round(value["mean"], 3) for value in values if value), default=None) if best else None
    return [figure(value, top) for value in values]


def tested(test: dict[str, float] | None) -> str:
    """
    >>> tested({"difference": -0.0049, "p_value": 0.0496}), tested({"difference": 10.5, "p_value": 0.0001}), tested(None)
    ('-.005 (p = .050)', '+10.500 (p = .0001)', '')
    >>> tested({"difference": 0.01, "p_value": 0.4}), tested({"difference": 0.0001, "p_value": 1.0})
    ('+.010 (p = .40)', '+.000 (p = 1)')
    """
    if not test or not test.get("difference"):
        return ""
    p = test["p_value"]
    digits = 4 if p < 0.001 else 3 if p < 0.1 else 2
    difference, chance = bare(f"{test['difference']:+.3f}"), bare(f"{p:.{digits}f}")
    return f"{difference} (p = {chance if p < 0.995 else 1})"


def bare(number: str) -> str:
    """
    >>> bare("0.5"), bare("-0.5"), bare("10.5")
    ('.5', '-.5', '10.5')
    """
    return re.sub(r"^([+-]?)0\.", r"\1.", number)


def figure(value: dict[str, float] | None, top: float | None) -> str:
    """
    >>> figure({"mean": 0.76721, "deviation": 0.0036}, 0.767), figure({"mean": 1.0, "deviation": 0.0}, None), figure(None, None)
    ('**.767** ± .004', '1.000', '')
    """
    if value is None:
        return ""
    said = bare(f"{value['mean']:.3f}")
    if top is not None and round(value["mean"], 3) == top:
        said = f"**{said}**"
    return said + (f" ± {value['deviation']:.3f}".replace(" 0.", " .") if value.get("deviation") else "")


if __name__ == "__main__":
    sys.exit(main())
