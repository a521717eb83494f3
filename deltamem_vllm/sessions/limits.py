"""What stores take: names, sizes, numbers. Checked here once, for all of them."""

import re
from typing import Final

from deltamem_vllm.errors import SessionError, TooLargeError
from deltamem_vllm.sessions.records import SessionContent, SessionKey, Turn

MAX_NAME: Final = 256
"""Characters of the name of a session, tenant, turn or job."""

MAX_CONTENT: Final = 64 << 20
"""Bytes of one version's state, pending tokens and message hashes together."""

MAX_REPLY: Final = 16 << 20
"""Bytes of a kept reply."""

MAX_PAGE: Final = 1000
"""Sessions in one page of a listing."""

_FINGERPRINT: Final = re.compile(r"[0-9a-f]{8,128}")


def check_key(key: SessionKey) -> None:
    """Refuse a key that no store takes.

    Raises:
        SessionError, TooLargeError: names the part.
    """
    check_name("a tenant", key.tenant)
    check_name("a session", key.name)
    check_fingerprint(key.fingerprint)


def check_name(what: str, name: str) -> None:
    """Refuse an empty or huge name, or one with characters that do not print.

    Raises:
        SessionError, TooLargeError: says `what` it was to name.
    """
    if not name:
        raise SessionError(f"the name of {what} is empty.")
    if len(name) > MAX_NAME:
        raise TooLargeError(
            f"the name of {what} has {len(name)} characters; at most {MAX_NAME} are kept."
        )
    if not name.isprintable():
        raise SessionError(f"the name of {what}, {name!r}, has characters that do not print.")


def check_fingerprint(fingerprint: str) -> None:
    """Refuse what is no hexadecimal digest.

    Raises:
        SessionError: shows it.
    """
    if not _FINGERPRINT.fullmatch(fingerprint):
        raise SessionError(f"a fingerprint is 8 to 128 hexadecimal digits, not {fingerprint!r}.")


def check_content(content: SessionContent) -> None:
    """Refuse a version that is too large.

    Raises:
        TooLargeError: names both sizes.
    """
    size = (
        len(content.state)
        + 8 * len(content.pending_token_ids)
        + sum(map(len, content.message_chain))
    )
    if size > MAX_CONTENT:
        raise TooLargeError(f"a session of {size:,} bytes; a store takes {MAX_CONTENT:,}.")


def check_turn(turn: Turn) -> None:
    """Refuse a turn whose name or reply is too large.

    Raises:
        SessionError, TooLargeError: as above.
    """
    check_name("a turn", turn.name)
    if len(turn.reply) > MAX_REPLY:
        raise TooLargeError(
            f"a reply of {len(turn.reply):,} bytes; a store keeps at most {MAX_REPLY:,}."
        )


def check_limit(limit: int) -> None:
    """Refuse an impossible page size.

    Raises:
        SessionError: shows the bounds.
    """
    if not 1 <= limit <= MAX_PAGE:
        raise SessionError(f"limit is {limit}; a page lists 1 to {MAX_PAGE} sessions.")
