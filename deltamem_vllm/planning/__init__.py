"""What serving conversations takes, with their full history and with a memory, before it is served.

Sizes are exact: they are computed as the engine and the store compute them, and tests compare them
with both. Times are a model of two numbers, what a machine computes and what it reads per second;
`docs/planning.md` says how far off they were where they were measured. No vLLM is loaded here.
"""

from deltamem_vllm.planning.machine import GPUS, Gpu, Machine
from deltamem_vllm.planning.plan import Plan, Way, WayName, make_plan, turns_at_once
from deltamem_vllm.planning.sizes import (
    Backbone,
    BlockBytes,
    MemoryShape,
    block_bytes,
    read_backbone,
    session_bytes,
)
from deltamem_vllm.planning.workload import Workload

__all__ = [
    "GPUS",
    "Backbone",
    "BlockBytes",
    "Gpu",
    "Machine",
    "MemoryShape",
    "Plan",
    "Way",
    "WayName",
    "Workload",
    "block_bytes",
    "make_plan",
    "read_backbone",
    "session_bytes",
    "turns_at_once",
]
