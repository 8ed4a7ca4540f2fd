"""PNG files: lengths, losses. Labels are English, or Japanese for a person whose locale is."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

JAPANESE = {
    "tokens": "事例の長さ (トークン数)",
    "examples": "事例数",
    "median": "中央値",
    "maximum": "上限",
    "step": "ステップ",
    "loss": "損失",
    "training": "学習データ",
    "evaluation": "評価データ",
    "training loss": "学習データの損失",
    "evaluation loss": "評価データの損失",
    "percent": "スコア (%)",
}


def plot_lengths(lengths: NDArray[np.int64], max_length: int, folder: Path) -> None:
    """token_lengths.png: histogram of example lengths in tokens."""
    plt, median = pyplot(), np.median(lengths)
    figure, axes = plt.subplots(figsize=(8, 4.5))
    axes.hist(lengths, bins=60, color="#4c72b0")
    axes.axvline(median, color="#dd8452", label=f"{label('median')} {median:.0f}")
    axes.axvline(max_length, color="#c44e52", ls="--", label=f"{label('maximum')} {max_length}")
    axes.set_xlabel(label("tokens"))
    axes.set_ylabel(label("examples"))
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / "token_lengths.png", dpi=120)
    plt.close(figure)


def plot_losses(metrics: list[dict[str, Any]]) -> bytes | None:
    """A PNG of training and evaluation loss over the steps; None where nothing was logged.

    In English, as the model card in which it stands.
    """
    curves = [
        ("training", "loss", "-"),
        ("evaluation", "eval_loss", "o--"),
    ]
    points = {key: [(e["step"], e[key]) for e in metrics if key in e] for _, key, _ in curves}
    if not any(points.values()):
        return None
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for name, key, style in curves:
        if points[key]:
            axes.plot(*zip(*points[key], strict=True), style, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    figure.tight_layout()
    stream = io.BytesIO()
    # Without the name of the software: the same bytes with every version that draws alike.
    figure.savefig(stream, dpi=120, metadata={"Software": None})
    plt.close(figure)
    return stream.getvalue()


def label(text: str) -> str:
    """The text, or its Japanese where the person's locale is Japanese."""
    return JAPANESE[text] if is_japanese() else text


def is_japanese() -> bool:
    """As gettext finds the language of messages: the first variable that is set decides."""
    names = ("LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG")
    return next((os.environ[name] for name in names if os.environ.get(name)), "").startswith("ja")


def pyplot() -> Any:
    """matplotlib.pyplot that draws to files, with fonts that have kana and kanji."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import matplotlib_fontja

    matplotlib_fontja.japanize()
    return plt
