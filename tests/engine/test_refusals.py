"""Whatever would make memory wrong is refused before weights are loaded, by name, with a remedy."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from vllm import EngineArgs
from vllm.config import KVTransferConfig

from deltamem_vllm import Memory, MemoryLLM
from deltamem_vllm.adapter import Adapter, layer_tensor_shapes, save_adapter, tensor_name
from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.engine import memory_layer
from deltamem_vllm.engine.settings import served_adapter
from deltamem_vllm.errors import (
    AdapterError,
    BackboneError,
    ConfigError,
    DeltaMemError,
    EngineConfigError,
    MemoryRequestError,
)
from deltamem_vllm.memory import OFF
from deltamem_vllm.models.overrides import memory_overrides
from tests.helpers import DATA, change_json, running

CASE = DATA / "qwen3_tsw"
ARGUMENTS = {
    "dtype": "float32",
    "max_model_len": 256,
    "block_size": 32,
    "enforce_eager": True,
    "skip_tokenizer_init": True,
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model without weights: whoever tried to load them would fail in another way."""
    folder = tmp_path / "base"
    folder.mkdir()
    shutil.copy(CASE / "model" / "config.json", folder)
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter that fits `base`, to be spoilt."""
    return Path(shutil.copytree(CASE / "adapter", tmp_path / "adapter"))


def start(model: Path, adapter: Path | None, **arguments: Any) -> MemoryLLM:
    return MemoryLLM(
        str(model),
        adapter=None if adapter is None else str(adapter),
        **{**ARGUMENTS, **arguments},
    )


def configure(model: Path, overrides: dict[str, Any], **arguments: Any) -> Any:
    """What `vllm serve` does before it starts any process."""
    return EngineArgs(
        model=str(model), hf_overrides=overrides, **{**ARGUMENTS, **arguments}
    ).create_engine_config()


def assert_says(error: BaseException, *words: str) -> None:
    missing = [word for word in words if word not in str(error)]
    assert not missing, f"{missing} not in: {error}"


# Adapters


def test_adapter_for_another_hidden_size_is_refused(base: Path, adapter: Path) -> None:
    change_json(base / "config.json", hidden_size=128)
    with pytest.raises(BackboneError) as refusal:
        start(base, adapter)
    assert_says(refusal.value, str(adapter), "hidden_size is 64", "128", "Use the base that")


def test_adapter_for_another_number_of_layers_is_refused(base: Path, adapter: Path) -> None:
    change_json(base / "config.json", num_hidden_layers=4, layer_types=["full_attention"] * 4)
    with pytest.raises(BackboneError) as refusal:
        start(base, adapter)
    assert_says(refusal.value, "layers 0-2", "4 layers", "0-3")


def test_adapter_without_one_of_its_tensors_is_refused(base: Path, adapter: Path) -> None:
    path = adapter / "delta_mem_adapter.pt"
    tensors = torch.load(path, weights_only=True)
    del tensors["model.layers.1.self_attn.beta_proj"]
    torch.save(tensors, path)
    with pytest.raises(AdapterError) as refusal:
        start(base, adapter)
    assert_says(refusal.value, "missing tensor model.layers.1.self_attn.beta_proj", "same export")


def test_truncated_adapter_is_refused(base: Path, adapter: Path) -> None:
    path = adapter / "delta_mem_adapter.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AdapterError) as refusal:
        start(base, adapter)
    assert_says(refusal.value, str(path), "damaged", "get it again")


def test_unknown_option_of_an_adapter_is_refused(base: Path, adapter: Path) -> None:
    change_json(adapter / "delta_mem_config.json", couple_lamda=False)
    with pytest.raises(ConfigError) as refusal:
        start(base, adapter)
    assert_says(refusal.value, "couple_lamda", "did you mean couple_lambda?")


def test_missing_adapter_folder_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as refusal:
        start(base, tmp_path / "nothing here")
    assert_says(refusal.value, "nothing here", "no such folder")


# Base models and linked checkpoints


def test_unknown_backbone_is_refused_with_the_known_ones(base: Path, adapter: Path) -> None:
    change_json(base / "config.json", architectures=["GPT2LMHeadModel"])
    with pytest.raises(BackboneError) as refusal:
        start(base, adapter)
    assert_says(refusal.value, str(base), "GPT2LMHeadModel", "Qwen3ForCausalLM", "LlamaForCausalLM")


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, ["cannot be read"]), ("{", ["not valid JSON"]), ("[]", ["a JSON list"])],
)
def test_model_without_a_readable_config_is_refused(
    base: Path, adapter: Path, content: str | None, words: list[str]
) -> None:
    path = base / "config.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(BackboneError) as refusal:
        start(base, adapter)
    assert_says(refusal.value, str(path), *words)


def test_stock_checkpoint_without_an_adapter_is_refused(base: Path) -> None:
    with pytest.raises(BackboneError) as refusal:
        start(base, None)
    assert_says(refusal.value, str(base), "adapter=", "deltamem adapter link")


def test_linked_checkpoint_without_its_key_is_refused(base: Path) -> None:
    change_json(base / "config.json", architectures=["DeltaMemQwen3ForCausalLM"])
    with pytest.raises(ConfigError) as refusal:
        start(base, None)
    assert_says(refusal.value, "no 'deltamem' key", "deltamem adapter link", "--hf-overrides")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"adapter": "deltamem_adapter", "max_kv_shar": 0.2}, ["max_kv_shar:", "not permitted"]),
        ({"adapter": "deltamem_adapter", "max_kv_share": 0}, ["max_kv_share:", "greater than 0"]),
        ({"max_kv_share": 0.2}, ["adapter:", "required"]),
        ("deltamem_adapter", ["'deltamem' key"]),
    ],
)
def test_malformed_deltamem_key_is_refused(base: Path, settings: object, words: list[str]) -> None:
    change_json(base / "config.json", architectures=["DeltaMemQwen3ForCausalLM"], deltamem=settings)
    with pytest.raises(ConfigError) as refusal:
        start(base, None)
    assert_says(refusal.value, "the 'deltamem' key of config.json is not valid", *words)


# Engine settings

OTHER_CONNECTOR = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
DRAFTS = {"method": "ngram_gpu", "num_speculative_tokens": 2, "prompt_lookup_max": 2}


@pytest.mark.parametrize(
    ("setting", "flag"),
    [
        ({"prefix_match_unit": 16}, "--prefix-match-unit"),
        (
            {"compilation_config": {"splitting_ops": ["vllm::unified_attention_with_output"]}},
            "splitting_ops without 'deltamem::memory_step'",
        ),
        (
            {"decode_context_parallel_size": 2, "tensor_parallel_size": 2},
            "--decode-context-parallel-size",
        ),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size"),
        ({"ubatch_size": 2}, "--ubatch-size"),
        ({"runner": "pooling"}, "--runner pooling"),
        ({"weight_transfer_config": {"backend": "nccl"}}, "--weight-transfer-config"),
        ({"load_format": "sharded_state"}, "--load-format sharded_state"),
        ({"speculative_config": DRAFTS}, "'ngram_gpu'"),
        ({"kv_transfer_config": OTHER_CONNECTOR}, "'ExampleConnector'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_unsupported_engine_setting_is_refused(
    base: Path, adapter: Path, setting: dict[str, Any], flag: str
) -> None:
    overrides = memory_overrides(str(base), str(adapter))
    with pytest.raises(ValidationError) as refusal:
        configure(base, overrides, **setting)
    assert_says(refusal.value, "delta-mem does not support", flag, "Remove that setting")
    if "kv_transfer_config" not in setting:
        with pytest.raises(EngineConfigError, match=flag):
            start(base, adapter, **setting)


def test_setting_that_vllm_completes_later_is_refused_with_the_model(
    base: Path, adapter: Path
) -> None:
    """Without a block size of the user's, vLLM chooses one after it asked us."""
    config = configure(base, memory_overrides(str(base), str(adapter)), block_size=None)
    assert served_adapter(config).source == adapter
    config.cache_config.prefix_match_unit = 16
    with pytest.raises(EngineConfigError) as refusal:
        served_adapter(config)
    assert_says(refusal.value, "--prefix-match-unit")


