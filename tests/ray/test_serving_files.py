"""The files of `serving/` hold together, and say what the programs that read them take."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ConfigDict
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from deltamem_vllm.ray import app
from deltamem_vllm.ray.arguments import ServeArguments
from deltamem_vllm.serve import split_flags

SERVING = Path(__file__).parents[2] / "serving"
COMPOSE = SERVING / "compose" / "compose.yaml"
METRIC = re.compile(r"\b(?:deltamem|vllm):[a-z0-9_]+")
DOCUMENTED = re.compile(r"^\| `(deltamem:[a-z_]+)` \| (\w+) \|", re.MULTILINE)


class Strict(BaseModel):
    """Takes no field that it does not know."""

    model_config = ConfigDict(extra="forbid")


class Service(Strict):
    """What we use of a compose file's service."""

    image: str | None = None
    build: dict[str, Any] | None = None
    command: list[str] = []
    environment: dict[str, str] = {}
    depends_on: dict[str, dict[str, str]] = {}
    healthcheck: dict[str, Any] = {}
    ports: list[str] = []
    networks: list[str]
    volumes: list[str] = []
    restart: str
    stop_grace_period: str = "10s"
    read_only: bool = False
    tmpfs: list[str] = []
    security_opt: list[str] = []
    cap_drop: list[str] = []
    shm_size: str = ""


class Compose(Strict):
    """What we use of a compose file."""

    name: str
    services: dict[str, Service]
    networks: dict[str, dict[str, Any]]
    volumes: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def compose() -> Compose:
    return Compose.model_validate(load(COMPOSE))


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def deployed(config: Any) -> list[ServeApplicationSchema]:
    return list(ServeDeploySchema.model_validate(config).applications)


@pytest.mark.parametrize("name", ["serve.yaml", "kuberay.yaml"])
def test_serve_takes_the_configuration(name: str) -> None:
    """The file by Serve's schema, our arguments by ours, and the options by Serve again."""
    config = load(SERVING / "ray" / name)
    if "spec" in config:
        config = yaml.safe_load(config["spec"]["serveConfigV2"])
    (application,) = deployed(config)
    assert application.import_path == "deltamem_vllm.ray.app:build"
    arguments = ServeArguments.model_validate(application.args)
    assert arguments.most_replicas > 1
    deployment = app.build(arguments)._bound_deployment
    assert deployment.name == app.DEPLOYMENT
    assert deployment.ray_actor_options["num_gpus"] == arguments.gpus == 1


def test_pods_of_the_ray_service_fit_its_app() -> None:
    service = load(SERVING / "ray" / "kuberay.yaml")
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    (application,) = deployed(yaml.safe_load(service["spec"]["serveConfigV2"]))
    arguments = ServeArguments.model_validate(application.args)
    (group,) = cluster["workerGroupSpecs"]
    assert group["maxReplicas"] == arguments.most_replicas
    pod = group["template"]["spec"]
    patience = app.options(arguments)["graceful_shutdown_timeout_s"]
    assert pod["terminationGracePeriodSeconds"] > patience
    ports = {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}
    assert ports["metrics"] == arguments.metrics_port
    annotations = group["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(arguments.metrics_port)
    for template in (cluster["headGroupSpec"]["template"], group["template"]):
        (container,) = template["spec"]["containers"]
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        hook = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
        (path,) = [entry["value"] for entry in container["env"] if entry["name"] == hook]
        assert path == "deltamem_vllm.ray.affinity.proxy_middlewares"


def test_compose_file_names_only_what_it_has(compose: Compose) -> None:
    folder = COMPOSE.parent
    for service in compose.services.values():
        assert (service.image is None) != (service.build is None)
        assert set(service.networks) <= set(compose.networks)
        assert set(service.depends_on) <= set(compose.services)
        for volume in service.volumes:
            source = volume.partition(":")[0]
            assert source in compose.volumes or (folder / source).exists(), source
        if service.build is not None:
            context = (folder / service.build["context"]).resolve()
            dockerfile = context / service.build["dockerfile"]
            copied = re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", dockerfile.read_text(), re.MULTILINE)
            assert copied
            for source in " ".join(copied).split():
                assert (context / source).exists(), source
            assert f"ARG {next(iter(service.build['args']))}=" in dockerfile.read_text()


def test_compose_file_shows_nothing_to_other_machines(compose: Compose) -> None:
    published = [port for service in compose.services.values() for port in service.ports]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)
    assert compose.networks["store"] == {"internal": True}
    on_store = [name for name, one in compose.services.items() if "store" in one.networks]
    assert on_store == ["server", "redis"]


def test_the_server_stops_in_its_own_time(compose: Compose) -> None:
    server = compose.services["server"]
    command = server.command
    timeout = command[command.index("--shutdown-timeout") + 1]
    assert int(server.stop_grace_period.removesuffix("s")) > int(timeout)
    assert command[0] == "serve"
    split_flags(command[2:])


def test_redis_of_the_compose_file_keeps_what_it_acknowledges(compose: Compose) -> None:
    settings = " ".join(compose.services["redis"].command)
    for needed in ("--appendonly yes", "--appendfsync always", "--maxmemory-policy noeviction"):
        assert needed in settings


def test_prometheus_asks_services_that_there_are(compose: Compose) -> None:
    config = load(COMPOSE.parent / "prometheus.yaml")
    assert set(config) == {"global", "scrape_configs"}
    jobs = config["scrape_configs"]
    assert len({job["job_name"] for job in jobs}) == len(jobs)
    targets = [
        target
        for job in jobs
        for group in job.get("static_configs", ())
        for target in group["targets"]
    ]
    assert targets
    for target in targets:
        service = compose.services[target.partition(":")[0]]
        assert set(service.networks) & set(compose.services["prometheus"].networks)
    folder = COMPOSE.parent / "grafana" / "provisioning"
    (source,) = load(folder / "datasources" / "prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = load(folder / "dashboards" / "deltamem.yaml")["providers"]
    mounted = [volume.split(":")[1] for volume in compose.services["grafana"].volumes]
    assert provider["options"]["path"] in mounted


def dashboard() -> Any:
    return json.loads((SERVING / "dashboards" / "deltamem.json").read_text())


def queries() -> list[str]:
    return [
        target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())
    ]


def test_dashboard_shows_every_metric_of_memory_and_no_other() -> None:
    """vLLM's metrics are looked for in a real server's, in `test_replicas.py`."""
    documented = dict(DOCUMENTED.findall((SERVING.parent / "docs" / "metrics.md").read_text()))
    shown = {name for query in queries() for name in METRIC.findall(query)}
    families = {
        name.removesuffix("_bucket") if name.endswith("_bucket") else name
        for name in shown
        if name.startswith("deltamem:")
    }
    assert families == set(documented)
    for name in shown:
        kind = documented.get(name.removesuffix("_bucket"))
        assert name.startswith("vllm:") or (kind == "histogram") == name.endswith("_bucket")


def test_dashboard_is_laid_out() -> None:
    board = dashboard()
    assert board["uid"]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    places = [panel["gridPos"] for panel in board["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y
    variables = {variable["name"] for variable in board["templating"]["list"]}
    for query in queries():
        assert query.count("(") == query.count(")")
        assert query.count("{") == query.count("}")
        used = set(re.findall(r"\$(\w+)", query)) - {"__rate_interval"}
        assert used <= variables
