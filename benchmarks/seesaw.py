"""The trade-off of the three objectives among the conditions of an ablation: relevance, quality and exclusivity.

    python benchmarks/seesaw.py runs/ablation --out runs/ablation/pareto.png \\
        --group "single objective=relevance alone" --group "one scalar reward=default,paper"

The folder is the ``--out`` of `benchmarks/ablation.py`, one folder per seed. Every condition is compared with stage 1 on the same seeds
and the same queries; seeds are averaged per query first. Prints two Markdown tables, and one of the named sets of conditions
(``--group NAME=CONDITION,CONDITION``, or ``--groups FILE.yaml`` for names with commas), writes the plot as PNG or SVG, and all figures as
JSON beside it.

- Objectives: nDCG@10, quality@10 and the exclusive good rate@10. Overlap@10 is shown but no objective: bad items lower it too.
- One unit of an objective is a tenth of the standard deviation of stage 1 over the queries (our choice): it depends neither on the
  conditions that are compared nor on the number of queries. ``Delta_f`` is the difference to stage 1 in units.
- Seesaw index: ``sum_f max(0, -Delta_f) / sum_f |Delta_f|``; 0 where no objective falls, 1 where all do.
- Hypervolume: of what a condition, or a set of them, dominates above stage 1, in cubed units. What falls in one objective adds none; a larger set
  has more chances.
- ``front``: no other condition is at least as good in all three objectives (means; the tests are in the second table).
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from taoemb.early_stopping import dominated
from taoemb.evaluation import paired_bootstrap
from taoemb.files import read_json, write_json

Array = npt.NDArray[np.float64]
OBJECTIVES = {"relevance": "ndcg@10", "quality": "quality@10", "exclusivity": "exclusive_goodrate@10"}
SHOWN = ("ndcg@10", "recall@100", "goodrate@10", "quality@10", "overlap@10", "exclusive_goodrate@10")
RELATIVE = ("quality@10", "overlap@10")
NOT_DRAWN = ("bm25", "untrained")
"""Far away from what was trained, so that they would leave no room."""
BASE = "stage1"


def main() -> None:
    """Print the tables, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--group", action="append", default=[], metavar="NAME=CONDITION,CONDITION")
    parser.add_argument("--groups", type=Path, help="YAML: name -> list of conditions")
    parser.add_argument("--out", type=Path, required=True, help="the plot: FILE.png or FILE.svg")
    arguments = parser.parse_args()
    rows = compared(read(arguments.folder))
    groups = dict(yaml.safe_load(arguments.groups.read_text(encoding="utf-8"))) if arguments.groups else {}
    for text in arguments.group:
        name, _, members = text.partition("=")
        groups[name] = members.split(",")
    volumes = {name: {"conditions": members, **of_set(members, rows)} for name, members in groups.items()}
    write_json(arguments.out.with_suffix(".json"), {"unit": "a tenth of stage 1's deviation over the queries",
                                                    "conditions": rows, "sets": volumes})  # fmt: skip
    print(f"{main_table(rows)}\n\n{test_table(rows)}")
    if volumes:
        print("\n| set | conditions | hypervolume | on the front |\n| --- | --- | --- | --- |")
        for name, row in volumes.items():
            print(f"| {name} | {len(row['conditions'])} | {row['hypervolume']:.2f} | {', '.join(row['front'])} |")
    draw(rows, arguments.out)


def read(folder: Path) -> dict[str, dict[str, dict[str, Array]]]:
    """condition -> run -> metric -> value per query ``[Q]``, NaN where a query has none; stage 1 first."""
    found: dict[str, dict[str, dict[str, Array]]] = {BASE: {}}
    for run in sorted(file.parent for file in folder.glob(f"*/{BASE}.json")):
        for file in sorted(run.glob("*.json")):
            values = read_json(file)["per_query"]
            found.setdefault(file.stem, {})[run.name] = {m: np.array(v, dtype=np.float64) for m, v in values.items()}
    if not found[BASE]:
        raise ValueError(f"{folder} holds no folder with a {BASE}.json; give the --out of benchmarks/ablation.py")
    return found


