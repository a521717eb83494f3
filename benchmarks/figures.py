"""Plots of benchmarks, by matplotlib: a row of panels, written as PNG or SVG."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import progress


def check_plot(file: Path | None) -> None:
    """Look, before anything is measured, whether a plot could be written; None: none is wanted.

    Raises:
        SystemExit: it could not.
    """
    if file is None:
        return
    if file.suffix not in (".png", ".svg"):
        sys.exit(f"--plot {file}: a name that ends in .png or .svg is needed")
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("--plot needs matplotlib: pip install 'deltamem-vllm[bench]'")


def figure(panels: int, title: str) -> tuple[Any, list[Any]]:
    """A figure and its panels, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chart, axes = pyplot.subplots(
        1, panels, figsize=(5.2 * panels, 4.2), layout="constrained", squeeze=False
    )
    chart.suptitle(title, fontsize=10)
    for panel in axes[0]:
        panel.grid(alpha=0.3)
    return chart, list(axes[0])


def save(chart: Any, file: Path) -> None:
    """Write a figure; the file's ending says whether as PNG or SVG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    chart.savefig(file, dpi=120)
    progress.print(f"wrote {file}")