def test_configuration_that_was_never_checked_is_refused(base: Path, adapter: Path) -> None:
    config = configure(base, memory_overrides(str(base), str(adapter)))
    config.additional_config.clear()
    with pytest.raises(EngineConfigError, match="EngineArgs"):
        served_adapter(config)


def test_adapter_that_changes_while_the_engine_starts_is_refused(base: Path, adapter: Path) -> None:
    overrides = memory_overrides(str(base), str(adapter))
    config = configure(base, overrides)
    change_json(adapter / "delta_mem_config.json", alpha=8.0)
    with pytest.raises(AdapterError) as refusal:
        served_adapter(config)
    assert_says(refusal.value, str(adapter), "changed while the engine started")
    assert served_adapter(configure(base, overrides)).config.alpha == 8.0


def test_prefix_match_unit_of_a_whole_block_is_accepted(base: Path, adapter: Path) -> None:
    configure(base, memory_overrides(str(base), str(adapter)), prefix_match_unit=32)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kv_transfer_config", OTHER_CONNECTOR),
        ("worker_extension_cls", "some.module.Extension"),
    ],
)
def test_argument_that_memory_llm_sets_itself_is_refused(
    base: Path, adapter: Path, name: str, value: object
) -> None:
    with pytest.raises(EngineConfigError) as refusal:
        start(base, adapter, **{name: value})
    assert_says(refusal.value, name, "leave it out")


def test_overrides_that_are_not_a_dict_are_refused(base: Path, adapter: Path) -> None:
    with pytest.raises(EngineConfigError) as refusal:
        start(base, adapter, hf_overrides=lambda config: config)
    assert_says(refusal.value, "hf_overrides", "dict")