def compared(found: dict[str, dict[str, dict[str, Array]]]) -> dict[str, dict[str, Any]]:
    """A row per condition: means, relative changes, differences in units and tests against stage 1 on the same seeds."""
    units = {
        name: np.mean([np.nanstd(run[metric]) for run in found[BASE].values()]) / 10
        for name, metric in OBJECTIVES.items()
    }
    rows: dict[str, dict[str, Any]] = {}
    for condition, runs in found.items():
        ours = {m: np.array([run[m] for run in runs.values()]) for m in SHOWN}
        base = {m: np.array([found[BASE][run][m] for run in runs]) for m in SHOWN}
        tests = {name: paired_bootstrap(ours[metric], base[metric]) for name, metric in OBJECTIVES.items()}
        rows[condition] = {
            "seeds": len(runs),
            "mean": {m: float(np.nanmean(ours[m])) for m in SHOWN},
            "relative": {m: float(np.nanmean(ours[m]) / np.nanmean(base[m])) - 1 for m in RELATIVE},
            "tests": {name: asdict(test) for name, test in tests.items()},
            "units": [tests[name].difference / units[name] for name in OBJECTIVES],
        }
        rows[condition]["seesaw"] = seesaw(rows[condition]["units"])
        rows[condition]["hypervolume"] = hypervolume([rows[condition]["units"]])
    front = pareto_front({name: row["units"] for name, row in rows.items()})
    for name, row in rows.items():
        row["front"] = name in front
    return rows


