"""The file of a SQLite store: making it, connecting to it durably, and naming what went wrong."""

import errno
import os
import secrets
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from deltamem_vllm.errors import StoreError, StoreFullError, StoreUnavailableError
from deltamem_vllm.sessions.sqlite_schema import PAGE_SIZE, migrate

BUSY_SECONDS: Final = 10.0
"""How long to wait for another process that has the file locked."""

PRAGMAS: Final[tuple[tuple[str, Any, Any], ...]] = (
    # name, what to set, what must then be read back
    ("journal_mode", "WAL", "wal"),
    ("synchronous", "FULL", 2),
    ("fullfsync", "ON", 1),
    ("checkpoint_fullfsync", "ON", 1),
    ("secure_delete", "ON", 1),
    ("foreign_keys", "ON", 1),
)
"""What every connection promises by: a commit is on the disk, and what is deleted is overwritten.
`fullfsync` matters on macOS only, where a plain fsync leaves data in the drive's cache."""

_TUNING: Final = (
    "PRAGMA cache_size = -16384",
    # Pages that many turns touch are written back once per checkpoint, so it pays to wait.
    "PRAGMA wal_autocheckpoint = 4000",
    "PRAGMA journal_size_limit = 67108864",
    "PRAGMA temp_store = MEMORY",
)

_NETWORK_FILESYSTEMS: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "glusterfs", "lustre", "fuse.sshfs"}
)
_VOLATILE_FILESYSTEMS: Final = frozenset({"tmpfs", "ramfs"})

_abandoned: list[sqlite3.Connection] = []
"""Kept open for good: closing one whose file was replaced would delete the new file's WAL."""


def path_of_url(url: str) -> Path:
    """The absolute path that `sqlite:///absolute/path.db` or `sqlite://relative/path.db` names.

    Raises:
        StoreError: it names no file.
    """
    scheme, _, name = url.partition("://")
    if scheme != "sqlite" or not name.strip("/") or name.endswith("/") or ":memory:" in name:
        raise StoreError(
            f"an embedded session store is sqlite:///absolute/path.db or "
            f"sqlite://relative/path.db, not {url!r}."
        )
    return Path(name).expanduser().absolute()


class DatabaseFile:
    """One file, made with its folder if absent, readable by its owner alone.

    Args:
        path: absolute.

    Raises:
        StoreError: something else lies there; or as `translated`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self.translating():
            if not path.exists():
                _make(path)
            connection = connect(path)
            try:
                migrate(connection, str(path))
            finally:
                connection.close()
            self._identity = _identity(path)

    def connect(self, *, read_only: bool = False) -> sqlite3.Connection:
        """A connection with every `PRAGMAS`.

        Raises:
            StoreUnavailableError: as `check_unmoved`.
            StoreError: a pragma does not hold.
            sqlite3.Error: as it comes.
        """
        self.check_unmoved()
        return connect(self.path, read_only=read_only)

    def check_unmoved(self) -> None:
        """Refuse to work on a file that is no longer found by its name: what is written there
        would be acknowledged and lost.

        Raises:
            StoreUnavailableError: tells what to do.
        """
        if not self._is_unmoved():
            raise StoreUnavailableError(
                f"{self.path} was moved, deleted or replaced while it was in use. Put it back, or "
                "restart this process to use what is there now."
            )

    def close(self, connection: sqlite3.Connection) -> None:
        """Close a connection if that is safe."""
        if self._is_unmoved():
            connection.close()
        else:
            _abandoned.append(connection)

    @contextmanager
    def translating(self) -> Iterator[None]:
        """Turn errors of SQLite and of the operating system into ours, see `translated`."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise self.translated(error) from error

    def translated(self, error: sqlite3.Error | OSError) -> StoreError:
        """What SQLite's, or the operating system's, error means to who uses the store."""
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            return self._full() if full else self._unavailable(error)
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code == sqlite3.SQLITE_FULL or (
            code == sqlite3.SQLITE_IOERR and _free_bytes(self.path.parent) < PAGE_SIZE
        ):
            return self._full()
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return StoreError(
                f"{self.path} is damaged, or no SQLite database ({error}). Restore a backup, or "
                "move the file away to start with an empty store."
            )
        if code == sqlite3.SQLITE_ERROR:
            return StoreError(f"the session store {self.path} cannot do what was asked: {error}.")
        return self._unavailable(error)

    def mount(self) -> tuple[str, str]:
        """Kind of the file system that the file lies on, and a warning about it or ''."""
        kind = _filesystem(self.path)
        if kind in _NETWORK_FILESYSTEMS:
            return kind, (
                f"{self.path} lies on a network file system ({kind}), whose locks SQLite cannot "
                "trust. Use a local disk, or redis:// for several machines."
            )
        if kind in _VOLATILE_FILESYSTEMS:
            return kind, f"{self.path} lies in memory ({kind}): a restart of the machine loses it."
        return kind, ""

    def _full(self) -> StoreFullError:
        return StoreFullError(
            f"the disk of the session store {self.path} is full; nothing was written. Free space "
            "or delete sessions; the store goes on by itself."
        )

    def _unavailable(self, error: Exception) -> StoreUnavailableError:
        return StoreUnavailableError(
            f"the session store {self.path} does not answer ({error}). Check that the file and "
            "its folder can be written and that no program keeps it locked; the store goes on by "
            "itself."
        )

    def _is_unmoved(self) -> bool:
        try:
            return _identity(self.path) == self._identity
        except OSError:
            return False


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """Connect to a file that exists, in autocommit mode, usable by one thread at a time.

    Raises:
        StoreError: the file is none, or one of `PRAGMAS` does not hold.
        sqlite3.Error: as it comes.
    """
    if not path.is_file():
        raise StoreError(f"{path} is not a file; a session store lies in one.")
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode=rw",
        uri=True,
        timeout=BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        for name, wanted, _ in PRAGMAS:
            connection.execute(f"PRAGMA {name} = {wanted}")
        for statement in _TUNING:
            connection.execute(statement)
        check_pragmas(connection, path)
        if read_only:
            connection.execute("PRAGMA query_only = ON")
    except BaseException:
        connection.close()
        raise
    return connection


