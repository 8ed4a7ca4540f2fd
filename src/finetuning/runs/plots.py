"""PNG files: lengths, losses."""

import io
from pathlib import Path
from typing import Any

import numpy as np


def plot_lengths(lengths: list[int], max_length: int, folder: Path) -> None:
    """token_lengths.png: histogram of example lengths in tokens, with Japanese labels."""
    plt = japanese_pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5))
    axes.hist(lengths, bins=60, color="#4c72b0")
    axes.axvline(np.median(lengths), color="#dd8452", label=f"中央値 {np.median(lengths):.0f}")
    axes.axvline(max_length, color="#c44e52", linestyle="--", label=f"上限 {max_length}")
    axes.set_xlabel("トークン数")
    axes.set_ylabel("レコード数")
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / "token_lengths.png", dpi=120)
    plt.close(figure)


def plot_losses(metrics: list[dict[str, Any]]) -> bytes | None:
    """A PNG of the losses over the steps, in training and of the held-out examples; None where nothing was logged."""
    curves = [
        (key, [(e["step"], e[key]) for e in metrics if key in e]) for key in ("loss", "eval_loss")
    ]
    if not any(points for _, points in curves):
        return None
    plt = japanese_pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for (_, points), label, style in zip(
        curves, ("学習データ", "評価データ"), ("-", "o--"), strict=True
    ):
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set_xlabel("ステップ")
    axes.set_ylabel("損失")
    axes.legend()
    figure.tight_layout()
    stream = io.BytesIO()
    figure.savefig(
        stream, dpi=120, metadata={"Software": None}
    )  # the same bytes with every version that draws alike
    plt.close(figure)
    return stream.getvalue()


def japanese_pyplot() -> Any:
    """matplotlib.pyplot that draws to files, with fonts that have kana and kanji."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import matplotlib_fontja

    matplotlib_fontja.japanize()
    return plt
