"""What conversations ask of a server."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Workload(BaseModel):
    """Conversations of one kind; all sizes in tokens, as the chat template renders them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    conversations: int = Field(default=1000, ge=1)
    """That are kept."""

    history: int = Field(default=8192, ge=0)
    """Said before a turn."""

    window: int = Field(default=512, ge=0)
    """Of the history, what is shown where not all of it is."""

    question: int = Field(default=64, ge=1)
    """What a turn adds."""

    reply: int = Field(default=128, ge=1)
    """What is generated."""

    standing: int = Field(default=0, ge=0)
    """System prompt and tools before every conversation, the same for all."""

    share_prefix: bool = False
    """Whether turns with memory ask for `share_prefix`: then they share these, too."""

    turns_per_hour: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    """Of one conversation."""

    messages: int = Field(default=2, ge=0)
    """Written messages per `question + reply` tokens of history; a hash is kept of each."""

    versions_kept: int = Field(default=4, ge=1)
    """Of a session (`DELTAMEM_VERSIONS_KEPT`)."""

    @property
    def shown(self) -> int:
        """Tokens of history in a window."""
        return min(self.window, self.history)

    @property
    def turns_per_second(self) -> float:
        """Of all conversations."""
        return self.conversations * self.turns_per_hour / 3600

    @property
    def written_messages(self) -> int:
        """Messages of a history."""
        return round(self.messages * self.history / (self.question + self.reply))
