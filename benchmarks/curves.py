"""The curves of a training run as one picture, and every so many steps of its log as JSON, small enough to be kept beside a result.

    python benchmarks/curves.py runs/demo/logs/retrieval_grpo.jsonl --out runs/demo/curves.png

The report of a run (``report.html``) shows the same curves, with titles and running means taken from there; this is for runs without a
report, such as the conditions of `benchmarks/ablation.py`, and for a page that wants a picture. Several logs are drawn over each other, named after
their run folders. Writes ``--out`` (PNG or SVG) and beside it the JSON: the first step, and every ``--every``-th.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from taoemb.files import write_json
from taoemb.report_charts import Curve
from taoemb.report_details import CURVES

KEYS = ("loss", "infonce", "kl", "entropy", "effective_rank", "cosine_to_reference", "overlap@K", "index_drift",
        "zero_variance_share", "grad_norm")  # fmt: skip
"""Curves that are drawn after the rewards and the evaluations, where they were logged."""
TITLES = {key: title for group in CURVES.values() for key, (title, _) in group.items()}
STEPPED = ("overlap@K", "index_drift")
"""Measured at a refresh and then held: a running mean would show a slope that is not there."""
COLUMNS = 4


def main() -> None:
    """Draw the picture, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, nargs="+", help="RUN/logs/NAME.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="the picture: FILE.png or FILE.svg")
    parser.add_argument("--every", type=int, default=50, help="steps between two rows of the JSON")
    arguments = parser.parse_args()
    logs = {f"{log.parent.parent.name}/{log.stem}": read(log) for log in arguments.logs}
    if len(logs) < len(arguments.logs):
        raise ValueError("two of the logs have the same run folder and name; draw them apart")
    thinned = {name: thin(rows, arguments.every) for name, rows in logs.items()}
    write_json(arguments.out.with_suffix(".json"), {"every": arguments.every, "logs": thinned})
    draw(logs, arguments.out)


def read(file: Path) -> list[dict[str, float]]:
    """The logged steps, in order."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if not rows:
        raise ValueError(f"{file} is empty")
    return rows


def thin(rows: list[dict[str, float]], every: int) -> list[dict[str, float]]:
    """The first step, and those after which a multiple of ``every`` is done; without seconds, to five digits."""
    return [
        {
            key: float(f"{value:.5g}") if value is not None else None
            for key, value in row.items()
            if not key.startswith("seconds/")
        }
        for row in rows
        if row["step"] == 0 or (row["step"] + 1) % every == 0
    ]


def keys_of(logs: dict[str, list[dict[str, float]]]) -> list[str]:
    """What is drawn: the means of the rewards, the evaluations, then `KEYS`."""
    logged = dict.fromkeys(key for rows in logs.values() for row in rows for key in row)
    rewards = [key for key in logged if key.startswith("reward/") and key.endswith("/mean")]
    return [*rewards, *(key for key in logged if key.startswith("eval/")), *(key for key in KEYS if key in logged)]


def draw(logs: dict[str, list[dict[str, float]]], file: Path) -> None:
    """Small multiples: the logged values pale, their running mean over a twentieth of the steps on top."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    keys = keys_of(logs)
    height = -(-len(keys) // COLUMNS)
    figure, grid = plt.subplots(
        height, COLUMNS, figsize=(3.2 * COLUMNS, 2.3 * height), layout="constrained", squeeze=False
    )
    for key, axes in zip(keys, grid.flat, strict=False):
        for color, (name, rows) in enumerate(logs.items()):
            known = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if known:
                steps, values = np.array(known, dtype=np.float64).T
                held = key in STEPPED or len(known) < len(rows)
                smooth = values if held else Curve(name, color, steps, values).smooth()
                axes.plot(steps, values, color=f"C{color}", alpha=0.25, linewidth=0.7)
                axes.plot(steps, smooth, color=f"C{color}", linewidth=1.6, label=name)
                axes.set_ylim(*_limits([line.get_ydata() for line in axes.lines]))
        axes.set_title(TITLES.get(key, key.replace("/mean", "")), fontsize=10)
        axes.tick_params(labelsize=8)
        axes.ticklabel_format(axis="y", useOffset=False)
    for axes in grid.flat[len(keys) :]:
        axes.axis("off")
    if len(logs) > 1:
        figure.legend(
            *grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(logs), fontsize=9
        )
    figure.supxlabel("step", fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _limits(lines: list[np.ndarray]) -> tuple[float, float]:
    """Ends of the axis: all but the farthest hundredth of the values on either side, and some room."""
    values = np.concatenate(lines)
    low, high = np.percentile(values[np.isfinite(values)], [1, 99])
    room = 0.08 * (high - low) or 0.05 * max(abs(high), 1.0)
    return low - room, high + room


if __name__ == "__main__":
    main()
