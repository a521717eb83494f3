"""`TrainSettings`: what a training run is asked for. Its fields are the flags of its command."""

from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from deltamem_vllm.config import (
    MAX_RANK,
    DeltaMemConfig,
    OutputInit,
    StateUpdateMode,
    WriteGranularity,
)
from deltamem_vllm.errors import TrainingError

Strategy = Literal["tsw", "ssw", "msw"]
Unit = Literal["message", "sentence"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["float32", "bfloat16"]
History = Literal["turns", "joint", "mixed"]

GRANULARITY: Final[dict[Unit, WriteGranularity]] = {
    "message": "message_mean",
    "sentence": "sentence_mean",
}

ONLY_WHERE: Final = frozenset({"out", "device", "threads", "eval_batch", "checkpoint_every"})
"""Fields that may change between two runs into one folder: they do not change the weights, but
for rounding."""


class TrainSettings(BaseModel):
    """Everything that decides what a run makes, and where it runs.

    The defaults of the adapter and of the learning rate are the published training's. Adapters of
    tiny models learn with far higher rates; `docs/training.md` has an example.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str
    """Backbone: a folder or a Hub id, of the Qwen3, Qwen2, Llama, Mistral or SmolLM3 layout."""

    data: Path
    """Conversations to learn from: a JSONL file, or a folder of them."""

    out: Path
    """Folder of the adapter. One that holds an unfinished run of the same settings goes on."""

    held_out: Path | None = None
    """Conversations that are never learned from; they decide when to stop."""

    held_out_share: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Without --held-out: the share of the data that is held out."""

    held_out_limit: int = Field(default=200, ge=1)
    """At most so many conversations are held out."""

    strategy: Strategy = "tsw"
    """How the memory is written: a write per token (tsw), per message or sentence (ssw), or per
    token into several states (msw)."""

    states: int = Field(default=4, ge=2, le=16)
    """States of msw."""

    unit: Unit = "message"
    """What ssw writes at once."""

    rank: int = Field(default=8, ge=1, le=MAX_RANK)
    """Rank of a state."""

    alpha: float = Field(default=16.0, gt=0.0, allow_inf_nan=False)
    """Corrections are scaled by alpha / rank."""

    heads: str = "q,o"
    """Projections that a read corrects: some of q, k, v, o."""

    layers: str = ""
    """Layers with a memory, such as 22-29 or 0,4,8; empty: all of them."""

    update: StateUpdateMode = "standard"
    """Update rule of the state."""

    gate_bias: float = Field(default=-1.5, allow_inf_nan=False)
    """Where the write gate begins, before the sigmoid."""

    output_init: OutputInit = "base_slice_fixed"
    """Where the corrections' weights begin."""

    online_gain: float = Field(default=0.05, ge=0.0, allow_inf_nan=False)
    """Factor of that beginning."""

    history: History = "mixed"
    """How histories are written: a prompt per turn, in one go, or one of the two by chance."""

    segment_tokens: int = Field(default=2048, ge=8)
    """The most tokens of a history that are read together; longer ones are cut, as an ingest is."""

    value_weight: float = Field(default=4.0, ge=1.0, allow_inf_nan=False)
    """Weight, in the loss, of an answer's tokens that are marked as its value."""

    reply_share: float = Field(default=0.1, ge=0.0, allow_inf_nan=False)
    """Weight of the loss on replies within histories."""

    writing_share: float = Field(default=0.2, ge=0.0, le=1.0)
    """Share of steps whose questions write while they ask, as an ordinary turn does."""

    window_share: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of conversations to learn from whose last turns stand as text in front of their
    questions. Held-out ones are asked without."""

    window_turns: int = Field(default=2, ge=1)
    """The most turns that do; each number is as likely, and all are shown where there are fewer."""

    steps: int = Field(default=1000, ge=1)
    """Optimizer steps, at most."""

    batch: int = Field(default=4, ge=1)
    """Conversations that are computed together."""

    accumulate: int = Field(default=1, ge=1)
    """Batches of one optimizer step."""

    learning_rate: float = Field(default=2e-4, gt=0.0, allow_inf_nan=False)
    """Peak of the learning rate; a cosine goes down from there."""

    warmup: int = Field(default=20, ge=0)
    """Steps of the way up."""

    weight_decay: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Of AdamW."""

    seed: int = 0
    """Of initial weights, order of the data and all other chance."""

    eval_every: int = Field(default=100, ge=1)
    """Steps between two looks at what is held out."""

    patience: int = Field(default=5, ge=1)
    """Stop after so many looks without an improvement."""

    eval_batch: int = Field(default=16, ge=1)
    """Held-out conversations that are computed together."""

    checkpoint_every: int = Field(default=100, ge=1)
    """Steps between two checkpoints."""

    dtype: Dtype = "float32"
    """Of the backbone; the memory is float32 always."""

    device: Device = "auto"
    """Where to run; auto takes a GPU if there is one."""

    threads: int = Field(default=0, ge=0)
    """CPU threads; 0 leaves it to torch."""

    def adapter_config(self) -> DeltaMemConfig:
        """The adapter that these settings train.

        Raises:
            ConfigError: heads or layers are not valid.
        """
        return DeltaMemConfig.from_dict(
            {
                "rank": self.rank,
                "alpha": self.alpha,
                "beta_bias_init": self.gate_bias,
                "state_update_mode": self.update,
                "output_init": self.output_init,
                "online_gain": self.online_gain,
                "num_state_heads": self.states if self.strategy == "msw" else 1,
                "memory_write_granularity": (
                    GRANULARITY[self.unit] if self.strategy == "ssw" else "token"
                ),
                "target_layers": layer_list(self.layers),
                "delta_heads": self.heads,
            }
        )

    def deciding(self) -> dict[str, object]:
        """The fields that decide the weights, as JSON values."""
        return self.model_dump(mode="json", exclude=set(ONLY_WHERE))


def layer_list(text: str) -> list[int]:
    """`22-24,29` as [22, 23, 24, 29].

    Raises:
        TrainingError: it is no such list.
    """
    found: set[int] = set()
    for part in filter(None, (each.strip() for each in text.split(","))):
        first, dash, last = part.partition("-")
        is_range = first.isdecimal() and (last.isdecimal() if dash else True)
        if not is_range or int(first) > int(last or first):
            raise TrainingError(
                f"--layers {text!r}: give numbers and ranges, such as 22-29 or 0,4,8"
            )
        found.update(range(int(first), int(last or first) + 1))
    return sorted(found)
