"""What a judge's worth does for the encoder that is trained against it: AUC of the judge against the encoder's gain over stage 1.

    python benchmarks/ablation.py --runs runs/small/seed0 runs/small/seed1 runs/small/seed2 --conditions benchmarks/conditions/grids/judges.yaml \\
        --against oracle --out runs/judge_gain
    python benchmarks/judge_gain.py runs/judge_gain --out runs/judge_gain/gain.png

The folder is the ``--out`` of `benchmarks/ablation.py` on a generated shop, one folder per seed. Prints a Markdown table, sorted by
the judges' AUC (good against bad items of test queries, graded by the shop's rules); the gain in nDCG@10 is against stage 1 with the same
queries (paired bootstrap, seeds averaged first). Writes the plot as PNG or SVG and all figures as JSON beside it.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np

from taoemb.evaluation import paired_bootstrap
from taoemb.files import read_json, write_json

METRICS = ("ndcg@10", "recall@100", "goodrate@10")
BASE = "stage1"
"""The gain is over this; ``default`` is the run's own judge again."""


def main() -> None:
    """Print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the plot: FILE.png or FILE.svg")
    arguments = parser.parse_args()
    rows = gains(arguments.folder)
    write_json(arguments.out.with_suffix(".json"), {"metrics": METRICS, "rows": rows})
    print("| judge | AUC | kappa | " + " | ".join(f"{metric} | gain" for metric in METRICS) + " |")
    print("| --- | --- | --- |" + " --- |" * (2 * len(METRICS)))
    for name, row in rows.items():
        cells = [
            f"{row['means'][m]:.3f} | {row['gains'][m]['difference']:+.3f} (p={row['gains'][m]['p_value']:.2g})"
            for m in METRICS
        ]
        print(f"| {name} | {row['judge']['auc']:.3f} | {row['judge']['kappa']:.3f} | " + " | ".join(cells) + " |")
    draw(rows, arguments.out)


def gains(folder: Path) -> dict[str, dict]:
    """judge -> its worth and what it did, of conditions that every seed has."""
    seeds = sorted(path for path in folder.iterdir() if (path / f"{BASE}.json").exists())
    if not seeds:
        raise ValueError(
            f"{folder} holds no {BASE}.json in a folder for each seed; give the --out of benchmarks/ablation.py"
        )
    shared = set.intersection(*({file.stem for file in seed.glob("*.json")} for seed in seeds))
    rows: dict[str, dict] = {}

    def values(name: str, metric: str) -> np.ndarray:
        return np.array([read_json(seed / f"{name}.json")["per_query"][metric] for seed in seeds], dtype=np.float64)

    for name in shared - {BASE, "default"}:
        found = [read_json(seed / f"{name}.json") for seed in seeds]
        if all(one.get("judge") for one in found):
            rows[name] = {
                "judge": {k: float(np.mean([one["judge"][k] for one in found])) for k in found[0]["judge"]},
                "means": {metric: float(np.nanmean(values(name, metric))) for metric in METRICS},
                "gains": {m: asdict(paired_bootstrap(values(name, m), values(BASE, m))) for m in METRICS},
                "seeds": len(seeds), "item_encodings": found[0]["item_encodings"],
            }  # fmt: skip
    return dict(sorted(rows.items(), key=lambda pair: pair[1]["judge"]["auc"]))


def draw(rows: dict[str, dict], file: Path) -> None:
    """AUC to the right, gain up, with the middle 95 % of the bootstrap."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    axes.axhline(0, color="0.6", linestyle="--", linewidth=0.9)
    for name, row in rows.items():
        gain = row["gains"][METRICS[0]]
        x, y = row["judge"]["auc"], gain["difference"]
        made = name.startswith("oracle,")
        color = "0.45" if made else "tab:blue"
        axes.errorbar(
            x, y, [[y - gain["ci_low"]], [gain["ci_high"] - y]], fmt="o" if made else "D", color=color, capsize=3
        )
        axes.annotate(name, (x, y), xytext=(7, 5), textcoords="offset points", fontsize=8.5, color=color)
    axes.set(xlabel="AUC of the judge", ylabel=f"gain of the encoder over stage 1, {METRICS[0]}")
    axes.margins(0.12)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
