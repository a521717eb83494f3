"""Which versions of other packages are refused."""

import subprocess
import sys

import pytest

from deltamem_vllm.errors import EngineConfigError
from deltamem_vllm.versions import check_tested

TRIED = ("0.32", "0.33")
VARIABLE = "ALLOW_UNTESTED_CHEESE"


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1", "0.33.0rc1", "0.32.0+cpu"])
def test_minor_versions_that_were_tried_pass(version: str) -> None:
    check_tested("Cheese", version, TRIED, VARIABLE)


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "0.3.2", "0.320.0", "1.32.0"])
def test_others_are_refused_unless_the_user_insists(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineConfigError) as raised:
        check_tested("Cheese", version, TRIED, VARIABLE)
    assert str(raised.value) == (
        f"deltamem-vllm supports Cheese 0.32 and 0.33, but {version} is installed. Install a "
        f"supported version, or set {VARIABLE}=1 to try."
    )
    monkeypatch.setenv(VARIABLE, "1")
    check_tested("Cheese", version, TRIED, VARIABLE)
    monkeypatch.setenv(VARIABLE, "0")
    with pytest.raises(EngineConfigError):
        check_tested("Cheese", version, TRIED, VARIABLE)


def test_the_door_to_ray_loads_no_vllm() -> None:
    """Drivers look at Ray's version, and start replicas elsewhere."""
    pytest.importorskip("ray")
    program = "import sys, deltamem_vllm.ray.compat as c; c.check_version(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = done.stdout.split()
    assert "ray" in loaded and "vllm" not in loaded