@pytest.mark.parametrize("wanted", [None, False])
def test_mix_of_window_and_full_attention_shares_one_block_table(
    base: Path, adapter: Path, wanted: bool | None
) -> None:
    change_json(
        base / "config.json",
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        use_sliding_window=True,
        sliding_window=64,
    )
    config = configure(
        base,
        memory_overrides(str(base), str(adapter)),
        disable_hybrid_kv_cache_manager=wanted,
    )
    assert config.scheduler_config.disable_hybrid_kv_cache_manager is True


def test_compiled_graphs_of_two_adapters_are_kept_apart(base: Path, adapter: Path) -> None:
    overrides = memory_overrides(str(base), str(adapter))
    first = configure(base, overrides).compute_hash()
    assert configure(base, overrides).compute_hash() == first
    change_json(adapter / "delta_mem_config.json", alpha=8.0)
    other = memory_overrides(str(base), str(shutil.copytree(adapter, adapter.parent / "other")))
    assert configure(base, other).compute_hash() != first


# The share of the KV cache


def write_rank_64_adapter(folder: Path) -> Path:
    """State pages twice as large as the K/V of a block of 32 tokens of the tiny backbone."""
    config = DeltaMemConfig(rank=64, delta_heads=("q", "o"))
    shapes = layer_tensor_shapes(config, hidden_size=64, q_size=128, kv_size=64)
    tensors = {
        tensor_name(layer, name): torch.zeros(shape)
        for layer in range(3)
        for name, shape in shapes.items()
    }
    return save_adapter(Adapter.from_tensors(config, tensors), folder)


def test_state_pages_above_the_allowed_share_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineConfigError) as refusal:
        start(CASE / "model", write_rank_64_adapter(tmp_path / "wide"))
    assert_says(refusal.value, "66.7% of the KV cache", "max_kv_share=0.5", "--block-size 1024")


@pytest.mark.parametrize(("block_size", "warned"), [(128, True), (1024, False)])
def test_large_state_pages_come_with_a_warning_and_a_better_block_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_size: int, warned: bool
) -> None:
    warnings = set()
    # A handler would not last: vLLM configures its loggers anew while the engine starts.
    monkeypatch.setattr(
        memory_layer.logger, "warning_once", lambda text, *values: warnings.add(text % values)
    )
    adapter = write_rank_64_adapter(tmp_path / "wide")
    with running(start(CASE / "model", adapter, block_size=block_size, max_model_len=512)):
        assert len(warnings) == warned
    assert all("33.38%" in warning and "--block-size 1024" in warning for warning in warnings)


# A request's memory


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, ["'read_write' needs a session"]),
        ({"mode": "read_only"}, ["'read_only' needs a session"]),
        ({"mode": "off", "session": "a"}, ['"off"', "cannot name a session"]),
        ({"session": ""}, ["session:", "at least 1"]),
        ({"session": "a" * 257}, ["session:", "at most 256"]),
        ({"session": 7}, ["session:", "string"]),
        ({"session": b"a"}, ["session:", "string"]),
        ({"session": "a", "mode": "write"}, ["mode:", "'read_write', 'read_only' or 'off'"]),
        ({"session": "a", "mode": None}, ["mode:"]),
        ({"session": "a", "sesion": "b", "tll": 3}, ["sesion:", "tll:"]),
        ({"session": "a", "ttl": 0}, ["ttl:", "greater than 0"]),
        ({"session": "a", "version": -1}, ["version:"]),
        ({"session": "a", "on_busy": "queue"}, ["on_busy:", "'wait' or 'conflict'"]),
        ({"session": "a", "turn": "t" * 201}, ["turn:", "at most 200"]),
        ({"session": "a", "mode": "read_only", "turn": "t"}, ["turn", "read_only"]),
        ({"session": "a", "mode": "read_only", "ttl": 3}, ["ttl", "read_only"]),
        ({"session": "a", "window": {}}, ["window is"]),
        ({"session": "a", "window": {"messages": 1, "tokens": 1}}, ["window is"]),
        ({"session": "a", "window": {"messages": -1}}, ["window.messages:"]),
        ({"session": "a", "on_divergence": "fork"}, ["on_divergence", "needs a window"]),
    ],
)
def test_contradicting_or_mistyped_memory_is_refused(
    fields: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(MemoryRequestError) as refusal:
        Memory(**fields)
    assert_says(refusal.value, "memory", *words)


def test_memory_cannot_be_changed_once_it_was_checked() -> None:
    memory = Memory(session="a")
    with pytest.raises(ValidationError):
        memory.mode = "off"
    assert (OFF.session, OFF.mode) == (None, "off")


def test_every_refusal_is_one_of_the_packages_errors_and_a_value_error() -> None:
    for error in (AdapterError, BackboneError, ConfigError, EngineConfigError, MemoryRequestError):
        assert issubclass(error, DeltaMemError)
        assert issubclass(error, ValueError)
