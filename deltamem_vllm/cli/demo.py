"""`deltamem demo`."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Annotated

import typer

from deltamem_vllm.cli.common import console


def demo(
    conversations: Annotated[
        int,
        typer.Option("-n", "--conversations", min=2, help="Conversations per row of the table."),
    ] = 100,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
) -> None:
    """Tell a small model facts, delete them, and ask: the answers come from memory alone."""
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise FileNotFoundError(f"{json_file.parent}: no such folder, so --json could not write")
    # Read by vLLM when it is imported: one process, a small KV cache, and only its warnings.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    out = console()
    out.print("Loading vLLM ...")
    warnings.simplefilter("ignore", FutureWarning)
    from deltamem_vllm.demo import run

    report = run.run(conversations, out)
    out.print(run.table(report))
    out.print(run.WEAKNESSES)
    if json_file is not None:
        json_file.write_text(json.dumps(report.summary(), indent=1) + "\n", encoding="utf-8")
