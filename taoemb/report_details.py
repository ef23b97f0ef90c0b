"""The long parts of the run report: training curves, result lists, what the metrics mean, the configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from taoemb.evaluation import paired_bootstrap
from taoemb.report_charts import (
    OURS,
    Curve,
    Floats,
    Point,
    bar_chart,
    color_of,
    compact,
    decimal,
    difference_chart,
    duration,
    figure,
    line_chart,
    metric_text,
    missing,
    number,
    ordered_systems,
    share_chart,
    stars,
)  # fmt: skip

Logs = Mapping[str, Mapping[str, Floats]]
"""system -> key -> value per logged step, NaN where null; every log has ``step``."""

FROM_ZERO = {"zero_variance_share", "judge_calls", "judge_cache_hit_rate", "kl"}
"""Curves whose height says something only from 0 on."""
CURVES: Mapping[str, Mapping[str, tuple[str, str]]] = {  # group -> key -> title, note
    "Optimisation": {
        "kl": ("KL to the reference", "how far the policy over the candidates is from stage 1's"),
        "entropy": ("Entropy", "of the policy over the candidates, in nats; near 0 it has made up its mind"),
        "infonce": ("InfoNCE anchor", "stage 1's loss, which keeps the tail"),
    },
    "Health": {
        "zero_variance_share": ("Groups without a signal", "share of queries whose candidates all got the same reward"),
        "effective_rank": ("Effective rank", "of the query batch; a fall means that the embeddings collapse"),
        "cosine_to_reference": ("Cosine to the reference", "of query embeddings with stage 1's; 1 is unmoved"),
        "overlap@K": ("Overlap of stale and fresh", "at a refresh (dotted): share of the new Top-K that the old index had"),
        "hubness_skew": ("Hubness skew", "of items' counts as candidates; a rise: few items crowd the lists"),
        "judge_calls": ("Judge calls", "pairs sent to the judge so far"),
        "judge_cache_hit_rate": ("Judge cache hits", "share of pairs answered from the cache so far"),
    },
}  # fmt: skip
TIMES = {"refresh": 0, "retrieve": 7, "judge": 6, "forward": 8, "backward": 9}
"""Parts of a step, with their colours."""
MAX_REFRESH_MARKS = 60
OPEN_EXAMPLES = 2
MAX_SLICES = 12
RESAMPLES = 2000
GRADES = {3: "excellent", 2: "related", 1: "mismatch", 0: "irrelevant"}


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises ValueError that says what to do when it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); run the evaluation again") from error


def read_logs(folder: Path) -> tuple[Logs, list[str]]:
    """The logs of a run folder by system, and the names of those with lines that could not be read."""
    logs: dict[str, dict[str, Floats]] = {}
    torn: list[str] = []
    for path in sorted(folder.glob("*.jsonl")):
        rows: list[dict[str, Any]] = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError):  # a killed process leaves a torn last line
                torn.append(path.name)
        if not rows:
            continue
        keys = dict.fromkeys(key for row in rows for key in row)
        log = {key: np.array([number(row.get(key)) for row in rows]) for key in keys}
        steps = log.get("step", np.full(len(rows), np.nan))
        log["step"] = np.where(np.isfinite(steps), steps, np.arange(len(rows)))
        logs[path.stem] = log
    return {name: logs[name] for name in ordered_systems(logs)}, sorted(set(torn))


# ---------------------------------------------------------------------------------------------------------- training


def training_curves(logs: Logs, torn: Sequence[str]) -> str:
    """Everything that training logged: rewards, optimisation, health, time; keys without a place go into a fold-out."""
    title = "<h2>Training</h2>"
    if not logs:
        return title + missing("No logs/*.jsonl in the run folder: there are no training curves.")
    note = (
        "Points: logged values; line: running mean over a twentieth of the steps. Points outside of the frame sit "
        "on its edge. The figure beside a name is the end of its line."
    )
    parts = [title, f'<p class="note">{note}</p>']
    if OURS not in logs:
        parts.append(missing(f"No logs/{OURS}.jsonl in the run folder: its curves are missing."))
    if torn:
        parts.append(missing(f"Lines that are not JSON were left out of {', '.join(torn)}."))
    keys = sorted({key for log in logs.values() for key in log if np.isfinite(log[key]).any()} - {"step"})
    rewards = [match[1] for key in keys if (match := re.fullmatch(r"reward/(.+)/mean", key))]
    rewards.sort(key=lambda name: (name != "relevance", name != "quality", name))
    shown = {"loss", "index_age", *(f"reward/{name}/{kind}" for name in rewards for kind in ("mean", "abstained"))}
    charts = [_curve(logs, f"reward/{name}/mean", f"Reward: {name}", "mean over the candidates") for name in rewards]
    charts += [
        _curve(logs, f"reward/{name}/abstained", f"Abstained: {name}", "share of candidates without a reward")
        for name in rewards
        if any(np.nan_to_num(log.get(f"reward/{name}/abstained", np.zeros(1))).any() for log in logs.values())
    ]
    parts.append(_grid("Rewards", charts))
    for group, curves in CURVES.items():
        charts = [_curve(logs, key, label, note) for key, (label, note) in curves.items()]
        if group == "Optimisation":  # losses of different systems are no more comparable than their formulas
            charts = [_curve({name: log}, "loss", f"Loss of {name}") for name, log in logs.items()] + charts
        parts.append(_grid(group, charts))
        shown |= set(curves)
    parts.append(_grid("Time", [_time_shares(name, log) for name, log in logs.items()]))
    rest = [key for key in keys if key not in shown and not key.startswith("seconds/")]
    if rest:
        charts = [_curve(logs, key, key) for key in rest]
        parts.append(f"<details><summary>Other logged values ({len(rest)})</summary>{_grid('', charts)}</details>")
    return "\n".join(parts)


def _grid(title: str, charts: Sequence[str]) -> str:
    drawn = "".join(charts)
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return f'{heading}<div class="charts">{drawn}</div>' if drawn else ""


def _curve(logs: Logs, key: str, title: str, note: str = "") -> str:
    """One chart of a key, with a line per system that logged it; empty when none did."""
    curves = [
        Curve(name, color_of(name), log["step"], log[key])
        for name, log in logs.items()
        if key in log and np.isfinite(log[key]).any()
    ]
    if not curves:
        return ""
    marks: list[float] = []
    for log in logs.values() if key == "overlap@K" else ():
        age = log.get("index_age", np.zeros(0))
        marks += log["step"][1:][np.diff(age) < 0].tolist() if len(age) else []
    marks = sorted(set(marks))
    ends = [(curve.color, f"{curve.name} {compact(_end(curve))}") for curve in curves]
    zero = key in FROM_ZERO or key.endswith("/abstained")
    chart = line_chart(title, curves, from_zero=zero, marks=marks if len(marks) <= MAX_REFRESH_MARKS else ())
    return figure(title, chart, note, ends)


def _end(curve: Curve) -> float:
    smooth = curve.smooth()
    return float(f"{smooth[np.isfinite(smooth)][-1]:.3g}")


def _time_shares(name: str, log: Mapping[str, Floats]) -> str:
    """Where the steps of a system spent their time."""
    names = [key.removeprefix("seconds/") for key in log if key.startswith("seconds/") and np.nansum(log[key]) > 0]
    if not names:
        return ""
    ordered = [*(n for n in TIMES if n in names), *sorted(set(names) - set(TIMES))]
    totals = {n: float(np.nansum(log[f"seconds/{n}"])) for n in ordered}
    whole, steps = sum(totals.values()), len(log["step"])
    parts = [(TIMES.get(n, 3), log[f"seconds/{n}"]) for n in ordered]
    keys = [(TIMES.get(n, 3), f"{n} {100 * totals[n] / whole:.0f} %") for n in ordered]
    title = f"Time shares: {name}"
    note = f"{duration(whole)} in {steps:,} steps, {whole / steps:.3g} s per step"
    return figure(title, share_chart(title, log["step"], parts), note, keys)


# ------------------------------------------------------------------------------------------------------------ slices


def slice_charts(
    path: Path,
    metrics: Sequence[str],
    *,
    ours: str,
    rival: str,
    ordered: Callable[[Iterable[str]], list[str]],
    color_of: Callable[[str], int],
) -> str:
    """Bars of every system per slice from a ``per_query.parquet``, and ``ours`` minus ``rival``; of the first of the metrics
    that is there."""
    title = "<h2>Query slices</h2>"
    if not path.exists():
        return title + missing("No per_query.parquet in the run folder: the comparison per slice needs it.")
    table = pq.read_table(path)
    metric = next((m for m in metrics if m in table.column_names), metrics[0])
    absent = [name for name in ("system", "query_id", "slice", metric) if name not in table.column_names]
    if absent:
        return title + missing(f"per_query.parquet lacks {', '.join(absent)}: the comparison per slice needs it.")
    cells: dict[str, dict[str, dict[str, float]]] = {}  # slice -> system -> query -> value
    rows = zip(*(table.column(name).to_pylist() for name in ("system", "query_id", "slice", metric)), strict=True)
    for system, query, part, value in rows:
        cells.setdefault(part or "(no slice)", {}).setdefault(system, {})[query] = number(value)
    sizes = {part: max(len(values) for values in systems.values()) for part, systems in cells.items()}
    chosen = sorted(sizes, key=lambda part: (-sizes[part], part))[:MAX_SLICES]
    bars = {part: [_bar(s, color_of(s), cells[part][s]) for s in ordered(cells[part])] for part in chosen}
    tops = [v for points in bars.values() for p in points for v in (p.x, p.high) if np.isfinite(v)]
    limit = max([*tops, 1e-9])
    figures = [
        figure(f"{part}", bar_chart(f"{label_of(metric)}, slice {part}", points, limit), f"{sizes[part]:,} queries")
        for part, points in bars.items()
    ]
    pairs = {part: (cells[part].get(ours, {}), cells[part].get(rival, {})) for part in chosen}
    gaps = [gap for part, (a, b) in pairs.items() if (gap := _gap(part, color_of(ours), a, b))]
    if gaps:
        name = f"{ours} minus {rival}"
        chart = difference_chart(f"{name} per slice", gaps)
        figures.append(figure(name, chart, "paired by query, with 95 % intervals"))
    more = f" The {len(sizes) - MAX_SLICES} smallest slices are left out." if len(sizes) > MAX_SLICES else ""
    note = (
        f'<p class="note">Mean {escape(label_of(metric))} per slice with its 95 % bootstrap interval over queries. '
        f"Bars whose intervals overlap can still differ: the paired differences tell.{more}</p>"
    )
    return f'{title}{note}<div class="charts">{"".join(figures)}</div>'


def _bar(system: str, color: int, values: Mapping[str, float]) -> Point:
    known = np.array([v for v in values.values() if np.isfinite(v)])
    if not known.size:
        return Point(system, color, np.nan)
    test = paired_bootstrap(known, np.zeros_like(known), samples=RESAMPLES)
    return Point(system, color, test.difference, low=test.ci_low, high=test.ci_high, text=metric_text(test.difference))


def _gap(part: str, color: int, ours: Mapping[str, float], theirs: Mapping[str, float]) -> Point | None:
    both = [q for q in ours if q in theirs and np.isfinite(ours[q]) and np.isfinite(theirs[q])]
    if not both:
        return None
    test = paired_bootstrap([ours[q] for q in both], [theirs[q] for q in both], samples=RESAMPLES)
    text = decimal(test.difference, sign=True) + stars(test.p_value)
    return Point(part, color, test.difference, low=test.ci_low, high=test.ci_high, text=text)


# ---------------------------------------------------------------------------------------------------------- examples


def examples(path: Path) -> str:
    """Result lists before and after, a fold-out per query."""
    if not path.exists():
        return missing("No examples.json in the run folder: there are no result lists to show.")
    found = read_json(path)
    pairs = [(e.get("before"), e.get("after")) for e in found if isinstance(e, dict)] if isinstance(found, list) else []
    if not isinstance(found, list) or sum(isinstance(b, dict) and isinstance(a, dict) for b, a in pairs) < len(found):
        raise ValueError(f"{path} is not a list of {{query, before, after}}; run the evaluation again")
    if not found:
        return missing("examples.json holds no query.")
    return result_lists(found)


def result_lists(found: Sequence[Mapping[str, Any]], channel: str = "BM25") -> str:
    """Two systems' lists (``before`` and ``after``) of some queries, a fold-out each; ``channel`` says what also finds items."""
    legend = " ".join(f"{_badge(grade)} {word}" for grade, word in GRADES.items())
    legend += f" {_badge(None)} not graded"
    return (
        f'<p class="note">{legend}. q: item quality, 0 to 1. <span class="tag">{channel}</span> {channel} finds the item '
        f'too, <span class="tag reach">not {channel}</span> it does not. ▲ and ▼: places won and lost.</p>'
        + "".join(_example(example, i < OPEN_EXAMPLES, channel) for i, example in enumerate(found))
    )


