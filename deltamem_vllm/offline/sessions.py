"""The sessions of a `MemoryLLM` as a mapping."""

from collections.abc import Iterator, Mapping
from typing import Any

from deltamem_vllm.errors import SessionNotFoundError
from deltamem_vllm.offline.service import OfflineService
from deltamem_vllm.portable import check_vocabulary, export_record, import_content
from deltamem_vllm.sessions import SessionKey, SessionRecord
from deltamem_vllm.state.fingerprint import FingerprintParts
from deltamem_vllm.state.snapshot import MemorySnapshot


class Sessions(Mapping[str, MemorySnapshot]):
    """One tenant's sessions of one model, by name, as the store has them now.

    Args:
        service: where they are, and whose.
        lora_request: of the model; None is without.
    """

    def __init__(self, service: OfflineService, lora_request: Any) -> None:
        self._service = service
        self._store = service.store
        self._shape = service.shape
        self._lora_request = lora_request

    def __getitem__(self, session: str) -> MemorySnapshot:
        try:
            return self._snapshot(self._store.get(self._key(session)))
        except SessionNotFoundError:
            raise KeyError(session) from None

    def __delitem__(self, session: str) -> None:
        """Remove a session, its versions and replies for good."""
        if not self._store.delete(self._key(session)):
            raise KeyError(session)

    def __iter__(self) -> Iterator[str]:
        after = None
        while True:
            page = self._store.list_sessions(
                self._service.tenant, fingerprint=self._parts().digest, after=after, limit=1000
            )
            for info in page.sessions:
                yield info.key.name
            after = page.next_after
            if after is None:
                return

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def versions(self, session: str) -> tuple[MemorySnapshot, ...]:
        """The versions kept, newest first; empty for an absent session."""
        return tuple(map(self._snapshot, self._store.versions(self._key(session))))

    def fork(self, session: str, to: str, version: int | None = None) -> MemorySnapshot:
        """Make a new session of a version of another, the current one by default.

        Raises:
            SessionNotFoundError, SessionExistsError, SessionBusyError, QuotaError: nothing was
                made.
        """
        return self._snapshot(self._store.fork(self._key(session), to, version))

    def rollback(self, session: str, version: int) -> MemorySnapshot:
        """Make an older version's content the session's next version.

        Raises:
            SessionNotFoundError, SessionBusyError: nothing was changed.
        """
        return self._snapshot(self._store.rollback(self._key(session), version))

    def export(self, session: str, version: int | None = None) -> bytes:
        """A version, the current one by default, as the bytes of a file.

        Raises:
            SessionNotFoundError: no such session or version.
        """
        record = self._store.get(self._key(session), version)
        return export_record(record, self._parts(), self._shape)

    def import_(self, session: str, data: bytes, *, ttl: float | None = None) -> MemorySnapshot:
        """Make a session of exported bytes.

        Raises:
            SnapshotError: they are damaged, or of another model or adapter.
            SessionExistsError, SessionBusyError, QuotaError: nothing was made.
        """
        content = import_content(data, self._parts(), self._shape)
        check_vocabulary(content.pending_token_ids, self._service.llm.model_config.get_vocab_size())
        return self._snapshot(self._store.create(self._key(session), content, ttl=ttl))

    def _key(self, session: str) -> SessionKey:
        return self._service.key(session, self._lora_request)

    def _parts(self) -> FingerprintParts:
        return self._service.fingerprints.of(self._lora_request)

    def _snapshot(self, record: SessionRecord) -> MemorySnapshot:
        content = record.content
        return MemorySnapshot(
            state=self._shape.unpack(content.state),
            version=record.version,
            tokens_written=content.tokens_written,
            pending_token_ids=list(content.pending_token_ids),
        )
