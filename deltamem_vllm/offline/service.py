"""What a `MemoryLLM` with sessions is made of."""

import logging
import math
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

from vllm import LLM

from deltamem_vllm.api.boundaries import Render, turn_terminator
from deltamem_vllm.api.conversation import TEMPLATES_KNOWN
from deltamem_vllm.api.fingerprints import Fingerprints
from deltamem_vllm.api.messages import tenant_key
from deltamem_vllm.api.settings import ServerSettings
from deltamem_vllm.api.spans import SpanFinder
from deltamem_vllm.engine.compat import end_calls_of_a_dead_engine, engine_is_dead
from deltamem_vllm.engine.request_args import cache_scope
from deltamem_vllm.engine.settings import adapter_of
from deltamem_vllm.errors import MemoryRequestError, StoreError
from deltamem_vllm.offline.call import CallSessions
from deltamem_vllm.offline.engine import OfflineEngine
from deltamem_vllm.offline.rendering import text_tokens
from deltamem_vllm.offline.shared import SharedEngine
from deltamem_vllm.sessions import SessionKey, SessionStore, open_store
from deltamem_vllm.sessions.keeper import LeaseKeeper
from deltamem_vllm.state.snapshot import StateShape

logger = logging.getLogger(__name__)

STORE_THREADS: Final = 64
"""Store calls at a time; SQLite commits what arrives together in one go."""


class OfflineService:
    """The parts, for turns and ingests to use.

    Args:
        llm: vLLM's, started.
        url: the store's; None for a temporary one.
        tenant: whose sessions.
        settings: a server's.
    """

    def __init__(self, llm: LLM, url: str | None, tenant: str, settings: ServerSettings) -> None:
        # No cycle: an engine goes when its last user does, before the next one starts.
        self.llm: LLM = weakref.proxy(llm)
        self.tenant = tenant
        self.settings = settings
        self.shape = StateShape.of(adapter_of(llm.llm_engine.vllm_config))
        self.engine = OfflineEngine(self.llm, self.shape)
        folder = None
        if url is None:
            # Not a `TemporaryDirectory`, which a child of a fork would remove.
            folder = Path(tempfile.mkdtemp(prefix="deltamem-")).resolve()
            url = f"sqlite://{folder}/sessions.db"
        try:
            self.store = check_store(url, settings)
        except BaseException:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        self._swept = -math.inf
        owner = f"MemoryLLM in process {os.getpid()}"
        end_calls_of_a_dead_engine(llm.llm_engine.engine_core)
        core = weakref.ref(llm.llm_engine.engine_core)
        self._keeper = LeaseKeeper(
            self.store,
            owner,
            settings.lease_seconds,
            # Whoever holds the leases may not have noticed yet that the engine was killed.
            is_alive=lambda: (alive := core()) is not None and not engine_is_dead(alive),
        )
        self._threads = ThreadPoolExecutor(STORE_THREADS, thread_name_prefix="deltamem-store")
        self._running = threading.RLock()
        self._terminators: dict[str, tuple[int, ...]] = {}
        self.close = weakref.finalize(
            self, _close, os.getpid(), self.store, self._keeper, self._threads, folder
        )

    @cached_property
    def fingerprints(self) -> Fingerprints:
        """Made when a session is first used, because it takes reading the model's files."""
        return Fingerprints(
            self.llm.llm_engine.vllm_config,
            self.llm.chat_template,
            self.settings.fingerprint_alias,
        )

    @cached_property
    def chain_key(self) -> bytes:
        """Keys the hashes of the tenant's messages."""
        secret = self.settings.hash_secret.get_secret_value().encode()
        return tenant_key(secret, self.tenant)

    @property
    def finder(self) -> SpanFinder | None:
        """Finds the spans of chats; None if the adapter writes each token by itself."""
        if self.shape.granularity == "token":
            return None
        return SpanFinder(self.shape.granularity, partial(text_tokens, self.llm))

    @property
    def max_model_len(self) -> int:
        return int(self.llm.model_config.max_model_len)

    def key(self, session: str, lora_request: Any) -> SessionKey:
        """The session of a name, of the model with a LoRA; None is without."""
        return SessionKey(self.tenant, self.fingerprints.of(lora_request).digest, session)

    def cache_scope(self, lora_request: Any) -> str:
        """See `cache_scope`."""
        lora = "" if lora_request is None else self.fingerprints.of(lora_request).lora
        return cache_scope(self.tenant, lora)

    @contextmanager
    def call(self) -> Iterator[CallSessions]:
        """The sessions of one call; what it leased is given back at its end.

        Raises:
            MemoryRequestError: the engine is not idle, or was shut down.
        """
        if not self.close.alive:
            raise MemoryRequestError("this MemoryLLM is closed; make another.")
        if (shared := self.engine.shared) is not None:
            with shared.call():
                if self._is_time_to_sweep():
                    self._sweep()
                sessions = CallSessions(self.store, self._keeper, self._threads, shared)
                try:
                    yield sessions
                finally:
                    sessions.close()
            return
        # One call at a time: vLLM's `LLM` mixes up the requests of two threads.
        with self._running:
            self.engine.tidy()
            if self._is_time_to_sweep():
                self._sweep()
            if self.llm.llm_engine.has_unfinished_requests():
                raise MemoryRequestError(
                    "requests of `enqueue` are waiting: collect them with `wait_for_completion` "
                    "first."
                )
            sessions = CallSessions(self.store, self._keeper, self._threads)
            try:
                yield sessions
            finally:
                sessions.close()

    @contextmanager
    def share(self) -> Iterator[SharedEngine]:
        """See `MemoryLLM.shared`.

        Raises:
            MemoryRequestError: the engine is not idle, or was shut down.
        """
        with self.call(), self.engine.share() as shared:
            yield shared

    def _is_time_to_sweep(self) -> bool:
        """Now and then, for one caller."""
        now = time.monotonic()
        if now < self._swept + self.settings.sweep_seconds:
            return False
        self._swept = now
        return True

    def _sweep(self) -> None:
        """Remove what expired."""
        try:
            self.store.sweep()
        except StoreError as error:
            logger.warning("delta-mem: expired sessions were not removed: %s", error)

    def terminator(self, name: str, render: Render) -> tuple[int, ...]:
        """What a template puts behind a reply; empty if it cannot be told.

        Args:
            name: of the template with its arguments.
            render: renders with it.
        """
        if name not in self._terminators:
            if len(self._terminators) >= TEMPLATES_KNOWN:
                self._terminators.clear()
            try:
                self._terminators[name] = turn_terminator(render)
            # A template refuses conversations that it was not made for each in its own way.
            except Exception as error:
                logger.warning("delta-mem: what ends a turn cannot be told: %s", error)
                self._terminators[name] = ()
        return self._terminators[name]


def check_store(url: str, settings: ServerSettings) -> SessionStore:
    """Open a store that works and keeps what it acknowledges.

    Raises:
        StoreError: the message says what to change.
    """
    store = open_store(url, settings.store_options())
    try:
        store.check_health()
    except BaseException:
        store.close()
        raise
    return store


def _close(
    process: int,
    store: SessionStore,
    keeper: LeaseKeeper,
    threads: ThreadPoolExecutor,
    folder: Path | None,
) -> None:
    if os.getpid() != process:
        return  # A child of a fork has neither the threads nor a right to the temporary store.
    threads.shutdown()
    keeper.close()
    store.close()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