def _example(example: Mapping[str, Any], opened: bool, channel: str) -> str:
    before, after = example["before"], example["after"]
    places = [
        {item.get("id"): rank for rank, item in enumerate(side.get("items") or [], 1)} for side in (before, after)
    ]
    scores = [number(side.get("ndcg@10")) for side in (before, after)]
    change = decimal(scores[1] - scores[0], 2, sign=True)
    css = "up" if scores[1] > scores[0] else "down" if scores[1] < scores[0] else "soft"
    slice_tag = f' <span class="tag">{escape(str(example["slice"]))}</span>' if example.get("slice") else ""
    strips = " → ".join(
        f'<span class="strip">{"".join(_badge(item.get("grade")) for item in side.get("items") or [])}</span>'
        for side in (before, after)
    )
    query, shown = escape(str(example.get("query", ""))), [decimal(score, 2) for score in scores]
    return (
        f'<details class="example"{" open" if opened else ""}><summary><span><q>{query}</q>{slice_tag}</span>'
        f'<span>{strips}</span><span>nDCG@10 {shown[0]} → {shown[1]} <span class="{css}">{change}</span></span>'
        f'</summary><div class="pair">{_list(before, places[1], "gone", channel)}'
        f"{_list(after, places[0], 'new', channel)}</div></details>"
    )


