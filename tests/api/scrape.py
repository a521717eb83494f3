"""A server's `/metrics`, as tests look at it."""

import time
from collections.abc import Mapping

import httpx
from prometheus_client.parser import text_string_to_metric_families

from deltamem_vllm.api import metrics
from tests.api.server import Server

GAUGES_TIMEOUT_S = 10
"""More than a sweep's interval in tests."""


class Scrape:
    """All of our samples at one moment."""

    def __init__(self, server: Server) -> None:
        text = httpx.get(f"{server.url}/metrics", timeout=30).text
        families = list(text_string_to_metric_families(text))
        samples = [sample for family in families for sample in family.samples]
        self.families = [
            family.name for family in families if family.name.startswith(metrics.PREFIX)
        ]
        self.samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for sample in samples
            if sample.name.startswith(metrics.PREFIX)
        }
        self.engine_requests = sum(
            sample.value for sample in samples if sample.name == "vllm:request_success_total"
        )

    def __getitem__(self, name: str) -> float:
        return self.samples[metrics.PREFIX + name, frozenset()]

    def turns(self) -> dict[tuple[str, str], float]:
        """How many, by mode and outcome."""
        found = {}
        for (name, labels), value in self.samples.items():
            if name == f"{metrics.PREFIX}turns_total":
                by = dict(labels)
                found[by["mode"], by["outcome"]] = value
        return found


def increase(before: Scrape, after: Scrape, name: str) -> float:
    return after[name] - before[name]


def new_turns(before: Scrape, after: Scrape) -> dict[tuple[str, str], float]:
    old = before.turns()
    return {by: count - old[by] for by, count in after.turns().items() if count != old.get(by, 0.0)}


def gauges_of(server: Server, expected: Mapping[str, float]) -> dict[str, float]:
    """The gauges of these names, as soon as they are as expected, or when time is up."""
    deadline = time.monotonic() + GAUGES_TIMEOUT_S
    while True:
        scrape = Scrape(server)
        found = {name: scrape[name] for name in expected}
        if found == expected or time.monotonic() > deadline:
            return found
        time.sleep(0.1)
