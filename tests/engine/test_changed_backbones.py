"""Backbones that vLLM changes on the way: with a LoRA, or quantised. The memory stays itself."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm import LLM, EngineArgs
from vllm.lora.request import LoRARequest

from deltamem_vllm import Memory, MemoryLLM
from deltamem_vllm.adapter import link_checkpoint
from deltamem_vllm.memory import OFF
from deltamem_vllm.models.registry import ARCHITECTURES
from tests.helpers import (
    DATA,
    VOCAB,
    assert_states_close,
    change_json,
    greedy,
    output_logprobs,
    random_tokens,
    running,
    with_word_tokenizer,
    word,
)
from tests.oracle import Oracle

CASE = DATA / "qwen3_tsw"
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_logprobs": VOCAB,
    "block_size": 32,
    "enforce_eager": True,
}
PROMPTS = [random_tokens(seed, length) for seed, length in enumerate([40, 33, 100])]
MEMORIES = [Memory(session=str(index)) for index in range(len(PROMPTS))]
LORA_RANK = 8


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return with_word_tokenizer(CASE / "model", tmp_path / "base")


def with_weights(base: Path, target: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of a checkpoint whose weights `change` has changed in place."""
    shutil.copytree(base, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def run(llm: LLM, memory: Any = None, **arguments: Any) -> list[Tensor]:
    """Output logprobs of all prompts."""
    memory = {} if memory is None else {"memory": memory}
    outputs = llm.generate(PROMPTS, greedy(), use_tqdm=False, **memory, **arguments)
    return [output_logprobs(output) for output in outputs]


# LoRA


def make_lora(base: Path, target: Path) -> Path:
    """A random LoRA on all attention projections, in PEFT's form."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / 10

    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if any(name.endswith(f"self_attn.{module}.weight") for module in modules):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            outputs, inputs = weight.shape
            lora[f"{stem}.lora_A.weight"] = random(LORA_RANK, inputs)
            lora[f"{stem}.lora_B.weight"] = random(outputs, LORA_RANK)
    target.mkdir()
    save_file(lora, target / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": modules}
    sizes = {"r": LORA_RANK, "lora_alpha": LORA_RANK, "bias": "none"}
    (target / "adapter_config.json").write_text(json.dumps({**config, **sizes}))
    return target


def merge(lora: Path) -> Callable[[dict[str, Tensor]], None]:
    """Adds a LoRA to the weights it was made for."""
    pairs = load_file(lora / "adapter_model.safetensors")

    def add(weights: dict[str, Tensor]) -> None:
        for name in weights:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{stem}.lora_A.weight" in pairs:
                weights[name] += pairs[f"{stem}.lora_B.weight"] @ pairs[f"{stem}.lora_A.weight"]

    return add


def abort_two_steps_late(llm: MemoryLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an engine in another process may: it runs on while the word of a stop string travels."""
    core = llm.llm_engine.engine_core
    abort = core.abort_requests

    def late(request_ids: list[str]) -> None:
        for _ in range(2 if request_ids else 0):
            core.get_output()
        abort(request_ids)

    monkeypatch.setattr(core, "abort_requests", late)


def test_turns_with_a_lora_equal_those_of_the_merged_weights(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = make_lora(base, tmp_path / "lora")
    merged = with_weights(base, tmp_path / "merged", merge(lora))
    with running(MemoryLLM(str(merged), str(CASE / "adapter"), **ENGINE)) as llm:
        expected = run(llm, MEMORIES)
        states = {name: snapshot.state for name, snapshot in llm.sessions.items()}
        stop = word(int(expected[2][1].argmax()))
        params = greedy(50, stop=[stop], detokenize=True)
        llm.generate(PROMPTS[2], params, memory=Memory(session="stopped"), use_tqdm=False)
        states["stopped"] = llm.sessions["stopped"].state

    linked = link_checkpoint(
        base, CASE / "adapter", tmp_path / "linked", architectures=ARCHITECTURES
    )
    arguments = EngineArgs(model=str(linked), enable_lora=True, max_lora_rank=LORA_RANK, **ENGINE)
    with running(MemoryLLM.from_engine_args(arguments)) as llm:
        request = LoRARequest("random", 1, str(lora))
        for actual, wanted in zip(run(llm, MEMORIES, lora_request=request), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-4)
        abort_two_steps_late(llm, monkeypatch)
        llm.generate(
            PROMPTS[2],
            params,
            memory=Memory(session="stopped"),
            lora_request=request,
            use_tqdm=False,
        )
        for name, state in states.items():
            assert_states_close(llm.sessions_with(request)[name].state, state)
        without = run(llm, [Memory(session=f"without {index}") for index in range(3)])
        assert all((a - b).abs().max() > 1e-2 for a, b in zip(without, expected, strict=True))


# Quantised

INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def quantise(weights: dict[str, Tensor]) -> None:
    """All projections to int8, with a scale per output channel."""
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        scale = weights[name].abs().amax(1, keepdim=True) / 127
        weights[name] = torch.round(weights[name] / scale).to(torch.int8)
        weights[f"{name}_scale"] = scale


def test_memory_of_a_quantised_backbone_is_not_quantised(base: Path, tmp_path: Path) -> None:
    quantised = with_weights(base, tmp_path / "int8", quantise)
    change_json(quantised / "config.json", quantization_config=INT8)
    arguments = {**ENGINE, "dtype": "bfloat16"}
    with running(LLM(str(quantised), **arguments)) as llm:
        stock = run(llm)
    with running(MemoryLLM(str(quantised), str(CASE / "adapter"), **arguments)) as llm:
        for actual, wanted in zip(run(llm, OFF), stock, strict=True):
            assert torch.equal(actual, wanted)
        llm.generate(PROMPTS, greedy(1), memory=MEMORIES, use_tqdm=False)
        (parameters,) = llm.apply_model(
            lambda model: {name: value.dtype for name, value in model.named_parameters()}
        )
        states = [llm.sessions[memory.session].state for memory in MEMORIES]
    memory = {dtype for name, dtype in parameters.items() if ".memory." in name}
    assert memory == {torch.float32}
    assert "model.layers.0.self_attn.qkv_proj.weight_scale" in parameters

    # What the first layer writes passed through no quantised layer yet: bf16's noise is all.
    first = "model.layers.0.self_attn"
    oracle = Oracle(base, CASE / "adapter")
    for tokens, state in zip(PROMPTS, states, strict=True):
        assert_states_close({first: state[first]}, {first: oracle(tokens).state[first]}, 0.02)
