"""Batches on Ray Data: a pool of actors, each with an engine, on one machine or many.

`run` is `deltamem_vllm.batch.job.run` with several engines. `MemoryBatch` is for pipelines of your
own: a class for `Dataset.map_batches`.

The driver groups rows by session, so that each session stays within one actor, in order. Actors
send their results to one writer beside the driver, and wait until it has them on the disk.
"""

import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

from deltamem_vllm.batch.job import BatchSpec, Rest, progress
from deltamem_vllm.batch.report import Report
from deltamem_vllm.batch.rows import Placed, Result, Row, describe
from deltamem_vllm.batch.source import Source, placed_rows
from deltamem_vllm.errors import BatchError
from deltamem_vllm.ray.writer import Writer

try:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError:
    raise BatchError(
        "several engines run on Ray, which is not installed: pip install 'deltamem-vllm[ray]'. "
        "One engine, --concurrency 1, needs no Ray."
    ) from None

BUNDLES_PER_ENGINE: Final = 4
"""Parts that the rows are cut into: an engine that is done with one takes the next."""

ENGINE_DIED: Final = 70
"""Exit status of an actor whose engine died."""

PASSED_ON: Final = ("VLLM_", "HF_")
"""Prefixes of variables that actors on other machines need, too."""

SETTINGS_PREFIX: Final = "DELTAMEM_"

POLL_S: Final = 0.5

Keep = Callable[[Sequence[Result]], object]


class MemoryBatch:
    """Rows in, results out: a callable class for `Dataset.map_batches`.

    The rows of a session must be in one batch, in order, or in batches that run one after another.

        rows.map_batches(
            MemoryBatch,
            fn_constructor_args=[spec, "the job's name"],
            batch_format="pyarrow",
            batch_size=1024,
            **actors(2, spec),
        )

    A row has the columns of `Row`; what comes out has `id`, `session`, `text` (of the last reply),
    `replies` (JSON) and `error`.

    Args:
        spec: what rows are run with. With a store, rows that are run again under the same job's
            name are not written twice.
        job: the name.
        settings: variables of a server's settings, `DELTAMEM_*`.
    """

    def __init__(self, spec: BatchSpec, job: str, settings: dict[str, str] | None = None) -> None:
        os.environ.update(settings or {})
        from deltamem_vllm.batch.conversation import Conversations
        from deltamem_vllm.batch.runner import Runner

        llm = spec.start()
        self.runner = Runner(llm, Conversations(llm, job, spec.sampling), spec.in_flight)

    def __call__(self, table: Any) -> dict[str, list[Any]]:
        contents = table.to_pylist()
        named = [(f"row {number}", content) for number, content in enumerate(contents)]
        found: dict[str, Result] = {}
        self.runner.run(
            placed_rows(named),
            lambda results: found.update((result.row, result) for result in results),
        )
        results = [found[where] for where, _ in named]
        return {
            "id": [result.id for result in results],
            "session": [result.session for result in results],
            "text": [result.replies[-1].text if result.replies else None for result in results],
            "replies": [
                json.dumps([reply.model_dump() for reply in result.replies]) for result in results
            ],
            "error": [result.error for result in results],
        }


