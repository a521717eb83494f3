"""The `deltamem` command: a thin layer that parses, calls the library and prints.

An error that a user can cause ends as one `error: ...` on stderr and exit code 2, never as a
stack trace. Commands import what they need when they run, so that `--help` does not wait for torch.
"""

from __future__ import annotations

from typing import Annotated

import typer

from deltamem_vllm import __version__
from deltamem_vllm.cli.adapter import adapter_app
from deltamem_vllm.cli.batch import batch
from deltamem_vllm.cli.common import ReadableErrors
from deltamem_vllm.cli.demo import demo
from deltamem_vllm.cli.doctor import doctor
from deltamem_vllm.cli.flags import command_of
from deltamem_vllm.cli.plan import plan
from deltamem_vllm.cli.rebuild import rebuild
from deltamem_vllm.cli.serve import PASS_ON, serve
from deltamem_vllm.cli.sessions import sessions_app
from deltamem_vllm.cli.train import train
from deltamem_vllm.errors import TrainingError
from deltamem_vllm.training.settings import TrainSettings

app = typer.Typer(
    cls=ReadableErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="delta-mem for vLLM: models with a small, durable memory per session.",
)
app.command("serve", context_settings=PASS_ON)(serve)
app.command("batch")(batch)
app.command("plan")(plan)
app.command("doctor")(doctor)
app.command("demo")(demo)
app.command("train")(command_of(TrainSettings, train, TrainingError))
app.add_typer(adapter_app, name="adapter")
sessions_app.command("rebuild")(rebuild)
app.add_typer(sessions_app, name="sessions")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"deltamem-vllm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Options of the command itself."""


def main() -> None:
    """Entry point of the `deltamem` command."""
    app()
