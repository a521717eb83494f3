"""A plan over growing histories, drawn by matplotlib."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

from deltamem_vllm.errors import ConfigError
from deltamem_vllm.planning.machine import Machine
from deltamem_vllm.planning.plan import Plan, WayName, make_plan
from deltamem_vllm.planning.sizes import Backbone, MemoryShape
from deltamem_vllm.planning.workload import Workload

TITLES: Final[dict[WayName, str]] = {
    "full_cold": "full history",
    "full_warm": "full history, in the prefix cache",
    "window": "window",
    "memory": "window + memory",
}

SHORTEST: Final = 512


def check_plot(file: Path) -> None:
    """Look, before anything is worked out, whether a plot could be written.

    Raises:
        ConfigError: it could not.
    """
    if file.suffix not in (".png", ".svg"):
        raise ConfigError(f"--plot {file}: give a name that ends in .png or .svg.")
    if not file.parent.is_dir() or file.is_dir():
        raise ConfigError(f"--plot {file}: is a folder, or in none that exists.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'deltamem-vllm[bench]'.")


def plans_over_histories(
    backbone: Backbone,
    memory: MemoryShape,
    workload: Workload,
    machine: Machine,
    block_size: int,
) -> dict[int, Plan]:
    """Plans of histories from `SHORTEST` tokens on, doubling up to the workload's."""
    lengths = [workload.history]
    while lengths[-1] // 2 >= SHORTEST:
        lengths.append(lengths[-1] // 2)
    return {
        length: make_plan(
            backbone, memory, workload.model_copy(update={"history": length}), machine, block_size
        )
        for length in sorted(lengths)
    }


def draw(plans: dict[int, Plan], title: str, file: Path) -> None:
    """Write turns at once, first token and price over the history as PNG or SVG.

    Args:
        plans: by tokens of history.
        title: above the panels.
        file: whose ending says which.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chart, panels = pyplot.subplots(1, 3, figsize=(15.6, 4.2), layout="constrained")
    chart.suptitle(title, fontsize=10)
    parts = (
        ("Turns at once", "turns", "turns_at_once"),
        ("First token of a turn by itself", "seconds", "first_token_s"),
        ("Price of 1,000 turns", "price", "price_per_1000_turns"),
    )
    lengths = list(plans)
    for panel, (heading, label, figure) in zip(panels, parts, strict=True):
        panel.set(title=heading, xlabel="tokens of history", ylabel=label)
        panel.set(xscale="log", yscale="log")
        panel.grid(alpha=0.3)
        for name, said in TITLES.items():
            values = [getattr(plans[length].way(name), figure) for length in lengths]
            panel.plot(lengths, values, marker="o", label=said)
    panels[0].legend(fontsize=8)
    chart.savefig(file, dpi=120)
    pyplot.close(chart)
