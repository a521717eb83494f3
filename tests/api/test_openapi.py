"""The server answers whatever its OpenAPI document allows, and as the document says."""

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from deltamem_vllm.api.routes import SNAPSHOT_TYPE
from tests.api.server import MODEL, Server
from tests.helpers import VOCAB

SESSIONS = "/v1/memory/sessions"
NAMES = ["one", "two/three"]
"""Sessions that are there before each request."""

COPY = "copy"
"""A session that is not there at first."""

OPERATIONS = [
    "POST /v1/chat/completions",
    "POST /v1/completions",
    f"GET {SESSIONS}",
    f"DELETE {SESSIONS}",
    f"POST {SESSIONS}/{{session}}/ingest",
    f"POST {SESSIONS}/{{session}}/fork",
    f"POST {SESSIONS}/{{session}}/rollback",
    f"GET {SESSIONS}/{{session}}/export",
    f"POST {SESSIONS}/{{session}}/import",
    f"GET {SESSIONS}/{{session}}",
    f"DELETE {SESSIONS}/{{session}}",
]
EXAMPLES = 30

FIXED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/completions": {"prompt": [5, 6]},
}
"""What is asked with any `memory`; the rest of these bodies is vLLM's."""

PREFERRED_PARAMETERS = {"session": {"enum": NAMES}, "model": {"enum": [MODEL]}}
PREFERRED_BODIES: dict[str, dict[str, Any]] = {
    "fork": {"to": {"const": COPY}},
    "ingest": {
        "stream": {"type": "boolean"},
        "token_ids": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": VOCAB - 1},
            "minItems": 1,
            "maxItems": 20,
        },
    },
}
"""Every other request or so has these, to get further than chance would."""

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@schemathesis.serializer(SNAPSHOT_TYPE)
def as_bytes(context: schemathesis.SerializationContext, value: Any) -> dict[str, bytes]:
    """The body of an import."""
    return {"data": value if isinstance(value, bytes) else str(value).encode()}


@pytest.fixture(scope="module")
def memory_api(tool_server: Server) -> schemathesis.BaseSchema:
    """The document's routes with a memory, with values that get further than chance would."""
    document = httpx.get(f"{tool_server.url}/openapi.json").json()
    schemas = document["components"]["schemas"]
    _prefer(schemas["Memory"]["properties"], "session", {"enum": NAMES})
    paths = {
        path: document["paths"][path]
        for path in document["paths"]
        if path in FIXED or path.startswith(SESSIONS)
    }
    for path, operations in paths.items():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                if parameter["name"] in PREFERRED_PARAMETERS:
                    _prefer(parameter, "schema", PREFERRED_PARAMETERS[parameter["name"]])
            content = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if path in FIXED:
                fixed = {"model": MODEL, "max_tokens": 2, **FIXED[path]}
                constants = {name: {"const": value} for name, value in fixed.items()}
                # Most of its fields contradict each other, so few are answered by chance.
                plain = {"enum": [{"session": name} for name in NAMES]}
                memory = {"anyOf": [plain, {"$ref": "#/components/schemas/Memory"}]}
                content["schema"] = _object({**constants, "memory": memory})
            elif (action := path.rpartition("/")[2]) in PREFERRED_BODIES:
                _prefer(content, "schema", _object(PREFERRED_BODIES[action]))
    api = schemathesis.openapi.from_dict({**document, "paths": paths})
    api.config.update(base_url=tool_server.url)
    return api


def _prefer(holder: dict[str, Any], name: str, schema: dict[str, Any]) -> None:
    holder[name] = {"anyOf": [schema, holder[name]]}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


def test_all_operations_are_tried(memory_api: schemathesis.BaseSchema) -> None:
    operations = [result.ok() for result in memory_api.get_all_operations()]
    assert {f"{one.method.upper()} {one.path}" for one in operations} == set(OPERATIONS)


@pytest.mark.parametrize("mode", schemathesis.GenerationMode, ids=lambda mode: mode.value)
@pytest.mark.parametrize("name", OPERATIONS)
def test_any_request_is_answered_as_the_document_says(
    tool_server: Server,
    memory_api: schemathesis.BaseSchema,
    name: str,
    mode: schemathesis.GenerationMode,
) -> None:
    method, path = name.split()
    operation = memory_api[path][method]
    # vLLM passes over fields that it does not know.
    checks = CHECKS if path in FIXED else [*CHECKS, negative_data_rejection]
    answers: set[int] = set()
    httpx.delete(f"{tool_server.url}{SESSIONS}/{COPY}").raise_for_status()

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        make_sessions(tool_server)
        answers.add(case.call_and_validate(checks=checks, timeout=60).status_code)

    ask()
    if mode is schemathesis.GenerationMode.NEGATIVE:
        assert 400 in answers
    elif not path.endswith("/import"):
        assert 200 in answers


def make_sessions(server: Server) -> None:
    for name in NAMES:
        url = f"{server.url}{SESSIONS}/{name}"
        if httpx.get(url).status_code == 404:
            httpx.post(f"{url}/ingest", json={"token_ids": [5]}).raise_for_status()
