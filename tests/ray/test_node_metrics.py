"""The folders in which replicas of one machine keep their metrics."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from deltamem_vllm.ray.node_metrics import FOLDER_VARIABLE, keep_in_files, replicas_here


@pytest.fixture(autouse=True)
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv(FOLDER_VARIABLE, "")


def test_replicas_that_start_together_leave_each_other_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second one begins when the first has its folder and is about to say whose it is."""
    write = Path.write_text

    def late(path: Path, *args: Any) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", write)
            keep_in_files("app", "second")
        return write(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", late)
        keep_in_files("app", "first")
    assert replicas_here("app") == {"first": os.getpid(), "second": os.getpid()}
    assert Path(os.environ[FOLDER_VARIABLE]).name == "first"


def test_folders_of_processes_that_are_gone_are_removed() -> None:
    keep_in_files("app", "gone")
    folder = Path(os.environ[FOLDER_VARIABLE])
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    (folder / "pid").write_text(str(child.pid))
    assert not replicas_here("app")
    keep_in_files("app", "here")
    assert list(replicas_here("app")) == ["here"] and not folder.exists()
