"""Which stock architecture is served by which of our classes. A table; no heavy import.

To add a backbone: write `models/<name>.py` (see `qwen3.py`) and add a line to each table.
"""

from typing import Final

ARCHITECTURES: Final[dict[str, str]] = {
    "LlamaForCausalLM": "DeltaMemLlamaForCausalLM",
    "MistralForCausalLM": "DeltaMemMistralForCausalLM",
    "Qwen2ForCausalLM": "DeltaMemQwen2ForCausalLM",
    "Qwen3ForCausalLM": "DeltaMemQwen3ForCausalLM",
    "SmolLM3ForCausalLM": "DeltaMemSmolLM3ForCausalLM",
}
"""Architecture in a stock checkpoint's config.json -> architecture served with memory."""

MODEL_CLASSES: Final[dict[str, str]] = {
    "DeltaMemLlamaForCausalLM": "deltamem_vllm.models.llama:DeltaMemLlamaForCausalLM",
    "DeltaMemMistralForCausalLM": "deltamem_vllm.models.mistral:DeltaMemMistralForCausalLM",
    "DeltaMemQwen2ForCausalLM": "deltamem_vllm.models.qwen2:DeltaMemQwen2ForCausalLM",
    "DeltaMemQwen3ForCausalLM": "deltamem_vllm.models.qwen3:DeltaMemQwen3ForCausalLM",
    "DeltaMemSmolLM3ForCausalLM": "deltamem_vllm.models.smollm3:DeltaMemSmolLM3ForCausalLM",
}
"""Architecture served with memory -> "module:Class", as vLLM's ModelRegistry takes it."""