def check_pragmas(connection: sqlite3.Connection, path: Path) -> None:
    """Assert what every connection promises by.

    Raises:
        StoreError: names the pragma.
    """
    for name, _, expected in PRAGMAS:
        (value,) = connection.execute(f"PRAGMA {name}").fetchone()
        if value != expected:
            raise StoreError(
                f"{path}: SQLite has {name} = {value}, and the session store needs {expected}. "
                "Use a file system and a build of SQLite that allow it."
            )


def back_up(file: DatabaseFile, target: Path) -> None:
    """Copy one moment of a store into a new file, while others go on with it.

    The copy holds no leases, and its fencing tokens begin where no lease of the original can be.
    It appears whole or not at all.

    Raises:
        StoreError: `target` exists; or as `DatabaseFile.translated`, of the copy.
    """
    with file.translating():
        source = file.connect(read_only=True)
    try:
        with _appearing_at(target) as temporary:
            copy = sqlite3.connect(temporary, isolation_level=None)
            try:
                # One step copies one moment; several would begin again at every commit.
                source.backup(copy, pages=-1)
                copy.execute("DELETE FROM leases")
                copy.execute(f"UPDATE clock SET token = token + {1 << 40}")
            finally:
                copy.close()
    except sqlite3.Error as error:
        raise file.translated(error) from error
    except FileExistsError:
        raise StoreError(f"{target} exists; give the backup a name of its own.") from None
    except OSError as error:
        raise StoreError(f"the backup {target} cannot be written: {error}.") from error
    finally:
        file.close(source)


_making = threading.Lock()


def _make(path: Path) -> None:
    """Make a store; it is there with all its tables, or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with _making, _appearing_at(path) as temporary:
            connection = sqlite3.connect(temporary, isolation_level=None)
            try:
                connection.execute(f"PRAGMA page_size = {PAGE_SIZE}")
                connection.execute("PRAGMA journal_mode = WAL")
                migrate(connection, str(path))
            finally:
                connection.close()
    except FileExistsError:
        return  # somebody else made it meanwhile


@contextmanager
def _appearing_at(path: Path) -> Iterator[Path]:
    """A new file, empty and private, that gets its name when the block ends well.

    Raises:
        FileExistsError: there is a file of that name.
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    try:
        yield temporary
        _sync(temporary)
        os.link(temporary, path)
        _sync(path.parent)
    finally:
        for suffix in ("", "-wal", "-shm"):
            temporary.with_name(temporary.name + suffix).unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _identity(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return PAGE_SIZE


def _filesystem(path: Path) -> str:
    """Kind of the file system of a path, by Linux's list of mounts; 'unknown' elsewhere."""
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return "unknown"
    mounts = [line.split() for line in lines]
    under = [(len(where), kind) for _, where, kind, *_ in mounts if path.is_relative_to(where)]
    return max(under, default=(0, "unknown"))[1]
