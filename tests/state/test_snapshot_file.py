"""A session as a file: what comes back, and what is refused with which reason."""

import dataclasses
import hashlib
import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from deltamem_vllm.errors import SnapshotError
from deltamem_vllm.state.fingerprint import FingerprintParts
from deltamem_vllm.state.snapshot import StateShape
from deltamem_vllm.state.snapshot_file import (
    _KEYS,
    MAX_HEADER_BYTES,
    SnapshotFile,
    _digest,
    dump_snapshot,
    load_snapshot,
)

SHAPE = StateShape(
    layer_names=tuple(f"model.layers.{index}.self_attn" for index in (0, 2, 10)),
    layer_indices=(0, 2, 10),
    shape=(2, 4, 4),
)


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


PARTS = FingerprintParts(
    **{field.name: sha(field.name) for field in dataclasses.fields(FingerprintParts)}
)

STATE = np.random.default_rng(0).standard_normal(SHAPE.num_bytes // 4).astype("<f4").tobytes()

SNAPSHOT = SnapshotFile(
    state=STATE,
    version=7,
    tokens_written=12345,
    pending_token_ids=(1, 0, 151645),
    message_chain=(b"\0" * 32, b"\xff" * 32),
    metadata={"segment_tokens": 8192, "note": "ä\n"},
)

FILE = dump_snapshot(SNAPSHOT, PARTS, SHAPE)


def valid_header() -> dict[str, Any]:
    """The file's header, with the states in the order in which they are packed."""
    (length,) = struct.unpack_from("<Q", FILE)
    header = dict(json.loads(FILE[8 : 8 + length]))
    for index, name in enumerate(SHAPE.layer_names):
        header[name]["data_offsets"] = [index * 128, (index + 1) * 128]
    return header


def with_header(header: object, body: bytes = STATE) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def test_what_was_dumped_comes_back() -> None:
    assert load_snapshot(FILE, PARTS, SHAPE) == SNAPSHOT


states = st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    min_size=SHAPE.num_bytes // 4,
    max_size=SHAPE.num_bytes // 4,
).map(lambda values: np.array(values, "<f4").tobytes())

snapshots = st.builds(
    SnapshotFile,
    state=states,
    version=st.integers(1, 2**63 - 1),
    tokens_written=st.integers(0, 2**63 - 1),
    pending_token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple),
    message_chain=st.lists(st.binary(max_size=40), max_size=5).map(tuple),
    metadata=st.dictionaries(st.text(max_size=9), st.text(max_size=9) | st.integers(), max_size=5),
)


@settings(max_examples=50, deadline=None)
@given(snapshots)
def test_any_session_comes_back(snapshot: SnapshotFile) -> None:
    assert load_snapshot(dump_snapshot(snapshot, PARTS, SHAPE), PARTS, SHAPE) == snapshot


def test_the_file_is_plain_safetensors_with_one_tensor_per_layer(
    tmp_path: Path,
) -> None:
    path = tmp_path / "snapshot.safetensors"
    path.write_bytes(FILE)
    tensors = load_file(path)
    assert set(tensors) == set(SHAPE.layer_names)
    assert SHAPE.pack(tensors) == STATE
    assert torch.equal(
        tensors["model.layers.10.self_attn"], SHAPE.unpack(STATE)["model.layers.10.self_attn"]
    )


@pytest.mark.parametrize("part", [field.name for field in dataclasses.fields(FingerprintParts)])
def test_another_model_is_refused_by_the_part_that_differs(part: str) -> None:
    other = dataclasses.replace(PARTS, **{part: sha("other")})
    with pytest.raises(SnapshotError, match=f"another model: {part} differ"):
        load_snapshot(FILE, other, SHAPE)


def test_all_parts_that_differ_are_named() -> None:
    other = dataclasses.replace(PARTS, adapter=sha("x"), tokenizer=sha("x"))
    with pytest.raises(SnapshotError, match="tokenizer, adapter differ"):
        load_snapshot(FILE, other, SHAPE)


def test_a_change_of_any_byte_is_noticed() -> None:
    for position in range(len(FILE)):
        damaged = bytearray(FILE)
        damaged[position] ^= 1
        try:
            loaded = load_snapshot(bytes(damaged), PARTS, SHAPE)
        except SnapshotError:
            continue
        # Blanks that pad the header mean nothing; whatever was read is what was written.
        assert loaded == SNAPSHOT


def test_a_file_cut_anywhere_or_longer_is_refused() -> None:
    for length in range(len(FILE)):
        with pytest.raises(SnapshotError):
            load_snapshot(FILE[:length], PARTS, SHAPE)
    with pytest.raises(SnapshotError, match="expected 384"):
        load_snapshot(FILE + b"\0", PARTS, SHAPE)


