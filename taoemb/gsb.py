"""The human comparison of two systems: a blinded sheet of result lists side by side, and its good : same : bad score.

A person who does not know which list is whose says per query which one is better. Sides are swapped at random; which system
stood where is in a file of its own.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from taoemb.comparison import Comparison
from taoemb.evaluation import paired_bootstrap
from taoemb.files import read_json, write_json, write_text

SHEET, KEY = "gsb.csv", "gsb_key.json"
QUERIES = 100
"""Queries of a sheet, at most; our choice."""
VERDICTS = ("left", "same", "right")
COLUMNS = ("query_id", "query", "left", "right", "verdict", "sheet")


@dataclass(frozen=True)
class GSB:
    """What people said: in how many queries ``system`` is better than ``against``, as good, worse."""

    system: str
    against: str
    good: int
    same: int
    bad: int
    asked: int
    """Queries of the sheet, with or without a verdict."""
    identical: float
    """Share of all queries whose two lists are the same; they are not in the sheet."""
    score: float
    """(good - bad) / (good + same + bad), with its 95 % bootstrap interval over queries."""
    ci_low: float
    ci_high: float

    def text(self) -> str:
        """A few lines for the terminal."""
        filled = self.good + self.same + self.bad
        lines = [
            f"{self.system} against {self.against}",
            f"G : S : B = {self.good} : {self.same} : {self.bad}",
            f"GSB score {self.score:+.3f}  [{self.ci_low:+.3f}, {self.ci_high:+.3f}] (95 %, bootstrap over queries)",
        ]
        if filled < self.asked:
            lines.append(
                f"{filled} of {self.asked} queries have a verdict; the rows are in random order, so that any first part counts"
            )
        if self.identical:
            lines.append(f"{100 * self.identical:.0f} % of the queries have two identical lists and were not asked; with them as same the "
                         f"score is {(1 - self.identical) * self.score:+.3f}")  # fmt: skip
        return "\n".join(lines)


def write_sheet(comparison: Comparison, system: str, against: str, folder: Path, seed: int = 0) -> str:
    """Write ``gsb.csv`` and ``gsb_key.json``: up to 100 random queries whose Top-10 differ; returns a sentence about them.

    A sheet that holds verdicts stays, with its key.
    """
    ours, theirs = (comparison.lists[name][0] for name in (system, against))
    differ = [i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]]
    if not differ:
        return f"no {SHEET}: {system} and {against} show the same Top-10 for every query"
    rng = np.random.default_rng(seed)
    chosen = [differ[i] for i in rng.permutation(len(differ))[:QUERIES].tolist()]
    swapped = rng.integers(2, size=len(chosen)).astype(bool).tolist()
    rows = []
    for i, swap in zip(chosen, swapped, strict=True):
        query, lists = comparison.queries[i], [_shown(comparison, side[i]) for side in (ours, theirs)]
        rows.append([query.id, _plain(query.text), *(lists[::-1] if swap else lists)])
    sheet = hashlib.sha256(json.dumps([system, against, seed, rows]).encode()).hexdigest()[:12]
    key = {"kind": "gsb key", "format": 1, "sheet": sheet, "seed": seed, "system": system, "against": against,
           "left": {comparison.queries[i].id: against if swap else system for i, swap in zip(chosen, swapped, strict=True)},
           "queries": len(ours), "identical": len(ours) - len(differ)}  # fmt: skip
    filled = _verdicts_in(folder / SHEET)
    if filled:
        return f"kept {folder / SHEET} and its key: {filled} verdicts are filled in; move it away to get a new sheet"
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows([*row, "", sheet] for row in rows)
    write_json(folder / KEY, key)
    write_text(folder / SHEET, "\ufeff" + text.getvalue())  # spreadsheets know UTF-8 by its mark
    return f"{folder / SHEET}: {len(rows)} queries, {system} against {against}"


def score_sheet(path: Path) -> GSB:
    """Read a filled sheet (``gsb.csv``, or the folder that holds it) with the ``gsb_key.json`` beside it.

    Raises:
        FileNotFoundError: sheet or key is missing.
        ValueError: the sheet is of another key, no sheet at all, without a verdict, or with one that is none of left,
            same, right.
    """
    sheet = path / SHEET if path.is_dir() else path
    key_file = sheet.with_name(KEY)
    for file in (sheet, key_file):
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist; a sheet ({SHEET}) is scored with the key ({KEY}) beside it"
            )
    key, rows = read_json(key_file), _read_rows(sheet)
    if not isinstance(key, dict) or key.get("kind") != "gsb key":
        raise ValueError(f"{key_file} is no key of a sheet; take the one that `taoemb benchmark` wrote with it")
    others = {row["sheet"].strip() for row in rows} - {key["sheet"]}
    if others:
        raise ValueError(f"{sheet} is sheet {min(others)!r}, {key_file} is the key of {key['sheet']!r}; a sheet is scored with "
                         "the key that was written with it")  # fmt: skip
    ids = [row["query_id"] for row in rows]
    strange = [i for i in ids if i not in key["left"] or ids.count(i) > 1]
    if strange:
        raise ValueError(
            f"{sheet}: query {strange[0]!r} is twice in it or not in the key; keep the column query_id as it was"
        )
    said = {row["query_id"]: row["verdict"].strip().lower() for row in rows}
    wrong = {query: verdict for query, verdict in said.items() if verdict and verdict not in VERDICTS}
    if wrong:
        told = ", ".join(f"{verdict!r} for query {query!r}" for query, verdict in list(wrong.items())[:5])
        raise ValueError(f"{sheet}: {len(wrong)} verdicts are none of left, same, right (or empty): {told}")
    worth = [_worth(verdict, key["left"][query] == key["system"]) for query, verdict in said.items() if verdict]
    if not worth:
        raise ValueError(
            f"{sheet}: the column verdict is empty; write left, same or right in it for as many queries as you like"
        )
    test = paired_bootstrap(worth, np.zeros(len(worth)))
    return GSB(key["system"], key["against"], worth.count(1), worth.count(0), worth.count(-1), len(key["left"]),
               key["identical"] / key["queries"], test.difference, test.ci_low, test.ci_high)  # fmt: skip


def _worth(verdict: str, system_is_left: bool) -> int:
    """1 where the system is better, -1 where it is worse."""
    if verdict == "same":
        return 0
    return 1 if (verdict == "left") == system_is_left else -1


def _shown(comparison: Comparison, ids: Sequence[str]) -> str:
    """A list as people read it: a line per item."""
    items = comparison.catalog.items
    lines = []
    for rank, place in enumerate(items.positions(ids).tolist(), start=1):
        item = items[place]
        facts = [" ".join(item.title.split()), "" if item.price is None else f"{item.price:.2f}"]
        lines.append(f"{rank}. " + " | ".join(filter(None, facts)))
    return "\n".join(lines) or "(nothing found)"


def _plain(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in "=+-@" else text


def _read_rows(sheet: Path) -> list[dict[str, str]]:
    try:
        text = sheet.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{sheet} is not UTF-8; save it from the spreadsheet as CSV UTF-8") from None
    head = text.partition("\n")[0]
    comma = max(",;\t", key=head.count)  # what the spreadsheet's country writes
    rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=comma))
    absent = [c for c in ("query_id", "verdict", "sheet") if not rows or c not in rows[0]]
    if absent:
        raise ValueError(f"{sheet} has no column {', '.join(absent)}, or no row; keep all columns as they were written")
    return [{c: row[c] or "" for c in ("query_id", "verdict", "sheet")} for row in rows if row["query_id"]]


def _verdicts_in(sheet: Path) -> int:
    """How many verdicts an older sheet holds; what cannot be read counts as one, so that nobody's work is lost."""
    if not sheet.exists():
        return 0
    try:
        return sum(bool(row["verdict"].strip()) for row in _read_rows(sheet))
    except ValueError:
        return 1
