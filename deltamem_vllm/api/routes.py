"""The HTTP routes: chat and completions with memory, and everything about sessions."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response, UploadFile
from fastapi.responses import JSONResponse, StreamingResponse

from deltamem_vllm.api.generation import Generation, Run
from deltamem_vllm.api.problems import problem, problem_event, problem_response
from deltamem_vllm.api.schemas import (
    Deleted,
    ForkRequest,
    IngestReport,
    IngestRequest,
    MemoryChatRequest,
    MemoryCompletionRequest,
    RollbackRequest,
    SessionDetail,
    SessionList,
    SessionView,
    TenantDeleted,
)
from deltamem_vllm.api.service import MemoryService
from deltamem_vllm.engine.compat import (
    ErrorResponse,
    load_aware_call,
    validate_json_request,
    with_cancellation,
    with_sse_keep_alive,
)
from deltamem_vllm.errors import DeltaMemError, MemoryRequestError
