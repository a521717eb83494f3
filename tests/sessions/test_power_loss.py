"""What a store acknowledged is there after the power went, on a disk that keeps what was fsynced.

A process writes to a store under a preloaded recorder, see `recorder.c`. Then the power is cut at
many places of the record: each file has what was written to it before its last fsync, and of what
came later nothing, or an arbitrary part with its last write torn.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from deltamem_vllm.errors import DeltaMemError
from deltamem_vllm.sessions.sqlite import SqliteStore
from tests.sessions.crash_worker import OPTIONS, check_acknowledged

COMPILER = next(filter(shutil.which, ("cc", "gcc", "clang")), None)
pytestmark = pytest.mark.skipif(
    COMPILER is None or not sys.platform.startswith("linux"),
    reason="recording what is written to the disk needs a C compiler and LD_PRELOAD",
)

ACKS = "acks"
SECTOR = 512
SECONDS = 1.0
CUTS = 60


class Step(NamedTuple):
    """One line of the record."""

    op: str
    name: str
    offset: int
    data: bytes


class Disk:
    """The files of a folder: what an fsync made safe, and what came after it."""

    def __init__(self, folder: Path) -> None:
        self.safe = {file.name: file.read_bytes() for file in folder.iterdir()}
        self.unsafe: dict[str, list[Step]] = {}

    def do(self, step: Step) -> None:
        if step.op == "unlink":
            self.safe.pop(step.name, None)
            self.unsafe.pop(step.name, None)
        elif step.op == "sync":
            if step.name in self.unsafe:
                steps = self.unsafe.pop(step.name)
                self.safe[step.name] = applied(self.safe.get(step.name, b""), steps)
        else:
            self.unsafe.setdefault(step.name, []).append(step)

    def cut(self, folder: Path, source: random.Random) -> None:
        """Write what is left when the power goes now."""
        folder.mkdir()
        files = dict(self.safe)
        if source.random() < 0.5:
            for name, steps in self.unsafe.items():
                kept = [step for step in steps if source.random() < 0.6]
                if kept and kept[-1].op == "write":
                    whole = kept[-1].data
                    sectors = source.randrange(len(whole) // SECTOR + 1)
                    kept[-1] = kept[-1]._replace(data=whole[: sectors * SECTOR])
                files[name] = applied(files.get(name, b""), kept)
        for name, content in files.items():
            (folder / name).write_bytes(content)


def applied(content: bytes, steps: Sequence[Step]) -> bytes:
    changed = bytearray(content)
    for step in steps:
        if step.op == "truncate":
            del changed[step.offset :]
            changed.extend(bytes(step.offset - len(changed)))
        elif step.data:
            changed.extend(bytes(max(0, step.offset - len(changed))))
            changed[step.offset : step.offset + len(step.data)] = step.data
    return bytes(changed)


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("recorder") / "recorder.so"
    source = Path(__file__).with_name("recorder.c")
    command = [COMPILER, "-O1", "-shared", "-fPIC", source, "-o", library, "-ldl", "-lpthread"]
    subprocess.run([str(part) for part in command], check=True)
    return library


def preloaded(recorder: Path, folder: Path, **settings: str) -> dict[str, str]:
    """The environment of a process whose files in `folder` are watched."""
    return {**os.environ, "LD_PRELOAD": str(recorder), "RECORD_FOLDER": f"{folder}/", **settings}


def recorded(recorder: Path, tmp_path: Path, mutant: str = "") -> tuple[Disk, list[Step]]:
    """Run a writer; its disk before, and all it did."""
    folder, record = tmp_path / "store", tmp_path / "record"
    url = f"sqlite://{folder / 'sessions.db'}"
    SqliteStore(url, OPTIONS).close()
    disk = Disk(folder)
    worker = [sys.executable, "-m", "tests.sessions.crash_worker"]
    subprocess.run(
        [*worker, url, str(folder / ACKS), "0", str(SECONDS), *([mutant] if mutant else [])],
        env=preloaded(recorder, folder, RECORD_FILE=str(record)),
        check=True,
    )
    return disk, list(parsed(record.read_bytes()))


def parsed(record: bytes) -> Iterator[Step]:
    position = 0
    while position < len(record):
        end = record.index(b"\n", position)
        op, name, offset, size = record[position:end].decode().split()
        position = end + 1
        data = record[position : position + int(size)]
        position += len(data)
        yield Step(op, name, int(offset), data)


def check_cuts(disk: Disk, steps: list[Step], tmp_path: Path) -> int:
    """Cut the power at random places, and right after acknowledgements; returns how many of these
    the record has.

    Raises:
        AssertionError, DeltaMemError: something acknowledged is lost.
    """
    source = random.Random(0)
    at_acks = [index for index, step in enumerate(steps) if step.name == ACKS]
    places = {*source.sample(at_acks, min(CUTS // 2, len(at_acks))), len(steps) - 1}
    places |= {*source.sample(range(len(steps)), CUTS // 2)}
    acks: list[dict[str, Any]] = []
    for index, step in enumerate(steps):
        if step.name == ACKS:
            acks += [json.loads(step.data)] if step.op == "write" else []
        else:
            disk.do(step)
        if index in places:
            folder = tmp_path / f"cut-{index}"
            disk.cut(folder, source)
            with SqliteStore(f"sqlite://{folder / 'sessions.db'}", OPTIONS) as store:
                check_acknowledged(store, acks)
            shutil.rmtree(folder)
    return len(at_acks)


def test_power_loss_loses_nothing_acknowledged(recorder: Path, tmp_path: Path) -> None:
    disk, steps = recorded(recorder, tmp_path)
    assert any(step.op == "sync" and step.name.endswith("-wal") for step in steps)
    assert check_cuts(disk, steps, tmp_path) > 20


@pytest.mark.parametrize(
    "mutant", ["without fsync", "reply before commit", "without compare-and-set"]
)
def test_a_broken_promise_is_noticed(recorder: Path, tmp_path: Path, mutant: str) -> None:
    disk, steps = recorded(recorder, tmp_path, mutant)
    with pytest.raises((AssertionError, DeltaMemError)):
        check_cuts(disk, steps, tmp_path)


FAILING_DISK = """
import pathlib, sys
from deltamem_vllm.errors import StoreFullError, StoreUnavailableError
from deltamem_vllm.sessions import SessionContent, SessionKey
from deltamem_vllm.sessions.sqlite import SqliteStore

