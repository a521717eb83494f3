"""Weights stay what sessions were written with, for as long as an engine lives.

A state means nothing to other weights, and the fingerprint that keeps sessions apart is that of the
files an engine was started with. So whatever puts other weights in their place is refused.
"""

from typing import Any, Final

from deltamem_vllm.errors import MemoryRequestError

RELOADS: Final = (
    "reload_weights",
    "init_weight_transfer_engine",
    "start_weight_update",
    "start_draft_weight_update",
    "update_weights",
    "finish_weight_update",
)
"""Methods of vLLM's workers."""

RELOAD_PROBLEM: Final = (
    "the weights of a model with memory cannot be changed while it is served: its sessions belong "
    "to the weights that they were written with. Start another engine; sessions of the same files "
    "go on there, and `deltamem sessions rebuild` writes them anew for others."
)

DISCARDING_LEVEL: Final = 2
"""Of vLLM's sleep mode: weights are thrown away, and to be loaded again."""


def refuse_reload(method: Any) -> None:
    """Refuse a worker call that changes weights.

    Args:
        method: its name, or a function to be run.

    Raises:
        MemoryRequestError: says what to do instead.
    """
    if method in RELOADS:
        raise MemoryRequestError(RELOAD_PROBLEM)


def refuse_sleep(level: Any) -> None:
    """Refuse to sleep so deep that weights must be loaded again.

    Raises:
        MemoryRequestError: says which level is served.
    """
    if str(level) == str(DISCARDING_LEVEL):
        raise MemoryRequestError(f"sleep level {level}: {RELOAD_PROBLEM} Level 1 keeps them.")
