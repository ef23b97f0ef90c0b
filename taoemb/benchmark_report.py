"""The page and the printed table of ``taoemb benchmark``, from the files in its folder; the same files give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from taoemb.benchmark import NO_SLICE, RRF_K, headline_of, read_results
from taoemb.files import write_text
from taoemb.report_charts import (
    Curve,
    Point,
    aligned,
    compact,
    decimal,
    difference_chart,
    duration,
    figure,
    html_page,
    line_chart,
    metric_text,
    missing,
    number,
    p_text,
    scatter_chart,
    stars,
)  # fmt: skip
from taoemb.report_details import (
    METRICS,
    TERMS,
    base_of,
    direction_of,
    glossary,
    label_of,
    result_lists,
    slice_charts,
)

_PALETTE = (0, 3, 5, 4, 7, 6, 9, 1, 8, 2)
_COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "item_encodings": ("Item encodings", lambda v: f"{v:,.0f}"),
    "prepare_seconds": ("Encoding", duration),
    "query_ms": ("Query", lambda v: f"{v:.3g} ms"),
    "index_mb": ("Index", lambda v: f"{v:,.3g} MB"),
}  # fmt: skip
_WORDS = {
    **{word: TERMS[word] for word in ("good", "paired bootstrap")},
    "bm25+…": f"Fusion by reciprocal rank: an item's score is the sum of 1 / ({RRF_K} + its rank) over BM25 and the first model.",
}
_FACTS = {"data": "Catalog", "items": "Items", "queries": "Queries", "split": "Split", "graded_by": "Graded by",
          "unjudged": "Pairs without a grade", "channels": "Channels", "depth": "List length", "device": "Measured on",
          "version": "taoemb version"}  # fmt: skip


class _Page:
    """``benchmark.json`` with what the parts of the page ask for."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw, self.order, self.against = raw, list(raw["order"]), str(raw["against"])
        names = {metric for row in raw["systems"].values() for metric in row}
        known = list(METRICS)
        self.metrics = sorted(
            names, key=lambda m: (known.index(base_of(m)) if base_of(m) in known else 99, _cutoff(m), m)
        )
        self.headline = headline_of(names)
        self.tests = sum(len(found) for found in raw["tests"].values())

    def value(self, system: str, metric: str) -> float:
        return number(self.raw["systems"][system].get(metric))

    def cost(self, system: str, name: str) -> float:
        return number(self.raw["cost"].get(system, {}).get(name))

    def test(self, metric: str, system: str) -> dict[str, float]:
        return dict(self.raw["tests"].get(metric, {}).get(system, {}))

    def color(self, system: str) -> int:
        return _PALETTE[self.order.index(system) % len(_PALETTE)]

    def marks(self, metric: str, system: str) -> str:
        """Stars of the test against the reference."""
        p = self.test(metric, system).get("p_value", 1.0)
        return "***" if p < 0.05 / max(1, self.tests) else stars(p)

    def ordered(self, systems: Iterable[str]) -> list[str]:
        given = set(systems)
        return [name for name in self.order if name in given]


def write_page(folder: Path) -> Path:
    """Write ``benchmark.html`` from ``benchmark.json`` and ``per_query.parquet`` beside it, and return its path."""
    page = _Page(read_results(folder))
    rival = page.raw["examples"][0]["after"]["system"] if page.raw["examples"] else ""
    lists = (
        f"<h2>Result lists: {escape(page.against)} and {escape(rival)}</h2>"
        + '<p class="note">Left the system compared against, right the other: a dozen queries, spread over slices and over the gains and '
        "losses of nDCG@10.</p>" + result_lists(page.raw["examples"], "BM25" if page.raw["meta"].get("channels") == "bm25" else "any channel")
    )  # fmt: skip
    body = "\n".join([
        _header(page), _table(page), _cost(page), _objectives(page),
        _slices(page, folder / "per_query.parquet", rival), lists, _people(page), "<h2>Reference</h2>" + glossary(page.metrics, _WORDS),
        f"<details><summary>The table as plain text</summary><pre>{escape(table_text(page.raw))}</pre></details>",
    ])  # fmt: skip
    write_text(folder / "benchmark.html", html_page("taoemb benchmark", body))
    return folder / "benchmark.html"


