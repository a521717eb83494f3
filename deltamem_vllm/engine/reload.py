"""Weights stay what sessions were written with, for as long as an engine lives.

A state means nothing to other weights, and the fingerprint that keeps sessions apart is that of the
files an engine was started with. So whatever puts other weights in their place is refused.
"""

from typing import Any, Final

from deltamem_vllm.errors import MemoryRequestError

RELOADS: Final = (
    "reload_weights",
    "reset_weights",
    "load_model",
    "update_config",
    "sleep",
    "discard",
    "init_weight_transfer_engine",
    "start_weight_update",
    "start_draft_weight_update",
    "update_weights",
    "finish_weight_update",
)
"""Methods of vLLM's workers. To sleep is a call of the engine's, which says how deep."""

RELOAD_PROBLEM: Final = (
    "the weights of a model with memory cannot be changed while it is served: its sessions belong "
    "to the weights that they were written with. Start another engine; sessions of the same files "
    "go on there, and `deltamem sessions rebuild` writes them anew for others."
)

KEEPING_LEVELS: Final = (None, "0", "1")
"""Of vLLM's sleep mode, as text: those under which weights are kept. None is vLLM's own choice, 1.
Level 2 throws them away, to be loaded again, and its number can be written in many ways."""


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

    Args:
        level: a number or its text; None where a request names none.

    Raises:
        MemoryRequestError: says which level is served.
    """
    if (level if level is None else str(level)) not in KEEPING_LEVELS:
        raise MemoryRequestError(f"sleep level {level}: {RELOAD_PROBLEM} Level 1 keeps them.")
