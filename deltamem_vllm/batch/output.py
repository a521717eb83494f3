"""The output folder: what is finished stays finished, whatever is killed.

    job.json            what the batch is, made before its first row; names its turns in the store
    part-00000.jsonl    one `Result` a line; each run of the command appends to a part of its own
    report.json         of the last run

A result is on the disk before the next row that changes its session begins, so that a row which
has to be run again finds the session as it was, or its own turn in it.
"""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

from pydantic import BaseModel, ConfigDict, ValidationError

from deltamem_vllm.batch.rows import Result
from deltamem_vllm.errors import BatchError

JOB_FILE: Final = "job.json"
LOCK_FILE: Final = "lock"
PARTS: Final = "part-*.jsonl"

BEFORE_A_JOB: Final = frozenset({LOCK_FILE, "job.tmp"})
"""What a run that was killed before its first row may leave."""

TAIL_BYTES: Final = 1 << 16
"""Of a part, read at a time from its end."""


class Job(BaseModel):
    """A batch, from its first run to its last."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = 1
    job: str
    """Part of the names of its turns: other batches never get their replies."""

    settings: dict[str, Any]
    """That make the results; the same in each of its runs."""


class Output:
    """An output folder, locked until it is closed.

    Args:
        folder: is made, or holds an earlier run of the same batch, which then goes on.
        settings: see `Job`.

    Raises:
        BatchError: it holds something else, cannot be written, or another process writes it.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._folder = folder
        if folder.is_dir() and not (folder / JOB_FILE).exists() and _holds_more(folder):
            raise BatchError(f"{folder}: holds other files. Give a folder of its own.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / LOCK_FILE).open("w")
        except OSError as error:
            raise BatchError(
                f"{folder}: cannot be written ({error.strerror}). Give a folder that can."
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise BatchError(f"{folder}: another run writes it.") from None
        self._part: BinaryIO | None = None
        self._failure: OSError | None = None
        try:
            self._has_job_file = (folder / JOB_FILE).exists()
            self.job = self._open_job(settings)
            parts = sorted(folder.glob(PARTS))
            for part in parts:
                _cut_torn_end(part)
            self.finished = {result.key for part in parts for result in _results(part)}
            """Keys of rows that have their result."""
        except BaseException:
            self._lock.close()
            raise
        number = 1 + int(parts[-1].stem.partition("-")[2]) if parts else 0
        self._path = folder / f"part-{number:05}.jsonl"

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another run write the folder."""
        try:
            if self._part is not None:
                self._part.close()
        finally:
            self._lock.close()

    def begin(self) -> None:
        """Put the job on the disk, before any row runs; not before an engine is ready, so that a
        run which could not start leaves nothing behind that another must agree with."""
        if not self._has_job_file:
            _replace(self._folder / JOB_FILE, self.job.model_dump_json(indent=2) + "\n")
            self._has_job_file = True

    def write(self, results: Sequence[Result]) -> list[Result]:
        """Put results on the disk; those of rows that have theirs are left out.

        Returns:
            The results that were new.

        Raises:
            OSError: the disk is full, or gone, now or at an earlier call: what is in the part is
                not known then. The rows will be run again.
        """
        assert not self._lock.closed
        if self._failure is not None:
            raise self._failure
        new: dict[str, Result] = {}
        for result in results:
            if result.key not in self.finished:
                new.setdefault(result.key, result)
        if not new:
            return []
        try:
            self._append(b"".join(one.model_dump_json().encode() + b"\n" for one in new.values()))
        except OSError as error:
            self._failure = error
            raise
        self.finished.update(new)
        return list(new.values())

    def _append(self, lines: bytes) -> None:
        self.begin()
        if self._part is None:
            self._part = self._path.open("ab")
            _sync_folder(self._folder)
        self._part.write(lines)
        self._part.flush()
        os.fsync(self._part.fileno())

    def write_report(self, report: BaseModel) -> None:
        """Keep what a run did."""
        self.begin()
        _replace(self._folder / "report.json", report.model_dump_json(indent=2) + "\n")

    def _open_job(self, settings: dict[str, Any]) -> Job:
        path = self._folder / JOB_FILE
        settings = json.loads(json.dumps(settings))
        if not self._has_job_file:
            return Job(job=secrets.token_hex(8), settings=settings)
        try:
            job = Job.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise BatchError(f"{path}: is not a batch of ours ({error}).") from None
        if job.settings != settings:
            names = sorted({*job.settings, *settings})
            different = "; ".join(
                f"{name} was {job.settings.get(name)!r}, is {settings.get(name)!r}"
                for name in names
                if job.settings.get(name) != settings.get(name)
            )
            raise BatchError(
                f"{self._folder}: was begun with other settings: {different}. Go on with those, "
                "or give another folder."
            )
        return job


def read_results(folder: Path) -> Iterator[Result]:
    """The results in an output folder, in the order in which rows were finished.

    Raises:
        BatchError: it holds a line that is none.
    """
    for part in sorted(folder.glob(PARTS)):
        yield from _results(part)


def _results(part: Path) -> Iterator[Result]:
    with part.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return  # being written, or torn by a crash
            try:
                yield Result.model_validate_json(line)
            except ValidationError as error:
                raise BatchError(f"{part}:{number}: is not a result ({error}).") from None


def _cut_torn_end(part: Path) -> None:
    """Remove the half line that a crash left."""
    with part.open("r+b") as file:
        size = whole = begin = file.seek(0, os.SEEK_END)
        while begin:
            begin = max(0, whole - TAIL_BYTES)
            file.seek(begin)
            end_of_line = file.read(whole - begin).rfind(b"\n") + 1
            whole = begin + end_of_line
            if end_of_line:
                break
        if whole < size:
            file.truncate(whole)
            os.fsync(file.fileno())


def _holds_more(folder: Path) -> bool:
    return any(path.name not in BEFORE_A_JOB for path in folder.iterdir())


def _replace(path: Path, text: str) -> None:
    """Write a file wholly, or not at all."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
