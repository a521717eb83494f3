"""Every name of vLLM that is not a documented plugin point and that we touch, in one place.

The rest of the package imports these names from here, so that a new vLLM version is one file to
check. `patches/` says for each why it is touched and what upstream change would make it
unnecessary; `tests/engine/test_compat.py` checks that each still exists with the shape we rely on.
"""

import asyncio
import functools
import gc
import hashlib
import io
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import InvalidStateError
from contextlib import asynccontextmanager, redirect_stderr, suppress
from types import SimpleNamespace
from typing import Any, Final

import vllm
from vllm import envs
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import CompilationConfig, VllmConfig, get_current_vllm_config
from vllm.config.kv_transfer import KVTransferConfig
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
)
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import (
    load_aware_call,
    validate_json_request,
    with_cancellation,
)
from vllm.entrypoints.serve.utils.orca_metrics import metrics_header
from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive
from vllm.forward_context import get_forward_context
from vllm.logprobs import Logprob
from vllm.lora.utils import get_adapter_absolute_path
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.renderers import ChatParams, TokenizeParams
from vllm.utils.mistral import is_mistral_tokenizer
from vllm.utils.torch_utils import direct_register_custom_op, get_dtype_size
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine.core_client import InprocClient
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, SlidingWindowSpec
from vllm.v1.request import Request

from deltamem_vllm.errors import BrokenOffError, EngineConfigError, ModelNotFoundError
from deltamem_vllm.versions import check_tested

try:
    from vllm.triton_utils import dispatcher
except ImportError:  # a build that has nothing to replace
    dispatcher = None

SUPPORTED_VERSIONS = ("0.32", "0.33")
"""Minor versions of vLLM whose names were compared with what this module imports."""

UNTESTED_VERSION_VARIABLE = "DELTAMEM_ALLOW_UNTESTED_VLLM"

GENERATION_REQUESTS = (ChatCompletionRequest, CompletionRequest, ResponsesRequest)
"""The request models of HTTP routes that generate; all have `to_sampling_params`."""


def check_version(version: str = vllm.__version__) -> None:
    """Refuse a vLLM that this package was never compared with.

    Raises:
        EngineConfigError: unless the environment variable above is set to 1.
    """
    check_tested("vLLM", version, SUPPORTED_VERSIONS, UNTESTED_VERSION_VARIABLE)


def add_splitting_op(op_name: str) -> None:
    """Make piecewise CUDA graphs split at `op_name` ("namespace::name"), as they do at attention.

    vLLM copies `CompilationConfig._attention_ops` into `splitting_ops` when it builds its config,
    after plugins have loaded.
    """
    if op_name not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append(op_name)


def add_config_hook(architecture: str, hook: type[VerifyAndUpdateConfig]) -> None:
    """Have `hook` check and adjust vLLM's configuration when `architecture` is served."""
    MODELS_CONFIG_MAP[architecture] = hook


def let_kernel_scan_pass_llvmlite() -> None:
    """Keep vLLM's CPU workers from failing in a process that has loaded numba.

    A worker looks through every attribute of every loaded module for kernels to replace, and
    takes whatever `__dict__` returns for a dict. `llvmlite.binding.ffi.lib` answers every
    attribute with a function of the LLVM library, so the scan ends in an AttributeError.
    """
    scan: Any = getattr(dispatcher, "_rebind_kernels", None)
    if scan is None or hasattr(scan, "__wrapped__"):
        return

    @functools.wraps(scan)
    def without_llvmlite(overrides: Any) -> None:
        hidden = {name: sys.modules[name] for name in sys.modules if name.startswith("llvmlite")}
        for name in hidden:
            del sys.modules[name]
        try:
            scan(overrides)
        finally:
            sys.modules.update(hidden)

    dispatcher._rebind_kernels = without_llvmlite


