"""A client that sends its full history every turn: each message is written exactly once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from deltamem_vllm.api.folding import FoldPlan, plan_fold
from deltamem_vllm.api.messages import Message, hash_message
from deltamem_vllm.errors import ConflictError
from deltamem_vllm.memory import Window
from deltamem_vllm.sessions import SessionContent, SessionRecord
from tests.api.histories import KEY, message, record


@dataclass(frozen=True)
class Version:
    """A record, and what the turns behind it wrote, in order."""

    record: SessionRecord
    written: tuple[str, ...]


@dataclass
class Session:
    """Applies plans as a server does, and keeps the last versions."""

    versions_kept: int
    versions: list[Version] = field(default_factory=list)  # newest first

    def records(self) -> list[SessionRecord]:
        return [version.record for version in self.versions]

    def written_at(self, number: int) -> tuple[str, ...]:
        if number == 0:
            return ()
        return next(v.written for v in self.versions if v.record.version == number)

    def commit(self, plan: FoldPlan, reply: dict[str, Any]) -> None:
        texts = [message["content"] for message in (*plan.ingest, *plan.fresh, reply)]
        written = (*self.written_at(plan.base_version), *texts)
        number = self.versions[0].record.version + 1 if self.versions else 1
        content = SessionContent(
            state=b"", message_chain=(*plan.chain_after_prompt, hash_message(reply, KEY))
        )
        one = replace(record(number, "", plan.base_version), content=content)
        self.versions = [Version(one, written), *self.versions][: self.versions_kept]


def as_echoed(reply: dict[str, Any]) -> dict[str, Any]:
    """A reply as clients give it back."""
    content = [{"type": "text", "text": reply["content"]}]
    return reply | {"content": content, "refusal": None, "reasoning": "hm", "tool_calls": []}


WINDOWS = st.one_of(
    st.integers(0, 8).map(lambda n: Window(messages=n)),
    st.sampled_from([0, 3, 9, 20, 99]).map(lambda n: Window(tokens=n)),
)


class Conversations(RuleBasedStateMachine):
    """A client that sends its full history every turn, edits it, and asks again."""

    @initialize(kept=st.integers(1, 5))
    def begin(self, kept: int) -> None:
        self.session = Session(kept)
        self.history: list[dict[str, Any]] = []
        self.names = self._names()

    def _names(self) -> Iterator[str]:
        number = 0
        while True:
            number += 1
            yield str(number)

    def _new(self, role: str) -> dict[str, Any]:
        return message(role + next(self.names))

    def _send(self, sent: list[dict[str, Any]], window: Window, standing: int = 0) -> FoldPlan:
        texts = tuple(message["content"] for message in sent)
        system = [message("s") for _ in range(standing)]
        given = [*system, *(as_echoed(m) if m["role"] == "assistant" else m for m in sent)]
        plan = plan_fold(
            given,
            self.session.records(),
            window,
            None,
            KEY,
            lambda messages: len(messages) * 3,
        )
        self._check(plan, texts, window, standing)
        reply = self._new("a")
        plain = replace(plan, ingest=_plain(plan.ingest), fresh=_plain(plan.fresh))
        self.session.commit(plain, reply)
        assert self.session.versions[0].written == (*texts, reply["content"])
        self.history = [*sent, reply]
        return plan

    def _check(self, plan: FoldPlan, texts: tuple[str, ...], window: Window, standing: int) -> None:
        before = self.session.written_at(plan.base_version)
        saved, reread, ingest, fresh = (
            tuple(message["content"] for message in _plain(part))
            for part in (plan.saved, plan.reread, plan.ingest, plan.fresh)
        )
        assert (*saved, *reread, *ingest, *fresh) == texts
        assert (*saved, *reread) == before
        assert not (reread and ingest)
        shown = (*reread, *fresh)
        assert shown[-1] == texts[-1]
        assert shown[0].startswith("u") or shown == texts
        assert len(plan.standing) == standing
        asked = window.messages if window.messages is not None else (window.tokens or 0) // 3
        least = texts[len(texts) - min(len(texts), max(1, asked)) :]
        assert shown[-len(least) :] == least
        # Not a message more than it takes to begin with a question.
        assert not any(text.startswith("u") for text in shown[1 : len(shown) - len(least) + 1])

    @rule(window=WINDOWS, standing=st.integers(0, 2), tools=st.integers(0, 2))
    def ask(self, window: Window, standing: int, tools: int) -> None:
        if tools and self.history:
            sent = [*self.history, *(self._new("t") for _ in range(tools))]
        else:
            sent = [*self.history, self._new("u")]
        self._send(sent, window, standing)

    @rule(window=WINDOWS, unseen=st.lists(st.sampled_from("uat"), min_size=1, max_size=5))
    def bring_turns_that_were_had_elsewhere(self, window: Window, unseen: list[str]) -> None:
        self._send([*self.history, *map(self._new, unseen), self._new("u")], window)

    @precondition(lambda self: self.history)
    @rule(window=WINDOWS, data=st.data(), edits=st.booleans())
    def go_back(self, window: Window, data: st.DataObject, edits: bool) -> None:
        kept = data.draw(st.integers(1, len(self.history) - 1))
        sent = self.history[:kept]
        if edits:
            sent = [*sent, self._new("u")]
        texts = tuple(message["content"] for message in sent)
        fits = [v for v in self.session.versions if v.written == texts[: len(v.written)]]
        oldest = self._oldest_ancestor()
        if fits or oldest.record.parent_version == 0:
            plan = self._send(sent, window)
            # Nothing is written again that a kept version holds.
            held = max((len(version.written) for version in fits), default=0)
            assert len(plan.saved) + len(plan.reread) == held
            event("went back")
        else:
            with pytest.raises(ConflictError, match="none of the versions kept"):
                self._send(sent, window)
            event("too far back")

    def _oldest_ancestor(self) -> Version:
        one = self.session.versions[0]
        while parents := [
            v for v in self.session.versions if v.record.version == one.record.parent_version
        ]:
            (one,) = parents
        return one

    @precondition(lambda self: len(self.history) > 2)
    @rule(data=st.data())
    def change_the_past(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.history) - 2))
        sent = [*self.history]
        sent[index] = self._new(sent[index]["content"][0])
        with pytest.raises(ConflictError, match=f"repeats the first {index} and then differs"):
            self._send([*sent, self._new("u")], Window(messages=1))

    @invariant()
    def every_version_wrote_each_message_once(self) -> None:
        if hasattr(self, "session"):
            for version in self.session.versions:
                assert len(set(version.written)) == len(version.written)


def _plain(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Messages with their content as a string again."""
    return tuple(
        {**one, "content": one["content"][0]["text"]} if isinstance(one["content"], list) else one
        for one in messages
    )


TestConversations = Conversations.TestCase
TestConversations.settings = settings(max_examples=100, stateful_step_count=12, deadline=None)
