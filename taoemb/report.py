"""The run report: one self-contained HTML page about a run folder, made to be read by a relevance engineer.

It only reads what evaluation and training wrote, says what is missing, and needs neither network nor script. The same
files give the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from taoemb.files import write_text
from taoemb.report_charts import (
    BASELINE,
    CONTROL,
    OURS,
    Point,
    color_of,
    decimal,
    difference_chart,
    duration,
    figure,
    html_page,
    metric_text,
    missing,
    number,
    ordered_systems,
    p_text,
    scatter_chart,
    stars,
)  # fmt: skip
from taoemb.report_details import (
    METRICS,
    base_of,
    config_text,
    direction_of,
    examples,
    glossary,
    label_of,
    read_json,
    read_logs,
    slice_charts,
    training_curves,
)


def write_report(run_dir: str | Path) -> Path:
    """Write ``RUN/report.html`` from what lies in the run folder, and return its path.

    ``metrics.json`` must be there. ``per_query.parquet``, ``logs/*.jsonl``, ``examples.json`` and ``config.yaml`` may
    be absent, the page then says so.

    Raises:
        FileNotFoundError: the folder holds no ``metrics.json``.
        ValueError: ``metrics.json`` or ``examples.json`` is not what evaluation writes.
    """
    run_dir = Path(run_dir)
    results = _Results(_read_metrics(run_dir / "metrics.json"))
    title = "Retrieval-GRPO run report" if OURS in results.systems else "taoemb run report"
    body = "\n".join(
        [
            _header(results, title),
            _results_table(results),
            slice_charts(
                run_dir / "per_query.parquet",
                (results.headline, *results.metrics),
                ours=OURS,
                rival=results.rivals[0] if results.rivals else "",
                ordered=ordered_systems,
                color_of=color_of,
            ),
            training_curves(*read_logs(run_dir / "logs")),
            "<h2>Result lists, before and after</h2>" + examples(run_dir / "examples.json"),
            "<h2>Reference</h2>" + glossary(results.metrics),
            config_text(run_dir / "config.yaml"),
        ]
    )
    write_text(run_dir / "report.html", html_page(title, body))
    return run_dir / "report.html"


# ---------------------------------------------------------------------------------------------------------- reading


class _Results:
    """``metrics.json`` with its systems and metrics in reading order."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.meta: Mapping[str, Any] = raw.get("meta") or {}
        self.systems = ordered_systems(raw["systems"])
        names = {metric for row in raw["systems"].values() for metric in row}
        known = list(METRICS)
        places = {name: known.index(base_of(name)) if base_of(name) in METRICS else len(known) for name in names}
        self.metrics = sorted(names, key=lambda name: (places[name], name))
        self.pooled = any(base_of(name) == "condensed_ndcg" for name in names)
        """Labels are incomplete, so that the plain figures favour the system that filled the pool."""
        wanted = ("condensed_ndcg@10", "ndcg@10", *self.metrics)
        self.headline = next((name for name in wanted if name in names), "")

    def value(self, system: str, metric: str) -> float:
        return number(self.raw["systems"].get(system, {}).get(metric))

    def test(self, metric: str, system: str) -> tuple[float, float, float, float]:
        """Retrieval-GRPO minus a system: difference, ends of its interval, p; NaN where not tested."""
        found = ((self.raw.get("tests") or {}).get(metric) or {}).get(system) or {}
        difference, low, high, p = (number(found.get(key)) for key in ("difference", "ci_low", "ci_high", "p_value"))
        if not np.isfinite(difference):
            difference = self.value(OURS, metric) - self.value(system, metric)
        return difference, low, high, p

    @property
    def rivals(self) -> list[str]:
        """The other systems that have the headline metric, best first."""
        others = [s for s in self.systems if s != OURS and np.isfinite(self.value(s, self.headline))]
        return sorted(others, key=lambda s: -self.value(s, self.headline))


def _read_metrics(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: run the evaluation first (`taoemb train` ends with it)")
    raw = read_json(path)
    systems = raw.get("systems") if isinstance(raw, dict) else None
    if not isinstance(systems, dict) or not systems or not all(isinstance(row, dict) for row in systems.values()):
        raise ValueError(f'{path} has no {{"systems": {{system: {{metric: value}}}}}}; run the evaluation again')
    return dict(raw)


# ----------------------------------------------------------------------------------------------------------- header


def _header(results: _Results, title: str) -> str:
    meta, seconds = results.meta, results.raw.get("seconds") or {}
    kind, verdict = _verdict(results)
    shown = {"data": "Catalog", "items": "Items", "train_queries": "Training queries", "test_queries": "Test queries",
             "judge": "Reward judge", "evaluated_by": "Evaluated by", "model": "Start model", "policy": "Policy",
             "seed": "Seed", "version": "taoemb version"}  # fmt: skip
    rest = {key: key.replace("_", " ").capitalize() for key in sorted(meta) if key not in shown}
    facts = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(_fact(key, meta.get(key)))}</dd></div>"
        for key, label in (shown | rest).items()
        if key in meta or key in ("items", "test_queries", "judge", "evaluated_by", "version", "seed")
    )
    parts = [f"<h1>{escape(title)}</h1>", f'<div class="verdict {kind}">{escape(verdict)}</div>']
    if results.pooled:
        parts.append(
            '<p class="note">The labels are incomplete, so the verdict is about condensed nDCG (items without a grade '
            "taken out): plain nDCG favours the system whose results were graded.</p>"
        )
    parts += [_evaluator_note(meta), _against(results), f'<dl class="facts">{facts}</dl>']
    spent = {name: number(value) for name, value in seconds.items()}
    if spent:
        longest, total = max(np.nan_to_num(list(spent.values())).max(), 1e-9), np.nansum(list(spent.values()))
        rows = "".join(
            f"<span>{escape(name)}</span><span>{duration(spent[name])}</span>"
            f'<i style="width:{max(0.4, 100 * np.nan_to_num(spent[name]) / longest):.1f}%"></i>'
            for name in (*ordered_systems(spent),)
        )
        parts.append(f'<h3>Wall time per phase, {duration(float(total))} in all</h3><div class="phases">{rows}</div>')
    else:
        parts.append(missing("metrics.json holds no wall times."))
    return "\n".join(parts)


def _fact(key: str, value: object) -> str:
    if value is None or value == "":
        return "not recorded"
    if isinstance(value, int) and not isinstance(value, bool) and key != "seed":
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _verdict(results: _Results) -> tuple[str, str]:
    """Kind (lead, level, behind) and one sentence."""
    name, rivals, ours = label_of(results.headline), results.rivals, results.value(OURS, results.headline)
    if not np.isfinite(ours):
        best = f" Best is {rivals[0]}, {decimal(results.value(rivals[0], results.headline))} {name}." if rivals else ""
        return "level", f"No verdict: {OURS} was not evaluated.{best}"
    if not rivals:
        return "level", f"No verdict: {OURS} was evaluated alone, {decimal(ours)} {name}."
    rival = rivals[0]
    difference, _, _, p = results.test(results.headline, rival)
    gap = f"{decimal(difference, sign=True)} {name}"
    if not np.isfinite(p):
        return "level", f"No verdict: the difference to {rival} is {gap}, but no paired test was recorded."
    if not p < 0.05:
        kind, text = "level", f"{OURS} does not lead: the difference to {rival}, {gap}, is within chance ({p_text(p)})"
    elif difference > 0:
        kind, text = "lead", f"{OURS} leads {rival} by {gap} ({p_text(p)})"
    else:
        kind, text = "behind", f"{OURS} does not lead: it is behind {rival}, {gap} ({p_text(p)})"
    return kind, text + "."


def _against(results: _Results) -> str:
    """A small table: on which metrics Retrieval-GRPO is better or worse than a system beyond chance."""
    rows = []
    for system in dict.fromkeys((*results.rivals[:1], CONTROL, BASELINE)):
        sides: dict[int, list[str]] = {1: [], -1: []}
        for metric in results.metrics:
            difference, _, _, p = results.test(metric, system)
            if p < 0.05 and direction_of(metric):
                side = sides[1 if difference * direction_of(metric) > 0 else -1]
                side.append(f"<span>{escape(label_of(metric))} {decimal(difference, sign=True)}</span>")
        if system in results.rivals:
            better, worse = (", ".join(side) or "–" for side in sides.values())
            rows.append(f"<tr><td>{escape(system)}</td><td>{better}</td><td>{worse}</td></tr>")
    if not rows or not results.raw.get("tests"):
        return ""
    return (
        f'<table class="against"><thead><tr><th scope="col">{OURS} against</th><th scope="col">better on (p &lt; .05)'
        f'</th><th scope="col">worse on (p &lt; .05)</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def _evaluator_note(meta: Mapping[str, Any]) -> str:
    judge, evaluator = str(meta.get("judge") or "").strip(), str(meta.get("evaluated_by") or "").strip()
    if not judge or not evaluator:
        return (
            '<p class="warn"><b>Not recorded who judged.</b> Without the names of the reward judge and of the '
            "evaluator nobody can tell whether they are independent.</p>"
        )
    same = re.search(rf"(?<!\w){re.escape(judge)}(?!\w)", evaluator, re.IGNORECASE)
    labels = re.search(r"\b(humans?|rules?|raters?|annotators?)\b", evaluator, re.IGNORECASE)
    if same and not labels:
        return (
            f'<p class="warn"><b>Warning: the judge that gave the reward also evaluates ({escape(judge)}).</b> Gains '
            "may be nothing but agreement with this judge. Evaluate with another judge or with human grades.</p>"
        )
    if same or judge.lower() == "oracle":
        return (
            '<p class="note">The reward came from the same labels that evaluate: read the gains as an upper bound, for '
            "a judge without errors.</p>"
        )
    return ""


# ---------------------------------------------------------------------------------------------------------- results


def _results_table(results: _Results) -> str:
    metrics, encodings = results.metrics, results.raw.get("item_encodings") or {}
    arrows = {1: "\N{NO-BREAK SPACE}↑", 0: ""}
    head = "".join(
        f'<th scope="col" title="{escape(metric)}">{escape(label_of(metric)).replace("@", "<wbr>@")}'
        f"{arrows[direction_of(metric)]}</th>"
        for metric in metrics
    )
    rows = []
    for system in results.systems:
        cells = "".join(_cell(results, system, metric) for metric in metrics)
        spent = number(encodings.get(system))
        count = f"{spent:,.0f}" if np.isfinite(spent) else "–"
        name = f'<span class="dot c{color_of(system)}"></span>{escape(system)}'
        ours = ' class="ours"' if system == OURS else ""
        rows.append(f"<tr{ours}><td>{name}</td>{cells}<td>{count}</td></tr>")
    points = []
    for system in results.rivals:
        difference, low, high, p = results.test(results.headline, system)
        text = decimal(difference, sign=True) + stars(p)
        points.append(Point(system, color_of(system), difference, low=low, high=high, text=text))
    charts = _tradeoffs(results)
    if points and OURS in results.systems:
        name = f"{OURS} minus each system, {label_of(results.headline)}"
        charts = figure(name, difference_chart(name, points), "with 95 % intervals") + charts
    return (
        '<h2>Results</h2><div class="scroll"><table class="results"><thead><tr><th scope="col">System</th>'
        f'{head}<th scope="col">Item encodings</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        f'<p class="note">Mean over the test queries. Bold: the best of a column. Small: difference to {BASELINE}. '
        f"* p &lt; .05, ** p &lt; .01: {OURS} differs from this system, two-sided paired bootstrap over queries, not "
        "corrected for the number of comparisons, and about new queries, not about new seeds. ↑ higher is better; "
        "without an arrow a metric is neither good nor bad by itself. Item encodings: texts of items that went through "
        "the encoder while this system was trained, the cost of training.</p>"
        f'<div class="charts">{charts}</div>'
    )


def _cell(results: _Results, system: str, metric: str) -> str:
    value, direction = results.value(system, metric), direction_of(metric)
    text = metric_text(value)
    column = [results.value(s, metric) for s in results.systems]
    known = [v for v in column if np.isfinite(v)]
    best = bool(direction and known) and text == metric_text(max(known) if direction > 0 else min(known))
    shown = f"<b>{text}</b>" if best and np.isfinite(value) else text
    if system != OURS:
        difference, low, high, p = results.test(metric, system)
        if stars(p):
            least, middle, most = (decimal(v, sign=True) for v in (low, difference, high))
            tip = f"{OURS} {middle} [{least}, {most}], {p_text(p)}"
            shown += f'<sup title="{escape(tip)}">{stars(p)}</sup>'
    change = value - results.value(BASELINE, metric)
    if system != BASELINE and np.isfinite(change):
        shown += f"<small>{decimal(change, sign=True)}</small>"
    return f"<td>{shown}</td>"


def _tradeoffs(results: _Results) -> str:
    """Quality against relevance, and what a system adds to the other channel."""
    pairs = (
        ("goodrate@10", "quality@10", "Quality against relevance", "top right is better on both", ()),
        ("overlap@10", "exclusive_goodrate@10", "Exclusivity",
         "up: adds more good items that BM25 does not find; bm25 itself is left out", ("bm25",)),
    )  # fmt: skip
    parts = []
    for x, y, title, note, left_out in pairs:
        points = [
            Point(system, color_of(system), results.value(system, x), results.value(system, y))
            for system in results.systems
            if system not in left_out and np.isfinite(results.value(system, x) + results.value(system, y))
        ]
        if points:
            chart = scatter_chart(f"{title}: {x} and {y} per system", points, f"{label_of(x)} →", f"{label_of(y)} ↑")
            parts.append(figure(title, chart, note))
        else:
            parts.append(missing(f"{title}: no system has both {label_of(x)} and {label_of(y)} in metrics.json."))
    return "".join(parts)
