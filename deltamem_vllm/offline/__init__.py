"""vLLM's `LLM` with sessions: batches of turns on conversations that a store keeps."""

from deltamem_vllm.offline.llm import MemoryLLM

__all__ = ["MemoryLLM"]
