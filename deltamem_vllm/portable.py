"""A stored session as a file, and back: what joins the stores' records and the file's form."""

from collections.abc import Iterable

from deltamem_vllm.api.lineage import unfolded
from deltamem_vllm.errors import SnapshotError
from deltamem_vllm.sessions import SessionContent, SessionRecord
from deltamem_vllm.state.fingerprint import FingerprintParts
from deltamem_vllm.state.snapshot import StateShape
from deltamem_vllm.state.snapshot_file import SnapshotFile, dump_snapshot, load_snapshot


def export_record(record: SessionRecord, parts: FingerprintParts, shape: StateShape) -> bytes:
    """The file of one version of a session; see `dump_snapshot`."""
    content = record.content
    file = SnapshotFile(
        state=content.state,
        version=record.version,
        tokens_written=content.tokens_written,
        pending_token_ids=content.pending_token_ids,
        message_chain=content.message_chain,
        metadata=content.metadata,
    )
    return dump_snapshot(file, parts, shape)


def import_content(data: bytes, parts: FingerprintParts, shape: StateShape) -> SessionContent:
    """What a file's session holds, for a model of this fingerprint; see `load_snapshot`.

    It counts as written without a window: what it holds besides its messages cannot be told.
    """
    file = load_snapshot(data, parts, shape)
    return unfolded(
        SessionContent(
            state=file.state,
            tokens_written=file.tokens_written,
            pending_token_ids=file.pending_token_ids,
            message_chain=file.message_chain,
            metadata=file.metadata,
        )
    )


def check_vocabulary(tokens: Iterable[int], vocab_size: int) -> None:
    """Refuse the pending tokens of a file if the model does not have them.

    Raises:
        SnapshotError: one is outside its vocabulary.
    """
    if any(token >= vocab_size for token in tokens):
        raise SnapshotError("the file's pending tokens are not in the model's vocabulary.")
