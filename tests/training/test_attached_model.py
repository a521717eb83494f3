"""The attached memory equals the published reference's outputs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from deltamem_vllm.adapter import load_adapter
from deltamem_vllm.training.attached import attach

GOLDEN = Path(__file__).parents[1] / "parity" / "data"
LOGITS = 1e-4
STATES = 1e-5


@pytest.mark.parametrize("case", ["qwen3_tsw", "qwen3_msw4"])
def test_logits_and_states_equal_the_reference(case: str) -> None:
    folder = GOLDEN / case
    golden = load_file(folder / "golden.safetensors")
    greedy = json.loads((folder / "meta.json").read_text())["greedy"]
    model = Qwen3ForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    memory = attach(model, load_adapter(folder / "adapter"))
    tokens = torch.cat([golden["history"], torch.tensor(greedy[:-1])]).unsqueeze(0)
    history = golden["history"].numel()

    with torch.no_grad():
        model(tokens[:, :history])
        for layer, state in memory.states.items():
            expected = golden[f"prompt_state.model.layers.{layer}.self_attn"]
            torch.testing.assert_close(
                state.view_as(expected), expected, atol=STATES, rtol=0, msg=f"layer {layer}"
            )
        memory.reset()
        written = model(tokens).logits[0]
        torch.testing.assert_close(written, golden["write_logits"], atol=LOGITS, rtol=0)
        assert written[history - 1 :].argmax(-1).tolist() == greedy
        for layer, state in memory.states.items():
            expected = golden[f"state.model.layers.{layer}.self_attn"]
            torch.testing.assert_close(state.view_as(expected), expected, atol=STATES, rtol=0)

        states = memory.states
        memory.write_enabled = False
        query = golden["query"].unsqueeze(0)
        torch.testing.assert_close(
            model(query).logits[0], golden["read_logits"], atol=LOGITS, rtol=0
        )
        assert all(torch.equal(memory.states[layer], state) for layer, state in states.items())
        memory.load_states({})
        torch.testing.assert_close(
            model(query).logits[0], golden["empty_logits"], atol=LOGITS, rtol=0
        )