class _Bundles:
    """The actors of `run`: what comes in is a bundle of sessions, what goes out is their number.

    The engine starts with the first bundle: Ray repeats a constructor's error over and over. What
    went wrong is told to the writer: on its way through Ray Data it gets lost.
    """

    def __init__(self, spec: BatchSpec, job: str, settings: dict[str, str], writer: Any) -> None:
        self._make = partial(MemoryBatch, spec, job, settings)
        self._engine: MemoryBatch | None = None
        self._writer = writer
        self._has_store = spec.store is not None

    def __call__(self, batch: Any) -> dict[str, list[Any]]:
        (number,), (bundle,) = batch["number"], batch["bundle"]
        try:
            return self._run(int(number), bundle)
        except Exception as error:
            if self._engine is not None and self._engine.runner.engine_is_dead:
                # Then so does this actor; Ray starts another one, which begins the bundle again.
                os._exit(ENGINE_DIED)
            ray.get(self._writer.fail.remote(describe(error)))
            raise

    def _run(self, number: int, bundle: str) -> dict[str, list[Any]]:
        rows = [Placed(where, Row.model_validate_json(row)) for where, row in json.loads(bundle)]
        which = f"{len(rows)} rows, {rows[0].where} to {rows[-1].where}"
        ray.get(self._writer.try_bundle.remote(number, which))
        self._engine = self._engine or self._make()
        # More than none only if another actor died over this bundle.
        finished = set(ray.get(self._writer.finished_of.remote([placed.key for placed in rows])))

        def keep(results: Sequence[Result]) -> None:
            lines = [result.model_dump_json() for result in results]
            ray.get(self._writer.write.remote(lines))

        self._engine.runner.run(Rest(rows, finished, self._has_store), keep)
        return {"rows": [len(rows)]}


def actors(concurrency: int, spec: BatchSpec, cpus: float | None = None) -> dict[str, Any]:
    """Arguments of `Dataset.map_batches` for a pool of engines.

    Args:
        concurrency: engines.
        spec: its parallel sizes say how many GPUs an engine has, where the cluster has any.
        cpus: of an engine; None is an equal part of the cluster's, or one beside GPUs.

    Raises:
        BatchError: the cluster is too small.
    """
    resources = ray.cluster_resources()
    arguments = spec.engine_args
    num_devices = int(arguments.get("tensor_parallel_size") or 1)
    num_devices *= int(arguments.get("pipeline_parallel_size") or 1)
    gpus = num_devices if resources.get("GPU") else 0
    available = resources.get("CPU", 0)
    if cpus is None:
        cpus = 1 if gpus else max(available // concurrency, 1)
    for what, each in (("GPU", gpus), ("CPU", cpus)):
        if each * concurrency > resources.get(what, 0):
            raise BatchError(
                f"{concurrency} engines with {each:g} {what}s each need more than the cluster's "
                f"{resources.get(what, 0):g}. Lower --concurrency or --cpus-per-engine."
            )
    variables = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    if not gpus:
        # Unless it is told, each engine binds its threads to all cores, the same as the others'.
        variables.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        variables["OMP_NUM_THREADS"] = str(max(int(cpus), 1))
    return {
        "compute": ray.data.ActorPoolStrategy(size=concurrency),
        "num_cpus": cpus,
        "num_gpus": gpus,
        "runtime_env": {"env_vars": variables},
    }


def run(
    source: Path,
    output: Path,
    spec: BatchSpec,
    *,
    concurrency: int,
    cpus: float | None = None,
) -> Report:
    """Run a batch, or what is left of it, on several engines.

    Uses the Ray cluster that this process is in or that `RAY_ADDRESS` names; else starts one here.

    Args:
        source: a file or folder, see `Source`.
        output: a folder on this machine, see `Output`.
        spec: what rows are run with.
        concurrency: engines.
        cpus: of each, see `actors`.

    Raises:
        DeltaMemError: the batch cannot be run; the same call goes on with it.
    """
    rows = Source(source)
    with _cluster():
        _check_store(spec)
        pool = actors(concurrency, spec, cpus)
        writer = (
            ray.remote(Writer)
            .options(num_cpus=0, scheduling_strategy=_here())
            .remote(output.absolute(), spec.settings)
        )
        with _closed(writer), _own_errors(writer):
            job, finished = ray.get(writer.begin.remote())
            rest = Rest(rows, finished, spec.store is not None)
            with progress(rest) as bar:
                _run(rest, spec, job, writer, concurrency, pool, bar)
            report: Report = ray.get(writer.end.remote(rest.num_before))
        return report


def _run(
    rest: Rest,
    spec: BatchSpec,
    job: str,
    writer: Any,
    concurrency: int,
    pool: dict[str, Any],
    bar: Any,
) -> None:
    problems: list[str] = []
    bundles = _bundles(rest, concurrency * BUNDLES_PER_ENGINE, problems)
    if bundles:
        settings = {
            name: value for name, value in os.environ.items() if name.startswith(SETTINGS_PREFIX)
        }
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        # What it plans and does is of no use to whoever waits for rows.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        items = ray.data.from_items(bundles, override_num_blocks=len(bundles))
        counts = items.map_batches(
            _Bundles,
            fn_constructor_args=[spec, job, settings, writer],
            batch_size=1,
            **pool,
        )
        with _shown(writer, bar):
            for _ in counts.iter_rows():
                pass
    if problems:
        # Not before: a run whose engines could not start keeps nothing.
        ray.get(writer.write.remote(problems))
    bar.update(bar.initial + ray.get(writer.num_new.remote()) - bar.n)


def _bundles(rest: Iterable[Placed], count: int, problems: list[str]) -> list[dict[str, Any]]:
    """Rows of sessions, each session wholly in one of about `count` bundles.

    Args:
        rest: rows.
        count: bundles at most.
        problems: gets the results of rows that are not valid.
    """
    sessions: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for placed in rest:
        if placed.problem is not None:
            problems.append(placed.problem.model_dump_json())
            continue
        row = placed.row
        assert row is not None
        key = ("row", row.id) if row.session is None else ("session", row.session)
        sessions.setdefault(key, []).append((placed.where, row.model_dump_json(exclude_unset=True)))
    bundles: list[list[tuple[str, str]]] = [[] for _ in range(min(count, len(sessions)))]
    for number, rows in enumerate(sessions.values()):
        bundles[number % len(bundles)].extend(rows)
    return [
        {"number": number, "bundle": json.dumps(bundle)} for number, bundle in enumerate(bundles)
    ]


@contextmanager
def _cluster() -> Iterator[None]:
    """The cluster this process is in, or one that ends with the run."""
    if ray.is_initialized():
        yield
        return
    local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": len(os.sched_getaffinity(0))}
    ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False, **local)
    try:
        yield
    finally:
        ray.shutdown()


