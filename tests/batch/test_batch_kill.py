"""The `deltamem batch` command, killed in the middle, and run again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from deltamem_vllm import MemoryLLM
from deltamem_vllm.batch import job
from deltamem_vllm.batch.output import read_results
from deltamem_vllm.sessions import open_store
from tests.batch.rows import ADAPTER, ENGINE_ARGS, mixed_rows, names, plain, spec_of, write_jsonl
from tests.batch.test_batch_runs import states
from tests.helpers import assert_states_close
from tests.sessions.servers import RedisProcess

COMMAND = "import sys; from deltamem_vllm.cli import main; sys.argv[0] = 'deltamem'; main()"

SESSIONS = 32


def start(arguments: Sequence[str | Path], log: Path) -> subprocess.Popen[bytes]:
    # So that what the killed run locked is free soon.
    settings = {"DELTAMEM_LEASE_SECONDS": "3"}
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, "batch", *map(str, arguments)],
            env={**os.environ, **settings},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def num_lines(folder: Path) -> int:
    return sum(part.read_bytes().count(b"\n") for part in folder.glob("part-*.jsonl"))


@pytest.fixture(params=["sqlite", "redis"])
def killed_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite://{tmp_path}/sessions.db"
        return
    (tmp_path / "redis").mkdir()
    server = RedisProcess(tmp_path / "redis")
    yield server.url()
    server.stop()


@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    llm: MemoryLLM,
    checkpoint: Path,
    store: str,
    tmp_path: Path,
    killed_store: str,
) -> None:
    rows = mixed_rows(SESSIONS)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    job.run(path, tmp_path / "whole", spec_of(checkpoint, store), llm=llm)
    expected = states(llm, names(rows))

    arguments: list[str | Path] = [path, tmp_path / "out", "--model", checkpoint]
    arguments += ["--adapter", ADAPTER, "--store", killed_store, "--in-flight", "8"]
    arguments += ["--sampling", '{"temperature": 0, "max_tokens": 12, "ignore_eos": true}']
    for name, value in ENGINE_ARGS.items():
        arguments += ["--set", f"{name}={json.dumps(value)}"]
    log = tmp_path / "log"
    for least in (len(rows) // 4, len(rows) // 2):
        process = start(arguments, log)
        try:
            while num_lines(tmp_path / "out") < least:
                assert process.poll() is None, log.read_text()[-3000:]
                time.sleep(0.01)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert least <= num_lines(tmp_path / "out") < len(rows)
    assert start(arguments, log).wait() == 0, log.read_text()[-3000:]

    assert plain(read_results(tmp_path / "out")) == plain(read_results(tmp_path / "whole"))
    killed = open_store(killed_store)
    service = llm._service
    for name, snapshot in expected.items():
        record = killed.get(service.key(name, None))
        assert record.version == snapshot.version
        assert record.content.tokens_written == snapshot.tokens_written
        assert list(record.content.pending_token_ids) == snapshot.pending_token_ids
        assert_states_close(service.shape.unpack(record.content.state), snapshot.state)
    killed.close()