url, switch, error = sys.argv[1:]
switch = pathlib.Path(switch)
store = SqliteStore(url)
def create(name):
    return store.create(SessionKey("t", "c0ffee00", name), SessionContent(state=bytes(9216)))
create("before")
switch.touch()
for _ in range(2):
    try:
        create("during")
    except (StoreFullError, StoreUnavailableError) as caught:
        assert type(caught).__name__ == error, repr(caught)
    else:
        raise SystemExit("the disk failed and the store said nothing")
store.get(SessionKey("t", "c0ffee00", "before"))
switch.unlink()
create("after")
names = [found.key.name for found in store.list_sessions("t").sessions]
assert names == ["after", "before"], names
store.check_integrity()
store.close()
"""


@pytest.mark.parametrize(
    ("variable", "error"),
    [("RECORD_FULL", "StoreFullError"), ("RECORD_BROKEN", "StoreUnavailableError")],
)
def test_the_store_goes_on_after_the_disk_failed(
    recorder: Path, tmp_path: Path, variable: str, error: str
) -> None:
    folder, switch = tmp_path / "store", tmp_path / "switch"
    url = f"sqlite://{folder / 'sessions.db'}"
    subprocess.run(
        [sys.executable, "-c", FAILING_DISK, url, str(switch), error],
        env=preloaded(recorder, folder, **{variable: str(switch)}),
        check=True,
    )
    with SqliteStore(url) as store:
        assert store.stats().sessions == 2