def table_text(raw: dict[str, Any]) -> str:
    """The table for the terminal: a row per metric and cost, a column per system, stars as on the page."""
    page = _Page(raw)
    rows: list[Sequence[str]] = [("", *page.order)]
    for metric in page.metrics:
        cells = [metric_text(page.value(s, metric)) + page.marks(metric, s).ljust(3) for s in page.order]
        rows.append((label_of(metric), *cells))
    for name, (label, text) in _COSTS.items():
        cells = [text(v) if math.isfinite(v := page.cost(s, name)) else "–" for s in page.order]
        rows.append((label, *(cell + "   " for cell in cells)))
    return "\n".join([*aligned(rows), f"against {page.against}: {_stars_told(page)}"])


def _cutoff(metric: str) -> int:
    cut = metric.partition("@")[2].partition("/")[0]
    return int(cut) if cut.isdigit() else 0


def _stars_told(page: _Page) -> str:
    if not page.tests:
        return "no test, because fewer than two queries have a value"
    return (
        f"* p < .05, ** p < .01, *** p < .05 / {page.tests}: still significant after correction for the {page.tests} tests made here "
        "(two-sided paired bootstrap over queries)"
    )


# ---------------------------------------------------------------------------------------------------------- results


def _header(page: _Page) -> str:
    meta = page.raw["meta"]
    facts = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(f'{v:,}' if isinstance(v, int) else str(v))}</dd></div>"
        for key, label in {"against": "Compared against", **_FACTS}.items()
        for v in [page.against if key == "against" else meta.get(key)]
        if v not in (None, "")
    )
    kind, verdict = _verdict(page)
    return (
        f'<h1>taoemb benchmark</h1><div class="verdict {kind}">{escape(verdict)}</div>'
        + _pooled_note(page) + f'<dl class="facts">{facts}</dl>'
    )  # fmt: skip


def _pooled_note(page: _Page) -> str:
    if not page.headline.startswith("condensed"):
        return ""
    return (
        '<p class="note">Not every pair has a grade. The systems are compared by condensed nDCG (items without a grade taken out); '
        "plain nDCG, recall and hit rate count such items as bad and favour the systems whose results were graded. Judged@10 says how "
        "much of what is shown has a grade.</p>"
    )


def _verdict(page: _Page) -> tuple[str, str]:
    name = label_of(page.headline)
    others = [s for s in page.order if s != page.against and math.isfinite(page.value(s, page.headline))]
    if not others:
        return "level", f"No verdict: no system beside {page.against} has {name}."
    best = max(others, key=lambda s: page.value(s, page.headline))
    test = page.test(page.headline, best)
    if not test:
        return "level", f"No verdict: too few queries have {name}."
    gap, p = f"{decimal(test['difference'], sign=True)} {name}", test["p_value"]
    if not p < 0.05:
        return (
            "level",
            f"{best}, the best beside {page.against}, is level with it: {gap} is within chance ({p_text(p)}).",
        )
    if test["difference"] > 0:
        return "lead", f"{best} is best: {gap} against {page.against} ({p_text(p)})."
    return "behind", f"{page.against} is best: {best}, the next, is at {gap} ({p_text(p)})."


