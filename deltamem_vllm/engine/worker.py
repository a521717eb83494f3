"""What the frontend can ask of the workers: mixed into vLLM's worker by `worker_extension_cls`."""

from deltamem_vllm.engine.compat import get_kv_transfer_group
from deltamem_vllm.engine.connector import DeltaMemConnector


class MemoryWorkerExtension:
    """Methods reachable through `collective_rpc`."""

    def take_memory_states(
        self, tickets: list[str], unwanted: list[str]
    ) -> dict[str, tuple[int, dict[int, bytes]]]:
        """See `DeltaMemConnector.take_states`."""
        connector = get_kv_transfer_group()
        assert isinstance(connector, DeltaMemConnector)
        return connector.take_states(tickets, unwanted)

    def forget_memory_states(self) -> None:
        """See `DeltaMemConnector.forget_states`."""
        connector = get_kv_transfer_group()
        assert isinstance(connector, DeltaMemConnector)
        connector.forget_states()

    def take_correction_norms(self) -> tuple[float, float]:
        """See `DeltaMemConnector.take_correction_norms`; as a plain tuple."""
        connector = get_kv_transfer_group()
        assert isinstance(connector, DeltaMemConnector)
        norms = connector.take_correction_norms()
        return norms.correction, norms.corrected