def of_set(members: list[str], rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Hypervolume of a set of conditions, and which of them are on its own front."""
    unknown = [name for name in members if name not in rows]
    if unknown:
        raise ValueError(f"no condition is called {unknown[0]!r}; there are {', '.join(rows)}")
    units = {name: rows[name]["units"] for name in members}
    return {"hypervolume": hypervolume(list(units.values())), "front": pareto_front(units)}


def seesaw(deltas: npt.ArrayLike) -> float:
    """``sum_f max(0, -Delta_f) / sum_f |Delta_f|``, 0 where nothing changed."""
    values = np.asarray(deltas, dtype=np.float64)
    moved = np.abs(values).sum()
    return float(np.maximum(0, -values).sum() / moved) if moved else 0.0


def pareto_front(points: dict[str, list[float]]) -> list[str]:
    """Names of the points to which no other one is at least as good in every figure; equal points do not exclude each other."""
    return [name for name, point in points.items() if not dominated(point, [p for p in points.values() if p != point])]


def hypervolume(points: npt.ArrayLike) -> float:
    """Volume of the union of the boxes from 0 to each of ``N`` points ``[N, D]``, exact: slices along the last figure.

    A point that is not above 0 everywhere has no box. The time is ``O(N^D)``, for a few dozen points in three figures.

    >>> hypervolume([[2, 1], [1, 2], [5, -1]])
    3.0
    """
    array = np.asarray(points, dtype=np.float64)
    array = array[(array > 0).all(axis=1)]
    if array.shape[1] == 1:
        return float(array.max(initial=0.0))
    array = array[np.argsort(-array[:, -1])]
    heights = array[:, -1] - np.append(array[1:, -1], 0.0)
    return float(sum(h * hypervolume(array[: i + 1, :-1]) for i, h in enumerate(heights) if h > 0))


def main_table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: what each condition reaches."""
    heads = [f"{m} (change)" if m in RELATIVE else m for m in SHOWN]
    heads = ["condition", "seeds", *heads, "seesaw", "hypervolume", "front"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for name, row in rows.items():
        cells = [f"{row['mean'][m]:.3f}" + (f" ({row['relative'][m]:+.1%})" if m in RELATIVE and name != BASE else "")
                 for m in SHOWN]  # fmt: skip
        ends = [f"{row['seesaw']:.2f}", f"{row['hypervolume']:.2f}"] if name != BASE else ["", ""]
        lines.append(
            f"| {name} | {row['seeds']} | " + " | ".join([*cells, *ends, "yes" if row["front"] else ""]) + " |"
        )
    return "\n".join(lines)


def test_table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: difference to stage 1 with its 95 % interval and p-value, and whether all three objectives rise (p < .05 each)."""
    lines = [
        "| against stage 1 | " + " | ".join(OBJECTIVES.values()) + " | rise |",
        "| --- |" + " --- |" * (len(OBJECTIVES) + 1),
    ]
    for name, row in rows.items():
        if name != BASE:
            tests = list(row["tests"].values())
            cells = [
                f"{t['difference']:+.4f} [{t['ci_low']:+.4f}, {t['ci_high']:+.4f}] p={t['p_value']:.2g}" for t in tests
            ]
            risen = sum(t["difference"] > 0 and t["p_value"] < 0.05 for t in tests)
            fallen = sum(t["difference"] < 0 and t["p_value"] < 0.05 for t in tests)
            verdict = (
                "all" if risen == len(tests) else f"{risen} of {len(tests)}" + (f", {fallen} fall" if fallen else "")
            )
            lines.append(f"| {name} | " + " | ".join([*cells, verdict]) + " |")
    return "\n".join(lines)


def draw(rows: dict[str, dict[str, Any]], file: Path) -> None:
    """Relevance against quality, exclusivity as colour, conditions on the front as diamonds, stage 1 as lines.

    A condition stands where its difference to stage 1 on its own seeds puts it, from stage 1's mean over all seeds.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [name for name in rows if name not in NOT_DRAWN]
    xs, ys, colors = (
        np.array([rows[BASE]["mean"][metric] + rows[name]["tests"][objective]["difference"] for name in shown])
        for objective, metric in OBJECTIVES.items()
    )
    x_metric, y_metric, color_metric = OBJECTIVES.values()
    figure, axes = plt.subplots(figsize=(10, 7), layout="constrained")
    axes.axvline(rows[BASE]["mean"][x_metric], color="0.6", linestyle="--", linewidth=0.9, zorder=0)
    axes.axhline(rows[BASE]["mean"][y_metric], color="0.6", linestyle="--", linewidth=0.9, zorder=0)
    front = np.array([rows[name]["front"] for name in shown])
    limits = {"vmin": colors.min(), "vmax": colors.max(), "cmap": "viridis"}
    for chosen, marker, size, label in ((front, "D", 80, "on the front"), (~front, "o", 50, "dominated")):
        dots = axes.scatter(xs[chosen], ys[chosen], s=size, c=colors[chosen], marker=marker, edgecolors="0.2",
                            linewidths=0.7, label=label, **limits)  # fmt: skip
    figure.colorbar(dots, label=f"exclusivity: {color_metric}")
    axes.set(xlabel=f"relevance: {x_metric} (right is better)", ylabel=f"quality: {y_metric} (up is better)")
    axes.margins(0.12)
    for handle in axes.legend(loc="best", frameon=False).legend_handles:
        handle.set(array=None, facecolor="0.85")
    _name_dots(figure, axes, shown, np.stack([xs, ys], axis=1))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _name_dots(figure: Any, axes: Any, names: list[str], points_N2: Array) -> None:
    """Write each name near its dot where it covers nothing, with a thin line to it where that is further away."""
    figure.canvas.draw()
    dots = axes.transData.transform(points_N2)
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in dots]
    taken.append(tuple(axes.get_legend().get_window_extent().extents))
    left, bottom, right, top = axes.get_window_extent().extents
    turns = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    for name, (x, y) in zip(names, dots, strict=True):
        text = axes.annotate(name, (0, 0), xycoords="figure pixels", fontsize=8.5, ha="center", va="center")
        size = text.get_window_extent()
        best: tuple[float, Any] = (np.inf, None)
        for distance in (1, 12, 26, 42, 60, 80):
            for turn in turns:
                cx = x + np.cos(turn) * (distance + 10 + size.width / 2)
                cy = y + np.sin(turn) * (distance + 10 + size.height / 2)
                box = (
                    cx - size.width / 2 - 1,
                    cy - size.height / 2 - 1,
                    cx + size.width / 2 + 1,
                    cy + size.height / 2 + 1,
                )
                covered = sum(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken)
                outside = box[0] < left or box[2] > right or box[1] < bottom or box[3] > top
                best = min(best, (covered + 3 * outside + distance / 100, (cx, cy, box)), key=lambda found: found[0])
        cx, cy, box = best[1]
        taken.append(box)
        text.remove()
        end, start = axes.transData.inverted().transform([(cx, cy), (x, y)])
        line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 5}
        axes.annotate(name, start, end, fontsize=8.5, ha="center", va="center", arrowprops=line,
                      bbox={"boxstyle": "square,pad=0.1", "color": "white"})  # fmt: skip


if __name__ == "__main__":
    main()