def _table(page: _Page) -> str:
    arrow = {1: "\N{NO-BREAK SPACE}↑", 0: ""}
    head = "".join(
        f'<th scope="col" title="{escape(m)}">{escape(label_of(m)).replace("@", "<wbr>@")}{arrow[direction_of(m)]}</th>'
        for m in page.metrics
    )
    rows = []
    for system in page.order:
        cells = "".join(_cell(page, system, metric) for metric in page.metrics)
        ours = ' class="ours"' if system == page.against else ""
        rows.append(f"<tr{ours}><td>{_named(page, system)}</td>{cells}</tr>")
    by_chance = f"{0.05 * page.tests:.0f}"
    return (
        f'<h2>Results</h2><div class="scroll"><table class="results"><thead><tr><th scope="col">System</th>{head}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div>'
        f'<p class="note">Mean over the queries. Bold: the best of a column. Small: difference to {escape(page.against)}. '
        f"{escape(_stars_told(page))}: this system differs from {escape(page.against)}. If no system differed at all, about "
        f"{by_chance} of the {page.tests} tests would get a star by chance alone, so trust the three stars, or one test that you chose "
        "beforehand. ↑ higher is better; without an arrow a metric is neither good nor bad by itself.</p>"
        f'<div class="charts">{_differences(page)}{_recall(page)}</div>'
    )  # fmt: skip


def _named(page: _Page, system: str) -> str:
    return f'<span class="dot c{page.color(system)}"></span>{escape(system)}'


def _cell(page: _Page, system: str, metric: str) -> str:
    value, direction = page.value(system, metric), direction_of(metric)
    known = [v for s in page.order if math.isfinite(v := page.value(s, metric))]
    text = metric_text(value)
    shown = (
        f"<b>{text}</b>" if direction and known and math.isfinite(value) and text == metric_text(max(known)) else text
    )
    test, marks = page.test(metric, system), page.marks(metric, system)
    if marks:
        least, middle, most = (decimal(test[key], sign=True) for key in ("ci_low", "difference", "ci_high"))
        tip = f"{middle} [{least}, {most}], {p_text(test['p_value'])}"
        shown += f'<sup title="{escape(tip)}">{marks}</sup>'
    change = value - page.value(page.against, metric)
    if system != page.against and math.isfinite(change):
        shown += f"<small>{metric_change(change)}</small>"
    return f"<td>{shown}</td>"


def metric_change(change: float) -> str:
    """A difference of two metric values."""
    return decimal(change, sign=True) if not abs(change) >= 10 else ("+" if change > 0 else "") + compact(change)


# ---------------------------------------------------------------------------------------------------- cost and plots


