"""A session as a portable file: plain safetensors, one tensor per layer, facts in the metadata.

| metadata | content |
|---|---|
| `format`, `format_version` | `deltamem-session`, `1` |
| `fingerprint` | JSON: the parts of `FingerprintParts` |
| `version` | the session's version when it was exported; an import begins at 1 again |
| `tokens_written` | all tokens that the session has written |
| `pending_token_ids` | JSON: tokens that its next turn starts with |
| `message_chain` | JSON: keyed hashes of the written messages, hex, oldest first |
| `session_metadata` | JSON: small facts such as `segment_tokens` |
| `digest` | sha256 over all of the above and the states |

The tensors are `model.layers.N.self_attn`: fp32 [H, r, r], the matrices S of N's state heads.

The message chain says which messages a session has seen only where the same hash key is used; to
other servers its hashes mean nothing, and no history fits them. The digest finds damage; it is no
signature, so import only what you trust.

The file is read by a parser of its own, since it may come from anybody: sizes are checked before
anything is parsed, and every byte has to be accounted for.
"""

import dataclasses
import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import safetensors.numpy

from deltamem_vllm.errors import SnapshotError
from deltamem_vllm.state.fingerprint import FingerprintParts
from deltamem_vllm.state.snapshot import StateShape

FORMAT_NAME: Final = "deltamem-session"
FORMAT_VERSION: Final = "1"

MAX_HEADER_BYTES: Final = 16 << 20
"""Enough for the hashes of 200,000 messages."""

MAX_PENDING: Final = 65536
MAX_FACTS: Final = 64
MAX_COUNT: Final = 2**63 - 1
MAX_TOKEN_ID: Final = 2**31 - 1

_LENGTH: Final = struct.Struct("<Q")
_KEYS: Final = (
    "format",
    "format_version",
    "fingerprint",
    "version",
    "tokens_written",
    "pending_token_ids",
    "message_chain",
    "session_metadata",
)


@dataclass(frozen=True)
class SnapshotFile:
    """What a file says about a session."""

    state: bytes = field(repr=False)
    """Packed as in `StateShape.pack`."""

    version: int
    tokens_written: int = 0
    pending_token_ids: tuple[int, ...] = ()
    message_chain: tuple[bytes, ...] = ()
    metadata: Mapping[str, str | int] = field(default_factory=dict)


def dump_snapshot(snapshot: SnapshotFile, parts: FingerprintParts, shape: StateShape) -> bytes:
    """The file of a session.

    Raises:
        SnapshotError: the state is not this adapter's, or not finite; or there is too much else.
    """
    shape.check(snapshot.state)
    states = _states(snapshot.state, shape)
    facts = {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "fingerprint": _json(dataclasses.asdict(parts)),
        "version": str(snapshot.version),
        "tokens_written": str(snapshot.tokens_written),
        "pending_token_ids": _json(snapshot.pending_token_ids),
        "message_chain": _json([message.hex() for message in snapshot.message_chain]),
        "session_metadata": _json(dict(snapshot.metadata)),
    }
    data: bytes = safetensors.numpy.save(
        dict(zip(shape.layer_names, states, strict=True)),
        metadata={**facts, "digest": _digest(facts, shape, snapshot.state)},
    )
    # What cannot be read again must not be handed out.
    load_snapshot(data, parts, shape)
    return data


def load_snapshot(data: bytes, parts: FingerprintParts, shape: StateShape) -> SnapshotFile:
    """Read a file, for a model of this fingerprint and an adapter with these states.

    Raises:
        SnapshotError: the file is damaged, hostile, or of another format or model; the message
            names each part of the model that differs.
    """
    header, body = _split(data)
    facts = header.pop("__metadata__", None)
    _check_format(facts)
    _check_parts(facts["fingerprint"], parts)
    state = _packed(header, body, shape)
    digest = facts.pop("digest")
    if _digest(facts, shape, state) != digest:
        raise _damaged("its digest does not fit its content")
    _states(state, shape)
    return SnapshotFile(
        state=state,
        version=_count(facts, "version", at_least=1),
        tokens_written=_count(facts, "tokens_written", at_least=0),
        pending_token_ids=_pending(facts),
        message_chain=_chain(facts),
        metadata=_session_metadata(facts),
    )


