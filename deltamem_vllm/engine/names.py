"""What vLLM is told by name, so that a command line can be built without loading vLLM."""

from typing import Final

CONNECTOR_NAME: Final = "DeltaMemConnector"
CONNECTOR_MODULE: Final = "deltamem_vllm.engine.connector"
MEMORY_STEP_OP: Final = "deltamem::memory_step"
KV_ROLE: Final = "kv_both"
WORKER_EXTENSION: Final = "deltamem_vllm.engine.worker.MemoryWorkerExtension"
ARCHITECTURE_PREFIX: Final = "DeltaMem"
