"""`deltamem serve`: it makes a command line that vLLM understands, or says what is wrong."""

import functools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from deltamem_vllm.adapter import link_checkpoint
from deltamem_vllm.cli import app
from deltamem_vllm.demo.assets import adapter_dir, model_dir
from deltamem_vllm.engine.names import CONNECTOR_MODULE, CONNECTOR_NAME, WORKER_EXTENSION
from deltamem_vllm.errors import DeltaMemError, EngineConfigError
from deltamem_vllm.models.registry import ARCHITECTURES
from deltamem_vllm.serve import Launch, default_store, plan, plugins

MODEL = str(model_dir())
ADAPTER = str(adapter_dir("tsw"))
STORE = "sqlite:///tmp/sessions.db"
SERVED = {
    "architectures": ["DeltaMemQwen3ForCausalLM"],
    "deltamem": {"adapter": str(adapter_dir("tsw").resolve())},
}
CONNECTOR = {
    "kv_connector": CONNECTOR_NAME,
    "kv_connector_module_path": CONNECTOR_MODULE,
    "kv_role": "kv_both",
}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("DELTAMEM_STORE", raising=False)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("linked") / "model"
    return str(link_checkpoint(MODEL, ADAPTER, out, architectures=ARCHITECTURES))


def planned(
    *flags: str,
    model: str = MODEL,
    adapter: str | None = ADAPTER,
    store: str = STORE,
    environment: Mapping[str, str] | None = None,
) -> Launch:
    return plan(model, adapter, store, flags, environment or {})


@functools.cache
def vllm_parser() -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


def as_vllm_reads_it(launch: Launch) -> Any:
    parser = vllm_parser()
    arguments = list(launch.arguments)
    if "--config" in arguments:
        # vLLM opens the file for the command `serve` only, which it then takes off.
        arguments = parser._pull_args_from_config(["serve", *arguments])[1:]
    return parser.parse_args(arguments)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_base_and_an_adapter_become_flags_that_vllm_understands() -> None:
    read = as_vllm_reads_it(planned("--dtype", "float32", "-tp", "2", "--max_model_len=1k"))
    assert read.model_tag == MODEL
    assert read.hf_overrides == SERVED
    assert vars(read.kv_transfer_config).items() >= CONNECTOR.items()
    assert read.worker_extension_cls == WORKER_EXTENSION
    assert (read.dtype, read.tensor_parallel_size, read.max_model_len) == ("float32", 2, 1000)


def test_a_linked_checkpoint_needs_no_overrides(linked: str) -> None:
    launch = planned(model=linked, adapter=None)
    assert "--hf-overrides" not in launch.arguments
    assert vars(as_vllm_reads_it(launch).kv_transfer_config).items() >= CONNECTOR.items()


def test_without_a_store_there_is_no_connector() -> None:
    launch = planned(store="none")
    assert launch.arguments == (MODEL, "--hf-overrides", json.dumps(SERVED))
    assert launch.environment["DELTAMEM_STORE"] == "none"
    own = planned("--worker-extension-cls", "mine.Extension", store="none")
    assert as_vllm_reads_it(own).worker_extension_cls == "mine.Extension"


@pytest.mark.parametrize("form", ["--hf-overrides {}", "--hf_overrides={}"])
def test_the_users_overrides_are_joined_with_ours(form: str) -> None:
    given = json.dumps({"rope_theta": 5, "deltamem": {"max_kv_share": 0.9}})
    flags = [part.format(given) for part in form.split(" ", 1)]
    read = as_vllm_reads_it(planned(*flags))
    assert read.hf_overrides == {
        **SERVED,
        "rope_theta": 5,
        "deltamem": {**SERVED["deltamem"], "max_kv_share": 0.9},  # type: ignore[dict-item]
    }


def test_dotted_overrides_pass_where_we_set_none(linked: str) -> None:
    launch = planned("--hf-overrides.a.b", "3", "--hf-overrides.c=4", model=linked, adapter=None)
    assert as_vllm_reads_it(launch).hf_overrides == {"a": {"b": 3}, "c": 4}
    with pytest.raises(EngineConfigError, match="one JSON object"):
        planned("--hf-overrides.a", "3")


def test_what_the_user_sets_as_we_do_is_no_contradiction() -> None:
    theirs = {**CONNECTOR, "kv_connector_extra_config": {"a": 1}}
    read = as_vllm_reads_it(
        planned(
            f"--kv-transfer-config={json.dumps(theirs)}",
            "--worker-extension-cls",
            WORKER_EXTENSION,
        )
    )
    assert vars(read.kv_transfer_config).items() >= theirs.items()
    assert read.worker_extension_cls == WORKER_EXTENSION


@pytest.mark.parametrize(
    ("flags", "store", "reason"),
    [
        (['--kv-transfer-config={"kv_connector": "LMCache"}'], STORE, "several KV connectors"),
        (['--kv_transfer_config={"kv_connector": "LMCache"}'], "none", "without a connector"),
        (["--kv-transfer-config", '{"kv_role": "kv_producer"}'], STORE, "kv_role"),
        (["--kv-transfer-config.kv_connector", "LMCache"], STORE, "one JSON object"),
        (["--kv-transfer-config", "{"], STORE, "not valid JSON"),
        (["--kv-transfer-config", "[]"], STORE, "no JSON object"),
        (["--kv-transfer-config"], STORE, "needs a value"),
        (["--kv-transfer", "{}"], STORE, "write --kv-transfer-config"),
        (["--worker-extension-cls", "mine.Extension"], STORE, "mine.Extension"),
        (["--worker-ext=mine.Extension"], STORE, "write --worker-extension-cls"),
        (['--hf-overrides={"deltamem": {"adapter": "/other"}}'], STORE, "Name one"),
        (["--hf-overrides={}", "--hf_overrides", "{}"], STORE, "given twice"),
        (["--hf-overrides.a=1", "--hf-overrides", "{}"], STORE, "given twice"),
        (["--hf-o={}"], STORE, "write --hf-overrides"),
        (["--model", "other"], STORE, "Give the model once"),
        ([], "mysql://host", "DELTAMEM_STORE"),
        ([], "sessions.db", "DELTAMEM_STORE"),
    ],
)
def test_a_contradiction_is_refused_with_its_reason(
    flags: list[str], store: str, reason: str
) -> None:
    with pytest.raises(DeltaMemError, match=reason):
        planned(*flags, store=store)


