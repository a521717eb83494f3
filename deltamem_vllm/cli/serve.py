"""`deltamem serve`."""

from __future__ import annotations

import os
from typing import Annotated, Final

import typer

PASS_ON: Final = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="Linked checkpoint, or base model: a folder or a Hub id.")
    ],
    adapter: Annotated[
        str | None, typer.Option(help="Adapter of a base model: a folder or a Hub id.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Where sessions are kept: sqlite:///path/to/file.db, redis://host:port/0, or "
            "none for ephemeral memory only. Default: DELTAMEM_STORE, or a file of this user.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the vllm command line and end.")
    ] = False,
) -> None:
    """Serve a model with sessions: sets everything up and runs `vllm serve`.

    All further flags are those of `vllm serve` and are passed on.
    """
    from deltamem_vllm import serve as launching
    from deltamem_vllm.api.settings import ServerSettings

    settings = ServerSettings.from_environment()
    if store is None:
        given = settings.model_fields_set
        store = settings.store if "store" in given else launching.default_store_url()
    launch = launching.plan(model, adapter, store, context.args, os.environ)
    if dry_run:
        typer.echo(launch.shell_line())
        return
    launching.make_folder(store)
    launch.run()