def _list(side: Mapping[str, Any], elsewhere: Mapping[Any, int], absent: str, channel: str) -> str:
    """One system's Top-10; ``elsewhere`` are the places of the same items in the other list."""
    reach = {True: f'<span class="tag">{channel}</span>', False: f'<span class="tag reach">not {channel}</span>'}
    rows = []
    for rank, item in enumerate(side.get("items") or [], 1):
        cells = (
            _badge(item.get("grade")),
            escape(str(item.get("title") or item.get("id") or "–")),
            decimal(number(item.get("quality")), 2),
            reach.get(item.get("in_channel"), ""),
            _move(rank, elsewhere.get(item.get("id")), absent),
        )
        rows.append(f'<tr><td class="soft">{rank}</td>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    head = "".join(f'<th scope="col">{name}</th>' for name in ("#", "grade", "item", "q", "found by", "move"))
    return (
        f"<div><h3>{escape(str(side.get('system', '')))}</h3><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _move(rank: int, other: int | None, absent: str) -> str:
    if other is None:
        return f'<span class="{"new" if absent == "new" else "soft"}">{absent}</span>'
    if absent == "gone" or other == rank:  # moves are told once, in the list after
        return '<span class="soft">=</span>' if absent == "new" else ""
    return f'<span class="up">▲{other - rank}</span>' if other > rank else f'<span class="down">▼{rank - other}</span>'


def _badge(grade: object) -> str:
    known = int(grade) if isinstance(grade, (int, float)) and grade in GRADES else None
    word = GRADES[known] if known is not None else "not graded"
    css, text = (f"g{known}", str(known)) if known is not None else ("gx", "–")
    return f'<span class="g {css}" title="{word}">{text}</span>'


# -------------------------------------------------------------------------------------------------------- reference


@dataclass(frozen=True)
class Metric:
    """How a metric is written, whether higher is better (1) or it is neither good nor bad (0), and what it means."""

    label: str
    direction: int
    meaning: str


METRICS = {  # name before @, in the order of the table
    "condensed_ndcg": Metric("condensed nDCG", 1, "nDCG after items without a grade are taken out of the list: does "
        "not punish a system for finding items that nobody graded."),
    "ndcg": Metric("nDCG", 1, "Graded gains, discounted by rank, as a share of the best possible order."),
    "recall": Metric("Recall", 1, "Share of a query's good items that are in the Top-k, mean over queries."),
    "hit_rate": Metric("HitRate", 1, "Good items found in the Top-k over all queries, divided by all good items: "
        "queries with many good items weigh more."),
    "mrr": Metric("MRR", 1, "1 / rank of the first good item."),
    "goodrate": Metric("Goodrate", 1, "Share of the Top-k that is good; of those that have a grade, where labels are incomplete."),
    "quality": Metric("Quality", 1, "Mean item quality (0 to 1) of the Top-k, relevant or not."),
    "good_quality": Metric("Good quality", 1, "Mean item quality of the good items in the Top-k."),
    "overlap": Metric("Overlap", 0, "Share of the Top-k that a channel (BM25 by default) finds too. Low is good only "
        "while the goodrate holds: an unrelated item overlaps with nothing."),
    "exclusive_goodrate": Metric("Exclusive goodrate", 1, "Share of the Top-k that is good and that no channel "
        "finds: what this system adds."),
    "incremental_recall": Metric("Incremental recall", 1, "Share of a query's good items that are in the Top-k and that no channel finds: "
        "what recall gains by this system beside them."),
    "hubness": Metric("Hubness", 0, "Skew of the numbers of queries in whose Top-k an item is: the higher, the more a few items crowd "
        "the lists."),
    "auc": Metric("AUC", 1, "Probability that an item of grade 3 scores higher than one of grade 0, at any rank."),
    "judged": Metric("Judged", 0, "Share of the Top-k that has a grade: how far the other figures can be trusted, "
        "not how good the list is."),
}  # fmt: skip
TERMS = {
    "good": "A grade of 2 or 3. Grades: 3 excellent, 2 related, 1 mismatch, 0 irrelevant.",
    "stage1_continued": "The control: stage 1 trained on for as many item encodings as retrieval_grpo spent.",
    "paper, exact, mixed, positive_only, pl_rank": "Policies: the published gradient, the exact one, half of each, without "
    "negative advantages, and PL-Rank for the reward of a whole list.",
    "kl_distill, kl_optimum, listnet, lambda, infonce_hard, dpo_pairs": "Rivals without a policy gradient on the same candidates "
    "and rewards: the softmax of the rewards is learned, alone or times the stage-1 policy, ListNet, LambdaRank, good "
    "candidates against bad ones, DPO on pairs.",
    "paired bootstrap": "Resamples the test queries and asks how often a difference as large would appear if the systems "
    "were equal.",
}


def base_of(metric: str) -> str:
    """A metric's name without its cut-off."""
    return metric.partition("@")[0]


def label_of(metric: str) -> str:
    """A metric as people write it; an unknown one as it is.

    >>> label_of("ndcg@10"), label_of("mine@5")
    ('nDCG@10', 'mine@5')
    """
    name, at, cutoff = metric.partition("@")
    return (METRICS[name].label if name in METRICS else name) + at + cutoff


def direction_of(metric: str) -> int:
    """1 where higher is better, 0 where a metric is neither good nor bad by itself, or unknown."""
    return METRICS[base_of(metric)].direction if base_of(metric) in METRICS else 0


def glossary(metrics: Sequence[str], words: Mapping[str, str] = TERMS) -> str:
    """What these metrics and the words of the page mean, folded."""
    unknown = Metric("", 0, "No description is known for this metric.")
    entries = {metric: METRICS.get(base_of(metric), unknown).meaning for metric in metrics}
    rows = "".join(f"<dt><code>{escape(name)}</code></dt><dd>{escape(text)}</dd>" for name, text in entries.items())
    rows += "".join(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in words.items())
    return f'<details><summary>Glossary of metrics and words</summary><dl class="glossary">{rows}</dl></details>'


def config_text(path: Path) -> str:
    """The exact configuration, folded."""
    if not path.exists():
        return missing("No config.yaml in the run folder: the exact configuration is not known.")
    text = path.read_text(encoding="utf-8")
    return f"<details><summary>Exact configuration (config.yaml)</summary><pre>{escape(text)}</pre></details>"
