"""A worker process without our plugin is refused by name."""

import os
import subprocess
import sys

import pytest

LOAD = "from vllm.plugins import load_general_plugins; load_general_plugins(); "


@pytest.mark.parametrize("plugins", ["deltamem", "another"])
def test_a_worker_without_the_plugin_says_so(plugins: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", f"{LOAD}import deltamem_vllm.engine.worker"],
        env={**os.environ, "VLLM_PLUGINS": plugins},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (result.returncode == 0) == (plugins == "deltamem"), result.stderr
    if plugins != "deltamem":
        assert "runs without the plugin deltamem" in result.stderr
        assert "VLLM_PLUGINS is 'another'" in result.stderr
