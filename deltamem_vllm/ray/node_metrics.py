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
from pathlib import Path
from typing import Final

FOLDER_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"
LABEL: Final = "replica"
RETRY_S: Final = 5.0
"""How often replicas without the port try to get it."""


def keep_in_files(app: str, replica: str) -> Path:
    """Have this process keep its metrics in a folder, which holds the process id as `pid`.

    Must run before prometheus_client is imported, which decides then.
    """
    root = Path(tempfile.gettempdir()) / f"deltamem-metrics-{os.getuid()}" / app
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder in root.iterdir():
        if not _is_alive(folder):
            shutil.rmtree(folder, ignore_errors=True)
    folder = root / replica
    folder.mkdir(mode=0o700)
    (folder / "pid").write_text(str(os.getpid()))
    os.environ[FOLDER_VARIABLE] = str(folder)
    return root


class NodeMetrics:
    """The metrics of one machine's replicas, at a port of it.

    Args:
        root: the folder of their folders.
        port: where they are shown, by whichever replica got it.
    """

    def __init__(self, root: Path, port: int) -> None:
        self._root = root
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
        registry.register(ReplicaCollector(self._root))  # type: ignore[arg-type]  # see there
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

    def __init__(self, root: Path) -> None:
        self._root = root

    def collect(self) -> Iterable[object]:
        """One family per metric, with the samples of all replicas."""
        from prometheus_client import CollectorRegistry, Metric, multiprocess

        families: dict[str, Metric] = {}
        for folder in sorted(self._root.iterdir()):
            if not _is_alive(folder):
                continue
            reader = multiprocess.MultiProcessCollector(CollectorRegistry(), path=str(folder))
            for family in reader.collect():
                shown = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = {**sample.labels, LABEL: folder.name}
                    shown.add_sample(sample.name, labels, sample.value)
        return families.values()


def _is_alive(folder: Path) -> bool:
    try:
        os.kill(int((folder / "pid").read_text()), 0)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True
