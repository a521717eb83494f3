"""`deltamem batch`: a file of rows in, a folder of results out."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from deltamem_vllm.cli.common import console
from deltamem_vllm.errors import BatchError, DeltaMemError

FAILED: Final = 1
INTERRUPTED: Final = 130


def batch(
    source: Annotated[
        Path,
        typer.Argument(metavar="IN", help="A .jsonl or .parquet file, or a folder of them."),
    ],
    output: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="A folder. One that holds an earlier run goes on."),
    ],
    model: Annotated[
        str, typer.Option(help="Linked checkpoint, or base model: a folder or a Hub id.")
    ],
    adapter: Annotated[
        str | None, typer.Option(help="Adapter of a base model: a folder or a Hub id.")
    ] = None,
    store: Annotated[
        str,
        typer.Option(
            help="Where sessions are kept: sqlite:///path/to/file.db, redis://host:port/0, or "
            "none for sessions that end with the run."
        ),
    ] = "none",
    tenant: Annotated[str | None, typer.Option(help="Whose sessions they are.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Engines; more than one run on Ray.")] = 1,
    in_flight: Annotated[
        int | None,
        typer.Option(min=1, help="Rows at a time in an engine.", show_default="as it batches"),
    ] = None,
    sampling: Annotated[
        str, typer.Option(help="For rows that say nothing else: a JSON object.")
    ] = "{}",
    cpus: Annotated[
        float | None,
        typer.Option(
            "--cpus-per-engine", min=0, help="On Ray.", show_default="an equal part of a node"
        ),
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(help="As of vllm serve.")] = None,
    dtype: Annotated[str | None, typer.Option(help="As of vllm serve.")] = None,
    tensor_parallel_size: Annotated[int | None, typer.Option(help="As of vllm serve.")] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Any other argument of vllm.LLM. Repeatable."
        ),
    ] = None,
) -> None:
    """Run rows of a file: prompts, chats, whole conversations, texts to remember.

    Run the same command again after an interruption: it goes on, and writes nothing twice.
    """
    from deltamem_vllm.batch.job import BatchSpec, run
    from deltamem_vllm.batch.rows import describe
    from deltamem_vllm.sessions import PUBLIC_TENANT

    named = {
        "max_model_len": max_model_len,
        "dtype": dtype,
        "tensor_parallel_size": tensor_parallel_size,
    }
    spec = BatchSpec(
        model=model,
        adapter=adapter,
        store=store,
        tenant=tenant or PUBLIC_TENANT,
        sampling=_sampling(sampling),
        in_flight=in_flight,
        engine_args={
            **{name: value for name, value in named.items() if value is not None},
            **_settings(sets or []),
        },
    )
    try:
        if concurrency == 1:
            report = run(source, output, spec)
        else:
            from deltamem_vllm.ray import batch as on_ray

            report = on_ray.run(source, output, spec, concurrency=concurrency, cpus=cpus)
    except KeyboardInterrupt:
        typer.echo("interrupted. The same command goes on.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except (DeltaMemError, OSError):
        raise
    except Exception as error:
        # Of the engine. Python would end with the status of a run in which rows failed.
        if not isinstance(error, TypeError | ValueError):
            traceback.print_exc()
        problem = f"{type(error).__name__}: {describe(error)}"
        raise BatchError(f"the run could not go on ({problem}).") from error
    console().print(report.table())
    typer.echo(f"results: {output}/part-*.jsonl, report: {output}/report.json")
    if report.failed:
        typer.echo(f"{report.failed:,} rows failed; their `error` says why.", err=True)
        raise typer.Exit(FAILED)


def _sampling(text: str) -> Any:
    from pydantic import ValidationError

    from deltamem_vllm.batch.rows import Sampling

    try:
        return Sampling.model_validate_json(text)
    except ValidationError as error:
        problems = "; ".join(
            ".".join([*map(str, item["loc"]), ""]).replace(".", ": ") + item["msg"]
            for item in error.errors()
        )
        raise BatchError(f"--sampling is not valid: {problems}.") from None


def _settings(pairs: list[str]) -> dict[str, Any]:
    """`name=value`, the value as YAML has it: numbers, true, lists, JSON objects, else text."""
    import yaml

    found = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not (separator and name.isidentifier()):
            raise BatchError(f"--set takes NAME=VALUE, such as max_num_seqs=64, not {pair!r}.")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise BatchError(f"--set {pair}: the value is not valid YAML.") from None
    return found
