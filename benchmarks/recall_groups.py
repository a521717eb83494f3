"""Groups of held-out synthetic facts: how many are told, how far back, corrected, never told.

All asked pairs of thing and value belong to the demo's test split, which no training ever saw.
"""

from dataclasses import dataclass
from typing import Literal

from benchmarks.conditions import Case
from deltamem_vllm.demo.facts import (
    Conversation,
    distant_conversations,
    held_out_conversations,
)

GroupKind = Literal["told", "overwritten", "untold", "distance", "distractors"]


@dataclass(frozen=True)
class Group:
    """What is asked for.

    `size` counts facts; for `distance`, the turns between the fact and the question.
    """

    kind: GroupKind
    size: int

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.size}"

    def conversations(self, count: int, seed: int) -> list[Conversation]:
        """`count` conversations with a question each, the same for the same seed."""
        if self.kind == "distance":
            return distant_conversations(count, self.size, seed=seed)
        if self.kind == "distractors":
            return held_out_conversations(count, self.size, small_talk_share=1.0, seed=seed)
        return held_out_conversations(count, self.size, self.kind, seed=seed)

    def __str__(self) -> str:
        return {
            "told": f"a fact, of {self.size} told",
            "overwritten": f"a corrected fact, of {self.size}",
            "untold": f"a fact never told, {self.size} others were",
            "distance": f"the only fact, {self.size} turns of small talk ago",
            "distractors": f"a fact, of {self.size} told, small talk before each",
        }[self.kind]


MAIN: tuple[Group, ...] = (
    Group("told", 4),
    Group("told", 1),
    Group("overwritten", 4),
    Group("untold", 4),
)
"""What the summary names; done first."""

FURTHER: tuple[Group, ...] = (
    *(Group("told", size) for size in (2, 6, 8, 12, 16)),
    Group("overwritten", 8),
    Group("untold", 8),
    *(Group("distance", turns) for turns in (4, 16, 32)),
    Group("distractors", 4),
)


def cases_of(group: Group, count: int, seed: int) -> tuple[list[Case], list[str]]:
    """The group's cases, and what is expected of each one's question."""
    conversations = group.conversations(count, seed)
    cases = [
        Case(
            key=f"{group.name}/{seed}/{index}",
            history=[message.as_dict() for message in one.messages],
            questions=[one.questions[0].text],
        )
        for index, one in enumerate(conversations)
    ]
    return cases, [one.questions[0].answer for one in conversations]
