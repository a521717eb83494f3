"""What a finished run tells: the model card and the plot of its loss."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
import transformers

from deltamem_vllm import __version__
from deltamem_vllm.adapter import Adapter, format_ranges
from deltamem_vllm.adapter.files import write_atomically
from deltamem_vllm.training.checkpoint import Evaluation, RunState
from deltamem_vllm.training.settings import TrainSettings

CARD: Final = "README.md"
PLOT: Final = "loss.png"
SMOOTHED: Final = 25
"""Steps whose mean a point of the plotted curve is."""


def write_plot(out: Path, state: RunState) -> bool:
    """Plot the loss over the steps; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(state.losses) + 1), state.losses, alpha=0.25, label="each step")
    means = [
        sum(part) / len(part)
        for end in range(1, len(state.losses) + 1)
        if (part := state.losses[max(0, end - SMOOTHED) : end])
    ]
    axes.plot(range(1, len(means) + 1), means, label=f"mean of {SMOOTHED} steps")
    looks = state.evaluations
    axes.plot([one.step for one in looks], [one.loss for one in looks], "o-", label="held out")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(out / PLOT, dpi=120)
    return True


def write_card(
    settings: TrainSettings,
    state: RunState,
    best: Evaluation,
    adapter: Adapter,
    counts: Mapping[str, int],
    plotted: bool,
) -> None:
    """Write the adapter's `README.md`: what it is, how it was made, what it reached.

    Args:
        settings: of the run.
        state: all losses.
        best: the look whose parameters the adapter has.
        adapter: as it was written.
        counts: of the data.
        plotted: whether there is a plot to show.
    """
    text = "\n".join(
        [
            "---",
            "library_name: deltamem-vllm",
            "tags: [delta-mem, memory, vllm]",
            *_base_lines(settings.model),
            "---",
            "",
            f"# {adapter.config.strategy} memory for {_name(settings.model)}",
            "",
            *_facts(adapter),
            "",
            "Serve it with",
            "",
            "```bash",
            f"deltamem serve {settings.model} --adapter {settings.out}",
            "```",
            "",
            "## Training",
            "",
            "Histories were written into the memory and their text removed; the loss is on answers",
            "from the state alone. Of the looks at held-out conversations the one with the lowest",
            f"loss gave these weights: step {best.step} of {state.step}, loss {best.loss:.4f}, "
            f"{best.exact:.1%} of the answers",
            "right in every token (given the tokens before).",
            "",
            *([f"![loss]({PLOT})", ""] if plotted else []),
            *_table(counts),
            "",
            *_table(settings.deciding()),
            "",
            f"Made by deltamem-vllm {__version__}, torch {torch.__version__}, transformers "
            f"{transformers.__version__}.",
            "",
        ]
    )
    write_atomically(settings.out / CARD, text.encode())


def _base_lines(model: str) -> list[str]:
    """The base model, where it is one of the Hub; a folder says nothing to others."""
    is_hub_id = not Path(model).expanduser().exists()
    return [f"base_model: {model}"] if is_hub_id else []


def _name(model: str) -> str:
    return Path(model).expanduser().resolve().name if Path(model).exists() else model


def _facts(adapter: Adapter) -> list[str]:
    config = adapter.config
    return [
        f"Rank {config.rank}, {config.num_state_heads} state(s) a layer, one write per "
        f"{config.memory_write_granularity.removesuffix('_mean')}, heads "
        f"{', '.join(config.delta_heads)}, layers {format_ranges(adapter.layer_indices)}.",
        f"{adapter.num_parameters:,} parameters; a session's state has {adapter.state_bytes:,} "
        "bytes.",
        f"Fingerprint `{adapter.fingerprint}`.",
    ]


def _table(values: Mapping[str, object]) -> list[str]:
    rows = [f"| {name} | {value} |" for name, value in values.items() if value not in (None, "")]
    return ["| | |", "|---|---|", *rows]