def _cost(page: _Page) -> str:
    rows = []
    for system in page.order:
        cells = [text(v) if math.isfinite(v := page.cost(system, name)) else "–" for name, (_, text) in _COSTS.items()]
        rows.append(f"<tr><td>{_named(page, system)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f'<th scope="col">{label}</th>' for label, _ in _COSTS.values())
    name = label_of(page.headline)
    plots = [
        _scatter(page, f"{name} against {what}", {s: page.cost(s, key) for s in page.order}, page.headline, title, -1, note)
        for key, what, title, note in (
            ("prepare_seconds", "encoding time", "seconds →", "up and left is better; logarithmic"),
            ("query_ms", "the time of a query", "milliseconds →", "one at a time, exact search; up and left is better; logarithmic"),
            ("index_mb", "memory", "MB →", "of exact search; up and left is better; logarithmic"),
        )
    ]  # fmt: skip
    return (
        f'<h2>Quality and cost</h2><div class="charts">{"".join(plots)}</div>'
        f'<div class="scroll"><table><thead><tr><th scope="col">System</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        '<p class="note">Item encodings: items that go through the encoder before anything is found. Encoding: wall time of encoding all items; of BM25, of building its index. Query: median of up to 100 queries, one '
        "at a time: encoding it and exact search for 100 items. Index: what exact search holds in memory. A fusion costs what its parts "
        "cost together. Dotted: no system is better and cheaper at once. Measured once and kept with the encodings. –: not known, as of a run file.</p>"
    )  # fmt: skip


def _scatter(
    page: _Page, title: str, x: Mapping[str, float], y: str, x_title: str, best: int, note: str
) -> str:  # fmt: skip
    points = [
        Point(system, page.color(system), x[system], page.value(system, y))
        for system in page.order
        if math.isfinite(x[system] + page.value(system, y)) and (best > 0 or x[system] > 0)
    ]
    if not points:
        return missing(f"{title}: no system has both figures.")
    chart = scatter_chart(title, points, x_title, f"{label_of(y)} ↑", best=best, log_x=best < 0)
    return figure(title, chart, note)


def _recall(page: _Page) -> str:
    title, note = "Recall@k", "share of the good items in the first k; logarithmic; a run file may end before"
    curves = []
    for system in page.order:
        found = sorted((int(k), value) for k, value in page.raw["recall_curve"][system].items())
        if found:
            x, y = np.array(found, dtype=np.float64).T
            curves.append(Curve(system, page.color(system), x, y))
    if not curves:
        return missing("No query has a good item: there is no recall.")
    chart = line_chart(title, curves, from_zero=True, x_title="k →", log_x=True)
    return figure(title, chart, note, [(curve.color, curve.name) for curve in curves])


def _differences(page: _Page) -> str:
    gaps = []
    for system in page.order:
        if t := page.test(page.headline, system):
            text = decimal(t["difference"], sign=True) + page.marks(page.headline, system)
            gaps.append(
                Point(system, page.color(system), t["difference"], low=t["ci_low"], high=t["ci_high"], text=text)
            )
    title = f"Each system minus {page.against}, {label_of(page.headline)}"
    return figure(title, difference_chart(title, gaps), "with 95 % intervals") if gaps else ""


def _objectives(page: _Page) -> str:
    relevance, name = page.headline, label_of(page.headline)
    pairs = (
        ("quality@10", relevance, f"{label_of('quality@10')} →", "Relevance and quality"),
        ("exclusive_goodrate@10", relevance, f"{label_of('exclusive_goodrate@10')} →", "Relevance and what the channels miss"),
        ("exclusive_goodrate@10", "quality@10", f"{label_of('exclusive_goodrate@10')} →", "Quality and what the channels miss"),
    )  # fmt: skip
    plots = [
        _scatter(page, title, {s: page.value(s, x) for s in page.order}, y, x_title, 1, "up and right is better; dotted: the Pareto front")
        for x, y, x_title, title in pairs
    ]  # fmt: skip
    pareto = page.raw["pareto"]
    told = ", ".join(label_of(m) for m in pareto["objectives"])
    best = (
        f"<p>No other system is at least as good in all of {escape(told)} and better in one: "
        f"<b>{escape(', '.join(pareto['front']))}</b>.</p>"
    )
    return (
        f'<h2>Objectives</h2>{best if told else ""}<div class="charts">{"".join(plots)}</div><p class="note">{escape(name)} is relevance; quality is a column of the items; '
        "exclusive goodrate is what a system adds to the channels, so that BM25, which is a channel, has none. Overlap is in the table.</p>"
    )  # fmt: skip


def _slices(page: _Page, path: Path, rival: str) -> str:
    if set(page.raw["slices"]) == {NO_SLICE}:
        return "<h2>Query slices</h2>" + missing(
            "The queries have no slices: a column slice in queries says which ones to look at apart."
        )
    return slice_charts(
        path, (page.headline,), ours=rival, rival=page.against, ordered=page.ordered, color_of=page.color
    )


def _people(page: _Page) -> str:
    return (
        f'<h2>Ask people</h2><p>{escape(page.raw["meta"].get("gsb", ""))}</p>'
        "<p>The sheet opens in any spreadsheet: per query two lists without names, sides swapped at random. Write <code>left</code>, "
        "<code>same</code> or <code>right</code> into the column verdict: which list would you rather have been shown? Rows may stay empty. "
        "Save it as CSV UTF-8 under its name; <code>taoemb benchmark --gsb-score FOLDER</code> then prints good : same : bad with its "
        "interval. Who fills it in should see neither this page nor <code>gsb_key.json</code>.</p>"
    )  # fmt: skip
