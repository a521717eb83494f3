"""`deltamem doctor`: what it finds right, what wrong, and that it says what to do."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deltamem_vllm import doctor
from deltamem_vllm.adapter import load_adapter, save_adapter
from deltamem_vllm.adapter.weights import Adapter
from deltamem_vllm.api.settings import ServerSettings
from deltamem_vllm.cli import app
from deltamem_vllm.demo.assets import adapter_dir, model_dir
from deltamem_vllm.doctor import Finding, Status
from deltamem_vllm.serve import default_store_url
from deltamem_vllm.sessions import SessionContent, SessionKey, open_store

MODEL, ADAPTER = str(model_dir()), str(adapter_dir("tsw"))


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    for name in [name for name in os.environ if name.startswith("DELTAMEM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed metadata of a package that has the session routes."""
    metadata = tmp_path / "site" / "routes-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: routes\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[vllm.endpoint_plugins]\ndeltamem = json:dumps\n")
    monkeypatch.syspath_prepend(str(metadata.parent))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def wrong(found: Iterable[Finding]) -> Finding:
    (one,) = [finding for finding in found if finding.status is Status.wrong]
    return one


def test_a_sound_installation_has_nothing_wrong(entry_point: None, tmp_path: Path) -> None:
    url = f"sqlite://{tmp_path}/sessions.db"
    with open_store(url) as store:
        store.create(SessionKey("public", "ab" * 32, "a"), SessionContent(b"state"))
    result = run(MODEL, "--adapter", ADAPTER, "--store", url, "--integrity")
    assert result.exit_code == 0, result.output
    fingerprint = load_adapter(ADAPTER).fingerprint
    for fact in (
        "registered in a new process of vLLM",
        "the memory step is ready on cpu",
        url,
        "1 sessions, 1 versions, 5 bytes",
        "everything in it agrees",
        f"{fingerprint[:12]}, 4 layers, 1,024 bytes per session, fits {MODEL}",
        "Nothing is wrong.",
    ):
        assert fact in result.stdout
    assert "wrong " not in result.stdout


def test_what_is_wrong_is_counted_and_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is wrong at once is said at once."""
    broken = tmp_path / "site" / "torchaudio"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise OSError('undefined symbol: torch_xyz')")
    monkeypatch.syspath_prepend(str(broken.parent))
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.setenv("DELTAMEM_TENANT_KEYS_FILE", str(tmp_path / "absent.json"))
    result = run("--adapter", tmp_path / "nowhere", "--store", "mysql://me:geheim@host/db")
    assert result.exit_code == 1
    for fact in (
        "torchaudio",
        "undefined symbol: torch_xyz",
        "pip uninstall torchaudio",
        "VLLM_PLUGINS=other leaves 'deltamem' out",
        "add deltamem to it",
        "absent.json cannot be read",
        "no such folder",
        "thing(s) to mend",
    ):
        assert fact in result.stdout, result.stdout
    assert "geheim" not in result.stdout


def test_a_plugin_that_does_not_load_is_found_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vLLM of a version that is not supported, as its process sees it."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import vllm\nvllm.__version__ = '0.1.0'\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    found = [one for one in doctor.check_plugins() if one.subject == "vllm"]
    assert "0.1.0 is installed" in wrong(found).fact


def test_a_missing_entry_point_is_an_old_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    found = next(doctor.check_plugins())
    assert found.status is Status.wrong
    assert "vllm.general_plugins does not name 'deltamem'" in found.fact
    assert "pip install" in found.advice


def test_settings_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAMEM_MAX_QUEU", "3")
    assert "DELTAMEM_MAX_QUEU" in wrong(doctor.check_settings()).fact


def test_the_default_store_is_not_made() -> None:
    (found,) = doctor.check_store(None, ServerSettings(), integrity=False)
    assert found.status is Status.ok and default_store_url() in found.fact
    assert not Path(default_store_url().removeprefix("sqlite://")).parent.exists()


def test_without_a_store_memory_is_ephemeral() -> None:
    (found,) = doctor.check_store("none", ServerSettings(), integrity=False)
    assert found.status is Status.note


def test_a_store_that_cannot_be_opened_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "sessions.db").write_bytes(b"no database at all" * 1000)
    url = f"sqlite://{tmp_path}/sessions.db"
    assert "sessions.db" in wrong(doctor.check_store(url, ServerSettings(), integrity=False)).fact


def test_an_adapter_of_zeros_does_nothing(tmp_path: Path) -> None:
    adapter = load_adapter(ADAPTER)
    zeros = {
        name: tensor.zero_() if ".delta_" in name else tensor
        for name, tensor in adapter.tensors.items()
    }
    folder = save_adapter(Adapter.from_tensors(adapter.config, zeros), tmp_path / "zeros")
    found = wrong(doctor.check_adapter(MODEL, str(folder)))
    assert "all its delta heads are zero" in found.fact and found.advice


def test_an_adapter_of_another_base_is_wrong(tmp_path: Path) -> None:
    base = Path(shutil.copytree(MODEL, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 9}))
    assert "does not fit" in wrong(doctor.check_adapter(str(base), ADAPTER)).fact


def test_a_base_without_an_adapter_is_wrong() -> None:
    assert "carries no adapter" in wrong(doctor.check_adapter(MODEL, None)).fact
