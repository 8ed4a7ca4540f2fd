"""Draws benchmarks/training.png from what `benchmarks/train.py --json` wrote.

python benchmarks/plot.py benchmarks/results/*.json
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from train import MODES

COLOURS = {"ours_padded": "#8fbf8f", "ours_packed": "#3a7d3a"}


def main(paths: list[str]) -> None:
    figure, axes = plt.subplots(2, len(paths), figsize=(4.2 * len(paths), 5.2), squeeze=False)
    measured = [json.loads(Path(path).read_text()) for path in paths]
    modes = [mode for mode in MODES if any(mode in runs for runs in measured)]
    names = [MODES[mode] for mode in modes]
    colours = [COLOURS.get(mode, "#b0b0b0") for mode in modes]
    for column, (path, runs) in enumerate(zip(paths, measured, strict=True)):
        for row, (figure_name, label) in enumerate(
            (("seconds", "CPU seconds"), ("peak_mib", "peak MiB"))
        ):
            panel = axes[row][column]
            values = [runs[mode][figure_name] if mode in runs else 0 for mode in modes]
            bars = panel.barh(names, values, color=colours)
            text = [
                f"{value:,.{1 if figure_name == 'seconds' else 0}f}" if value else "not run"
                for value in values
            ]
            panel.bar_label(bars, text, padding=2, fontsize=8)
            panel.invert_yaxis()
            panel.margins(x=0.2)
            panel.set_xlabel(label)
            panel.tick_params(axis="y", labelleft=column == 0)
        axes[0][column].set_title(Path(path).stem.replace("_", ", "))
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("training.png"), dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
