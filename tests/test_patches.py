"""`patches/` is true: each diff applies to the installed vLLM, each name of its tables exists."""

import importlib
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import vllm

from deltamem_vllm.engine.compat import SUPPORTED_VERSIONS

PATCHES = Path(__file__).parents[1] / "patches"
DIFFS = sorted(PATCHES.glob("*.diff"))
INSTALLED = Path(vllm.__file__).parent.parent
README = (PATCHES / "README.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (`vllm[^|]*) \|", re.MULTILINE)
RECORD = json.loads((PATCHES / "signatures.json").read_text(encoding="utf-8"))
NAMES = [name for cell in ROW.findall(README) for name in re.findall(r"`([^`]+)`", cell)]


def load(path: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


vllm_signatures = load(PATCHES / "signatures.py")


def touched_files(diff: Path) -> list[str]:
    """Paths under the folder that holds `vllm/`."""
    return re.findall(r"^\+\+\+ b/(\S+)$", diff.read_text(encoding="utf-8"), re.MULTILINE)


def apply(diff: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Apply `diff` to copies of the files it touches; with `patch`, or `git` where that lacks."""
    for name in touched_files(diff):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(INSTALLED / name, target)
    # No fuzz: a diff that only nearly fits was made for another version. Forward only: one that is
    # already in vLLM must not pass by being reversed.
    patch = ["patch", "-p1", "--fuzz=0", "--forward", "--input", str(diff)]
    git = ["git", "apply", "--verbose", str(diff)]
    command = patch if shutil.which("patch") else git
    return subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def resolve(name: str) -> object:
    """`vllm.module:Class.attribute`, or `vllm.Class.attribute`."""
    module, colon, path = name.partition(":")
    if not colon:
        module, path = name.split(".", 1)
    value: object = importlib.import_module(module)
    for attribute in path.split("."):
        value = getattr(value, attribute)
    return value


@pytest.mark.parametrize("diff", DIFFS, ids=lambda diff: diff.stem)
def test_diff_applies_to_the_installed_vllm(diff: Path, tmp_path: Path) -> None:
    files = touched_files(diff)
    assert files
    result = apply(diff, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    for name in files:
        patched = (tmp_path / name).read_text(encoding="utf-8")
        assert patched != (INSTALLED / name).read_text(encoding="utf-8")
        compile(patched, name, "exec")


def test_diff_for_other_code_does_not_apply(tmp_path: Path) -> None:
    diff = tmp_path / "wrong.diff"
    text = (PATCHES / "0004-request-set-cache-salt.diff").read_text(encoding="utf-8")
    diff.write_text(text.replace("def use_structured_output", "def something_else"))
    assert apply(diff, tmp_path).returncode != 0


@pytest.mark.parametrize("name", NAMES)
def test_name_of_the_tables_exists(name: str) -> None:
    assert resolve(name) is not None


def test_missing_name_is_noticed() -> None:
    with pytest.raises(AttributeError):
        resolve("vllm.v1.request:Request.no_such_method")


def test_every_diff_is_in_a_table_and_begins_with_its_reason() -> None:
    assert DIFFS
    for diff in DIFFS:
        assert f"({diff.name})" in README
        subject, blank, *body = diff.read_text(encoding="utf-8").splitlines()
        assert re.match(r"(\[[A-Za-z]+\])+ \S", subject)
        assert blank == ""
        assert not body[0].startswith("---")


def test_every_vllm_name_that_we_import_is_in_a_table() -> None:
    """In `engine/compat.py` and the backbones, where all of them are imported."""
    package = PATCHES.parent / "deltamem_vllm"
    dotted = {name.replace(":", ".") for name in NAMES}
    documented = dotted | {name.rpartition(".")[0] for name in dotted}
    imports = re.compile(r"^from (vllm[\w.]*) import (\([^)]*\)|[^\n]+)", re.MULTILINE)
    found = {
        f"{module}.{name}"
        for path in [package / "engine" / "compat.py", *(package / "models").glob("*.py")]
        for module, names in imports.findall(path.read_text(encoding="utf-8"))
        for name in re.findall(r"\w+", names)
    }
    assert len(found) > 30
    assert not found - documented


def test_signatures_of_the_installed_version_are_those_on_record() -> None:
    """What we rely on has not changed behind a version's name."""
    assert vllm_signatures.signatures(INSTALLED) == RECORD[vllm_signatures.minor(vllm.__version__)]


def test_every_supported_version_has_all_that_we_touch() -> None:
    assert set(RECORD) == set(SUPPORTED_VERSIONS)
    for version, found in RECORD.items():
        assert set(found) == set(vllm_signatures.touched()), version
        assert not [name for name, signature in found.items() if signature is None], version


def test_a_changed_signature_is_noticed(tmp_path: Path) -> None:
    name = "vllm.v1.request:Request.update_block_hashes"
    changed = tmp_path / "vllm" / "v1" / "request.py"
    changed.parent.mkdir(parents=True)
    source = (INSTALLED / "vllm/v1/request.py").read_text(encoding="utf-8")
    old = "def update_block_hashes(self)"
    assert source.count(old) == 1
    changed.write_text(source.replace(old, "def update_block_hashes(self, start: int)"))
    found = vllm_signatures.Sources(tmp_path).signature(name)
    assert "start: int" in found
    assert found != RECORD[vllm_signatures.minor(vllm.__version__)][name]


def test_what_differs_between_versions_is_known() -> None:
    """Fields and arguments that came or changed, of which we use none; see README.md."""
    old, new = RECORD["0.32"], RECORD["0.33"]
    assert {name.rpartition(":")[2] for name in old if old[name] != new[name]} == {
        "VllmConfig",
        "ChatCompletionRequest",
        "CompletionRequest",
        "ResponsesRequest",
        "OnlineRenderer",
        "TokenizeParams",
        "AttentionBackend",
        "SchedulerOutput",
        "get_request_block_hasher",
    }


def test_every_file_in_patches_is_known() -> None:
    """A diff under another name would not be tested."""
    names = {path.name for path in PATCHES.iterdir() if path.is_file()}
    known = {"README.md", "vllm_cpu_metadata.py", "signatures.py", "signatures.json"}
    assert names == {path.name for path in DIFFS} | known
