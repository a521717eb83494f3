"""A Ray cluster of one machine with Serve on it: real proxies, routers and replicas."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import ray
from ray import serve

from benchmarks.serving import free_port

ROOT = Path(__file__).parents[2]

SETTINGS = {
    # Else replicas are nice to everybody else, and start in the time that is left over.
    "RAY_worker_niceness": "0",
    # Else it starts as many processes as it was told that there are CPUs, before any is needed.
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Else Ray kills its own processes when others take the machine's memory.
    "RAY_memory_monitor_refresh_ms": "0",
    # Else it leaves a token in the user's home.
    "RAY_AUTH_MODE": "disabled",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deltamem_vllm.ray.affinity.proxy_middlewares",
    # Proxies of a busy machine are slow, and are not to be started again for that.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
}


def start_ray(folder: str, **settings: object) -> None:
    """A cluster of its own, whatever runs on this machine; its files lie in a folder.

    Ray gives its processes 30 seconds, which a busy machine may need for other things.
    """
    for is_last in (False, False, True):
        try:
            ray.init("local", include_dashboard=False, _temp_dir=folder, **settings)
            return
        except Exception as error:
            ray.shutdown()
            if is_last or "timed out during startup" not in str(error):
                raise


@contextmanager
def serving(environment: Mapping[str, str] | None = None, cpus: int = 8) -> Iterator[str]:
    """Serve on a cluster of its own; its URL. `cpus` are what Ray is told, not what there is."""
    before = dict(os.environ)
    os.environ.update(SETTINGS | dict(environment or {}))
    port = free_port()
    # Unix sockets lie in there, whose paths must be short.
    with TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        try:
            start_ray(folder, num_cpus=cpus, log_to_driver=False)
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()
            ray.shutdown()
            os.environ.clear()
            os.environ.update(before)
