"""The look of the run report: its style sheet, how numbers are written, and small charts as inline SVG.

Drawn by hand instead of with matplotlib, so that colours follow the reader's light or dark scheme, a page stays small
and its bytes depend on the data alone. Every chart is 360 units wide, about one per pixel on a phone and in a grid.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Box: TypeAlias = tuple[float, float, float, float]  # left, top, right, bottom

OURS, BASELINE, CONTROL = "retrieval_grpo", "stage1", "stage1_continued"
SYSTEMS = ("bm25", "untrained", BASELINE, CONTROL, "kl_distill", OURS)
"""Order of the systems that a run may have; the place is also the colour. Others come before ``retrieval_grpo``."""
POLICIES = ("paper", "exact", "mixed", "positive_only")
"""Policies that a run may have as further rows, in the order of the remaining colours."""

WIDTH = 360
LEFT, RIGHT, TOP, BOTTOM = 42, 8, 8, 22
MAX_POINTS = 300
"""Points of a curve that are drawn; longer ones are thinned after smoothing."""


# ---------------------------------------------------------------------------------------------------------- numbers


def number(value: object) -> float:
    """A number as a float; NaN for null, infinity, text and everything else that is no number."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else math.nan  # type: ignore[arg-type]


def decimal(value: float, digits: int = 3, sign: bool = False) -> str:
    """Text of a number with fixed digits: no zero before the point, a real minus sign, an en dash for "not known".

    >>> decimal(0.7421), decimal(-0.0104, sign=True), decimal(1.0), decimal(float("nan"))
    ('.742', '−.010', '1.000', '–')
    """
    if not math.isfinite(value):
        return "–"
    text = f"{abs(value):,.{digits}f}"
    shown = text.removeprefix("0") if digits and text.startswith("0.") else text
    if not text.strip("0.,"):
        return ("±" if sign else "") + shown
    return ("−" if value < 0 else "+" if sign else "") + shown


def compact(value: float) -> str:
    """Short text of a number of any size, for axes and counts.

    >>> compact(0.25), compact(12000.0), compact(1e-5), compact(2.5e6), compact(0.0)
    ('.25', '12k', '1e−5', '2.5M', '0')
    """
    if not math.isfinite(value):
        return "–"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}".replace("-", "−")
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", "−")
    text = f"{value:.4g}"
    return text.replace("0.", ".", 1).replace("-", "−") if abs(value) < 1 and value else text.replace("-", "−")


def duration(seconds: float) -> str:
    """Wall time as a person says it.

    >>> duration(3.21), duration(95), duration(7500)
    ('3.2 s', '1 min 35 s', '2 h 05 min')
    """
    if not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    return f"{whole // 60} min {whole % 60:02} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02} min"


def metric_text(value: float) -> str:
    """A metric's value: three digits, or short where it is large."""
    return decimal(value) if not abs(value) >= 10 else compact(value)


def stars(p: float) -> str:
    """** below .01, * below .05."""
    return "**" if p < 0.01 else "*" if p < 0.05 else ""


