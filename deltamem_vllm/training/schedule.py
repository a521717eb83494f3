"""The learning rate over a run."""

import math


def learning_rate_share(step: int, steps: int, warmup: int, final: float) -> float:
    """Share of the peak learning rate: linear warmup, then cosine from 1 down to `final`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
