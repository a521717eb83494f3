"""The package's exceptions.

Everything a user can get wrong raises a `DeltaMemError`. A message says what was given, what was
expected and what to do, so that the CLI can print it alone, without a stack trace. The concrete
classes are also `ValueError`s: vLLM and pydantic turn those into client errors by themselves.
"""

from __future__ import annotations


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
