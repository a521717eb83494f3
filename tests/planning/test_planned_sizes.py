"""What a plan says of sizes is what the engine allocates, and what the store keeps."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from deltamem_vllm import MemoryLLM
from deltamem_vllm.adapter import BackboneShape, load_adapter
from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.demo.assets import model_dir
from deltamem_vllm.errors import BackboneError
from deltamem_vllm.planning import MemoryShape, block_bytes, read_backbone, session_bytes
from deltamem_vllm.sessions import (
    SessionContent,
    SessionKey,
    StoreOptions,
    open_store,
)
from tests.helpers import DATA, running


def memory_of(case: Path) -> MemoryShape:
    shape = BackboneShape.from_dir(case / "model")
    adapter = load_adapter(case / "adapter", backbone=shape)
    return MemoryShape(adapter.config, len(adapter.layer_indices), steps_in_flight=1)


@pytest.mark.parametrize(
    ("name", "block_size", "dtype"),
    [
        ("qwen3_tsw", 32, "float32"),
        ("qwen3_msw4", 64, "bfloat16"),
        ("qwen3_ssw_message", 32, "float32"),
    ],
)
def test_a_block_takes_what_the_engine_allocates_for_it(
    name: str, block_size: int, dtype: str
) -> None:
    case = DATA / name
    llm = MemoryLLM(
        str(case / "model"),
        adapter=str(case / "adapter"),
        dtype=dtype,
        block_size=block_size,
        max_model_len=512,
        enforce_eager=True,
        skip_tokenizer_init=True,
    )
    with running(llm):
        engine: Any = llm.llm_engine.engine_core
        allocated = engine.engine_core.scheduler.kv_cache_config
        # One allocation, in which each of these has its place.
        (whole,) = {tensor.size for tensor in allocated.kv_cache_tensors}
        planned = block_bytes(
            read_backbone(str(case / "model"), dtype), memory_of(case), block_size, gpus=1
        )
        assert whole == planned.total * allocated.num_blocks


@pytest.mark.parametrize("messages", [2, 500])
def test_a_session_takes_what_a_full_store_has_for_it(tmp_path: Path, messages: int) -> None:
    memory = MemoryShape(DeltaMemConfig(rank=8), layers=36)
    assert memory.state_bytes == 9 * 1024
    sessions, versions = 150, 4
    file = tmp_path / "sessions.db"
    with open_store(f"sqlite://{file}", StoreOptions(versions_kept=versions)) as store:
        for number in range(sessions):
            key = SessionKey("public", "f" * 64, f"session-{number}")
            for _ in range(versions):
                content = SessionContent(
                    state=bytes(memory.state_bytes),
                    tokens_written=1 << 20,
                    pending_token_ids=(1 << 16, 1 << 16),
                    message_chain=(bytes(16),) * messages,
                )
                lease = store.acquire(key, "a test", seconds=60)
                store.commit(lease, content)
                store.release(lease)
    kept = sum(part.stat().st_size for part in tmp_path.glob("sessions.db") if part.is_file())
    planned = sessions * session_bytes(memory, messages, versions)
    assert planned == pytest.approx(kept, rel=0.15)


def test_parameters_are_those_of_the_checkpoint() -> None:
    backbone = read_backbone(str(model_dir()))
    with safe_open(model_dir() / "model.safetensors", "pt") as file:
        names = list(file.keys())
        stored = sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    assert backbone.parameters == pytest.approx(stored, rel=0.01)
    assert backbone.weight_bytes == (model_dir() / "model.safetensors").stat().st_size


def test_a_config_by_itself_is_enough(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text((model_dir() / "config.json").read_text())
    alone, whole = read_backbone(str(config)), read_backbone(str(model_dir()))
    assert alone.shape == whole.shape
    assert alone.weight_bytes == pytest.approx(whole.weight_bytes, rel=0.05)


def test_key_heads_are_split_and_states_are_not() -> None:
    memory = MemoryShape(DeltaMemConfig(rank=8), layers=4)
    backbone = read_backbone(str(model_dir()))
    one, two = (block_bytes(backbone, memory, 16, gpus) for gpus in (1, 2))
    assert two.keys_values * 2 == one.keys_values
    assert two.state_pages == one.state_pages


@pytest.mark.parametrize("name", ["half", "float16"])
def test_names_of_a_dtype_are_those_of_vllm(name: str) -> None:
    assert read_backbone(str(model_dir()), name).dtype == "float16"
    assert read_backbone(str(model_dir()), "auto") == read_backbone(str(model_dir()))


@pytest.mark.parametrize(
    "field", [{"architectures": 5}, {"vocab_size": -1}, {"intermediate_size": True}]
)
def test_a_config_that_cannot_be_is_refused(tmp_path: Path, field: dict[str, Any]) -> None:
    config = json.loads((model_dir() / "config.json").read_text())
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**config, **field}))
    with pytest.raises(BackboneError):
        read_backbone(str(file))


def test_a_model_that_is_not_served_is_refused(tmp_path: Path) -> None:
    config = json.loads((model_dir() / "config.json").read_text())
    config["architectures"] = ["MambaForCausalLM"]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    with pytest.raises(BackboneError, match="MambaForCausalLM"):
        read_backbone(str(file))
