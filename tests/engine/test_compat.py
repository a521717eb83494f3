"""Every name of vLLM that we rely on exists, with the shape we rely on. Starts no engine."""

import dataclasses
import importlib
import inspect
import queue
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_type_hints

import pytest
import torch
import zmq
from vllm import LLM, SamplingParams
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.forward_context import ForwardContext
from vllm.model_executor.models import llama, mistral, qwen2, qwen3
from vllm.renderers.base import BaseRenderer
from vllm.triton_utils import dispatcher
from vllm.utils.counter import Counter
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import CachedRequestData, KVConnectorBlockState, NewRequestData
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import BackgroundResources, SyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.engine.output_processor import OutputProcessor

from deltamem_vllm.engine import compat
from deltamem_vllm.engine.attention_backend import MemoryBackend, MemoryMetadataBuilder
from deltamem_vllm.engine.connector import DeltaMemConnector
from deltamem_vllm.errors import BrokenOffError, EngineConfigError
from deltamem_vllm.models.registry import ARCHITECTURES, MODEL_CLASSES
from deltamem_vllm.offline.llm import PER_PROMPT

ATTENTION_CLASSES = [
    qwen2.Qwen2Attention,
    qwen3.Qwen3Attention,
    llama.LlamaAttention,
    mistral.MistralAttention,
]
DECODER_LAYERS = [
    qwen2.Qwen2DecoderLayer,
    qwen3.Qwen3DecoderLayer,
    llama.LlamaDecoderLayer,
    mistral.MistralDecoderLayer,
]
CONNECTOR_METHODS = {
    "__init__": ("vllm_config", "role", "kv_cache_config"),
    "on_new_request": ("request",),
    "get_num_new_matched_tokens": ("request", "num_computed_tokens"),
    "update_state_after_alloc": ("request", "blocks", "num_external_tokens"),
    "build_connector_meta": ("scheduler_output",),
    "bind_connector_metadata": ("connector_metadata",),
    "get_finished": ("finished_req_ids",),
    "start_load_kv": ("forward_context", "kwargs"),
    "wait_for_layer_load": ("layer_name",),
    "save_kv_layer": ("layer_name", "kv_layer", "attn_metadata", "kwargs"),
    "wait_for_save": (),
}


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(function).parameters if name != "self")


