"""Two engines on a Ray cluster of this machine, against one engine without Ray."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from deltamem_vllm.adapter import load_adapter
from deltamem_vllm.batch.job import run as run_here
from deltamem_vllm.batch.output import Output, read_results
from deltamem_vllm.errors import BatchError
from deltamem_vllm.sessions import PUBLIC_TENANT, open_store
from deltamem_vllm.state.snapshot import StateShape
from tests.batch.rows import ADAPTER, mixed_rows, names, plain, spec_of, write_jsonl
from tests.helpers import DATA, assert_states_close, with_word_tokenizer
from tests.sessions.servers import RedisProcess

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")

SESSIONS = 16


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two engines find room on it, whatever this machine has."""
    # By default workers let every other program on the machine go first.
    config = {
        "worker_niceness": 0,
        # Else Ray kills its own when others take the machine's memory.
        "memory_monitor_refresh_ms": 0,
        "enable_worker_prestart": False,
        "prestart_worker_first_driver": False,
    }
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _system_config=config)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words") / "model"
    return with_word_tokenizer(DATA / "qwen3_tsw" / "model", folder)


def kill_one(name: str, folder: Path, least: int, killed: list[int]) -> None:
    """Kill the busier of two processes when so many results are there; leaves their number."""
    lines, deadline = 0, time.monotonic() + 600
    while lines < least:
        assert time.monotonic() < deadline
        time.sleep(0.005)
        lines = sum(part.read_bytes().count(b"\n") for part in folder.glob("part-*.jsonl"))
    mine = psutil.Process().children(recursive=True)
    found = [process for process in mine if name in " ".join(process.cmdline())]
    assert len(found) == 2
    # Not the other one, which may still be starting.
    max(found, key=lambda process: process.cpu_times().user).kill()
    killed.append(lines)


@pytest.mark.timeout(300)
def test_an_engine_on_ray_runs_rows_in_order(
    cluster: None, checkpoint: Path, tmp_path: Path
) -> None:
    from deltamem_vllm.ray import batch

    rows = [*mixed_rows(2), {"id": "bad", "prompt": ""}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    store = f"sqlite://{tmp_path}/sessions.db"
    report = batch.run(path, tmp_path / "out", spec_of(checkpoint, store), concurrency=1)
    assert (report.rows, report.failed, report.rows_before) == (len(rows), 1, 0)
    results = {result.id: result for result in read_results(tmp_path / "out")}
    assert "prompt: is empty" in (results.pop("bad").error or "")
    assert all(result.error is None for result in results.values())
    versions = [[0, 0, 0], [0, 0, 0]]
    for number, seen in enumerate(versions):
        ingested = results[f"0/{number}"].ingested
        assert ingested is not None
        last = [results[f"{step}/{number}"].replies[-1].memory or {} for step in (1, 3)]
        seen[:] = [ingested["version"], *(memory["version"] for memory in last)]
        read = results[f"2/{number}a"].replies[0].memory
        assert read is not None and read["version"] == 3
    assert versions == [[1, 3, 4]] * 2


@pytest.mark.timeout(300)
def test_a_run_on_ray_that_cannot_start_says_why_and_binds_nothing(
    cluster: None, checkpoint: Path, tmp_path: Path
) -> None:
    from deltamem_vllm.ray import batch

    path = write_jsonl(tmp_path / "rows.jsonl", [*mixed_rows(1), {"id": "bad"}])
    spec = replace(spec_of(checkpoint, None), adapter="no-such/adapter")
    with pytest.raises(BatchError, match=r"^'no-such/adapter': no such folder"):
        batch.run(path, tmp_path / "out", spec, concurrency=1)
    with Output(tmp_path / "out", {"model": "what was meant"}) as output:
        assert not output.finished
    with pytest.raises(BatchError, match="cannot be written"):
        batch.run(path, path, spec_of(checkpoint, None), concurrency=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kind", "dies"), [("sqlite", "_Bundles"), ("redis", "EngineCore")], ids=["sqlite", "redis"]
)
def test_two_engines_do_what_one_does(
    cluster: None,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    kind: str,
    dies: str,
) -> None:
    """Also if one of them is killed, or the actor that it belongs to."""
    from deltamem_vllm.ray import batch

    rows = [*mixed_rows(SESSIONS), {"id": "bad", "prompt": ""}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    shared = f"sqlite://{tmp_path}/shared.db"
    if kind == "redis":
        (tmp_path / "redis").mkdir()
        server = RedisProcess(tmp_path / "redis")
        request.addfinalizer(server.stop)
        shared = server.url()
    spec = spec_of(checkpoint, shared)
    monkeypatch.setenv("DELTAMEM_LEASE_SECONDS", "3")
    killed: list[int] = []
    killer = threading.Thread(target=kill_one, args=(dies, tmp_path / "out", 8, killed))
    killer.daemon = True
    killer.start()
    with monkeypatch.context() as variables:
        if dies == "EngineCore":
            variables.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        report = batch.run(path, tmp_path / "out", spec, concurrency=2)
    killer.join()
    assert killed[0] < len(rows)
    assert (report.rows, report.failed, report.rows_before) == (len(rows), 1, 0)

    alone = f"sqlite://{tmp_path}/alone.db"
    run_here(path, tmp_path / "alone", spec_of(checkpoint, alone))
    assert plain(read_results(tmp_path / "out")) == plain(read_results(tmp_path / "alone"))
    shape = StateShape.of(load_adapter(ADAPTER))
    stores = [open_store(url) for url in (shared, alone)]
    pages = [store.list_sessions(PUBLIC_TENANT, prefix="session") for store in stores]
    assert sorted(info.key.name for info in pages[0].sessions) == names(rows)
    for info in pages[1].sessions:
        mine, theirs = (store.get(info.key) for store in stores)
        assert mine.version == theirs.version
        assert mine.content.tokens_written == theirs.content.tokens_written
        assert mine.content.pending_token_ids == theirs.content.pending_token_ids
        states = [shape.unpack(one.content.state) for one in (mine, theirs)]
        assert_states_close(*states)
    for store in stores:
        store.close()

    again = batch.run(path, tmp_path / "out", spec, concurrency=2)
    assert (again.rows, again.rows_before) == (0, len(rows))


def test_clusters_that_are_too_small_are_refused(
    cluster: None, checkpoint: Path, tmp_path: Path
) -> None:
    from deltamem_vllm.ray import batch

    path = write_jsonl(tmp_path / "rows.jsonl", mixed_rows(1))
    with pytest.raises(BatchError, match="3 engines with 1 CPUs each need more"):
        batch.run(path, tmp_path / "out", spec_of(checkpoint, None), concurrency=3)


def test_one_engine_needs_no_ray() -> None:
    """It is not even imported."""
    program = (
        "import sys; sys.modules['ray'] = None; import deltamem_vllm.batch.job, "
        "deltamem_vllm.batch.runner, deltamem_vllm.cli.batch; assert sys.modules['ray'] is None"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_missing_ray_is_said_in_one_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", mixed_rows(1))
    program = (
        "import sys; sys.modules['ray'] = None; from deltamem_vllm.cli import main; "
        f"sys.argv = ['deltamem', 'batch', {str(path)!r}, {str(tmp_path / 'out')!r}, "
        "'--model', 'm', '--concurrency', '2']; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: several engines run on Ray")
    assert "pip install 'deltamem-vllm[ray]'" in done.stderr
