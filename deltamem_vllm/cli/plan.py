"""`deltamem plan`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltamem_vllm.cli.common import console, readable_bytes
from deltamem_vllm.errors import ConfigError

if TYPE_CHECKING:
    from deltamem_vllm.planning import Backbone, Machine, MemoryShape, Plan, Way, Workload

GIB = 1 << 30
FLAGS = {
    "memory_bytes": "gpu_memory",
    "utilization": "gpu_memory_utilization",
    "overhead_bytes": "overhead",
}
"""Fields whose flags are called otherwise."""

PREFILL_SHARE, DECODE_SHARE = 0.5, 0.7
"""Of a data sheet's numbers, what is reached unless it is said: assumptions, not measurements."""


def plan(
    model: Annotated[
        str, typer.Argument(help="A checkpoint's folder, a Hub id, or a config.json.")
    ],
    adapter: Annotated[
        str | None, typer.Option(help="The adapter; else one is assumed of these settings:")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of the assumed adapter.")] = 8,
    state_heads: Annotated[int, typer.Option(min=1, help="Of it: 1, or 4 for MSW.")] = 1,
    write: Annotated[
        str, typer.Option(help="Of it: token, message_mean or sentence_mean.")
    ] = "token",
    conversations: Annotated[int, typer.Option(min=1, help="That are kept.")] = 1000,
    history: Annotated[int, typer.Option(min=0, help="Tokens of one, before a turn.")] = 8192,
    window: Annotated[int, typer.Option(min=0, help="Tokens of it that a window shows.")] = 512,
    question: Annotated[int, typer.Option(min=1, help="Tokens that a turn adds.")] = 64,
    reply: Annotated[int, typer.Option(min=1, help="Tokens generated in a turn.")] = 128,
    standing: Annotated[
        int, typer.Option(min=0, help="Tokens of a system prompt and tools, the same for all.")
    ] = 0,
    share_prefix: Annotated[
        bool, typer.Option("--share-prefix", help="Turns with memory share those, too.")
    ] = False,
    turns_per_hour: Annotated[float, typer.Option(help="Of one conversation.")] = 4.0,
    versions_kept: Annotated[int, typer.Option(min=1, help="Of a session.")] = 4,
    gpu: Annotated[
        str | None, typer.Option(help="a100-40, a100-80, h100, h200, l4, l40s or rtx4090.")
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(help="GiB of one GPU; else the data sheet's.")
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            help="Reached in a prefill, of one GPU.", show_default="half of the data sheet's"
        ),
    ] = None,
    gb_per_s: Annotated[
        float | None,
        typer.Option(
            help="Reached in a decode step, of one GPU.", show_default="0.7 of the data sheet's"
        ),
    ] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs of a replica.")] = 1,
    utilization: Annotated[
        float, typer.Option("--gpu-memory-utilization", help="As of vllm serve.")
    ] = 0.9,
    overhead: Annotated[
        float, typer.Option(min=0, help="GiB of a GPU for activations and graphs.")
    ] = 2.0,
    block_size: Annotated[int, typer.Option(min=1, help="As of vllm serve.")] = 16,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="As of vllm serve.")] = 256,
    dtype: Annotated[str | None, typer.Option(help="As of vllm serve.")] = None,
    draft_tokens: Annotated[int, typer.Option(min=0, help="Speculated in a step.")] = 0,
    async_scheduling: Annotated[
        bool, typer.Option("--async-scheduling/--no-async-scheduling", help="As of vllm serve.")
    ] = True,
    price_per_hour: Annotated[float, typer.Option(min=0, help="Of one GPU.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw it over histories: .png, .svg.")
    ] = None,
) -> None:
    """What conversations take on GPUs: with their full history, with a window, with a memory.

    Sizes are what the engine allocates and the store keeps. Times are estimates from two numbers of
    the GPU, without what scheduling and HTTP take: measure, and give `--tflops` and `--gb-per-s`.
    """
    from pydantic import ValidationError

    from deltamem_vllm.planning import (
        GPUS,
        Machine,
        MemoryShape,
        Workload,
        make_plan,
        read_backbone,
    )
    from deltamem_vllm.planning.plot import check_plot, draw, plans_over_histories

    if plot is not None:
        check_plot(plot)
        if history < 1:
            raise ConfigError("--plot draws over growing histories: give a --history above 0.")
    sheet = None
    if gpu is not None and (sheet := GPUS.get(gpu.lower())) is None:
        raise ConfigError(f"--gpu {gpu}: expected one of {', '.join(GPUS)}, or its numbers.")
    if sheet is not None:
        gpu_memory = sheet.memory_gib if gpu_memory is None else gpu_memory
        tflops = PREFILL_SHARE * sheet.tflops if tflops is None else tflops
        gb_per_s = DECODE_SHARE * sheet.gb_per_s if gb_per_s is None else gb_per_s
    if gpu_memory is None or tflops is None or gb_per_s is None:
        raise ConfigError("give --gpu, or all of --gpu-memory, --tflops and --gb-per-s.")
    backbone = read_backbone(model, dtype)
    memory = MemoryShape(
        *_memory_of(model, adapter, rank, state_heads, write, backbone),
        steps_in_flight=2 if async_scheduling else 1,
        draft_tokens=draft_tokens,
    )
    count = tensor_parallel_size
    try:
        machine = Machine(
            memory_bytes=gpu_memory * GIB * count,
            utilization=utilization,
            overhead_bytes=overhead * GIB,
            gpus=count,
            tflops=tflops * count,
            gb_per_s=gb_per_s * count,
            max_requests=max_num_seqs,
            price_per_hour=price_per_hour * count,
        )
        work = Workload(
            conversations=conversations,
            history=history,
            window=window,
            question=question,
            reply=reply,
            standing=standing,
            share_prefix=share_prefix,
            turns_per_hour=turns_per_hour,
            versions_kept=versions_kept,
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        raise ConfigError(
            f"--{FLAGS.get(field, field).replace('_', '-')}: {first['msg']}"
        ) from None
    longest = standing + history + question + reply
    made = make_plan(backbone, memory, work, machine, block_size)
    if as_json:
        typer.echo(json.dumps(_as_dict(made, backbone, work, machine), indent=2))
    else:
        _show(made, backbone, memory, work, machine, block_size)
        if backbone.max_context and longest > backbone.max_context:
            console().print(
                f"[yellow]note[/yellow] {longest:,} tokens are beyond the model's context of "
                f"{backbone.max_context:,}: its full history cannot be shown at all."
            )
    if plot is not None:
        plans = plans_over_histories(backbone, memory, work, machine, block_size)
        draw(plans, f"{model} on {count} x {gpu or 'GPU'}", plot)


def _memory_of(
    model: str, adapter: str | None, rank: int, heads: int, write: str, backbone: Backbone
) -> tuple[Any, int]:
    """Configuration of the adapter, and its number of layers."""
    from deltamem_vllm.adapter import load_adapter, resolve_adapter_dir
    from deltamem_vllm.adapter.backbone import read_base_config
    from deltamem_vllm.config import DeltaMemConfig
    from deltamem_vllm.models.overrides import adapter_to_serve
    from deltamem_vllm.models.registry import MODEL_CLASSES

    if adapter is not None:
        loaded = load_adapter(resolve_adapter_dir(adapter), backbone=backbone.shape)
        return loaded.config, len(loaded.layer_indices)
    folder = Path(model).expanduser()
    if folder.is_dir() and (read_base_config(folder).get("architectures") or [None])[0] in (
        MODEL_CLASSES
    ):
        linked = adapter_to_serve(str(folder), None)
        return linked.config, len(linked.layer_indices)
    fields = {"rank": rank, "num_state_heads": heads, "memory_write_granularity": write}
    return DeltaMemConfig.from_dict(fields), backbone.shape.num_layers


def _as_dict(made: Plan, backbone: Backbone, work: Workload, machine: Machine) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "model": asdict(backbone),
        "machine": machine.model_dump(),
        "workload": work.model_dump(),
        "plan": {**asdict(made), "block": made.block._asdict()},
    }


