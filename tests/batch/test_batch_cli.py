"""What `deltamem batch` says before an engine starts."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from deltamem_vllm.batch.output import Output
from deltamem_vllm.cli import app
from deltamem_vllm.cli.batch import _settings
from tests.batch.rows import ADAPTER, write_jsonl
from tests.helpers import DATA

MODEL = ("--model", "no-such-model")
BASE = str(DATA / "qwen3_tsw" / "model")


def test_arguments_of_the_engine_are_read_as_yaml() -> None:
    pairs = ["max_num_seqs=64", "--enforce-eager=true", 'compilation_config={"level": 0}']
    assert _settings([*pairs, "revision=main"]) == {
        "max_num_seqs": 64,
        "enforce_eager": True,
        "compilation_config": {"level": 0},
        "revision": "main",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "max_num_seqs"], "--set takes NAME=VALUE"),
        (["--set", "a={"], "is not valid YAML"),
        (["--sampling", '{"temp": 0}'], "--sampling is not valid: temp: Extra inputs"),
        (["--sampling", "hot"], "--sampling is not valid"),
    ],
)
def test_wrong_options_end_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"id": "a", "prompt": "x"}])
    told = CliRunner().invoke(app, ["batch", str(path), str(tmp_path / "out"), *MODEL, *arguments])
    assert told.exit_code == 2
    assert told.stderr.startswith("error: ") and message in told.stderr
    assert not (tmp_path / "out").exists()


def test_an_input_that_is_not_there_is_named(tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["batch", str(tmp_path / "no.jsonl"), str(tmp_path), *MODEL])
    assert told.exit_code == 2
    assert told.stderr == f"error: {tmp_path / 'no.jsonl'}: no such file or folder.\n"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--model", "no-such/model", "--adapter", ADAPTER], "'no-such/model': no such folder"),
        (["--model", BASE, "--adapter", "no-such/adapter"], "'no-such/adapter': no such folder"),
        (
            ["--model", BASE, "--adapter", ADAPTER, "--store", "redis://localhost:1/0"],
            "redis://localhost:1/0 does not answer",
        ),
        (["--model", BASE, "--adapter", ADAPTER, "--set", "no_such_name=1"], "no_such_name"),
        (["--model", BASE, "--adapter", ADAPTER, "--dtype", "float31"], "float31"),
    ],
)
def test_a_run_that_cannot_start_says_why_and_binds_nothing(
    tmp_path: Path, wrong: list[str], message: str
) -> None:
    """The folder takes the same rows with what was meant."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{"id": "a", "prompt": "x"}, {"id": "b"}])
    told = CliRunner().invoke(app, ["batch", str(path), str(tmp_path / "out"), *wrong])
    assert told.exit_code == 2
    (line,) = [one for one in told.stderr.splitlines() if one.startswith("error: ")]
    assert message in line
    with Output(tmp_path / "out", {"model": "what was meant"}) as output:
        assert not output.finished


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"id": "a", "prompt": "x"}])
    told = CliRunner().invoke(app, ["batch", str(path), str(path), *MODEL])
    assert told.exit_code == 2
    assert told.stderr.startswith(f"error: {path}: cannot be written")


def test_nothing_left_to_do_starts_no_engine(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [])
    told = CliRunner().invoke(app, ["batch", str(path), str(tmp_path / "out"), *MODEL])
    assert told.exit_code == 0
    assert (tmp_path / "out" / "report.json").exists()
