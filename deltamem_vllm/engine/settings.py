"""What a served checkpoint says about its memory, and which engine settings we refuse.

The `deltamem` key of `config.json` (written by `deltamem adapter link`, or given through
`--hf-overrides`) names the adapter. vLLM calls `MemoryConfigHook` while it builds its
configuration, in the frontend process and before any weights are loaded: everything that could
make memory wrong at run time is refused there, by name.
"""

import functools
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from vllm.logger import init_logger

from deltamem_vllm.adapter import (
    LINKED_ADAPTER_DIR,
    Adapter,
    BackboneShape,
    load_adapter,
    resolve_adapter_dir,
    resolve_linked_adapter_dir,
)
from deltamem_vllm.adapter.link import CONFIG_KEY
from deltamem_vllm.adapter.names import ADAPTER_FILES
from deltamem_vllm.engine.compat import VerifyAndUpdateConfig, VllmConfig, kv_connector_of
from deltamem_vllm.engine.names import CONNECTOR_NAME, MEMORY_STEP_OP
from deltamem_vllm.errors import AdapterError, ConfigError, EngineConfigError
from deltamem_vllm.ops import DeltaRule
from deltamem_vllm.state.layout import layout_of, rule_of
from deltamem_vllm.state.page import PageLayout, ring_length

logger = init_logger(f"vllm.{__name__}")

FINGERPRINT_KEY = "deltamem_adapter"
"""Key of `VllmConfig.additional_config` under which the adapter's fingerprint is known."""

DRAFTERS = ("ngram", "draft_model")
"""Methods of speculative decoding that memory was checked with."""

FORMATS_WITHOUT_ADAPTER = (
    "ipc_cache",
    "modelexpress",
    "runai_streamer_sharded",
    "sharded_state",
    "tensorizer",
)
"""Ways of loading that restore a model's parameters without its `load_weights`."""


