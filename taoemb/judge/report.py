"""Judge evaluations as a table for the terminal and as one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from taoemb.files import write_json, write_text
from taoemb.judge.adversarial import Attack
from taoemb.judge.evaluation import BINS, LOW_MASS, Bin, Interval, JudgeEvaluation, Measures
from taoemb.report_charts import Frame, Point, aligned, bar_chart, decimal, figure, html_page, missing
from taoemb.report_details import Metric

METRICS = {  # in the order of the table
    "macro_f1": Metric("Macro-F1", 1, "Mean of the F1s of the labels; a label that neither the data nor the judge uses is left out."),
    "accuracy": Metric("Accuracy", 1, "Share of the pairs that got their label; an abstention is wrong."),
    "good_f1": Metric("Good-F1", 1, "F1 of good against the rest."),
    "tier_accuracy": Metric("Tier accuracy", 1, "Share of the pairs on the right page tier, read off the probabilities by CumPT."),
    "auc": Metric("AUC", 1, "Chance that a good pair scores higher than a bad one, over all pairs that got a score."),
    "auc_per_query": Metric("AUC per query", 1, "The same for the best label against the worst within a query, mean over queries."),
    "kappa": Metric("Kappa", 1, "Quadratic weighted kappa: agreement beyond chance, far misses count more."),
    "ece": Metric("ECE", -1, f"Mean gap between how sure the judge is and how often it is right, {BINS} bins."),
    "brier": Metric("Brier", -1, "Squared distance between probabilities and label, 0 to 2."),
    "log_loss": Metric("Log loss", -1, "Mean of −ln of the true label's probability."),
    "abstained": Metric("Abstained", -1, "Share of the pairs without an answer: wrong in F1, accuracy and tier, left out elsewhere."),
    "label_mass": Metric("Label mass", 1, "Probability that a language model gave to the labels among all that it could write, mean."),
    "low_label_mass": Metric("Low label mass", -1, f"Share of the pairs with a label mass below {decimal(LOW_MASS, 1)}."),
}  # fmt: skip
SLICE_METRICS = ("macro_f1", "accuracy", "good_f1", "auc", "auc_per_query", "kappa", "ece")
ATTACKS = {
    "keyword_stuffing": "keyword stuffing: the title of a bad item repeats the query",
    "order": "order: the title of a bad item orders the judge to give the best label",
    "flipped_negation": "flipped negation: the query now asks for what it ruled out, the item had the best label",
}
MAX_SLICES = 12
NO_BREAK = "\N{NON-BREAKING HYPHEN}"
_NEVER_MOVED = "no score changed: it does not read what was changed"
_CSS = """.heat{table-layout:fixed}.heat td,.heat th{text-align:center;padding:6px 2px;border:0;vertical-align:middle}
.heat th{font-size:11px;font-weight:400;overflow-wrap:anywhere}.heat th:first-child{text-align:right;padding-right:6px}
.heat td{background:rgb(31 122 190 / var(--a))}.heat .own{outline:1.5px solid var(--soft);outline-offset:-2px}
td small{display:block;color:var(--soft);font-size:11.5px;white-space:nowrap}td:first-child{white-space:nowrap}
.text td:nth-child(2),.text th:nth-child(2){text-align:left}.text td{border-bottom:0;padding:4px 8px}
.text .first td{border-top:1px solid var(--line)}svg{overflow:visible}main>h3{font-size:15px;margin-top:26px}
.scroll td:first-child{min-width:150px;overflow-wrap:anywhere;white-space:normal}"""


# -------------------------------------------------------------------------------------------------------- the terminal


def judge_text(evaluation: JudgeEvaluation) -> str:
    """One evaluation as text: metrics with their intervals, F1 of each label, slices, attacks, generated text."""
    overall = evaluation.overall
    lines = [f"Judge {evaluation.judge}, scheme {evaluation.scheme.name}: {_size(overall)}"]
    if overall.intervals:
        lines[0] += f"; in brackets 95 % over queries, {evaluation.bootstrap:,} draws"
    names = [name for name in (*METRICS, *(f"f1/{name}" for name in evaluation.scheme.names)) if name in overall.values]
    lines += ["", *aligned([(_label(n), decimal(overall.values[n]), _range(overall.intervals.get(n))) for n in names])]
    if evaluation.slices:
        head = ("slice", "pairs", *(_label(name) for name in SLICE_METRICS))
        rows = [
            (name, f"{m.pairs:,}", *(decimal(m.values[x]) for x in SLICE_METRICS))
            for name, m in evaluation.slices.items()
        ]
        lines += ["", *aligned([head, *rows])]
    if evaluation.attacks:
        head = ("attack", "pairs", "score change", "label rose", "fooled", "")
        lines += ["", *aligned([head, *(_attack_cells(one, one.kind) for one in evaluation.attacks)])]
    if evaluation.generated:
        lines += ["", *aligned([(_label(name), decimal(value)) for name, value in evaluation.generated.items()])]
    return "\n".join(lines)


def compare_text(evaluations: Sequence[JudgeEvaluation]) -> str:
    """Several judges on the same pairs, a column each; raises ValueError as `write_judge_report`."""
    _check(evaluations)
    names = _metrics(evaluations)
    rows = [
        (_label(n), *(f"{decimal(one.values.get(n, math.nan))} {_range(one.overall.intervals.get(n))}" for one in evaluations))
        for n in names
    ]  # fmt: skip
    return "\n".join(aligned([("", *(one.judge for one in evaluations)), *rows]))


# ------------------------------------------------------------------------------------------------------------ the page


def write_judge_report(
    evaluations: Sequence[JudgeEvaluation], folder: str | Path, meta: Mapping[str, Any] | None = None
) -> Path:
    """Write ``judge.json`` and ``judge.html``, a page that loads nothing; returns the page's path.

    ``meta`` is anything worth knowing about the run (name -> JSON value): what the labels are, which catalog and split.

    Raises ValueError without evaluations, when two judges have the same name, or when they judged different pairs.
    """
    _check(evaluations)
    folder, facts = Path(folder), dict(meta or {})
    judges = [one.to_json() for one in evaluations]
    write_json(folder / "judge.json", {"kind": "judge evaluation", "format": 1, "meta": facts, "judges": judges})
    page = _page(evaluations, facts)
    write_text(folder / "judge.html", page)
    return folder / "judge.html"


def _check(evaluations: Sequence[JudgeEvaluation]) -> None:
    if not evaluations:
        raise ValueError("there is no evaluation to report; give at least one")
    names = [one.judge for one in evaluations]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two judges are called {twice!r}; rename one: dataclasses.replace(evaluation, judge='...')")
    other = [one.judge for one in evaluations if one.data != evaluations[0].data]
    if other:
        raise ValueError(f"judges {names[0]!r} and {other[0]!r} judged different pairs; evaluate both on the same ones")


def _page(evaluations: Sequence[JudgeEvaluation], meta: Mapping[str, Any]) -> str:
    overall = evaluations[0].overall
    known = {"Pairs": overall.pairs, "Queries": overall.queries, "Judges": len(evaluations),
             "Labels": ", ".join(dict.fromkeys(one.scheme.name for one in evaluations)),
             "Draws for intervals": evaluations[0].bootstrap}  # fmt: skip
    facts = "".join(
        f"<div><dt>{escape(str(name))}</dt><dd>{escape(f'{v:,}' if isinstance(v, int) else str(v))}</dd></div>"
        for name, v in {**known, **meta}.items()
    )
    body = "\n".join([
        "<h1>Judge evaluation</h1>",
        f'<p class="verdict level">{escape(_verdict(evaluations))}</p><dl class="facts">{facts}</dl>',
        _overall(evaluations),
        "<h2>Labels and confidence</h2>",
        _note("F1 of each label with its 95 % interval; open where neither the data nor the judge uses the label."),
        _note("Reliability: how often the judge is right over how sure it is. Below the diagonal it is surer than it should be. The "
              "larger a dot, the more pairs."),
        _note("Confusion: true label in rows, the judge's in columns; the upper number, and the colour, is the share of the row."),
        *(_charts(one, _color(place)) for place, one in enumerate(evaluations)),
        _slices(evaluations), _attacks(evaluations), _generated(evaluations), _glossary(evaluations),
    ])  # fmt: skip
    return html_page("Judge evaluation", body, _CSS)


def _verdict(evaluations: Sequence[JudgeEvaluation]) -> str:
    def told(one: JudgeEvaluation) -> str:
        bounds = _range(one.overall.intervals.get("macro_f1"))
        return f"{one.judge} with {decimal(one.values['macro_f1'])}" + (f" {bounds}" if bounds else "")

    ordered = sorted(evaluations, key=lambda one: -one.values["macro_f1"])
    if len(ordered) == 1:
        return f"Macro-F1: {told(ordered[0])}."
    low, high = (
        one.overall.intervals.get("macro_f1", (math.nan,) * 2)[i] for one, i in zip(ordered, (0, 1), strict=False)
    )
    apart = (
        "" if math.isnan(low + high) else "; their intervals are apart" if low > high else "; their intervals overlap"
    )
    return f"Highest Macro-F1: {told(ordered[0])}, then {told(ordered[1])}{apart}."


def _overall(evaluations: Sequence[JudgeEvaluation]) -> str:
    names = _metrics(evaluations)
    best = {n: _best([one.values.get(n, math.nan) for one in evaluations], METRICS[n].direction) for n in names}
    rows = [
        [f'<span class="dot c{_color(i)}"></span>{escape(one.judge)}', *(_cell(one.overall, n, best[n]) for n in names)]
        for i, one in enumerate(evaluations)
    ]
    arrow = {1: "\N{NO-BREAK SPACE}↑", -1: "\N{NO-BREAK SPACE}↓"}
    head = ["Judge", *(_label(name) + arrow[METRICS[name].direction] for name in names)]
    several = "Bold: the best of a column. " if len(evaluations) > 1 else ""
    note = _note(f"{several}Small: 95 % bootstrap interval over queries. ↑ higher is better, ↓ lower is better.")
    return f"<h2>Metrics</h2>{_table(head, rows)}{note}"


def _charts(one: JudgeEvaluation, color: int) -> str:
    """F1 of the labels, reliability and confusion of one judge."""
    points = [
        Point(name, color, value, low=low, high=high, text=decimal(value))
        for name, value in reversed(one.f1.items())
        for low, high in [one.overall.intervals.get(f"f1/{name}", (math.nan, math.nan))]
    ]
    f1 = figure("F1 of each label", bar_chart(f"F1 of each label, {one.judge}", points, 1.0),
                f"mean {decimal(one.values['macro_f1'])}")  # fmt: skip
    name = f'<span class="dot c{color}"></span>{escape(one.judge)}'
    return f'<h3>{name}</h3><div class="charts">{f1}{_reliability(one, color)}{_confusion(one)}</div>'


def _reliability(one: JudgeEvaluation, color: int) -> str:
    shown = [b for b in one.reliability if b.count]
    if not shown:
        return figure("Reliability", missing("The judge abstained on every pair."))
    frame = Frame((0.0, 1.0), (0.0, 1.0), 210, "sure →", "right ↑")
    ends = [f"{frame.place_x(value):.1f} {frame.place_y(value):.1f}" for value in (0.0, 1.0)]
    frame.parts.append(f'<path class="mark" d="M{ends[0]}L{ends[1]}"/>')
    x, y = (np.array([getattr(b, axis) for b in shown]) for axis in ("confidence", "accuracy"))
    dots = "".join(_dot(frame, b, sum(b.count for b in shown)) for b in shown)
    frame.parts.append(f'<g class="c{color}"><path class="line" d="{frame.path(x, y)}"/>{dots}</g>')
    return figure(
        "Reliability", frame.svg(f"Accuracy over confidence, {one.judge}"), f"ECE {decimal(one.values['ece'])}"
    )


def _dot(frame: Frame, one: Bin, total: int) -> str:
    radius = 2.5 + 9 * math.sqrt(one.count / total)
    tip = f"{one.count:,} pairs: sure {decimal(one.confidence)}, right {decimal(one.accuracy)}"
    place = f'cx="{frame.place_x(one.confidence):.1f}" cy="{frame.place_y(one.accuracy):.1f}"'
    return f'<circle class="fill" {place} r="{radius:.1f}"><title>{tip}</title></circle>'


def _confusion(one: JudgeEvaluation) -> str:
    abstains = one.confusion[:, -1].any()
    counts = one.confusion if abstains else one.confusion[:, :-1]
    head = "".join(
        f'<th scope="col">{escape(n)}</th>' for n in (*one.scheme.names, *(["no answer"] if abstains else []))
    )
    rows = []
    for label, (name, row) in enumerate(zip(one.scheme.names, counts.tolist(), strict=True)):
        total = sum(row)
        cells = "".join(
            f'<td{own} style="--a:{0.6 * share:.2f}">{decimal(share, 2) if total else "–"}<small>{count:,}</small></td>'
            for given, count in enumerate(row)
            for share in [count / max(total, 1)]
            for own in [' class="own"' if given == label else ""]
        )
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    table = f'<table class="heat"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return figure("Confusion", table, f"{one.overall.pairs:,} pairs, below each share how many")


def _slices(evaluations: Sequence[JudgeEvaluation]) -> str:
    sizes = evaluations[0].slices
    chosen = sorted(sizes, key=lambda name: (-sizes[name].pairs, name))[:MAX_SLICES]
    if not chosen:
        return "<h2>Slices</h2>" + missing("All pairs are in one slice.")
    rows, first = [], []
    for name in chosen:
        told = [(one.judge, one.slices[name]) for one in evaluations if name in one.slices]
        best = {x: _best([m.values[x] for _, m in told], METRICS[x].direction) for x in SLICE_METRICS}
        for place, (judge, m) in enumerate(told):
            where = f"{escape(name)}<small>{escape(_size(m))}</small>" if not place else ""
            rows.append([where, escape(judge), *(_cell(m, x, best[x]) for x in SLICE_METRICS)])
            first.append(not place)
    left = len(sizes) - len(chosen)
    more = _note(f"The {left} smallest slices are left out.") if left else ""
    table = _table(["Slice", "Judge", *map(_label, SLICE_METRICS)], rows, "text", first.__getitem__)
    return f"<h2>Slices</h2>{table}{more}"


def _attacks(evaluations: Sequence[JudgeEvaluation]) -> str:
    found = {kind: [(one.judge, a) for one in evaluations for a in one.attacks if a.kind == kind]
             for kind in dict.fromkeys(a.kind for one in evaluations for a in one.attacks)}  # fmt: skip
    if not found:
        return "<h2>Attacks</h2>" + missing("The judges were not attacked.")
    rows, first = [], []
    for kind, told in found.items():
        for place, (judge, one) in enumerate(told):
            cells = _attack_cells(one, kind)
            named = [cells[1], *(f"{cell}<small>{_range(one.intervals.get(name)) or '&nbsp;'}</small>"
                                 for cell, name in zip(cells[2:5], ("score_change", "rose", "fooled"), strict=True)), escape(cells[5])]  # fmt: skip
            rows.append([f"<b>{escape(kind.replace('_', ' '))}</b>" if not place else "", escape(judge), *named])
            first.append(not place)
    note = "".join(_note(ATTACKS[kind] + ".") for kind in found if kind in ATTACKS)
    head = ["Attack", "Judge", "pairs", "score change", "label rose", "fooled", ""]
    what = _note(
        "Fooled: the bad item became good; for the flipped negation, the pair has the best label all the same. No good judge "
        "raises a score here."
    )
    return f"<h2>Attacks</h2>{note}{what}{_table(head, rows, 'text', first.__getitem__)}"


def _attack_cells(one: Attack, name: str) -> tuple[str, ...]:
    note = "no such pair was answered" if not one.pairs else _NEVER_MOVED if not one.moved else ""
    return (name, f"{one.pairs:,}", decimal(one.score_change, sign=True), decimal(one.rose), decimal(one.fooled), note)


def _generated(evaluations: Sequence[JudgeEvaluation]) -> str:
    names = list(dict.fromkeys(name for one in evaluations for name in one.generated))
    if not names:
        return ""
    rows = [[escape(one.judge), *(decimal(one.generated.get(name, math.nan)) for name in names)]
            for one in evaluations if one.generated]  # fmt: skip
    note = _note(
        "Format failure: no verdicts or label could be read. Of the rest: step accuracy, both verdicts are right; rule adherence, "
        "the label follows from the judge's own verdicts; discriminative hallucination, the verdicts are right and the label is wrong."
    )
    return f"<h2>Written reasons</h2>{_table(['Judge', *map(_label, names)], rows)}{note}"


def _glossary(evaluations: Sequence[JudgeEvaluation]) -> str:
    rows = "".join(f"<dt>{METRICS[n].label}</dt><dd>{escape(METRICS[n].meaning)}</dd>" for n in _metrics(evaluations))
    return (
        f'<h2>Reference</h2><details><summary>What the metrics mean</summary><dl class="glossary">{rows}</dl></details>'
    )


# --------------------------------------------------------------------------------------------------------- small parts


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], css: str = "", first: Callable[[int], bool] = lambda row: False
) -> str:
    """A table of ready HTML cells; ``first`` says which rows begin a group."""
    titles = "".join(f'<th scope="col">{escape(title).replace("-", NO_BREAK)}</th>' for title in head)
    lines = "".join(
        ('<tr class="first">' if first(i) else "<tr>") + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
        for i, row in enumerate(rows)
    )
    return (
        f'<div class="scroll"><table class="{css}"><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _cell(measures: Measures, name: str, best: str) -> str:
    text, bounds = decimal(measures.values.get(name, math.nan)), _range(measures.intervals.get(name))
    return (f"<b>{text}</b>" if text == best else text) + (f"<small>{bounds}</small>" if bounds else "")


def _best(values: Sequence[float], direction: int) -> str:
    """The best of several values as text; empty where there is nothing to choose from."""
    known = [value for value in values if not math.isnan(value)]
    return decimal(max(known) if direction > 0 else min(known)) if len(known) > 1 else ""


def _metrics(evaluations: Sequence[JudgeEvaluation]) -> list[str]:
    return [name for name in METRICS if any(name in one.values for one in evaluations)]


def _label(name: str) -> str:
    if name in METRICS:
        return METRICS[name].label
    return f"F1 {name[3:]}" if name.startswith("f1/") else name.replace("_", " ")


def _range(bounds: Interval | None) -> str:
    return "" if bounds is None or math.isnan(bounds[0]) else f"[{decimal(bounds[0])}, {decimal(bounds[1])}]"


def _size(measures: Measures) -> str:
    return f"{measures.pairs:,} pairs, {measures.queries:,} queries"


def _color(place: int) -> int:
    return (3, 5, 4, 7, 6, 9, 1, 8, 2, 0)[place % 10]


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'
