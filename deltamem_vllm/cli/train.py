"""`deltamem train`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import typer

if TYPE_CHECKING:
    from deltamem_vllm.training.settings import TrainSettings

INTERRUPTED: Final = 130


def train(settings: TrainSettings) -> None:
    """Train an adapter for a backbone on conversations with questions.

    Run the same command again after an interruption: it goes on. docs/training.md tells the format.
    """
    from deltamem_vllm.training.run import TrainingRun

    try:
        outcome = TrainingRun(settings, typer.echo).run()
    except KeyboardInterrupt:
        typer.echo("interrupted. The same command goes on.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    assert outcome is not None
    typer.echo(
        f"wrote {settings.out} (fingerprint {outcome.adapter.fingerprint}): step "
        f"{outcome.best.step} of {outcome.state.step}, held-out loss {outcome.best.loss:.4f}, "
        f"answers exactly right {outcome.best.exact:.3f}"
    )