def test_exchanged_layers_are_noticed() -> None:
    header = valid_header()
    first, second = SHAPE.layer_names[:2]
    header[first], header[second] = header[second], header[first]
    with pytest.raises(SnapshotError, match="digest"):
        load_snapshot(with_header(header), PARTS, SHAPE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_by_its_layer(value: float) -> None:
    numbers = np.frombuffer(STATE, "<f4").copy()
    numbers[40] = value
    bad = dataclasses.replace(SNAPSHOT, state=numbers.tobytes())
    with pytest.raises(SnapshotError, match=r"model\.layers\.2\.self_attn has a non-finite"):
        dump_snapshot(bad, PARTS, SHAPE)
    # From another program, which computed a fitting digest.
    signed = dump_unchecked(bad)
    with pytest.raises(SnapshotError, match=r"model\.layers\.2\.self_attn has a non-finite"):
        load_snapshot(signed, PARTS, SHAPE)


def dump_unchecked(snapshot: SnapshotFile) -> bytes:
    """A file whose digest fits its content, whatever that is."""
    header = valid_header()
    facts = header["__metadata__"]
    facts["digest"] = _digest(facts, SHAPE, snapshot.state)
    return with_header(header, snapshot.state)


def edit(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The file with another header, its digest made to fit."""
    header = valid_header()
    change(header)
    facts = header.get("__metadata__")
    if isinstance(facts, dict) and "digest" in facts and set(_KEYS) <= set(facts):
        facts["digest"] = _digest(facts, SHAPE, STATE)
    return with_header(header)


def fact(name: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda header: header["__metadata__"].update({name: value})


def tensor(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda header: header[SHAPE.layer_names[0]].update(changes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda header: header.pop("__metadata__"), "no snapshot of a session"),
        (fact("format", "deltamem-adapter"), "no snapshot of a session"),
        (fact("format_version", "2"), "format version '2'"),
        (lambda header: header["__metadata__"].pop("version"), "exactly the entries"),
        (fact("surprise", "x"), "exactly the entries"),
        (fact("version", 7), "exactly the entries"),
        (fact("version", "0"), "version is 0"),
        (fact("version", "-1"), "version is '-1'"),
        (fact("version", "9" * 5000), "version is '999"),
        (fact("version", "٣"), "version is"),
        (fact("tokens_written", str(2**63)), "tokens_written is"),
        (fact("pending_token_ids", "[1, -1]"), "pending_token_ids"),
        (fact("pending_token_ids", "[true]"), "pending_token_ids"),
        (fact("pending_token_ids", "[1.5]"), "pending_token_ids"),
        (fact("pending_token_ids", f"[{2**31}]"), "pending_token_ids"),
        (fact("pending_token_ids", json.dumps([0] * 70_000)), "pending_token_ids"),
        (fact("pending_token_ids", "{}"), "pending_token_ids"),
        (fact("pending_token_ids", "[" * 100_000), "not valid JSON"),
        (fact("message_chain", '["xy"]'), "message_chain"),
        (fact("message_chain", "[1]"), "message_chain"),
        (fact("message_chain", "3"), "message_chain"),
        (fact("session_metadata", '{"a": []}'), "session_metadata"),
        (fact("session_metadata", '{"a": true}'), "session_metadata"),
        (fact("session_metadata", '{"a": 1, "a": 2}'), "twice"),
        (fact("fingerprint", "[]"), "fingerprint is no JSON object"),
        (fact("fingerprint", "{}"), "has the parts none"),
        (fact("fingerprint", '{"weights": 1}'), "has the parts weights"),
        (tensor(dtype="F64"), r"layers\.0\.self_attn is 'F64'"),
        (tensor(shape=[2, 4, 8]), r"'F32' \[2, 4, 8\], but the adapter's is 'F32' \[2, 4, 4\]"),
        (tensor(shape=[2, 4, 4, 1]), "but the adapter's"),
        (tensor(data_offsets=[128, 256]), "share their bytes"),
        (tensor(data_offsets=[4, 132]), "offsets"),
        (tensor(data_offsets=[-128, 0]), "offsets"),
        (tensor(data_offsets=[384, 512]), "offsets"),
        (tensor(data_offsets=[0, 2**70]), "offsets"),
        (tensor(data_offsets="0"), "offsets"),
        (lambda header: header.update({SHAPE.layer_names[0]: 3}), "no JSON object"),
        (lambda header: header.pop(SHAPE.layer_names[0]), "another adapter or backbone"),
        (lambda header: header.update(more={}), "another adapter or backbone"),
    ],
)
def test_a_file_whose_digest_fits_is_still_checked(
    change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    assert load_snapshot(edit(lambda header: None), PARTS, SHAPE) == SNAPSHOT
    with pytest.raises(SnapshotError, match=reason):
        load_snapshot(edit(change), PARTS, SHAPE)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        b"\xff" * 64,
        b"PK\x03\x04" + b"\0" * 100,
        with_header(b"[]"),
        with_header(b"{" * 100_000),
        with_header(b'{"a": 1, "a": 2}'),
        with_header(b"\xff\xfe"),
        with_header(b'{"__metadata__": ' + b"9" * 10_000 + b"}"),
    ],
)
def test_what_is_no_snapshot_is_refused(data: bytes) -> None:
    with pytest.raises(SnapshotError):
        load_snapshot(data, PARTS, SHAPE)


def test_a_huge_header_is_refused_before_it_is_parsed() -> None:
    data = struct.pack("<Q", MAX_HEADER_BYTES + 1) + b" " * (MAX_HEADER_BYTES + 1)
    tracemalloc.start()
    try:
        with pytest.raises(SnapshotError, match="claims"):
            load_snapshot(data, PARTS, SHAPE)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_what_could_not_be_read_again_is_not_written() -> None:
    with pytest.raises(SnapshotError, match="version is 0"):
        dump_snapshot(dataclasses.replace(SNAPSHOT, version=0), PARTS, SHAPE)
    long = dataclasses.replace(SNAPSHOT, message_chain=(b"\0" * 32,) * 300_000)
    with pytest.raises(SnapshotError, match="header"):
        dump_snapshot(long, PARTS, SHAPE)
    with pytest.raises(SnapshotError, match="bytes"):
        dump_snapshot(dataclasses.replace(SNAPSHOT, state=b"short"), PARTS, SHAPE)