def fields(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def own_source(cls: type) -> str:
    """The source of a class and of the vLLM classes it derives from."""
    return "\n".join(inspect.getsource(c) for c in cls.__mro__ if c.__module__.startswith("vllm"))


def tiny_request(**overrides: Any) -> compat.Request:
    """A request whose block hashes are its salt and its tokens, in blocks of two."""

    def hash_new_blocks(request: Any) -> list[bytes]:
        blocks = range(len(request.block_hashes), request.num_tokens // 2)
        return [
            f"{request.cache_salt}{request.all_token_ids[2 * b : 2 * b + 2]}".encode()
            for b in blocks
        ]

    arguments: dict[str, Any] = {
        "request_id": "a",
        "prompt_token_ids": [1, 2, 3, 4, 5],
        "sampling_params": SamplingParams(max_tokens=1, extra_args={"key": b"value"}),
        "pooling_params": None,
        "block_hasher": hash_new_blocks,
    }
    return compat.Request(**{**arguments, **overrides})


# Versions


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.33.0", "0.33.0rc1", "0.32.0+cpu"])
def test_versions_that_were_compared_are_accepted(version: str) -> None:
    compat.check_version(version)


@pytest.mark.parametrize("version", ["0.31.0", "0.31.9", "0.34.0", "0.3.2", "0.320.0", "1.32.0"])
def test_other_versions_are_refused_unless_the_user_insists(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(compat.UNTESTED_VERSION_VARIABLE, raising=False)
    with pytest.raises(EngineConfigError, match=compat.UNTESTED_VERSION_VARIABLE):
        compat.check_version(version)
    monkeypatch.setenv(compat.UNTESTED_VERSION_VARIABLE, "1")
    compat.check_version(version)


def test_all_exports_exist() -> None:
    missing = [name for name in compat.__all__ if not hasattr(compat, name)]
    assert not missing


# Configuration and registration


def test_splitting_op_reaches_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    original = list(compat.CompilationConfig._attention_ops)
    assert "vllm::unified_attention_with_output" in original
    monkeypatch.setattr(compat.CompilationConfig, "_attention_ops", list(original))
    compat.add_splitting_op("test::op")
    compat.add_splitting_op("test::op")
    assert [*original, "test::op"] == compat.CompilationConfig._attention_ops
    # Where vLLM takes the list from, if the user names no splitting ops.
    assert "list(self._attention_ops)" in inspect.getsource(
        compat.CompilationConfig.set_splitting_ops_for_v1
    )


def test_config_hook_is_looked_up_by_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hook(compat.VerifyAndUpdateConfig):
        pass

    monkeypatch.setattr(compat, "MODELS_CONFIG_MAP", dict(compat.MODELS_CONFIG_MAP))
    compat.add_config_hook("TestForCausalLM", Hook)
    assert compat.MODELS_CONFIG_MAP["TestForCausalLM"] is Hook
    assert parameters(compat.VerifyAndUpdateConfig.verify_and_update_config) == ("vllm_config",)
    caller = inspect.getsource(compat.VllmConfig.try_verify_and_update_config)
    assert "MODELS_CONFIG_MAP" in caller
    assert "verify_and_update_config(self)" in caller


def test_configuration_has_the_settings_we_check() -> None:
    hints = get_type_hints(compat.VllmConfig)
    expected = {
        "cache_config": {"prefix_match_unit", "block_size", "kv_sharing_fast_prefill"},
        "parallel_config": {"decode_context_parallel_size", "prefill_context_parallel_size"},
        "scheduler_config": {"async_scheduling", "disable_hybrid_kv_cache_manager"},
        "compilation_config": {"static_forward_context"},
        "model_config": {"model", "revision", "hf_config", "hf_text_config"},
    }
    for name, settings in expected.items():
        assert settings <= fields(hints[name]), name
    assert isinstance(hints["model_config"].is_hybrid, property)
    assert isinstance(hints["model_config"].use_mla, property)
    own = fields(compat.VllmConfig)
    assert {"kv_transfer_config", "speculative_config", "additional_config"} <= own
    assert {"kv_connector", "kv_connector_module_path", "kv_role"} <= fields(
        compat.KVTransferConfig
    )


@pytest.mark.parametrize("request_class", compat.GENERATION_REQUESTS, ids=lambda c: c.__name__)
def test_http_requests_keep_unknown_fields_and_make_sampling_params(request_class: type) -> None:
    assert callable(request_class.to_sampling_params)
    assert request_class.model_config["extra"] == "allow"
    assert "vllm_xargs" in request_class.model_fields


def test_beam_search_parameters_are_made_where_the_guard_expects_them() -> None:
    with_beams = {
        request_class.__name__
        for request_class in compat.GENERATION_REQUESTS
        if hasattr(request_class, "to_beam_search_params")
    }
    assert with_beams == {"ChatCompletionRequest", "CompletionRequest"}


def test_kernel_scan_has_the_place_we_wrap() -> None:
    assert parameters(dispatcher._rebind_kernels) == ("overrides",)
    assert "_rebind_kernels(" in inspect.getsource(dispatcher.register_kernels)


# KV connector


@pytest.mark.parametrize("method", CONNECTOR_METHODS)
def test_connector_overrides_methods_by_their_signature(method: str) -> None:
    base = getattr(compat.KVConnectorBase_V1, method)
    assert parameters(base) == CONNECTOR_METHODS[method]
    assert parameters(getattr(DeltaMemConnector, method)) == CONNECTOR_METHODS[method]


def test_connector_with_several_groups_is_told_of_finished_requests() -> None:
    expected = ("request", "block_ids")
    assert parameters(compat.SupportsHMA.request_finished_all_groups) == expected
    assert parameters(DeltaMemConnector.request_finished_all_groups) == expected
    assert isinstance(compat.KVConnectorBase_V1.requires_kv_delivery, property)
    assert {"SCHEDULER", "WORKER"} <= set(compat.KVConnectorRole.__members__)


def test_connector_leaves_nothing_abstract() -> None:
    assert not DeltaMemConnector.__abstractmethods__


def test_every_method_the_connector_overrides_exists_in_vllm() -> None:
    ours = {
        name
        for name, value in vars(DeltaMemConnector).items()
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
    }
    known = set(dir(compat.KVConnectorBase_V1)) | set(dir(compat.SupportsHMA))
    assert ours - known == {"forget_states", "take_correction_norms", "take_states"}


def test_scheduler_output_tells_which_requests_start() -> None:
    output = fields(compat.SchedulerOutput)
    assert {"scheduled_new_reqs", "scheduled_cached_reqs", "kv_connector_block_state"} <= output
    assert {"req_id", "num_computed_tokens"} <= fields(NewRequestData)
    assert {"req_ids", "num_computed_tokens"} <= fields(CachedRequestData)
    assert "resolve_block_ids" in fields(KVConnectorBlockState)


def test_request_has_the_attributes_we_read() -> None:
    request = tiny_request()
    assert request.request_id == "a"
    assert request.sampling_params.extra_args == {"key": b"value"}
    assert request.num_computed_tokens == 0
    assert request.num_tokens == 5


def test_extended_salt_changes_every_block_hash_and_goes_before_the_users() -> None:
    request = tiny_request(cache_salt="user")
    before = list(request.block_hashes)
    assert len(before) == 2
    compat.extend_cache_salt(request, "memory")
    assert len(request.block_hashes) == 2
    assert not set(before) & set(request.block_hashes)
    assert request.cache_salt == "memoryuser"
    assert tiny_request().cache_salt is None


SHARED_BLOCKS = 3


def hashed_request(
    tokens: list[int], salt: str, shared_salt: str, known: int | None = None, **fields: Any
) -> compat.Request:
    """A request with vLLM's own hashes of blocks of two, `salt` behind the shared blocks; made when
    the first `known` tokens are known, and told the others in pieces."""
    known = len(tokens) if known is None else known
    hasher = get_request_block_hasher(2, sha256)
    request = tiny_request(prompt_token_ids=tokens[:known], block_hasher=hasher, **fields)
    compat.extend_cache_salt(request, salt, shared_blocks=SHARED_BLOCKS, shared_salt=shared_salt)
    for first in range(known, len(tokens), 3):
        request.append_output_token_ids(tokens[first : first + 3])
    assert len(request.block_hashes) == len(tokens) // 2
    return request


def common_blocks(one: compat.Request, other: compat.Request) -> int:
    """Blocks with which both begin; no later ones are equal."""
    equal = [a == b for a, b in zip(one.block_hashes, other.block_hashes, strict=True)]
    assert sum(equal) == (equal.index(False) if False in equal else len(equal))
    return sum(equal)


@pytest.fixture
def none_hash() -> None:
    """What vLLM sets when an engine starts."""
    init_none_hash(sha256)


@pytest.mark.usefixtures("none_hash")
def test_a_salt_enters_the_hashes_behind_shared_blocks() -> None:
    tokens = list(range(15))
    one = hashed_request(tokens, "a", "shared")
    assert common_blocks(one, hashed_request(tokens, "a", "shared")) == 7
    assert common_blocks(one, hashed_request(tokens, "b", "shared")) == SHARED_BLOCKS
    assert common_blocks(one, hashed_request(tokens, "a", "other")) == 0
    assert common_blocks(one, hashed_request(tokens, "a", "shared", cache_salt="user")) == 0
    changed = [*tokens[:8], 99, *tokens[9:]]
    assert common_blocks(one, hashed_request(changed, "a", "shared")) == 4
    plain = tiny_request(prompt_token_ids=tokens, block_hasher=get_request_block_hasher(2, sha256))
    compat.extend_cache_salt(plain, "shared")
    assert common_blocks(one, plain) == SHARED_BLOCKS


@pytest.mark.usefixtures("none_hash")
@pytest.mark.parametrize("known", range(1, 15))
def test_hashes_behind_shared_blocks_do_not_depend_on_when_tokens_come(known: int) -> None:
    tokens = list(range(15))
    whole = hashed_request(tokens, "a", "shared")
    assert hashed_request(tokens, "a", "shared", known).block_hashes == whole.block_hashes


# Layers, pages and metadata


def test_state_page_spec_fields_exist() -> None:
    needed = {
        "block_size",
        "num_kv_heads",
        "head_size",
        "head_size_v",
        "dtype",
        "num_head_slots",
        "page_size_padded",
        "state_content_bytes",
        "tokens_per_state",
    }
    assert needed <= fields(compat.AttentionSpec)
    assert "sliding_window" in fields(compat.FullAttentionSpec)
    assert "sliding_window" in fields(compat.SlidingWindowSpec)


@pytest.mark.parametrize("window", [None, 4096])
def test_state_page_is_one_state_of_the_given_bytes_per_block(window: int | None) -> None:
    arguments = {"block_size": 32, "num_kv_heads": 3, "head_size": 64, "dtype": torch.bfloat16}
    cls = compat.FullAttentionSpec if window is None else compat.SlidingWindowSpec
    spec = cls(**arguments, **({} if window is None else {"sliding_window": window}))
    assert spec.page_size_bytes == 32 * 3 * 2 * 64 * 2
    page = dataclasses.replace(
        spec,
        num_kv_heads=1,
        head_size=320,
        head_size_v=0,
        num_head_slots=None,
        page_size_padded=None,
        state_content_bytes=640,
        tokens_per_state=32,
    )
    assert page.page_size_bytes == 640
    assert page.num_states == 1


def test_layers_own_pages_through_these_methods() -> None:
    base = compat.AttentionLayerBase
    assert parameters(base.get_kv_cache_spec) == ("vllm_config",)
    assert parameters(base.get_attn_backend) == ()
    assert parameters(base.bind_kv_cache) == ("kv_cache",)


def test_metadata_builder_is_called_as_we_define_it() -> None:
    base = compat.AttentionMetadataBuilder
    assert parameters(MemoryMetadataBuilder.build) == parameters(base.build)
    assert parameters(MemoryMetadataBuilder.__init__) == parameters(base.__init__)
    assert not MemoryMetadataBuilder.__abstractmethods__
    needed = {"block_table_tensor", "query_start_loc", "seq_lens"}
    assert needed <= fields(compat.CommonAttentionMetadata)


def test_backend_answers_what_vllm_asks_of_it() -> None:
    ours, base = MemoryBackend, compat.AttentionBackend
    for name in ("get_name", "get_impl_cls", "get_builder_cls", "get_supported_kernel_block_sizes"):
        assert parameters(getattr(ours, name)) == parameters(getattr(base, name)), name


def test_forward_context_leads_the_op_to_its_layer() -> None:
    assert {"no_compile_layers", "attn_metadata"} <= fields(ForwardContext)


def test_helpers_take_the_arguments_we_give() -> None:
    needed = {"op_name", "op_func", "mutates_args", "fake_impl", "target_lib"}
    assert needed <= set(parameters(compat.direct_register_custom_op))
    assert compat.extract_layer_index("model.layers.7.self_attn") == 7
    assert compat.get_dtype_size(torch.bfloat16) == 2


# Backbones


@pytest.mark.parametrize("attention", ATTENTION_CLASSES, ids=lambda c: c.__name__)
def test_attention_modules_set_what_a_memory_layer_and_its_forward_use(attention: type) -> None:
    source = own_source(attention)
    used = ["hidden_size", "q_size", "kv_size", "num_heads", "num_kv_heads", "total_num_kv_heads"]
    used += ["head_dim", "qkv_proj", "o_proj", "rotary_emb", "attn"]
    used += {"Qwen2Attention": ["qk_norm"], "Qwen3Attention": ["q_norm", "k_norm"]}.get(
        attention.__name__, []
    )
    missing = [name for name in used if f"self.{name} = " not in source]
    assert not missing
    assert parameters(attention.forward) == ("positions", "hidden_states")


def test_mistral_scales_queries_the_way_our_forward_does() -> None:
    assert "self.do_llama_4_scaling = " in own_source(mistral.MistralAttention)
    assert parameters(mistral.MistralAttention._get_llama_4_attn_scale) == ("positions",)


@pytest.mark.parametrize("layer", DECODER_LAYERS, ids=lambda c: c.__name__)
def test_decoder_layers_hold_their_attention_as_self_attn(layer: type) -> None:
    source = own_source(layer)
    assert "self.self_attn = " in source
    assert 'prefix=f"{prefix}.self_attn"' in source


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_our_attention_adds_methods_only_to_the_stock_class(architecture: str) -> None:
    """The built module becomes an instance of it, without any constructor."""
    module, _, name = MODEL_CLASSES[ARCHITECTURES[architecture]].partition(":")
    model_class = getattr(importlib.import_module(module), name)
    ours = model_class.memory_attention
    stock = next(c for c in ours.__mro__ if c.__module__.startswith("vllm"))
    assert stock in ATTENTION_CLASSES
    assert parameters(ours.forward) == parameters(stock.forward)
    added = set(vars(ours)) - {"__module__", "__qualname__", "__doc__", "__annotations__"}
    assert added <= {"forward", "__firstlineno__", "__static_attributes__"}
    assert set(parameters(model_class.__mro__[2].__init__)) >= {"vllm_config", "prefix"}


# Offline


def test_llm_adds_each_rendered_prompt_through_the_method_we_override() -> None:
    assert parameters(LLM._add_request) == ("prompt", "params", "lora_request", "priority")
    assert "self._add_request(" in inspect.getsource(LLM._render_and_add_requests)


def test_llm_takes_the_arguments_memory_llm_sets() -> None:
    accepted = set(parameters(LLM.__init__))
    assert {"model", "hf_overrides", "kwargs"} <= accepted
    assert {"method", "args"} <= set(parameters(LLM.collective_rpc))


def test_in_process_engine_can_be_recognised_and_stepped() -> None:
    from vllm.v1.engine.llm_engine import LLMEngine

    source = inspect.getsource(LLMEngine.__init__)
    assert "self.engine_core = " in source
    assert "self.vllm_config = " in source
    assert callable(LLMEngine.step)
    assert inspect.isclass(compat.InprocClient)


def test_every_argument_that_comes_per_prompt_is_split_by_waves() -> None:
    """Turns of one session run in waves, so what comes per prompt must be dealt out with them."""
    given = {
        name
        for method in (LLM.generate, LLM.chat)
        for name, parameter in inspect.signature(method).parameters.items()
        if "Sequence" in str(parameter.annotation)
    }
    assert given == {"prompts", "messages", "sampling_params", *PER_PROMPT}


def test_an_engine_can_be_cleared_of_all_its_requests() -> None:
    """`MemoryLLM` aborts by the ids under which the output processor knows its requests."""
    assert parameters(LLMEngine.abort_request) == ("request_ids", "internal")
    assert "request_states" in own_source(OutputProcessor)
    assert "internal" in parameters(OutputProcessor.abort_requests)
    assert parameters(LLM._run_engine) == ("output_type", "use_tqdm")
    assert parameters(LLM._add_request) == ("prompt", "params", "lora_request", "priority")


def test_the_id_of_the_next_request_is_known_before_it_is_added() -> None:
    """An output has it, too; `SharedEngine` hands outputs out by it."""
    counter = Counter(5)
    assert (counter.counter, next(counter), counter.counter) == (5, 5, 6)
    assert "self.request_counter = Counter()" in inspect.getsource(LLM.__init__)
    assert "str(next(self.request_counter))" in inspect.getsource(LLM._add_request)
    for run in (LLM._render_and_run_requests, LLM.wait_for_completion):
        assert "self._run_engine(" in inspect.getsource(run)


def test_an_engine_client_knows_that_its_engine_died() -> None:
    assert fields(BackgroundResources) >= {"engine_dead"}
    assert "self.resources = BackgroundResources(" in own_source(SyncMPClient)
    assert "resources.engine_dead = True" in own_source(SyncMPClient)


def test_whoever_waits_for_an_engine_that_was_killed_gets_an_error() -> None:
    """vLLM's own client, without the process: an output and a worker's answer never come."""
    client: Any = SyncMPClient.__new__(SyncMPClient)
    client.resources = BackgroundResources(ctx=zmq.Context())
    client.outputs_queue, client.utility_results = queue.Queue(), {}
    client._send_input = lambda *_: None
    compat.end_calls_of_a_dead_engine(client)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(client.get_output), pool.submit(client.call_utility, "method")]
        while not client.utility_results:
            time.sleep(0.01)
        assert not any(call.done() for call in calls)
        client.resources.engine_dead = True
        for call in calls:
            assert isinstance(call.exception(timeout=60), (BrokenOffError, EngineDeadError))


def test_chats_and_texts_can_be_rendered_of_any_length() -> None:
    assert {"conversations", "chat_params", "tok_params"} <= set(
        parameters(BaseRenderer.render_chat)
    )
    assert {"prompts", "tok_params"} <= set(parameters(BaseRenderer.render_cmpl))
    assert {"max_total_tokens", "add_special_tokens"} <= set(parameters(compat.TokenizeParams))
    used = {"chat_template", "chat_template_content_format", "chat_template_kwargs"}
    assert used <= set(parameters(compat.ChatParams))
    assert {"logprob", "rank", "decoded_token"} <= fields(compat.Logprob)
    assert "self.renderer = " in inspect.getsource(LLM.__init__)
    assert "self.chat_template = " in inspect.getsource(LLM.__init__)


def test_the_folder_of_a_lora_is_found_as_vllm_does() -> None:
    assert parameters(compat.get_adapter_absolute_path) == ("lora_path",)
    assert compat.get_adapter_absolute_path("/some/lora") == "/some/lora"


def test_vllm_looks_for_a_lora_as_we_do_before_it() -> None:
    """Its own check of a request's model finds the one that `lora_behind` did."""
    assert inspect.iscoroutinefunction(OpenAIServingModels.resolve_lora)
    assert list(inspect.signature(OpenAIServingModels.resolve_lora).parameters) == [
        "self",
        "lora_name",
    ]
    check = inspect.getsource(BaseServing._check_model)
    for name in ("lora_requests", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "resolve_lora"):
        assert name in check
    assert "is_base_model" in inspect.getsource(BaseServing._is_model_supported)
    assert "VLLM_SKIP_MODEL_NAME_VALIDATION" in inspect.getsource(BaseServing._is_model_supported)


def test_every_lora_enters_the_engine_through_one_method() -> None:
    assert parameters(AsyncLLM.add_lora) == ("lora_request",)
    for loads in (OpenAIServingModels.load_lora_adapter, OpenAIServingModels.resolve_lora):
        assert "await self.engine_client.add_lora(lora_request)" in inspect.getsource(loads)
