"""Keeps `deltamem:correction_ratio` up to date by asking the workers every few seconds."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from vllm.logger import init_logger

from deltamem_vllm.api import metrics
from deltamem_vllm.config import DeltaHead
from deltamem_vllm.engine.probe import CorrectionNorms

logger = init_logger(f"vllm.{__name__}")

INTERVAL_S: Final = 5.0
"""Between two questions; a question holds up the engine's next step for less than a millisecond."""


class CorrectionWatch:
    """Asks all workers of all engines what they added up, and shows the ratio of the sums.

    Args:
        call: asks the workers; what each of them has added up since anybody asked.
        head: whose correction they measure; None if the adapter corrects nothing.
    """

    def __init__(
        self, call: Callable[[], Awaitable[Sequence[Sequence[float]]]], head: DeltaHead | None
    ) -> None:
        self._call = call
        self._gauge = metrics.CORRECTION_RATIO.labels(head or "none")
        # Where metrics are kept in files, a gauge like this is not shown before it is set.
        self._gauge.set(0.0)

    async def run(self) -> None:
        """Until it is cancelled, or the workers cannot be asked any more."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                answers = await self._call()
            except Exception as error:
                # An engine that died; vLLM says so itself, and ends the server.
                logger.warning("delta-mem: corrections are not measured any more: %s", error)
                return
            ratio = CorrectionNorms(*map(sum, zip(*answers, strict=True))).ratio
            if ratio is not None:
                self._gauge.set(ratio)
