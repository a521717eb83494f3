"""The package's exceptions.

Everything a user can get wrong raises a `DeltaMemError`. A message says what was given, what was
expected and what to do, so that the CLI can print it alone, without a stack trace. The concrete
classes are also `ValueError`s: vLLM and pydantic turn those into client errors by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class DeltaMemError(Exception):
    """Root of all errors that this package raises on purpose."""


class ConfigError(DeltaMemError, ValueError):
    """An adapter's hyper-parameters (`delta_mem_config.json`) are not valid."""


class AdapterError(DeltaMemError, ValueError):
    """An adapter's files are missing, damaged, hostile or do not fit their own config."""


class BackboneError(DeltaMemError, ValueError):
    """The base model is not supported, or the adapter was made for another one."""


class EngineConfigError(DeltaMemError, ValueError):
    """vLLM was started with a setting under which memory would be wrong, so we refuse it."""


class SnapshotError(DeltaMemError, ValueError):
    """A session's snapshot is damaged or belongs to another adapter, backbone or format."""


class MemoryRequestError(DeltaMemError, ValueError):
    """A request's `memory` argument is malformed or contradicts itself."""


class ModelNotFoundError(MemoryRequestError):
    """A request names a model that is not served."""


class SessionError(DeltaMemError, ValueError):
    """Root of what can go wrong with a session or its store."""


class BrokenOffError(SessionError):
    """The engine gave a turn up before its end; nothing was written."""


class SessionNotFoundError(SessionError):
    """No such session, or no such version of it: it never was, was deleted, expired or pruned."""


class SessionExistsError(SessionError):
    """A session of that name is there already."""


class SessionBusyError(SessionError):
    """Another turn holds the session's lease."""


class QueueFullError(SessionError):
    """Too many turns wait already."""


class ConflictError(SessionError):
    """The session moved on, or the lease was taken over: nothing was written."""


class TurnMismatchError(SessionError):
    """A turn's key was used before, for another request."""


class QuotaError(SessionError):
    """The tenant, or the store, may hold no more."""


class TooLargeError(SessionError):
    """A name, a state or a reply is larger than the store takes."""


class StoreError(SessionError):
    """The store is configured wrongly, damaged, or of an unknown format."""


class StoreFullError(StoreError):
    """The store's disk or memory is full; nothing was written."""


class StoreUnavailableError(StoreError):
    """The store did not answer. A commit that ends so may have happened or not: look up its reply
    or the session's version before you run the turn again."""


class SettingsError(DeltaMemError, ValueError):
    """A setting of the server, or a file that one names, is not valid."""


class TranscriptError(DeltaMemError, ValueError):
    """A file of transcripts, or a line of one, is not valid."""


class RebuildError(DeltaMemError):
    """Sessions cannot be rebuilt on this server at all."""


class BatchError(DeltaMemError):
    """A batch cannot be run, or not gone on with."""


class RowError(DeltaMemError, ValueError):
    """A row of a batch is not valid."""


class TrainingError(DeltaMemError, ValueError):
    """A training run cannot be begun, or not gone on with."""


class TrainingDataError(TrainingError):
    """A training conversation, or a file of them, is not valid."""


class UnauthorizedError(DeltaMemError):
    """A request does not show whose sessions it may use; the server answers 401."""


@contextmanager
def about(subject: str) -> Iterator[None]:
    """Name in an error what it is about, where it is one of many."""
    try:
        yield
    except DeltaMemError as error:
        raise type(error)(f"{subject}: {error}") from error
