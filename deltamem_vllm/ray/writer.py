"""Where the engines of a batch on Ray put their results: one writer of the output folder."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from deltamem_vllm.batch.output import Output
from deltamem_vllm.batch.report import Report, Tally
from deltamem_vllm.batch.rows import Result
from deltamem_vllm.errors import BatchError

RETRIES: Final = 3
"""Of a bundle whose actor died, before the run gives up."""


class Writer:
    """The output folder of a run, in an actor on the driver's machine.

    Args:
        folder, settings: see `Output`.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._folder = folder
        self._settings = settings
        self._open = ExitStack()
        self._tally = Tally()
        self._num_new = 0
        self._is_running = False
        self._tries: dict[int, int] = {}
        self._failure: str | None = None

    def begin(self) -> tuple[str, set[str]]:
        """The job's name, and keys of rows that are finished.

        Not in the constructor, whose errors Ray wraps up in text.
        """
        self._output = self._open.enter_context(Output(self._folder, self._settings))
        return self._output.job.job, self._output.finished

    def finished_of(self, keys: list[str]) -> list[str]:
        """Those of rows that are finished. Asked by an engine that is ready to run the others."""
        if not self._is_running:
            self._is_running = True
            self._output.begin()
            self._tally.start()
        return [key for key in keys if key in self._output.finished]

    def write(self, lines: list[str]) -> None:
        """Put results on the disk."""
        new = self._output.write([Result.model_validate_json(line) for line in lines])
        self._tally.add(new)
        self._num_new += len(new)

    def num_new(self) -> int:
        """Results that this run has put there."""
        return self._num_new

    def try_bundle(self, number: int, rows: str) -> None:
        """Count how often a bundle is begun: Ray begins it anew whenever its actor died.

        Args:
            number: the bundle's.
            rows: which those are, for a reader.

        Raises:
            BatchError: it was too often.
        """
        self._tries[number] = self._tries.get(number, 0) + 1
        if self._tries[number] > 1 + RETRIES:
            raise BatchError(
                f"{1 + RETRIES} engines died over the same {rows}. The messages of Ray's workers "
                "may say why: too little memory, mostly."
            )

    def fail(self, reason: str) -> None:
        """Note what ended the run."""
        self._failure = self._failure or reason

    def failure(self) -> str | None:
        """What `fail` noted."""
        return self._failure

    def end(self, rows_before: int) -> Report:
        """Write the report."""
        report = self._tally.report(rows_before)
        self._output.write_report(report)
        return report

    def close(self) -> None:
        """Let another run write the folder."""
        self._open.close()
