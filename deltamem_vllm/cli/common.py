"""What all commands share: readable errors, a console, sizes for a reader."""

from __future__ import annotations

import errno
import sys
from typing import Any, Final

import typer
from rich.console import Console
from typer.core import TyperGroup

from deltamem_vllm.errors import DeltaMemError

USAGE_ERROR: Final = 2

WIDTH_WITHOUT_TERMINAL: Final = 140
"""Columns of what is printed into a file or a pipe."""


class ReadableErrors(TyperGroup):
    """A command group that prints our errors, and the file system's, without a stack trace."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (DeltaMemError, OSError) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(USAGE_ERROR) from None


def console() -> Console:
    """Where tables go: as wide as the terminal, or wide enough to cut nothing that matters."""
    return Console(width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL, highlight=False)


def readable_bytes(count: int) -> str:
    """A size in KiB, MiB or GiB, and in bytes."""
    if count < 1 << 20:
        return f"{count / 1024:.4g} KiB ({count:,} bytes)"
    if count >= 1 << 30:
        return f"{count / (1 << 30):,.1f} GiB ({count:,} bytes)"
    return f"{count / (1 << 20):.4g} MiB ({count:,} bytes)"