def _show(
    made: Plan,
    backbone: Backbone,
    memory: MemoryShape,
    work: Workload,
    machine: Machine,
    block_size: int,
) -> None:
    from rich.table import Table

    from deltamem_vllm.planning.plot import TITLES

    out = console()
    sizes = Table(title="Sizes", show_header=False)
    sizes.add_column(no_wrap=True)
    sizes.add_column(justify="right")
    block = made.block
    for name, value in (
        ("weights", readable_bytes(backbone.weight_bytes)),
        ("keys and values of a token", readable_bytes(made.kv_bytes_per_token)),
        (f"a block of {block_size} tokens, of one GPU", readable_bytes(block.total)),
        ("of it, state pages", f"{block.state_pages / block.total:.2%}"),
        ("states of a conversation", readable_bytes(made.state_bytes)),
        (f"store, {work.conversations:,} sessions", readable_bytes(made.store_bytes)),
        ("KV cache of a replica", readable_bytes(int(made.kv_cache_bytes))),
        (f"keys and values of {work.conversations:,} histories", readable_bytes(
            work.conversations * work.history * made.kv_bytes_per_token)),
    ):  # fmt: skip
        sizes.add_row(name, value)
    out.print(sizes)
    asked = f"{work.turns_per_second:,.2f} turns a second asked for"
    table = Table(title=f"A turn after {work.history:,} tokens; {asked}")
    table.add_column("", no_wrap=True)
    for way in made.ways:
        table.add_column(TITLES[way.name], justify="right")

    def number(value: int | None) -> str:
        return "-" if value is None else f"{value:,}"

    rows: tuple[tuple[str, Callable[[Way], str]], ...] = (
        ("prompt tokens", lambda way: f"{way.prompt_tokens:,}"),
        ("of them computed", lambda way: f"{way.computed_tokens:,}"),
        ("KV cache blocks of a turn", lambda way: f"{way.blocks_per_turn:,}"),
        (
            "of them held once for all turns",
            lambda way: f"{way.shared_blocks:,}" if way.shared_blocks else "-",
        ),
        ("turns at once in a replica", lambda way: f"{way.turns_at_once:,}"),
        ("conversations kept warm in one", lambda way: number(way.warm_conversations)),
        ("replicas that keep all warm", lambda way: number(way.replicas_to_keep_warm)),
        (
            "KiB at rest, a conversation",
            lambda way: f"{way.rest_bytes / 1024:,.1f}" if way.rest_bytes else "-",
        ),
        ("to the first token, alone", lambda way: f"{1000 * way.first_token_s:,.1f} ms"),
        ("replicas kept busy", lambda way: f"{way.replicas:,.3g}"),
        ("price of 1,000 turns", lambda way: f"{way.price_per_1000_turns:,.3g}"),
    )
    for name, figure in rows:
        table.add_row(name, *(figure(way) for way in made.ways))
    out.print(table)
