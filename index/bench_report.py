"""The page of an index benchmark, and which index it recommends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from taoemb.files import write_json, write_text
from taoemb.index.bench import LIBRARIES, BenchRow
from taoemb.report_charts import BOTTOM, LEFT, RIGHT, TOP, WIDTH, compact, decimal, figure, html_page, log_ticks, svg

_CSS = """.num{fill:var(--bg);font-size:9px;font-weight:700;text-anchor:middle}.dot.n{width:17px;height:17px;color:var(--bg);
font-size:10px;font-weight:700;text-align:center;line-height:17px;margin:0}.best td{background:var(--wash);font-weight:600}"""


def recommend(rows: Sequence[BenchRow], min_recall: float = 0.95) -> tuple[BenchRow | None, str]:
    """The row with the lowest single-query latency (p50) whose recall@k reaches ``min_recall``, and a sentence why.

    Equally fast rows: the smaller index. None where no row reaches the recall. Raises ValueError without rows or for a
    recall that is not in (0, 1].
    """
    if not rows:
        raise ValueError("there are no rows to choose from")
    if not 0 < min_recall <= 1:
        raise ValueError(f"min_recall={min_recall}: give more than 0 and at most 1")
    wanted = f"recall@{rows[0].k} of at least {decimal(min_recall)}"
    reach = [row for row in rows if row.recall_at_k >= min_recall]
    if not reach:
        best = max(rows, key=lambda row: row.recall_at_k)
        return None, f"No row has a {wanted}; the nearest is {best.name} with {decimal(best.recall_at_k)}."
    best = min(reach, key=lambda row: (row.p50_ms, row.size_mb))
    exact = next((row for row in rows if row.factory == "exact" and row is not best), None)
    beside = f"; exact search takes {exact.p50_ms:.3g} ms" if exact else ""
    if best.factory in LIBRARIES:
        ours = min((row for row in reach if row.factory not in LIBRARIES), key=lambda row: row.p50_ms, default=None)
        beside += f"; taoemb does not build {best.factory}"
        beside += f", of what it builds {ours.name} is fastest with {ours.p50_ms:.3g} ms" if ours else ""
    return best, (
        f"{best.name} answers a single query fastest, in {best.p50_ms:.3g} ms (p50) at recall {decimal(best.recall_at_k)}, "
        f"of the {len(reach)} of {len(rows)} rows with a {wanted}{beside}."
    )


def write_bench(
    rows: Sequence[BenchRow], meta: Mapping[str, Any], folder: str | Path, min_recall: float = 0.95
) -> Path:
    """Write ``bench.json`` and ``bench.html``, a page that loads nothing; returns the page's path.

    ``meta`` is what `describe` gives, or any mapping of names to JSON values (``notes`` is a list of sentences).

    Raises ValueError without rows, as `recommend`, or where a value is no JSON.
    """
    folder = Path(folder)
    best, why = recommend(rows, min_recall)
    value = {
        "kind": "index bench", "format": 1, "meta": dict(meta), "rows": [asdict(row) for row in rows],
        "recommended": {"row": rows.index(best) if best else None, "min_recall": min_recall, "why": why},
    }  # fmt: skip
    write_json(folder / "bench.json", value)
    page = _page(rows, meta, best, why)
    write_text(folder / "bench.html", page)
    return folder / "bench.html"


def _page(rows: Sequence[BenchRow], meta: Mapping[str, Any], best: BenchRow | None, why: str) -> str:
    numbers = {factory: i for i, factory in enumerate(dict.fromkeys(row.factory for row in rows), start=1)}
    keys = [(_color(number), f"{number} {factory}") for factory, number in numbers.items()]
    k = rows[0].k
    facts = "".join(
        f"<div><dt>{escape(str(name))}</dt><dd>{escape(f'{v:,}' if isinstance(v, int) else str(v))}</dd></div>"
        for name, v in meta.items()
        if name != "notes"
    )
    charts = [
        figure(
            f"Recall and {what}",
            _scatter(rows, numbers, values, f"recall@{k}", title),
            f"{note}; both axes are logarithmic, recall in its misses",
            keys,
        )
        for what, values, title, note in (
            ("speed", [row.queries_per_second for row in rows], "queries/s", "in batches; up and right is better"),
            ("memory", [row.size_mb for row in rows], "MB", "serialised index; down and right is better"),
        )
    ]
    body = "\n".join([
        "<h1>Index benchmark</h1>",
        f'<p class="verdict {"lead" if best else "behind"}">{escape(why)}</p>',
        f'<dl class="facts">{facts}</dl>',
        f'<div class="charts">{"".join(charts)}</div>',
        f'<div class="scroll">{_table(rows, numbers, best)}</div>',
        *(f'<p class="note">{escape(str(note))}</p>' for note in meta.get("notes", ())),
    ])  # fmt: skip
    return html_page("Index benchmark", body, _CSS)


def _color(number: int) -> int:
    return number % 10


def _table(rows: Sequence[BenchRow], numbers: Mapping[str, int], best: BenchRow | None) -> str:
    titles = ("index", "search", f"recall@{rows[0].k}", "recall@100", "queries/s", "p50 ms", "p99 ms", "build s", "MB",
              "refresh 1 % s")  # fmt: skip
    lines = []
    for row in rows:
        number = numbers[row.factory]
        cells = (
            f'<span class="dot n c{_color(number)}">{number}</span> {escape(row.factory)}',
            escape(", ".join(f"{key} {value}" for key, value in row.setting.items()) or "–"),
            decimal(row.recall_at_k), decimal(_known(row.recall_at_100)), f"{row.queries_per_second:,.0f}",
            *(f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in
              (row.p50_ms, row.p99_ms, row.build_seconds, row.size_mb)),
            "–" if row.refresh_seconds is None else f"{row.refresh_seconds:.2g}",
        )  # fmt: skip
        kind = ' class="best"' if row is best else ""
        lines.append(f"<tr{kind}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def _scatter(
    rows: Sequence[BenchRow], numbers: Mapping[str, int], values: Sequence[float], x_title: str, y_title: str
) -> str:
    """Recall to the right, ``values`` upwards; a numbered mark per row, an index's rows joined by a line.

    Both on log scales, recall by its misses: what matters lies between .9 and 1. From .9995 on it is drawn as 1.
    """
    height, bottom = 270, 270 - BOTTOM
    left, right = _misses(min(0.9, min(row.recall_at_k for row in rows))) - 0.1, _misses(1.0)
    floor, ceiling = math.log10(min(values)) - 0.12, math.log10(max(values)) + 0.2

    def place_x(recall: float) -> float:
        return LEFT + (_misses(recall) - left) / (right - left) * (WIDTH - LEFT - RIGHT - 12)

    def place_y(value: float) -> float:
        return bottom - (math.log10(value) - floor) / (ceiling - floor) * (bottom - TOP)

    parts = []
    for value in log_ticks(10**floor, 10**ceiling):
        y = place_y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="end" x="{LEFT - 5}" y="{y + 3.5:.1f}">{compact(value)}</text>')
    for value in (0.2, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0):
        if _misses(value) > left:
            parts.append(f'<path class="grid" d="M{place_x(value):.1f} {bottom}v3"/>')
            parts.append(f'<text class="mid" x="{place_x(value):.1f}" y="{bottom + 15}">{compact(value)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text x="{LEFT + 4}" y="{TOP + 8}">{escape(y_title)} over {escape(x_title)}</text>')
    for factory, number in numbers.items():
        at = [
            (place_x(r.recall_at_k), place_y(v), r) for r, v in zip(rows, values, strict=True) if r.factory == factory
        ]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in at)
        marks = "".join(
            f'<circle class="solid" cx="{x:.1f}" cy="{y:.1f}" r="6.5"><title>{escape(row.name)}</title></circle>'
            f'<text class="num" x="{x:.1f}" y="{y + 3:.1f}">{number}</text>'
            for x, y, row in at
        )
        parts.append(f'<g class="c{_color(number)}"><path class="line" d="M{line}"/>{marks}</g>')
    return svg(f"{y_title} over {x_title}: {', '.join(numbers)}", height, parts)


def _misses(recall: float) -> float:
    return -math.log10(max(1 - recall, 5e-4))
