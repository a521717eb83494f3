"""`deltamem sessions rebuild`: write sessions anew from their transcripts, on a running server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.markup import escape
from rich.table import Table

from deltamem_vllm.cli.common import console
from deltamem_vllm.errors import RebuildError, TranscriptError

if TYPE_CHECKING:
    from rich.progress import Progress

    from deltamem_vllm.rebuild import Outcome

FAILED: Final = 1
INTERRUPTED: Final = 130


def rebuild(
    path: Annotated[
        Path, typer.Argument(metavar="TRANSCRIPTS", help="A JSONL file, or a folder of *.jsonl.")
    ],
    url: Annotated[
        str, typer.Option("--url", help="The server, which serves the new model.")
    ] = "http://localhost:8000",
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="VLLM_API_KEY", help="The server's key.")
    ] = None,
    header: Annotated[
        list[str] | None,
        typer.Option("--header", help='Another header, "NAME: VALUE": a tenant, say. Repeatable.'),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="The served model, if it is a LoRA.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Sessions at a time.")] = 8,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Write sessions that are there already anew, unless they hold more messages.",
        ),
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Send nothing if a line is bad.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and count the transcripts; send nothing.")
    ] = False,
) -> None:
    """Write sessions from transcripts, after a new model or adapter was deployed.

    Run it again after an interruption: it goes on, and writes no session twice.
    """
    from deltamem_vllm.transcripts import Reader, transcript_files

    headers = _headers(header or [], api_key)
    reader = Reader(transcript_files(path))
    sessions = messages = 0
    for transcript in reader:
        sessions += 1
        messages += len(transcript.messages)
    bad = list(reader.problems)
    for problem in bad:
        typer.echo(f"bad line: {problem}", err=True)
    if bad and strict:
        raise TranscriptError(f"{len(bad):,} bad lines; nothing was sent.")
    typer.echo(f"{sessions:,} sessions, {messages:,} messages, {len(bad):,} bad lines")
    if dry_run:
        raise typer.Exit(FAILED if bad else 0)

    outcomes: list[Outcome] = []
    with _progress() as progress:
        task = progress.add_task("sessions", total=sessions, tokens=0, failed=0)

        def on_tokens(count: int) -> None:
            progress.update(task, tokens=progress.tasks[0].fields["tokens"] + count)

        def on_outcome(outcome: Outcome) -> None:
            outcomes.append(outcome)
            failed = progress.tasks[0].fields["failed"] + (outcome.result == "failed")
            progress.update(task, advance=1, failed=failed)

        from deltamem_vllm.rebuild import Rebuild

        run = Rebuild(
            url,
            headers=headers,
            model=model,
            concurrency=concurrency,
            replace=replace,
            on_tokens=on_tokens,
            on_outcome=on_outcome,
        )
        try:
            asyncio.run(run.run(reader))
        except KeyboardInterrupt:
            progress.stop()
            typer.echo(
                f"interrupted after {len(outcomes):,} sessions. The same command goes on.", err=True
            )
            raise typer.Exit(INTERRUPTED) from None
    _report(outcomes)
    if bad or any(outcome.result == "failed" for outcome in outcomes):
        raise typer.Exit(FAILED)


def _headers(given: list[str], api_key: str | None) -> dict[str, str]:
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    for line in given:
        name, separator, value = line.partition(":")
        if not (separator and name.strip()):
            raise RebuildError('--header takes "NAME: VALUE".')
        headers[name.strip()] = value.strip()
    return headers


def _progress() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]:,} tokens, {task.fields[failed]} failed"),
        TimeElapsedColumn(),
        console=console(),
    )


def _report(outcomes: list[Outcome]) -> None:
    written = [outcome for outcome in outcomes if outcome.result == "written"]
    skipped = [outcome for outcome in outcomes if outcome.result == "skipped"]
    failed = [outcome for outcome in outcomes if outcome.result == "failed"]
    tokens = sum(outcome.tokens for outcome in written)
    typer.echo(
        f"written {len(written):,} ({tokens:,} tokens), skipped {len(skipped):,} that are there "
        f"already, failed {len(failed):,}"
    )
    if failed:
        table = Table("session", "failed because")
        for outcome in failed:
            table.add_row(escape(outcome.session), escape(outcome.reason))
        console().print(table)
