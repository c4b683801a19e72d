"""The curves of a run as a PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def plot_curves(
    curves: Mapping[str, Sequence[float]], path: Path, *, title: str, xlabel: str, smooth: int = 1
) -> None:
    """Write named curves as PNG, on a logarithmic axis; `smooth` is the width of a running mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in curves.items():
        width = max(1, min(smooth, len(values) // 4))
        y = np.convolve(np.asarray(values, float), np.ones(width) / width, mode="valid")
        axes.plot(np.arange(len(y)) + width, y, label=name)
    axes.set(title=title, xlabel=xlabel, yscale="log")
    axes.grid(alpha=0.3)
    if curves:
        axes.legend()
    figure.savefig(path, dpi=120)
