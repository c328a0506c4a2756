"""What each factor of runs.csv adds, seeds as pairs: `python experiments/div_factor/effects.py`."""

import csv
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev

METRIC = "val/accuracy"
FACTORS = ("scheduler.div_factor", "scheduler.pct_start")
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided 95%, for 2 to 5 seeds


def level_means(runs: list[dict[str, str]], factor: str) -> dict[str, list[float]]:
    """For each level of the factor the mean accuracy (%) of every seed, over the levels of the other factor."""
    seeds = sorted({run["seed"] for run in runs})
    levels = sorted({run[factor] for run in runs}, key=float)
    return {
        level: [
            mean(float(run[METRIC]) for run in runs if run["seed"] == seed and run[factor] == level) for seed in seeds
        ]
        for level in levels
    }


def main() -> None:
    """Print the means of each level and the differences between levels, paired by seed, with their 95% intervals."""
    with (Path(__file__).parent / "runs.csv").open(newline="") as file:
        runs = list(csv.DictReader(file))
    for factor in FACTORS:
        by_level = level_means(runs, factor)
        for level, accuracies in by_level.items():
            print(f"{factor}={float(level):.4g}: {mean(accuracies):.2f}%")
        for first, second in combinations(by_level, 2):
            pairs = [b - a for a, b in zip(by_level[first], by_level[second], strict=True)]
            half = T_95[len(pairs)] * stdev(pairs) / len(pairs) ** 0.5
            each = ", ".join(f"{pair:+.2f}" for pair in pairs)
            print(f"  {float(second):.4g} over {float(first):.4g}: {mean(pairs):+.2f} ± {half:.2f} (by seed: {each})")
    by_seed = {seed: [float(run[METRIC]) for run in runs if run["seed"] == seed] for seed in {r["seed"] for r in runs}}
    for seed, accuracies in sorted(by_seed.items()):
        print(f"seed={seed}: {mean(accuracies):.2f}% over {len(accuracies)} runs")


if __name__ == "__main__":
    main()
