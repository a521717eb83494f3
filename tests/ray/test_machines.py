"""A cluster of two machines, as Ray sees it: a store of one of them is refused."""

from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

from deltamem_vllm.errors import SettingsError
from deltamem_vllm.ray.app import build
from deltamem_vllm.ray.arguments import ServeArguments
from tests.ray.cluster import SETTINGS

FILE = "sqlite:///srv/sessions.db"


@pytest.fixture
def two_machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    machine = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=machine)
    try:
        cluster.add_node(num_cpus=1, resources={"file": 1})
        ray.init(address=cluster.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.timeout(180)
@pytest.mark.usefixtures("two_machines")
def test_a_file_is_shared_only_by_replicas_that_are_kept_on_its_machine() -> None:
    with pytest.raises(SettingsError, match="the cluster has 2"):
        build(ServeArguments(model="m", store=FILE, num_replicas=2))
    build(ServeArguments(model="m", store="redis://host/0", num_replicas=2))
    build(ServeArguments(model="m", store=FILE, num_replicas=1))
    kept = {"ray_actor_options": {"resources": {"file": 0.1}}}
    build(ServeArguments(model="m", store=FILE, num_replicas=2, deployment=kept))