def _check_store(spec: BatchSpec) -> None:
    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    if spec.store is not None and spec.store.startswith("sqlite:") and nodes > 1:
        raise BatchError(
            f"--store {spec.store}: the cluster has {nodes} machines, which share no file. Give a "
            "redis:// store."
        )


def _here() -> Any:
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@contextmanager
def _closed(writer: Any) -> Iterator[None]:
    """At the end, whatever it is, let another run write the folder: in a cluster that stays, Ray
    ends an actor some time after nobody knows it any more."""
    try:
        yield
    finally:
        with suppress(ray.exceptions.RayError):
            ray.get(writer.close.remote())


@contextmanager
def _own_errors(writer: Any) -> Iterator[None]:
    """Errors of actors, as our own, without the way that they came."""
    try:
        yield
    except ray.exceptions.RayError as error:
        reason = None
        with suppress(ray.exceptions.RayError):
            reason = ray.get(writer.failure.remote())
        if isinstance(error, ray.exceptions.RayTaskError):
            reason = reason or str(error.cause)
        raise BatchError(reason or str(error) or type(error).__name__) from error


@contextmanager
def _shown(writer: Any, bar: Any) -> Iterator[None]:
    """Show meanwhile how far the run is."""
    is_over = threading.Event()

    def show() -> None:
        # Of a writer that was killed the run's own error tells.
        with suppress(ray.exceptions.RayError):
            while not is_over.wait(POLL_S):
                # An update by nothing is drawn, too.
                if num := bar.initial + ray.get(writer.num_new.remote()) - bar.n:
                    bar.update(num)

    thread = threading.Thread(target=show, name="deltamem-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