def test_a_config_file_may_not_hide_what_we_set(tmp_path: Path, linked: str) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text("max-model-len: 512\nkv_transfer_config:\n  kv_connector: LMCache\n")
    with pytest.raises(EngineConfigError, match=f"{file} sets kv-transfer-config"):
        planned("--config", str(file))
    file.write_text("max-model-len: 512\nhf-overrides:\n  a: 1\n")
    with pytest.raises(EngineConfigError, match="sets hf-overrides"):
        planned("--config", str(file))
    read = as_vllm_reads_it(planned("--config", str(file), model=linked, adapter=None))
    assert (read.max_model_len, read.hf_overrides) == (512, {"a": 1})
    file.write_text("- a\n")
    with pytest.raises(EngineConfigError, match="flags and their values"):
        planned("--config", str(file))
    file.write_text("a: [")
    with pytest.raises(EngineConfigError, match="not valid YAML"):
        planned("--config", str(file))


def test_a_frontend_that_loads_no_plugins_is_refused() -> None:
    environment = {"VLLM_USE_RUST_FRONTEND": "1"}
    with pytest.raises(EngineConfigError, match="VLLM_USE_RUST_FRONTEND"):
        planned(environment=environment)
    planned(environment=environment, store="none")


def test_naming_us_leaves_no_other_plugin_out() -> None:
    installed = {found.name for found in entry_points(group="vllm.general_plugins")}
    assert set(plugins(None)) >= installed | {"deltamem"}
    assert len(installed) > 1, "vLLM itself has general plugins, so this means something"
    assert plugins("mine, deltamem") == ["deltamem", "mine"]
    assert plugins("") == ["deltamem"]
    launch = planned(environment={"VLLM_PLUGINS": "mine"})
    assert launch.environment["VLLM_PLUGINS"] == "deltamem,mine"


def test_dry_run_prints_a_line_for_a_shell() -> None:
    result = run("serve", MODEL, "--adapter", ADAPTER, "--max-num-seqs", "8", "--dry-run")
    assert result.exit_code == 0, result.output
    words = shlex.split(result.stdout)
    variables = dict(word.split("=", 1) for word in words[: words.index("vllm")])
    assert variables["DELTAMEM_STORE"] == f"sqlite://{default_store()}"
    assert "deltamem" in variables["VLLM_PLUGINS"].split(",")
    rest = words[words.index("vllm") :]
    assert rest[:5] == ["vllm", "serve", MODEL, "--max-num-seqs", "8"]
    assert json.loads(rest[rest.index("--hf-overrides") + 1]) == SERVED
    assert not default_store().parent.exists(), "a dry run makes nothing"


def test_the_store_comes_from_the_option_then_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DELTAMEM_STORE", "redis://host/1")
    arguments = ["serve", MODEL, "--adapter", ADAPTER, "--dry-run"]
    assert "DELTAMEM_STORE=redis://host/1 " in run(*arguments).stdout
    assert "DELTAMEM_STORE=none " in run(*arguments, "--store", "none").stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--dtype", "float32", MODEL], "the model comes first"),
        ([MODEL], "Pass adapter="),
        (["/nowhere", "--adapter", ADAPTER], "no such folder"),
        ([MODEL, "--adapter", "/nowhere"], "no such folder"),
        ([MODEL, "--adapter", ADAPTER, "--config", "/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_failures_are_one_line_and_exit_code_2(arguments: list[str], reason: str) -> None:
    result = run("serve", *arguments, "--dry-run")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert reason in result.stderr


def test_a_misspelt_setting_is_refused_before_vllm_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAMEM_STOER", "none")
    result = run("serve", MODEL, "--adapter", ADAPTER, "--dry-run")
    assert result.exit_code == 2 and "DELTAMEM_STOER" in result.stderr


def test_the_command_becomes_vllm_serve(own_home: Path) -> None:
    """vLLM's own parser answers, with the status and in the words of `vllm serve`."""
    code = "from deltamem_vllm.cli import main; main()"
    arguments = ["serve", MODEL, "--adapter", ADAPTER, "--port", "no-port"]
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert process.returncode == 2, process.stderr
    assert "vllm serve: error: argument --port: invalid" in process.stderr
    folder = own_home / "deltamem"
    assert folder.is_dir() and folder.stat().st_mode & 0o077 == 0


def test_the_names_given_to_vllm_are_those_of_our_classes() -> None:
    from deltamem_vllm.engine import connector, worker

    assert connector.__name__ == CONNECTOR_MODULE and hasattr(connector, CONNECTOR_NAME)
    extension = worker.MemoryWorkerExtension
    assert f"{extension.__module__}.{extension.__name__}" == WORKER_EXTENSION