def extend_cache_salt(
    request: Request, salt: str, *, shared_blocks: int = 0, shared_salt: str = ""
) -> None:
    """Make `request` share prefix-cache blocks only with requests of the same `salt`.

    Clients may give a salt of their own, so `salt` goes first and every request needs one of the
    same length: what a client writes then cannot pass for another request's `salt`.

    The block hashes were computed when the request was made, so they are computed anew. Must run
    before the scheduler looks the request up in the prefix cache.

    Args:
        request: as it was made.
        salt: of its blocks.
        shared_blocks: so many blocks at its beginning have `shared_salt` instead, and `salt` enters
            behind them.
        shared_salt: as long as `salt`, and different from every request's.
    """
    if shared_blocks and request._block_hasher is not None:
        request._block_hasher = _salted_behind(request._block_hasher, shared_blocks, salt)
        salt = shared_salt
    request.cache_salt = f"{salt}{request.cache_salt or ''}"
    request.block_hashes.clear()
    request.update_block_hashes()


def _salted_behind(
    hasher: Callable[[Request], list[Any]], num_blocks: int, salt: str
) -> Callable[[Request], list[Any]]:
    """vLLM's block hasher with a salt in the hashes of all blocks but the first `num_blocks`.

    vLLM takes the last of a request's hashes for the parent of the next. It hashes all blocks that
    are full by now, and is asked again when more are.
    """

    def hash_new_blocks(request: Request) -> list[Any]:
        known = request.block_hashes
        if len(known) > num_blocks:
            return hasher(request)
        shared = [*known, *(hasher(request) if len(known) < num_blocks else [])][:num_blocks]
        new = shared[len(known) :]
        if len(shared) == num_blocks:
            parent = hashlib.sha256(shared[-1] + salt.encode()).digest()
            request.block_hashes = [*shared[:-1], parent]
            try:
                new += hasher(request)
            finally:
                request.block_hashes = known
        return new

    return hash_new_blocks


ALIVE_CHECK_S: Final = 1.0
"""How often a call looks whether its engine still lives."""


async def call_all_workers(engine_client: Any, method: str, *args: Any) -> list[Any]:
    """Call a worker method in every worker of every data parallel engine.

    `EngineClient.collective_rpc` asks the first engine only. vLLM ends no call whose engine died
    meanwhile, so this one looks for itself.

    Returns:
        One answer per worker.

    Raises:
        EngineDeadError: an engine died.
    """
    call = asyncio.ensure_future(
        engine_client.engine_core.call_utility_all_async("collective_rpc", method, None, args, None)
    )
    try:
        while not (await asyncio.wait({call}, timeout=ALIVE_CHECK_S))[0]:
            if engine_client.errored:
                raise engine_client.dead_error
        per_engine = call.result()
    finally:
        call.cancel()
    return [answer for answers in per_engine for answer in answers]


def engine_of_this_process_is_taken() -> bool:
    """Whether another engine lives in this process, where the next one would run, too.

    Both would use the first one's KV connector. Engines that nobody holds any more do not count:
    they are collected first, of which vLLM's `gc.freeze` at an engine's start keeps Python.
    """
    if envs.VLLM_ENABLE_V1_MULTIPROCESSING or not has_kv_transfer_group():
        return False
    gc.unfreeze()
    gc.collect()
    return bool(has_kv_transfer_group())


def engine_is_dead(engine_core: Any) -> bool:
    """Whether the process of an `LLM`'s engine client died; calls of it may never return then."""
    resources = getattr(engine_core, "resources", None)  # none in process
    return resources is not None and bool(resources.engine_dead)


def end_calls_of_a_dead_engine(engine_core: Any) -> None:
    """Have calls of an `LLM`'s engine client end with an error once its engine was killed.

    vLLM notes the death, and lets whoever waits for an output or for a worker's answer wait for
    ever. A thread that ends with the engine tells them.
    """
    resources = getattr(engine_core, "resources", None)
    if resources is None:  # in process
        return
    # No reference to the client, which goes when its last user does.
    outputs, calls = engine_core.outputs_queue, engine_core.utility_results

    def watch() -> None:
        while not resources.engine_dead:
            time.sleep(ALIVE_CHECK_S)
        error = BrokenOffError("the engine's process died")
        outputs.put_nowait(error)
        for call in list(calls.values()):
            with suppress(InvalidStateError):
                call.set_exception(error)

    threading.Thread(target=watch, name="deltamem-engine-watch", daemon=True).start()