def _split(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """Header and states of a safetensors file."""
    if len(data) < _LENGTH.size:
        raise _damaged(f"it has only {len(data)} bytes")
    (length,) = _LENGTH.unpack_from(data)
    if length > MAX_HEADER_BYTES:
        raise SnapshotError(
            f"the snapshot's header claims {length:,} bytes, of at most {MAX_HEADER_BYTES:,}: it "
            "is no snapshot of a session."
        )
    start = _LENGTH.size + length
    if len(data) < start:
        raise _damaged("it ends within its header")
    try:
        header = json.loads(data[_LENGTH.size : start], object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise _damaged(f"its header is not valid JSON ({error!s:.200})") from None
    if not isinstance(header, dict):
        raise _damaged("its header is no JSON object")
    return header, memoryview(data)[start:]


def _check_format(facts: Any) -> None:
    if not isinstance(facts, dict) or facts.get("format") != FORMAT_NAME:
        raise SnapshotError(
            f"the file is no snapshot of a session: its metadata does not say {FORMAT_NAME!r}."
        )
    if facts.get("format_version") != FORMAT_VERSION:
        raise SnapshotError(
            f"the snapshot has format version {facts.get('format_version')!r:.40}; this version of "
            f"deltamem-vllm reads {FORMAT_VERSION!r}."
        )
    if set(facts) != {*_KEYS, "digest"} or not all(isinstance(v, str) for v in facts.values()):
        raise _damaged(f"its metadata has not exactly the entries {', '.join(_KEYS)}, digest")


def _check_parts(text: str, expected: FingerprintParts) -> None:
    given = _parsed(text, "fingerprint")
    if not isinstance(given, dict):
        raise _damaged("its fingerprint is no JSON object")
    different = FingerprintParts.from_mapping(given).differences(expected)
    if different:
        raise SnapshotError(
            f"the snapshot belongs to another model: {', '.join(different)} differ. Import it "
            "where the same model is served. DELTAMEM_FINGERPRINT_ALIAS joins models that differ "
            "in weights, config or quantization only."
        )


def _packed(tensors: dict[str, Any], body: memoryview, shape: StateShape) -> bytes:
    """All states in the order of layers, after every byte was accounted for."""
    if set(tensors) != set(shape.layer_names):
        shown = ", ".join(sorted(tensors))[:400]
        raise SnapshotError(
            f"the snapshot has states of [{shown}], but the adapter has "
            f"{list(shape.layer_names)}; it belongs to another adapter or backbone."
        )
    if len(body) != shape.num_bytes:
        raise _damaged(f"its states have {len(body):,} bytes, expected {shape.num_bytes:,}")
    starts = {name: _start(name, described, shape) for name, described in tensors.items()}
    size = _state_bytes(shape)
    if set(starts.values()) != set(range(0, shape.num_bytes, size)):
        raise _damaged("two states share their bytes")
    return b"".join(body[starts[name] : starts[name] + size] for name in shape.layer_names)


def _start(name: str, described: Any, shape: StateShape) -> int:
    """Where a layer's state begins: a multiple of a state's size within all states' bytes."""
    if not isinstance(described, dict):
        raise _damaged(f"the description of {name} is no JSON object")
    dtype, given = described.get("dtype"), described.get("shape")
    if dtype != "F32" or given != list(shape.shape):
        raise SnapshotError(
            f"the snapshot's state of {name} is {dtype!r:.20} {given!r:.60}, but the adapter's is "
            f"'F32' {list(shape.shape)} (state heads, rank, rank)."
        )
    offsets = described.get("data_offsets")
    size = _state_bytes(shape)
    for start in range(0, shape.num_bytes, size):
        if offsets == [start, start + size]:
            return start
    raise _damaged(f"the offsets of {name} are {offsets!r:.60}")


def _state_bytes(shape: StateShape) -> int:
    """Of one layer."""
    return shape.num_bytes // len(shape.layer_names)


def _states(state: bytes, shape: StateShape) -> Any:
    """Packed states as an array [layers, H, r, r].

    Raises:
        SnapshotError: a value is not finite.
    """
    states = np.frombuffer(state, "<f4").reshape(len(shape.layer_names), *shape.shape)
    finite = np.isfinite(states).all(axis=(1, 2, 3))
    if not finite.all():
        name = shape.layer_names[int(np.argmin(finite))]
        raise SnapshotError(f"the snapshot's state of {name} has a non-finite value.")
    return states


def _count(facts: Mapping[str, str], name: str, *, at_least: int) -> int:
    text = facts[name]
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MAX_COUNT))):
        raise _damaged(f"its {name} is {text!r:.60}")
    number = int(text)
    if not at_least <= number <= MAX_COUNT:
        raise _damaged(f"its {name} is {number}")
    return number


def _pending(facts: Mapping[str, str]) -> tuple[int, ...]:
    tokens = _parsed(facts["pending_token_ids"], "pending_token_ids")
    valid = isinstance(tokens, list) and len(tokens) <= MAX_PENDING
    if not valid or not all(_is_integer(token) and 0 <= token <= MAX_TOKEN_ID for token in tokens):
        raise _damaged(f"its pending_token_ids are not at most {MAX_PENDING} token ids")
    return tuple(tokens)


def _chain(facts: Mapping[str, str]) -> tuple[bytes, ...]:
    chain = _parsed(facts["message_chain"], "message_chain")
    try:
        return tuple(bytes.fromhex(message) for message in chain)
    except (TypeError, ValueError):
        raise _damaged("its message_chain is no list of hexadecimal hashes") from None


def _session_metadata(facts: Mapping[str, str]) -> dict[str, str | int]:
    metadata = _parsed(facts["session_metadata"], "session_metadata")
    valid = isinstance(metadata, dict) and len(metadata) <= MAX_FACTS
    if not valid or not all(_is_integer(v) or isinstance(v, str) for v in metadata.values()):
        raise _damaged(f"its session_metadata are not at most {MAX_FACTS} strings and numbers")
    return dict(metadata)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different; readers would not agree on another one."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key is there twice")
    return made


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise _damaged(f"its {name} is not valid JSON ({error!s:.200})") from None


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _digest(facts: Mapping[str, str], shape: StateShape, state: bytes) -> str:
    """sha256 (hex) over the metadata, without the digest, the layers' names and the states."""
    covered = json.dumps([[name, facts[name]] for name in _KEYS] + [list(shape.layer_names)])
    return hashlib.sha256(covered.encode() + b"\0" + state).hexdigest()


def _damaged(problem: str) -> SnapshotError:
    return SnapshotError(f"the snapshot is damaged: {problem}. Export it again.")