def p_text(p: float) -> str:
    """A p-value; below what the number of resamples can tell, no figure.

    >>> p_text(1 / 10_001), p_text(0.0213), p_text(0.5)
    ('p < .0001', 'p = .0213', 'p = .5')
    """
    if p < 0.0001:
        return "p < .0001"
    return "p = " + decimal(p, 4 if p < 0.1 else 2).rstrip("0").rstrip(".")


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a plain-text table: the first column to the left, the others to the right.

    >>> aligned([("", "a"), ("mean", ".5")])
    ['       a', 'mean  .5']
    """
    table = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in table
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------------- common elements


def html_page(title: str, body: str, css: str = "") -> str:
    """A whole page that loads nothing and runs no script."""
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}{css}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # a title may hold half a surrogate pair


def ordered_systems(names: Iterable[str]) -> list[str]:
    """Systems in reading order: what there was, what was trained, other systems, Retrieval-GRPO.

    >>> ordered_systems({"retrieval_grpo", "mine", "stage1", "bm25"})
    ['bm25', 'stage1', 'mine', 'retrieval_grpo']
    """
    given = set(names)
    return [name for name in (*SYSTEMS[:-1], *sorted(given - set(SYSTEMS)), OURS) if name in given]


def color_of(system: str) -> int:
    """Palette index of a system, the same in every chart and every run."""
    known = (*SYSTEMS, *POLICIES)
    return known.index(system) if system in known else len(SYSTEMS) + sum(system.encode()) % len(POLICIES)


def missing(text: str) -> str:
    """A note in the place of what cannot be shown."""
    return f'<p class="missing">{escape(text)}</p>'


def figure(title: str, chart: str, note: str = "", keys: Sequence[tuple[int, str]] = ()) -> str:
    """A chart with its title, a note below it and the names of its colours."""
    below = f"<small>{escape(note)}</small>" if note else ""
    named = "".join(f'<span><span class="dot c{color}"></span>{escape(text)}</span>' for color, text in keys)
    legend = f'<span class="keys">{named}</span>' if named else ""
    return f"<figure><figcaption>{escape(title)}{below}{legend}</figcaption>{chart}</figure>"


# ----------------------------------------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Curve:
    """One system's values over ``x``, NaN where not known; ``color`` is an index into the palette."""

    name: str
    color: int
    x: Floats
    y: Floats

    def smooth(self) -> Floats:
        """Centred running mean over about a twentieth of the curve, of the values that are known."""
        half = len(self.y) // 40
        if not half:
            return self.y
        kernel, known = np.ones(2 * half + 1), np.isfinite(self.y)
        counts = np.convolve(known, kernel, "full")[half:-half]
        sums = np.convolve(np.where(known, self.y, 0.0), kernel, "full")[half:-half]
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


