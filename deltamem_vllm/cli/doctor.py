"""`deltamem doctor`."""

from __future__ import annotations

from typing import Annotated, Final

import typer
from rich.markup import escape

from deltamem_vllm.cli.common import console

WRONG: Final = 1
"""Exit code if anything is wrong."""

COLOURS: Final = {"ok": "green", "note": "yellow", "wrong": "red"}


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(help="Also check this model and its adapter: a folder or a Hub id."),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Adapter of a base model: a folder or a Hub id.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(help="The session store's URL; default: that of `deltamem serve`."),
    ] = None,
    integrity: Annotated[
        bool,
        typer.Option("--integrity", help="Also go through everything in the store."),
    ] = False,
) -> None:
    """Check installation, settings, store and adapter; say what is wrong and what to do."""
    from deltamem_vllm.doctor import Status, examine

    out = console()
    wrong = 0
    for finding in examine(model, adapter, store, integrity=integrity):
        colour = COLOURS[finding.status]
        out.print(
            f"[{colour}]{finding.status:<6}[/{colour}] {finding.subject:<14}{escape(finding.fact)}",
            soft_wrap=True,
        )
        if finding.advice:
            out.print(f"{'':<21}{escape(finding.advice)}", soft_wrap=True)
        wrong += finding.status is Status.wrong
    out.print("Nothing is wrong." if not wrong else f"{wrong} thing(s) to mend.")
    if wrong:
        raise typer.Exit(WRONG)
