"""The HTTP routes: chats and completions with a memory, in place of vLLM's, and sessions."""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException as StarletteHTTPException

from deltamem_vllm.api.generation import Generation, stock_answer
from deltamem_vllm.api.ingesting import Ingests
from deltamem_vllm.api.problems import problem_response
from deltamem_vllm.api.schemas import (
    Deleted,
    ForkRequest,
    GenerationRequest,
    IngestReport,
    IngestRequest,
    MemoryChatRequest,
    MemoryCompletionRequest,
    Problem,
    RollbackRequest,
    SessionDetail,
    SessionList,
    SessionView,
    TenantDeleted,
)
from deltamem_vllm.api.service import MemoryService
from deltamem_vllm.api.turns import SessionTurns
from deltamem_vllm.engine.compat import load_aware_call, validate_json_request, with_cancellation
from deltamem_vllm.errors import DeltaMemError, MemoryRequestError, SessionNotFoundError
from deltamem_vllm.portable import check_vocabulary, export_record, import_content
from deltamem_vllm.sessions import SessionKey

SNAPSHOT_TYPE = "application/vnd.safetensors"

Model = Annotated[
    str | None, Query(description="The served model, where LoRA adapters are served beside it.")
]


class _NameConvertor(PathConvertor):
    """A session's name in a path: all of it, whereas `path` passes over a line break at its end."""

    regex = "(?s:.*)"


register_url_convertor("session", _NameConvertor())


class _OurRoute(APIRoute):
    """Answers our errors, and a body that cannot be read, in the form of OpenAI's."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await handle(request)
            except DeltaMemError as error:
                return problem_response(error)
            except RequestValidationError as error:
                # vLLM's answer would say it twice, and in Python's words.
                for found in error.errors():
                    ours = found.get("ctx", {}).get("error")
                    if isinstance(ours, MemoryRequestError):
                        return problem_response(ours)
                raise
            except RecursionError:
                # Messages, arguments of calls, definitions of tools: wherever they are walked.
                return problem_response(MemoryRequestError("the body nests too deep."))
            except StarletteHTTPException as error:
                # vLLM's handler is for FastAPI's class, but FastAPI raises the one behind it.
                raise HTTPException(error.status_code, error.detail) from error

        return handler


PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem} for status in (400, 401, 404, 409, 413, 422, 429, 500, 503, 507)
}

generation_router = APIRouter(
    dependencies=[Depends(validate_json_request)],
    responses={**PROBLEMS, 200: {"content": {"text/event-stream": {}}}},
    route_class=_OurRoute,
)
session_router = APIRouter(
    prefix="/v1/memory/sessions",
    tags=["memory"],
    responses=PROBLEMS,
    route_class=_OurRoute,
)


def service_of(raw_request: Request) -> MemoryService:
    """The server's session service.

    Raises:
        MemoryRequestError: it has none.
    """
    service: MemoryService | None = raw_request.app.state.deltamem
    if service is None:
        raise MemoryRequestError(
            "this server has no session store; every request has an ephemeral memory that is "
            "written token by token. Leave the field memory out, or start the server with "
            "`deltamem serve` and a --store."
        )
    return service


@generation_router.post("/v1/chat/completions")
@with_cancellation
@load_aware_call
async def create_chat_completion(request: MemoryChatRequest, raw_request: Request) -> Response:
    """vLLM's chat completions, with a field `memory`."""
    handler = raw_request.app.state.openai_serving_chat
    return await _answer(request, raw_request, handler and handler.create_chat_completion)


@generation_router.post("/v1/completions")
@with_cancellation
@load_aware_call
async def create_completion(request: MemoryCompletionRequest, raw_request: Request) -> Response:
    """vLLM's completions, with a field `memory`."""
    handler = raw_request.app.state.openai_serving_completion
    return await _answer(request, raw_request, handler and handler.create_completion)


async def _answer(request: GenerationRequest, raw_request: Request, generate: Any) -> Response:
    if generate is None:
        raise NotImplementedError("The model does not support this API")

    async def run(asked: GenerationRequest) -> Any:
        return await generate(asked, raw_request)

    if request.memory is None:
        if raw_request.app.state.deltamem is None:
            return await stock_answer(request, raw_request, run)
        return await Generation(service_of(raw_request)).answer_plain(request, raw_request, run)
    return await Generation(service_of(raw_request)).answer(request, raw_request, run)


async def detail_of(turns: SessionTurns, key: SessionKey) -> SessionDetail:
    """A session and its kept versions.

    Raises:
        SessionNotFoundError: there is none; it may have been deleted a moment ago.
    """
    versions = await turns.call(turns.store.versions, key)
    if not versions:
        raise SessionNotFoundError(f"session {key.name!r} does not exist any more.")
    return SessionDetail.of(versions)