@dataclass(frozen=True)
class Point:
    """A dot of a scatter, or a row of bars or differences with its interval from ``low`` to ``high``."""

    name: str
    color: int
    x: float
    y: float = math.nan
    low: float = math.nan
    high: float = math.nan
    text: str = ""


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers within ``[low, high]``, about ``count`` steps of 1, 2 or 5 times a power of ten.

    >>> ticks(0.13, 0.58)
    [0.2, 0.3, 0.4, 0.5]
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.8)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within ``[low, high]``; the powers alone where these span more than 300.

    >>> log_ticks(0.4, 12)
    [0.5, 1.0, 2.0, 5.0, 10.0]
    """
    steps = (1, 2, 5) if high / low < 300 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]


def log_span(values: Floats, pad: float = 0.06) -> tuple[float, float]:
    """`span` on a logarithmic axis: of positive values."""
    low, high = span(np.log10(values), pad)
    return 10.0**low, 10.0**high


def span(values: Floats, pad: float = 0.06) -> tuple[float, float]:
    """A range that holds the known values with some air; never empty."""
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    air = pad * (high - low) or max(abs(high) * 0.05, 1e-6)
    return low - air, high + air


class Frame:
    """Axes of a chart: maps values to places and keeps what is drawn; with ``log_x`` the horizontal one is logarithmic."""

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        height: int = 170,
        x_title: str = "",
        y_title: str = "",
        *,
        log_x: bool = False,
    ) -> None:
        self.x, self.y, self.height, self.log_x = x, y, height, log_x
        self.parts: list[str] = []
        bottom = height - BOTTOM
        for value in ticks(*y):
            place = self.place_y(value)
            self.parts.append(f'<path class="grid" d="M{LEFT} {place:.1f}H{WIDTH - RIGHT}"/>')
            self.parts.append(f'<text class="end" x="{LEFT - 5}" y="{place + 3.5:.1f}">{compact(value)}</text>')
        room = WIDTH - RIGHT - 6.2 * len(x_title) - 16  # the title stands at the end of the row of ticks
        for value in log_ticks(*x) if log_x else ticks(*x):
            place = self.place_x(value)
            if place < room or not x_title:
                self.parts.append(f'<path class="grid" d="M{place:.1f} {bottom}v3"/>')
                self.parts.append(f'<text class="mid" x="{place:.1f}" y="{bottom + 15}">{compact(value)}</text>')
        self.parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>')
        if y_title:
            self.parts.append(f'<text x="{LEFT + 4}" y="{TOP + 8}">{escape(y_title)}</text>')
        if x_title:
            self.parts.append(f'<text class="end" x="{WIDTH - RIGHT}" y="{bottom + 15}">{escape(x_title)}</text>')

    def place_x(self, value: float) -> float:
        """Horizontal place of a value; beyond the frame it sits on the edge."""
        value, low, high = (math.log10(v) if self.log_x else v for v in (value, *self.x))
        share = (value - low) / (high - low)
        return LEFT + min(1.0, max(0.0, share)) * (WIDTH - LEFT - RIGHT)

    def place_y(self, value: float) -> float:
        """Vertical place of a value; beyond the frame it sits on the edge."""
        share = (value - self.y[0]) / (self.y[1] - self.y[0])
        return self.height - BOTTOM - min(1.0, max(0.0, share)) * (self.height - TOP - BOTTOM)

    def path(self, x: Floats, y: Floats, *, dots: bool = False) -> str:
        """Path data through the known points, interrupted where one is not known, or a dot on each."""
        parts, pen = [], "M"
        for a, b in zip(x.tolist(), y.tolist(), strict=True):
            if math.isfinite(b):
                parts.append(f"{pen}{self.place_x(a):.1f} {self.place_y(b):.1f}" + ("h0" if dots else ""))
                pen = "M" if dots else "L"
            else:
                pen = "M"
        return "".join(parts)

    def svg(self, label: str) -> str:
        """The chart; ``label`` is read out to those who cannot see it."""
        return svg(label, self.height, self.parts)


def svg(label: str, height: int, parts: Sequence[str]) -> str:
    """An SVG element as wide as its place."""
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def line_chart(
    label: str,
    curves: Sequence[Curve],
    *,
    from_zero: bool = False,
    marks: Sequence[float] = (),
    x_title: str = "step",
    log_x: bool = False,
) -> str:
    """Raw values as light points and their running mean as a line; ``marks`` are vertical lines."""
    everything = np.concatenate([curve.y[np.isfinite(curve.y)] for curve in curves])
    low, high = span(np.percentile(everything, [0.5, 99.5]))  # a few outliers must not flatten the rest
    limits = (0.0, max(high, 0.01)) if from_zero else (low, high)
    x = np.concatenate([curve.x for curve in curves])
    right = float(x.max())
    frame = Frame((float(x.min()), right if right > x.min() else right + 1), limits, x_title=x_title, log_x=log_x)
    for mark in marks:
        frame.parts.append(f'<path class="mark" d="M{frame.place_x(mark):.1f} {TOP}V{frame.height - BOTTOM}"/>')
    for curve in curves:
        thin = slice(None, None, max(1, math.ceil(len(curve.y) / MAX_POINTS)))
        smooth = curve.smooth()
        frame.parts.append(
            f'<g class="c{curve.color}"><path class="dots" d="{frame.path(curve.x[thin], curve.y[thin], dots=True)}"/>'
            f'<path class="line" d="{frame.path(curve.x[thin], smooth[thin])}"/></g>'
        )
    return frame.svg(f"{label} over {x_title}s: " + ", ".join(curve.name for curve in curves))


def share_chart(label: str, x: Floats, parts: Sequence[tuple[int, Floats]], bins: int = 44) -> str:
    """Stacked shares over steps: the sum of each part (palette index, values) within bins, as a share of all parts.

    A part that comes only now and then makes the bins wide enough to hold it twice.
    """
    rarest = min(int((np.nan_to_num(y) > 0).sum()) for _, y in parts)
    bins = min(len(x), bins, max(8, rarest // 2))
    edges = np.linspace(0, len(x), bins + 1).round().astype(int)
    sums = np.array([[np.nansum(y[a:b]) for a, b in itertools.pairwise(edges)] for _, y in parts])
    shares = sums / np.maximum(sums.sum(axis=0), 1e-12)
    frame = Frame((float(x.min()), max(float(x.max()), float(x.min()) + 1)), (0.0, 1.0), x_title="step")
    width = (WIDTH - LEFT - RIGHT) / bins
    below = np.zeros(bins)
    for (color, _), row in zip(parts, shares, strict=True):
        data = ""
        for b, share in enumerate(row.tolist()):
            top, bottom = frame.place_y(below[b] + share), frame.place_y(below[b])
            if bottom - top > 0.05:
                data += f"M{LEFT + b * width:.1f} {bottom:.1f}h{width - 0.6:.1f}V{top:.1f}h{0.6 - width:.1f}z"
        frame.parts.append(f'<path class="fill c{color}" d="{data}"/>')
        below += row
    return frame.svg(label)


# ------------------------------------------------------------------------------------------------- rows and scatters


def _row_label(point: Point, y: float) -> str:
    name = point.name if len(point.name) <= 16 else point.name[:15] + "…"
    return f'<text class="end ink" x="116" y="{y + 4:.1f}">{escape(name)}</text>'


def bar_chart(label: str, points: Sequence[Point], limit: float) -> str:
    """One horizontal bar from 0 to ``x`` per row, with its interval; ``limit`` is the right end of the axis."""
    parts, scale = [], (WIDTH - 124 - 44) / limit
    for row, point in enumerate(points):
        y = 10 + row * 20
        parts.append(_row_label(point, y))
        if not math.isfinite(point.x):
            parts.append(f'<text x="128" y="{y + 4}">–</text>')
            continue
        width = f"{point.x * scale:.1f}"
        parts.append(f'<rect class="fill c{point.color}" x="124" y="{y - 6}" width="{width}" height="12"/>')
        if math.isfinite(point.low):
            low, high = 124 + point.low * scale, 124 + point.high * scale
            ends = f"M{low:.1f} {y - 3}v6M{high:.1f} {y - 3}v6"
            parts.append(f'<path class="interval" d="M{low:.1f} {y}H{high:.1f}{ends}"/>')
        parts.append(f'<text class="end ink" x="{WIDTH - 4}" y="{y + 4}">{escape(point.text)}</text>')
    parts.append(f'<path class="axis" d="M124 2V{len(points) * 20}"/>')
    return svg(label, len(points) * 20 + 4, parts)


def difference_chart(label: str, points: Sequence[Point]) -> str:
    """One dot with its interval per row, around a line at 0."""
    reach = np.array([v for p in points for v in (p.x, p.low, p.high)] + [0.0])
    low, high = span(reach)
    scale, height = (WIDTH - 124 - 70) / (high - low), len(points) * 22
    zero = 124 - low * scale
    parts = [f'<path class="axis" d="M{zero:.1f} 2V{height + 2}"/>']
    parts.append(f'<text class="mid" x="{zero:.1f}" y="{height + 14}">0</text>')
    for value in ticks(low, high, 3):
        if value:
            place = 124 + (value - low) * scale
            parts.append(f'<path class="grid" d="M{place:.1f} 2V{height + 2}"/>')
            parts.append(f'<text class="mid" x="{place:.1f}" y="{height + 14}">{compact(value)}</text>')
    for row, point in enumerate(points):
        y = 12 + row * 22
        parts.append(_row_label(point, y))
        if math.isfinite(point.x):
            left, right, dot = (124 + (v - low) * scale for v in (point.low, point.high, point.x))
            whisker = f'<path class="whisker" d="M{left:.1f} {y}H{right:.1f}"/>' if math.isfinite(point.low) else ""
            mark = f'<circle class="solid" cx="{dot:.1f}" cy="{y}" r="4"/>'
            parts.append(f'<g class="c{point.color}">{whisker}{mark}</g>')
        parts.append(f'<text class="end ink" x="{WIDTH - 2}" y="{y + 4}">{escape(point.text)}</text>')
    return svg(label, height + 18, parts)


_SHAPES = (  # around (0, 0), one for each of the usual systems, so that they do not differ by colour alone
    "M-4.5 -4.5h9v9h-9z", "M0 -5.5L5.5 0L0 5.5L-5.5 0z", "M0 -5.5L5.3 4.2H-5.3z", "M0 5.5L5.3 -4.2H-5.3z",
    "M-5.5 -2h3.5v-3.5h4v3.5h3.5v4h-3.5v3.5h-4v-3.5h-3.5z", "M-6 0a6 6 0 1 0 12 0a6 6 0 1 0 -12 0z",
)  # fmt: skip


def front(points: Iterable[tuple[float, ...]]) -> list[bool]:
    """Which points no other one beats: is at least as high in every coordinate and higher in one (the Pareto front).

    >>> front([(1, 2), (2, 1), (1, 1)])
    [True, True, False]
    """
    known = list(points)
    return [
        not any(other != one and all(o >= v for o, v in zip(other, one, strict=True)) for other in known)
        for one in known
    ]


def scatter_chart(
    label: str, points: Sequence[Point], x_title: str, y_title: str, *, best: int = 0, log_x: bool = False
) -> str:
    """A named mark per point; ``best`` is 1 where more of x is better, -1 where less is: the Pareto front gets a line."""
    xs, ys = (np.array([getattr(p, axis) for p in points]) for axis in "xy")
    frame = Frame(log_span(xs, 0.14) if log_x else span(xs, 0.14), span(ys, 0.14), 240, x_title, y_title, log_x=log_x)
    if best:
        ahead = front([(best * p.x, p.y) for p in points])
        line = sorted(
            {(frame.place_x(p.x), frame.place_y(p.y)) for p, first in zip(points, ahead, strict=True) if first}
        )
        frame.parts.append(f'<path class="mark" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in line)}"/>')
    places = [(frame.place_x(p.x), frame.place_y(p.y)) for p in points]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    taken.append((LEFT, TOP, LEFT + 6.3 * len(y_title), TOP + 12))
    for point, (x, y) in zip(points, places, strict=True):
        shape = _SHAPES[point.color % len(_SHAPES)]
        move = f"translate({x:.1f} {y:.1f})"
        frame.parts.append(f'<path class="solid c{point.color}" transform="{move}" d="{shape}"/>')
    for point, (x, y) in zip(points, places, strict=True):
        left, base = _free_place(x, y, 6.3 * len(point.name), taken)
        frame.parts.append(f'<text class="ink" x="{left:.1f}" y="{base:.1f}">{escape(point.name)}</text>')
    return frame.svg(label)


def _free_place(x: float, y: float, width: float, taken: list[Box]) -> tuple[float, float]:
    """Where the name of a mark at (x, y) covers nothing yet: beside, above or below it; takes the place."""
    found: list[tuple[int, int, Box]] = []
    for rise in (4, -4, 12, -9, 19, -20, 30):
        for left in (x + 9, x - 9 - width, x - width / 2):
            box = (left, y + rise - 9, left + width, y + rise + 2)
            covered = sum(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken)
            outside = box[0] < LEFT or box[2] > WIDTH or box[1] < 0
            found.append((covered + 2 * outside, len(found), box))
    best = min(found)[2]
    taken.append(best)
    return best[0], best[3] - 2


STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1d2126;--soft:#646c76;--line:#dfe3e8;--wash:#f5f6f8;--accent:#0f5f8f;
--good:#13713f;--bad:#b3261e;--even:#8a6100;
--p0:#8b919a;--p1:#b07aa1;--p2:#56a9dd;--p3:#1f5f9e;--p4:#1c9a74;--p5:#d4500a;--p6:#b58a00;--p7:#7a5cc2;--p8:#5c7a29;
--p9:#a14a5b}
@media (prefers-color-scheme:dark){:root{--bg:#15181c;--ink:#e6e8eb;--soft:#9aa3ad;--line:#30363d;--wash:#1d2126;
--accent:#7cc0ee;--good:#63c98f;--bad:#ff8a80;--even:#e3b341;
--p0:#9aa1aa;--p1:#cf9dc2;--p2:#7cc4f0;--p3:#4f8fd6;--p4:#3fc49a;--p5:#ff7d3b;--p6:#dcb53a;--p7:#a78bea;--p8:#9dbd5e;
--p9:#d98494}}
.c0{--c:var(--p0)}.c1{--c:var(--p1)}.c2{--c:var(--p2)}.c3{--c:var(--p3)}.c4{--c:var(--p4)}.c5{--c:var(--p5)}
.c6{--c:var(--p6)}.c7{--c:var(--p7)}.c8{--c:var(--p8)}.c9{--c:var(--p9)}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif;
font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main{max-width:1160px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:24px;line-height:1.25;margin:0;letter-spacing:-.01em}
h2{font-size:18px;margin:44px 0 4px;padding-top:14px;border-top:1px solid var(--line)}
h3{font-size:14px;margin:22px 0 6px}
p{margin:6px 0;max-width:78ch}
.soft,figcaption small,.note{color:var(--soft)}.note{font-size:13px}
code,pre{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace}
pre{overflow-x:auto;background:var(--wash);padding:12px 14px;border-radius:6px}
.verdict{font-size:20px;line-height:1.35;font-weight:600;margin:18px 0 8px;padding:2px 0 2px 14px;
border-left:5px solid var(--c)}
.lead{--c:var(--good)}.behind{--c:var(--bad)}.level{--c:var(--even)}
.warn,.missing{border:1px solid var(--even);border-radius:6px;padding:8px 12px;margin:12px 0;max-width:none}
.warn{border-color:var(--bad);border-width:2px}.warn b{color:var(--bad)}.missing{border-style:dashed;
color:var(--soft)}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:12px 20px;margin:18px 0}
.facts div{min-width:0}.facts dt{font-size:12px;color:var(--soft)}.facts dd{margin:0;overflow-wrap:anywhere}
.phases{display:grid;grid-template-columns:max-content max-content 1fr;gap:2px 14px;font-size:13px;max-width:620px;
align-items:center}
.phases i{display:block;height:8px;background:var(--accent);opacity:.75;border-radius:2px}
.phases span:nth-child(3n+2){text-align:right}
.scroll{overflow-x:auto;margin:12px 0}
.against{max-width:900px;margin:12px 0}.against td,.against th{text-align:left;padding:5px 14px 5px 0}
.against td:first-child{white-space:nowrap}
.against span{white-space:nowrap}.against td:last-child{min-width:110px}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th,td{padding:6px 8px;text-align:right;vertical-align:top;border-bottom:1px solid var(--line)}
th{font-weight:600;font-size:12px;line-height:1.3;vertical-align:bottom}
th:first-child,td:first-child{text-align:left}
.results td,.results th{padding:6px}.results td:first-child{min-width:156px;overflow-wrap:anywhere;font-weight:500}
.results small{display:block;color:var(--soft);
font-size:11.5px}
.results .ours{background:var(--wash)}.results sup{font-size:10px;line-height:0;color:var(--soft);margin-left:1px}
.results td b{font-weight:750}
.dot{display:inline-block;width:9px;height:9px;border-radius:50%;background:var(--c);margin-right:6px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:22px 26px;margin:14px 0}
figure{margin:0;min-width:0;break-inside:avoid}
figcaption{font-size:13px;font-weight:600;margin-bottom:4px;line-height:1.35}figcaption small{display:block;
font-weight:400;font-size:12px}
.keys{display:flex;flex-wrap:wrap;gap:0 12px;font-weight:400;font-size:12px;color:var(--soft)}
.keys .dot{width:8px;height:8px;margin-right:4px}
svg{display:block;width:100%;height:auto;max-width:470px}
svg text{font-size:11px;fill:var(--soft)}svg .ink{fill:var(--ink)}svg .end{text-anchor:end}
svg .mid{text-anchor:middle}
.grid{stroke:var(--line);fill:none}.axis{stroke:var(--soft);fill:none}.mark{stroke:var(--soft);stroke-dasharray:2 3;
opacity:.55;fill:none}
.dots{stroke:var(--c);stroke-width:2.4;stroke-linecap:round;opacity:.3;fill:none}.line{stroke:var(--c);
stroke-width:1.9;fill:none;stroke-linejoin:round}
.fill{fill:var(--c);opacity:.85}.solid{fill:var(--c);stroke:var(--bg);stroke-width:.8}.whisker{stroke:var(--c);
stroke-width:2.2;fill:none}
.interval{stroke:var(--ink);fill:none;stroke-width:1.1}
details{border-top:1px solid var(--line)}details:last-of-type{border-bottom:1px solid var(--line)}
summary{cursor:pointer;padding:9px 0}summary:focus-visible{outline:2px solid var(--accent)}
.example summary{display:grid;grid-template-columns:minmax(0,1fr) auto auto;gap:2px 18px;align-items:center}
.example summary::before{content:"▸";position:absolute;left:0;top:9px;color:var(--soft)}
.example[open] summary::before{content:"▾"}
.example summary{list-style:none;position:relative;padding-left:15px}
.example summary::-webkit-details-marker{display:none}
.example q{font-weight:600}.tag{font-size:11px;border:1px solid var(--line);border-radius:9px;padding:0 7px;
color:var(--soft);white-space:nowrap}
.tag.reach{color:var(--accent);border-color:var(--accent)}
.strip{display:inline-flex;gap:2px;align-items:center}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:8px 34px;padding:2px 0 18px}
.pair table{font-size:12.5px}.pair td,.pair th{padding:3px 5px;vertical-align:middle}
.pair td:nth-child(3),.pair th:nth-child(3){text-align:left;width:100%;overflow-wrap:anywhere;line-height:1.3}
.pair td:first-child,.pair th:first-child{padding-left:0}
.pair td:nth-child(2),.pair th:nth-child(2){text-align:center}
.pair td{white-space:nowrap}.pair td:nth-child(3){white-space:normal}.pair h3{margin:4px 0}
.g{display:inline-block;min-width:17px;height:17px;line-height:17px;border-radius:4px;text-align:center;
font-size:11px;font-weight:700}
.g3{background:#136b3c;color:#fff}.g2{background:#9bd4a6;color:#11331c}.g1{background:#f4c95d;color:#3d2c00}
.g0{background:#b83246;color:#fff}
.gx{border:1px dashed var(--soft);color:var(--soft);line-height:15px}
.up{color:var(--good)}.down{color:var(--bad)}.new{color:var(--accent);font-weight:600}
.glossary{display:grid;grid-template-columns:minmax(130px,max-content) 1fr;gap:6px 18px;font-size:13.5px}
.glossary dd{margin:0}
@media (max-width:640px){main{padding:18px 14px 40px}h1{font-size:21px}.verdict{font-size:17px}
.example summary{grid-template-columns:1fr}
.glossary{grid-template-columns:1fr;gap:0}.glossary dd{margin-bottom:8px}.pair td,.pair th{padding:3px}
.facts{grid-template-columns:repeat(2,1fr)}}
@media print{:root{color-scheme:light}main{max-width:none;padding:0}body{font-size:12px}.scroll{overflow:visible}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
details::details-content{content-visibility:visible;display:block;block-size:auto}h2,h3,figcaption{break-after:avoid}
tr{break-inside:avoid}summary{break-after:avoid}.pair{display:block}.pair table{font-size:11px}}
"""
"""The style sheet: colours c0 to c9 are the palette, with a second set for dark screens."""
