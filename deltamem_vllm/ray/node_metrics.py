"""`/metrics` of a machine: those of all its replicas, each under its own label `replica`.

A scrape of the app's own `/metrics` reaches one replica, another one each time. So each replica
keeps its metrics in files, as prometheus_client does for servers of several processes, and one of
a machine's replicas shows them all at a fixed port; when it goes, another one takes the port.
"""

import os
import shutil
import tempfile
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

FOLDER_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"
LABEL: Final = "replica"
RETRY_S: Final = 5.0
"""How often replicas without the port try to get it."""


def keep_in_files(app: str, replica: str) -> None:
    """Have this process keep its metrics in a folder of its own.

    Must run before prometheus_client is imported, which decides then.
    """
    root = _root(app)
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder in set(root.iterdir()).difference(_living(app)):
        shutil.rmtree(folder, ignore_errors=True)
    # Whole at once: a replica that starts meanwhile removes folders without a living process.
    begun = Path(tempfile.mkdtemp(prefix=f".{app}.", dir=root.parent))
    (begun / "pid").write_text(str(os.getpid()))
    folder = begun.rename(root / replica)
    os.environ[FOLDER_VARIABLE] = str(folder)


def replicas_here(app: str) -> dict[str, int]:
    """Process ids, by replica, of an app's replicas on this machine that keep metrics in files."""
    return {folder.name: pid for folder, pid in _living(app).items()}


class NodeMetrics:
    """The metrics of one machine's replicas, at a port of it.

    Args:
        app: whose replicas.
        port: where they are shown, by whichever replica got it.
    """

    def __init__(self, app: str, port: int) -> None:
        self._app = app
        self._port = port
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="node-metrics")
        self._thread.start()

    def close(self) -> None:
        """Leave the port to another replica."""
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        registry = CollectorRegistry()
        registry.register(ReplicaCollector(self._app))  # type: ignore[arg-type]  # not its subclass
        while not self._ends.is_set():
            try:
                server, thread = start_http_server(self._port, registry=registry)
            except OSError:
                self._ends.wait(RETRY_S)
                continue
            self._ends.wait()
            server.shutdown()
            server.server_close()
            thread.join()


class ReplicaCollector:
    """Reads the folders of the replicas that live; see prometheus_client's `Collector`."""

    def __init__(self, app: str) -> None:
        self._app = app

    def collect(self) -> Iterable[object]:
        """One family per metric, with the samples of all replicas."""
        from prometheus_client import CollectorRegistry, Metric, multiprocess

        families: dict[str, Metric] = {}
        for folder in sorted(_living(self._app)):
            reader = multiprocess.MultiProcessCollector(CollectorRegistry(), path=str(folder))
            for family in reader.collect():
                shown = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = {**sample.labels, LABEL: folder.name}
                    shown.add_sample(sample.name, labels, sample.value)
        return families.values()


def _root(app: str) -> Path:
    return Path(tempfile.gettempdir()) / f"deltamem-metrics-{os.getuid()}" / app


def _living(app: str) -> dict[Path, int]:
    """The folders whose process runs, and its id."""
    found = {}
    for folder in _root(app).glob("*"):
        # A replica that begins or ends has no file, or an empty one.
        with suppress(OSError, ValueError):
            pid = int((folder / "pid").read_text())
            os.kill(pid, 0)
            found[folder] = pid
    return found