@session_router.get("")
async def list_sessions(
    raw_request: Request,
    prefix: Annotated[str, Query(max_length=256)] = "",
    after: Annotated[str | None, Query(max_length=2000)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    model: Model = None,
) -> SessionList:
    """The tenant's sessions with this model, by name, a page at a time."""
    service = service_of(raw_request)
    scope = await service.scope(raw_request, model)
    page = await service.turns.call(
        service.turns.store.list_sessions,
        scope.tenant,
        fingerprint=scope.parts.digest,
        prefix=prefix,
        after=after,
        limit=limit,
    )
    return SessionList(
        data=[SessionView.of(info) for info in page.sessions],
        has_more=page.next_after is not None,
        next_after=page.next_after,
    )


@session_router.delete("")
async def delete_sessions(raw_request: Request, all: bool = False) -> TenantDeleted:
    """Delete all sessions of the tenant, whatever their model; say `all=true` to mean it."""
    service = service_of(raw_request)
    if not all:
        raise MemoryRequestError("this deletes all of the tenant's sessions: add ?all=true.")
    tenant = service.tenant(raw_request)
    return TenantDeleted(sessions=await service.turns.delete_tenant(tenant))


@session_router.post("/{session:session}/fork")
async def fork_session(
    session: str, body: ForkRequest, raw_request: Request, model: Model = None
) -> SessionDetail:
    """Make another session of one version of this one."""
    service = service_of(raw_request)
    key = (await service.scope(raw_request, model)).key(session)
    record = await service.turns.call(service.turns.store.fork, key, body.to, body.version)
    return SessionDetail.of((record,))


@session_router.post("/{session:session}/rollback")
async def roll_back_session(
    session: str, body: RollbackRequest, raw_request: Request, model: Model = None
) -> SessionDetail:
    """Make an older version the current one, as a new version."""
    service = service_of(raw_request)
    key = (await service.scope(raw_request, model)).key(session)
    await service.turns.call(service.turns.store.rollback, key, body.version)
    return await detail_of(service.turns, key)


@session_router.post(
    "/{session:session}/ingest",
    responses={200: {"model": IngestReport, "content": {"text/event-stream": {}}}},
)
@with_cancellation
async def ingest(
    session: str, body: IngestRequest, raw_request: Request, model: Model = None
) -> Response:
    """Write text of any length without generating."""
    service = service_of(raw_request)
    return await Ingests(service).answer(session, body, raw_request, model)


@session_router.get(
    "/{session:session}/export",
    response_class=Response,
    responses={200: {"content": {SNAPSHOT_TYPE: {}}}},
)
async def export_session(
    session: str,
    raw_request: Request,
    model: Model = None,
    version: Annotated[int | None, Query(ge=1)] = None,
) -> Response:
    """A session as a file, for another server with the same model."""
    service = service_of(raw_request)
    scope = await service.scope(raw_request, model)
    key = scope.key(session)
    record = await service.turns.call(service.turns.store.get, key, version)
    data = await service.turns.call(export_record, record, scope.parts, service.shape)
    return Response(data, media_type=SNAPSHOT_TYPE)


@session_router.post(
    "/{session:session}/import",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {SNAPSHOT_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def import_session(
    session: str,
    raw_request: Request,
    model: Model = None,
    ttl: Annotated[float | None, Query(gt=0, allow_inf_nan=False)] = None,
) -> SessionDetail:
    """Make a session of a file that `export` gave."""
    service = service_of(raw_request)
    scope = await service.scope(raw_request, model)
    key = scope.key(session)
    data = await raw_request.body()
    content = await service.turns.call(import_content, data, scope.parts, service.shape)
    vocabulary = raw_request.app.state.vllm_config.model_config.get_vocab_size()
    check_vocabulary(content.pending_token_ids, vocabulary)
    record = await service.turns.call(service.turns.store.create, key, content, ttl=ttl)
    return SessionDetail.of((record,))


# After the routes with a word behind the name: a name may have slashes in it.


@session_router.get("/{session:session}")
async def get_session(session: str, raw_request: Request, model: Model = None) -> SessionDetail:
    """A session and its kept versions."""
    service = service_of(raw_request)
    key = (await service.scope(raw_request, model)).key(session)
    await service.turns.call(service.turns.store.get, key)  # says what is missing
    return await detail_of(service.turns, key)


@session_router.delete("/{session:session}")
async def delete_session(session: str, raw_request: Request, model: Model = None) -> Deleted:
    """Delete a session for good, a running turn or not."""
    service = service_of(raw_request)
    key = (await service.scope(raw_request, model)).key(session)
    return Deleted(session=session, deleted=await service.turns.delete(key))