class MemorySettings(BaseModel):
    """The `deltamem` key of `config.json` or `--hf-overrides`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapter: str
    """`deltamem_adapter`, the folder inside a linked checkpoint; any other folder; or a hub id."""

    max_kv_share: float = Field(default=0.5, gt=0, le=1)
    """Refuse to start when state pages would take a larger share of the KV cache than this."""


def memory_settings(hf_config: Any) -> MemorySettings:
    """Read and check the `deltamem` key of a Hugging Face config.

    Raises:
        ConfigError: the key is missing or malformed.
    """
    raw = getattr(hf_config, CONFIG_KEY, None)
    if raw is None:
        raise ConfigError(
            f"the checkpoint's config.json has no {CONFIG_KEY!r} key, so no adapter is known. Make "
            "a servable checkpoint with `deltamem adapter link BASE ADAPTER OUT`, or pass "
            f'--hf-overrides \'{{"{CONFIG_KEY}": {{"adapter": "PATH"}}, "architectures": [...]}}\'.'
        )
    try:
        return MemorySettings.model_validate(raw)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or CONFIG_KEY}: {item['msg']}"
            for item in error.errors()
        )
        raise ConfigError(
            f"the {CONFIG_KEY!r} key of config.json is not valid: {problems}"
        ) from None


def adapter_dir(settings: MemorySettings, model: str, revision: str | None) -> Path:
    """Where the adapter of a checkpoint lies on this machine.

    Args:
        settings: the checkpoint's settings.
        model: the checkpoint's folder or hub id.
        revision: the hub revision, None for the default.
    """
    if settings.adapter == LINKED_ADAPTER_DIR:
        return resolve_linked_adapter_dir(model, revision)
    return resolve_adapter_dir(settings.adapter)


@functools.lru_cache(maxsize=4)
def _load(path: Path, shape: BackboneShape, stamps: tuple[tuple[int, int], ...]) -> Adapter:
    return load_adapter(path, backbone=shape)


def adapter_of(vllm_config: VllmConfig) -> Adapter:
    """The adapter that `vllm_config` serves, checked for its backbone.

    A process reads it once, and again after its files changed.
    """
    model_config = vllm_config.model_config
    settings = memory_settings(model_config.hf_config)
    path = adapter_dir(settings, model_config.model, model_config.revision)
    files = [path / name for name in ADAPTER_FILES if (path / name).exists()]
    stamps = tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    shape = BackboneShape.from_config_dict(model_config.hf_text_config.to_dict())
    return _load(path, shape, stamps)


def delta_rule(adapter: Adapter) -> DeltaRule:
    """The arithmetic an adapter asks for, as the ops understand it."""
    return rule_of(adapter.config)


def page_layout(adapter: Adapter, vllm_config: VllmConfig, block_size: int) -> PageLayout:
    """A state page for `adapter`, its ring as short as the engine's configuration allows.

    With asynchronous scheduling, a step is scheduled while the one before it runs.
    """
    steps_in_flight = 2 if vllm_config.scheduler_config.async_scheduling else 1
    ring = ring_length(steps_in_flight, draft_tokens(vllm_config))
    return layout_of(adapter.config, block_size, ring)


def draft_tokens(vllm_config: VllmConfig) -> int:
    """Tokens that one step may feed and take back."""
    speculative = vllm_config.speculative_config
    return 0 if speculative is None else int(speculative.num_speculative_tokens)


class MemoryConfigHook(VerifyAndUpdateConfig):
    """Checks and completes vLLM's configuration for a model with memory."""

    serving = False
    """Whether this process has configured a model with memory."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        adapter = adapter_of(vllm_config)
        MemoryConfigHook.serving = True
        refuse_unsupported(vllm_config, adapter)
        if not isinstance(vllm_config.additional_config or {}, dict):
            raise EngineConfigError("delta-mem needs --additional-config to be a JSON object.")
        if vllm_config.load_config.load_format == "dummy":
            logger.warning("delta-mem: load_format=dummy makes up the memory's weights too")
        use_one_cache_group(vllm_config)
        # vLLM's cache of compiled graphs knows the checkpoint's path, not the adapter's content.
        vllm_config.additional_config = {
            **(vllm_config.additional_config or {}),
            FINGERPRINT_KEY: adapter.fingerprint,
        }
        logger.info(
            "delta-mem adapter %s: rank %d, %d state head(s), %d layer(s), heads %s, %s writes",
            adapter.fingerprint[:12],
            adapter.config.rank,
            adapter.config.num_state_heads,
            len(adapter.layer_indices),
            "".join(adapter.config.delta_heads) or "none",
            adapter.config.memory_write_granularity,
        )


def served_adapter(vllm_config: VllmConfig) -> Adapter:
    """The adapter for a model that is being built, now that its configuration is final.

    vLLM goes on changing the configuration after `MemoryConfigHook` saw it, and other processes
    read the adapter's files later: so both are checked again, still before weights are loaded.

    Raises:
        EngineConfigError: a setting is not supported.
        AdapterError: the files changed since the engine was configured.
    """
    adapter = adapter_of(vllm_config)
    refuse_unsupported(vllm_config, adapter)
    configured = vllm_config.additional_config.get(FINGERPRINT_KEY)
    if configured is None:
        raise EngineConfigError(
            "vLLM built the model without asking for its settings to be checked; make the engine's "
            "configuration by EngineArgs, LLM or `vllm serve`."
        )
    if adapter.fingerprint != configured:
        raise AdapterError(
            f"{adapter.source}: the adapter changed while the engine started (fingerprint "
            f"{adapter.fingerprint[:12]}, configured {configured[:12]}); start again"
        )
    return adapter


def refuse_unsupported(vllm_config: VllmConfig, adapter: Adapter) -> None:
    """Refuse, by name, each setting under which memory would be wrong or was never checked.

    Raises:
        EngineConfigError: names the setting and what to do.
    """
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    load_format = str(vllm_config.load_config.load_format)
    model, connector = vllm_config.model_config, kv_connector_of(vllm_config)
    speculative = vllm_config.speculative_config
    # Without its name there, piecewise CUDA graphs would hold the op with no step's metadata.
    splits = vllm_config.compilation_config.splitting_ops
    drafter = None if speculative is None else str(speculative.method)
    refusals = {
        "--prefix-match-unit other than the block size (prefix-cache hits must be whole blocks)": (
            cache.prefix_match_unit not in (None, cache.block_size)
        ),
        "decode context parallelism (--decode-context-parallel-size)": (
            parallel.decode_context_parallel_size > 1
        ),
        "prefill context parallelism (--prefill-context-parallel-size)": (
            parallel.prefill_context_parallel_size > 1
        ),
        "a backbone with multi-head latent attention (MLA)": model.use_mla,
        "a Mamba-hybrid backbone": model.is_hybrid,
        "cross-layer KV sharing (--kv-sharing-fast-prefill)": cache.kv_sharing_fast_prefill,
        "KV cache offloading (--kv-offloading-size)": cache.kv_offloading_size is not None,
        "changes of weights while serving (--weight-transfer-config)": (
            vllm_config.weight_transfer_config is not None
        ),
        "pooling (--runner pooling)": model.runner_type != "generate",
        "micro-batches (--enable-dbo, --ubatch-size)": parallel.use_ubatching,
        f"splitting_ops without {MEMORY_STEP_OP!r} (in --compilation-config)": (
            bool(splits) and MEMORY_STEP_OP not in splits
        ),
        f"--load-format {load_format} (it does not load the adapter)": (
            load_format in FORMATS_WITHOUT_ADAPTER
        ),
        f"speculative decoding by {drafter!r} (only {' and '.join(DRAFTERS)} were checked)": (
            drafter is not None and drafter not in DRAFTERS
        ),
        f"the KV connector {connector!r} (memory needs {CONNECTOR_NAME}, alone)": (
            connector not in (None, CONNECTOR_NAME)
        ),
    }
    for name, refused in refusals.items():
        if refused:
            raise EngineConfigError(f"delta-mem does not support {name}. Remove that setting.")


def use_one_cache_group(vllm_config: VllmConfig) -> None:
    """Keep state pages and K/V in one block table when only some layers have a sliding window.

    vLLM would put such layers in groups with their own block sizes, where a page no longer stands
    for one block of its own layer.
    """
    layer_types = getattr(vllm_config.model_config.hf_text_config, "layer_types", None) or []
    if len(set(layer_types)) > 1:
        vllm_config.scheduler_config.disable_hybrid_kv_cache_manager = True
        logger.info("delta-mem: one KV cache group for all layers (hybrid KV cache manager off)")
