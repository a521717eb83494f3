"""`deltamem adapter ...`: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deltamem_vllm import __version__
from deltamem_vllm.adapter import (
    CONFIG_NAME,
    LINKED_ADAPTER_DIR,
    REFERENCE_WEIGHTS_NAME,
    WEIGHTS_NAME,
    Adapter,
    load_adapter,
    save_adapter,
)
from deltamem_vllm.cli import app

DATA = Path(__file__).parent / "parity" / "data"
TSW = DATA / "qwen3_tsw"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_readable_failure(result: Result, *reasons: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, "one line"
    assert result.stdout == ""
    for reason in reasons:
        assert reason in result.stderr


def test_version_is_printed() -> None:
    assert run("--version").stdout == f"deltamem-vllm {__version__}\n"


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, deltamem_vllm.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("case", "facts"),
    [
        (
            "qwen3_tsw",
            ["TSW", "q, o", "3 (0-2)", "0.75 KiB (768 bytes)", "float32", "|Dq|", "|Do|"],
        ),
        ("qwen3_msw4", ["MSW", "4 state head(s)", "3 KiB (3,072 bytes)"]),
        ("qwen3_scaled", ["2 (0, 2)", "gate per state", "0.5 KiB (512 bytes)"]),
        ("qwen3_qkvo_uncoupled", ["q, k, v, o", "lambda_outside, own lambda gate", "|Dk|", "|Dv|"]),
    ],
)
def test_inspect_states_the_facts(case: str, facts: list[str], tmp_path: Path) -> None:
    """Wherever things lie: long paths break no line."""
    base = tmp_path / ("long" * 20) / case
    base.parent.mkdir()
    base.symlink_to(DATA / case / "model")
    result = run("adapter", "inspect", DATA / case / "adapter", "--base", base)
    assert result.exit_code == 0, result.output
    fingerprint = load_adapter(DATA / case / "adapter").fingerprint
    for fact in [*facts, fingerprint, "qwen3: 3 layers, hidden 64, q 128, kv 64"]:
        assert fact in result.stdout


def test_inspect_shows_each_layers_norms() -> None:
    adapter = load_adapter(TSW / "adapter")
    result = run("adapter", "inspect", TSW / "adapter")
    assert "fits" not in result.stdout
    for index in adapter.layer_indices:
        delta = adapter.layer(index).delta_o_proj
        assert delta is not None
        assert f"{float(delta.norm()):.4g}" in result.stdout
    assert "answer as its base" not in result.stdout


def test_inspect_says_when_an_adapter_does_nothing(tmp_path: Path) -> None:
    adapter = load_adapter(TSW / "adapter")
    silent = {
        name: tensor.zero_() if ".delta_" in name else tensor
        for name, tensor in adapter.tensors.items()
    }
    save_adapter(Adapter.from_tensors(adapter.config, silent), tmp_path / "silent")
    assert "answer as its base" in run("adapter", "inspect", tmp_path / "silent").stdout


def test_inspect_refuses_another_base(tmp_path: Path) -> None:
    base = shutil.copytree(TSW / "model", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 9}))
    result = run("adapter", "inspect", TSW / "adapter", "--base", base)
    assert_readable_failure(result, "layers 0-2", "9 layers")


def test_convert_there_and_back(tmp_path: Path) -> None:
    fingerprint = load_adapter(TSW / "adapter").fingerprint
    there = run("adapter", "convert", TSW / "adapter", tmp_path / "a")
    assert there.exit_code == 0 and fingerprint in there.stdout
    assert {path.name for path in (tmp_path / "a").iterdir()} == {CONFIG_NAME, WEIGHTS_NAME}
    back = run("adapter", "convert", tmp_path / "a", tmp_path / "b", "--to", "reference")
    assert back.exit_code == 0
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert names == {CONFIG_NAME, REFERENCE_WEIGHTS_NAME}
    assert load_adapter(tmp_path / "b").fingerprint == fingerprint


def test_convert_overwrites_only_when_asked(tmp_path: Path) -> None:
    run("adapter", "convert", TSW / "adapter", tmp_path / "a")
    other = DATA / "qwen3_msw4" / "adapter"
    again = run("adapter", "convert", other, tmp_path / "a")
    assert_readable_failure(again, "already holds", str(tmp_path / "a"))
    assert run("adapter", "convert", other, tmp_path / "a", "--overwrite").exit_code == 0
    assert load_adapter(tmp_path / "a").fingerprint == load_adapter(other).fingerprint


def test_convert_writes_into_no_model(tmp_path: Path) -> None:
    model = shutil.copytree(TSW / "model", tmp_path / "model")
    before = {path.name for path in model.iterdir()}
    for options in ([], ["--overwrite"]):
        result = run("adapter", "convert", TSW / "adapter", model, *options)
        assert_readable_failure(result, str(model), "holds a model")
    assert {path.name for path in model.iterdir()} == before


def test_demo_is_refused_before_it_runs_if_its_figures_could_not_be_written(
    tmp_path: Path,
) -> None:
    result = run("demo", "--json", tmp_path / "absent" / "figures.json")
    assert_readable_failure(result, "absent", "--json")


@pytest.mark.parametrize("options", [[], ["--copy"]])
def test_link_ends_with_the_serve_command(tmp_path: Path, options: list[str]) -> None:
    out = tmp_path / "my model"
    result = run("adapter", "link", TSW / "model", TSW / "adapter", out, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"vllm serve '{out}'"
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["DeltaMemQwen3ForCausalLM"]
    assert (out / "model.safetensors").is_symlink() is not bool(options)
    assert (out / LINKED_ADAPTER_DIR / WEIGHTS_NAME).is_file()


def test_link_overwrites_only_when_asked(tmp_path: Path) -> None:
    arguments = ["adapter", "link", TSW / "model", TSW / "adapter", tmp_path / "out"]
    assert run(*arguments).exit_code == 0
    assert_readable_failure(run(*arguments), "already holds a linked checkpoint")
    assert run(*arguments, "--overwrite").exit_code == 0


def test_failures_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    assert_readable_failure(run("adapter", "inspect", tmp_path), CONFIG_NAME)
    assert_readable_failure(run("adapter", "inspect", tmp_path / "absent"), "no such folder")
    broken = shutil.copytree(TSW / "adapter", tmp_path / "broken")
    (broken / REFERENCE_WEIGHTS_NAME).write_bytes(b"not a pickle")
    assert_readable_failure(run("adapter", "inspect", broken), REFERENCE_WEIGHTS_NAME)
    (broken / CONFIG_NAME).write_text('{"rank": "8"}')
    assert_readable_failure(run("adapter", "inspect", broken), CONFIG_NAME, "rank = '8'")
    assert_readable_failure(
        run("adapter", "link", tmp_path, TSW / "adapter", tmp_path / "out"), "config.json"
    )


def test_file_system_errors_are_readable_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("adapter", "convert", TSW / "adapter", tmp_path / "file" / "out")
    assert_readable_failure(result, str(tmp_path / "file"))


def test_unknown_form_is_a_usage_error(tmp_path: Path) -> None:
    result = run("adapter", "convert", TSW / "adapter", tmp_path / "a", "--to", "gguf")
    assert result.exit_code == 2
    assert not (tmp_path / "a").exists()