async def lora_behind(models: Any, name: str | None) -> Any:
    """The LoRA request that vLLM will use for a model's name; None for the base model.

    A resolver's LoRA is loaded by this, as vLLM's own check of the name would do a moment later.

    Args:
        models: vLLM's `OpenAIServingModels`.
        name: of a request's `model`.

    Raises:
        ModelNotFoundError: nobody knows the name, or its LoRA cannot be loaded.
    """
    if not name:
        return None
    if name in models.lora_requests:
        return models.lora_requests[name]
    if envs.VLLM_SKIP_MODEL_NAME_VALIDATION or models.is_base_model(name):
        return None
    problem = f"The model `{name}` does not exist."
    if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        found = await models.resolve_lora(name)
        if not isinstance(found, ErrorResponse):
            return found
        problem = found.error.message
    raise ModelNotFoundError(problem)


@asynccontextmanager
async def api_server(arguments: Sequence[str]) -> AsyncIterator[tuple[Any, Any]]:
    """What `vllm serve` would run, without its HTTP server: the engine's client and the ASGI app.

    Args:
        arguments: what comes after `vllm serve`.

    Raises:
        EngineConfigError: vLLM does not take them; the message is vLLM's.
    """
    # Heavy, and no business of the engine's own processes.
    from vllm.entrypoints.cli.serve import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    said = io.StringIO()
    try:
        # A parser that refuses ends its process.
        with redirect_stderr(said):
            parsed = parser.parse_args(list(arguments))
    except SystemExit:
        # The usage before it is hundreds of lines.
        _, _, problem = said.getvalue().strip().rpartition("vllm serve: error: ")
        raise EngineConfigError(f"vLLM refuses its flags: {problem}") from None
    parsed.model = parsed.model_tag
    validate_parsed_serve_args(parsed)
    async with build_async_engine_client(parsed) as engine:
        tasks = await engine.get_supported_tasks()
        app = build_app(parsed, tasks, engine.model_config)
        await init_app_state(engine, app.state, parsed, tasks)
        # Where vLLM's handler of engine errors asks its HTTP server to end; there is none.
        app.state.server = SimpleNamespace()
        yield engine, app


def kv_connector_of(vllm_config: VllmConfig) -> str | None:
    """Name of the configured KV connector, None without one."""
    config = vllm_config.kv_transfer_config
    return None if config is None else config.kv_connector


__all__ = [
    "GENERATION_REQUESTS",
    "AttentionBackend",
    "AttentionCGSupport",
    "AttentionLayerBase",
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "AttentionSpec",
    "ChatCompletionRequest",
    "ChatCompletionResponse",
    "ChatParams",
    "CommonAttentionMetadata",
    "CompletionRequest",
    "CompletionResponse",
    "ErrorResponse",
    "FullAttentionSpec",
    "InprocClient",
    "KVConnectorBase_V1",
    "KVConnectorMetadata",
    "KVConnectorRole",
    "KVTransferConfig",
    "Logprob",
    "MultipleOf",
    "Request",
    "SchedulerOutput",
    "SlidingWindowSpec",
    "SupportsHMA",
    "TokenizeParams",
    "VerifyAndUpdateConfig",
    "VllmConfig",
    "add_config_hook",
    "add_splitting_op",
    "api_server",
    "call_all_workers",
    "check_version",
    "direct_register_custom_op",
    "eager_break_during_capture",
    "end_calls_of_a_dead_engine",
    "engine_is_dead",
    "engine_of_this_process_is_taken",
    "extend_cache_salt",
    "extract_layer_index",
    "get_adapter_absolute_path",
    "get_current_vllm_config",
    "get_dtype_size",
    "get_forward_context",
    "get_kv_transfer_group",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "is_mistral_tokenizer",
    "kv_connector_of",
    "let_kernel_scan_pass_llvmlite",
    "load_aware_call",
    "lora_behind",
    "metrics_header",
    "validate_json_request",
    "with_cancellation",
    "with_sse_keep_alive",
]
