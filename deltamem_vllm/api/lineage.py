"""Which version of a session a history goes on from."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final, Literal

from deltamem_vllm.api.boundaries import common_prefix
from deltamem_vllm.api.messages import Message, role_of
from deltamem_vllm.errors import ConflictError
from deltamem_vllm.sessions import SessionContent, SessionRecord

OnDivergence = Literal["reset", "fork"] | None

UNFOLDED: Final = "unfolded_at"
"""Key of a session's metadata: `tokens_written` after its last turn or ingest without a window that
added to something. Equal numbers of a version and its ancestor mean that the ancestor has all that
was so written to the other."""


def unfolded(content: SessionContent) -> SessionContent:
    """A session after something was added without a window, which no history need have."""
    return replace(content, metadata={**content.metadata, UNFOLDED: content.tokens_written})


class Lineage:
    """The versions kept of a session, and how they grew out of each other."""

    def __init__(self, versions: Sequence[SessionRecord]) -> None:
        self._newest_first = tuple(versions)
        by_version = {record.version: record for record in versions}
        version = versions[0].version if versions else 0
        self._ancestors: list[SessionRecord] = []
        while version in by_version:
            self._ancestors.append(by_version.pop(version))
            version = self._ancestors[-1].parent_version
        root = self._ancestors[-1] if self._ancestors else None
        # A session's own first write is not marked, so one that begins so was imported.
        inherited = (
            root is not None
            and root.version == 1
            and (root.forked_from is not None or _unfolded_at(root) is not None)
        )
        self._began_empty = version == 0 and not inherited
        """Whether the empty memory is known to lie before all that the session holds."""

    def base(
        self, hashes: Sequence[bytes], newest: Message, on_divergence: OnDivergence
    ) -> tuple[int, int]:
        """The version to grow out of, and how many messages of the history it holds."""
        current = self._newest_first[0] if self._newest_first else None
        chain = () if current is None else current.content.message_chain
        common = common_prefix(hashes, chain)
        if common == len(chain):
            return (0 if current is None else current.version), common
        if _goes_back(hashes, common, newest):
            # Of ancestors only: a version that was left, by a reset or a rollback, is not what the
            # session is. The longest chain has the least to be written again; of equal ones, the
            # nearest ancestor's holds what else was written since.
            fitting = list(_fitting(self._ancestors, hashes))
            base = max(fitting, key=_length) if fitting else None
            drops = _unfolded_at(base) != _unfolded_at(current)
            if drops and on_divergence is None:
                raise ConflictError(self._dropping(common))
            if not drops and base is not None:
                return _as_base(base)
            if not drops and self._began_empty:
                return 0, 0
        if on_divergence == "reset":
            return 0, 0
        if on_divergence == "fork":
            for record in _fitting(self._newest_first, hashes):
                return _as_base(record)
            if self._began_empty:
                return 0, 0
        raise ConflictError(self._problem(hashes, common, newest, on_divergence))

    def _dropping(self, common: int) -> str:
        name = self._newest_first[0].key.name
        return (
            f"session {name!r}: the history goes back to the first {common} messages that were "
            "written, and what was written since without a window would be lost. Send the history "
            'with it, or set on_divergence to "fork" to go on from the newest version that fits, '
            'or to "reset" to begin with an empty memory.'
        )

    def _problem(
        self, hashes: Sequence[bytes], common: int, newest: Message, on_divergence: OnDivergence
    ) -> str:
        newest_version, oldest_version = self._newest_first[0], self._newest_first[-1]
        name = newest_version.key.name
        if on_divergence == "fork" or _goes_back(hashes, common, newest):
            return (
                f"session {name!r}: the history shares its first {common} messages with what was "
                f"written, and none of the versions kept ({oldest_version.version} to "
                f"{newest_version.version}) holds these or fewer of them alone. Set on_divergence "
                'to "reset" to write the history into an empty memory, or keep more versions.'
            )
        return (
            f"session {name!r} was written with another history: of the "
            f"{len(newest_version.content.message_chain)} messages written, the one sent repeats "
            f"the first {common} and then differs. Send the history as it was, or set "
            'on_divergence to "fork" to go on from the newest version that fits it, or to "reset" '
            "to begin with an empty memory."
        )


def _goes_back(hashes: Sequence[bytes], common: int, newest: Message) -> bool:
    """Whether a history asks again what was asked before, or asks something else instead.

    A history that has nothing in common with the chain is no such edit: it may as well be another
    conversation, whose client does not mean to lose the memory.
    """
    if len(hashes) == common:
        return True
    return common > 0 and len(hashes) == common + 1 and role_of(newest) != "assistant"


def _fitting(records: Sequence[SessionRecord], hashes: Sequence[bytes]) -> Iterator[SessionRecord]:
    """Versions that hold nothing but the history's first messages."""
    for record in records:
        if common_prefix(hashes, record.content.message_chain) == _length(record):
            yield record


def _unfolded_at(record: SessionRecord | None) -> str | int | None:
    return None if record is None else record.content.metadata.get(UNFOLDED)


def _length(record: SessionRecord) -> int:
    return len(record.content.message_chain)


def _as_base(record: SessionRecord) -> tuple[int, int]:
    return record.version, _length(record)
