"""`deltamem adapter ...`: inspect, convert and link adapters."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from deltamem_vllm.cli.common import console, readable_bytes
from deltamem_vllm.config import DELTA_HEADS

if TYPE_CHECKING:
    from deltamem_vllm.adapter import Adapter, BackboneShape


class Form(StrEnum):
    """The two forms of an adapter's weights."""

    safetensors = "safetensors"
    reference = "reference"


adapter_app = typer.Typer(
    no_args_is_help=True, help="Inspect, convert and link delta-mem adapters."
)

AdapterArgument = Annotated[str, typer.Argument(help="Adapter: a folder or a Hub id.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace what an earlier call made there.")
]


@adapter_app.command("inspect")
def inspect_adapter(
    path: AdapterArgument,
    base: Annotated[
        str | None, typer.Option(help="Also check that it fits this base: a folder or a Hub id.")
    ] = None,
) -> None:
    """Check an adapter and show what it is."""
    from deltamem_vllm.adapter import BackboneShape, load_adapter, resolve_base_dir

    backbone = None
    if base is not None:
        backbone = BackboneShape.from_dir(resolve_base_dir(base, config_only=True))
    adapter = load_adapter(path, backbone=backbone)
    # Facts are lines of their own, however long: cutting a path or a fingerprint helps nobody.
    for name, value in _facts(adapter, base, backbone).items():
        typer.echo(f"{name:<19}{value}")
    out = console()
    out.print("\nNorms of the active delta heads, by layer:")
    out.print(_layer_table(adapter))
    if adapter.is_inert:
        out.print("All active delta heads are zero: the model will answer as its base does.")


@adapter_app.command("convert")
def convert_adapter(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Adapter: a folder or a Hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[Form, typer.Option(help="The form to write.")] = Form.safetensors,
    overwrite: OverwriteOption = False,
) -> None:
    """Write an adapter in the other form; config and tensors stay exactly the same."""
    from deltamem_vllm.adapter import load_adapter, save_adapter

    adapter = load_adapter(source)
    save_adapter(adapter, out, form=to.value, overwrite=overwrite)
    typer.echo(f"wrote {out} ({to.value}, fingerprint {adapter.fingerprint})")


@adapter_app.command("link")
def link(
    base: Annotated[str, typer.Argument(help="Base model: a folder or a Hub id.")],
    adapter: AdapterArgument,
    out: Annotated[Path, typer.Argument(help="The checkpoint folder to make.")],
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the base's files instead of linking to them.")
    ] = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Join a base model and an adapter into a checkpoint folder that vLLM serves."""
    from deltamem_vllm.adapter import link_checkpoint
    from deltamem_vllm.models.registry import ARCHITECTURES

    made = link_checkpoint(
        base, adapter, out, architectures=ARCHITECTURES, copy=copy, overwrite=overwrite
    )
    typer.echo(f"linked {made}; serve it with:")
    typer.echo(f"vllm serve {shlex.quote(str(made))}")


def _facts(adapter: Adapter, base: str | None, backbone: BackboneShape | None) -> dict[str, str]:
    """What an adapter is, by name."""
    from deltamem_vllm.adapter import format_ranges

    config = adapter.config
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in adapter.tensors.values()})
    facts = {
        "source": str(adapter.source),
        "strategy": f"{config.strategy} ({config.memory_write_granularity} writes)",
        "update": f"{config.state_update_mode}"
        + ("" if config.couple_lambda else ", own lambda gate")
        + (", gate per row" if config.rankwise_gates else ", gate per state"),
        "rank": f"{config.rank}, {config.num_state_heads} state head(s), alpha {config.alpha:g}",
        "delta heads": ", ".join(config.delta_heads) or "none",
        "layers": f"{len(adapter.layer_indices)} ({format_ranges(adapter.layer_indices)})",
        "parameters": f"{adapter.num_parameters:,} ({', '.join(dtypes)})",
        "size": readable_bytes(adapter.num_bytes),
        "state per session": readable_bytes(adapter.state_bytes),
        "fingerprint": adapter.fingerprint,
    }
    if backbone is not None:
        facts["fits"] = f"{base} ({backbone})"
    return facts


def _layer_table(adapter: Adapter) -> Table:
    table = Table()
    table.add_column("layer", justify="right")
    heads = [head for head in DELTA_HEADS if head in adapter.config.delta_heads]
    for head in heads:
        table.add_column(f"|D{head}|", justify="right")
    for index in adapter.layer_indices:
        norms = _delta_norms(adapter, index)
        table.add_row(str(index), *(f"{norms.get(head, 0.0):.4g}" for head in heads))
    return table


def _delta_norms(adapter: Adapter, index: int) -> dict[str, float]:
    """Frobenius norms of a layer's active delta heads, those that are zero left out."""
    weights = adapter.layer(index)
    norms: dict[str, float] = {}
    for head in DELTA_HEADS:
        delta = weights.delta(head)
        if delta is not None and bool(delta.any()):
            norms[head] = float(delta.float().norm())
    return norms
