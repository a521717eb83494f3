"""A batch from an input to an output folder: what is left of it, and running it in this process."""

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tqdm import tqdm

from deltamem_vllm.api.settings import NO_STORE
from deltamem_vllm.batch.output import Output
from deltamem_vllm.batch.report import Report, Tally
from deltamem_vllm.batch.rows import Placed, Result, Sampling
from deltamem_vllm.batch.source import Source
from deltamem_vllm.sessions import PUBLIC_TENANT

if TYPE_CHECKING:
    from deltamem_vllm.offline import MemoryLLM

SETTINGS: Final = ("model", "adapter", "store", "tenant", "sampling", "engine_args")
"""Of a `BatchSpec`: those that make the results."""


@dataclass(frozen=True)
class BatchSpec:
    """What rows are run with."""

    model: str
    adapter: str | None = None
    store: str | None = None
    """None: sessions live as long as the run, each wholly within one engine."""

    tenant: str = PUBLIC_TENANT
    sampling: Sampling = field(default_factory=Sampling)
    """For what rows do not say."""

    in_flight: int | None = None
    """Rows at a time in one engine; None is as many as it batches."""

    engine_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `MemoryLLM`."""

    def __post_init__(self) -> None:
        if self.store == NO_STORE:
            object.__setattr__(self, "store", None)

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same when a batch is gone on with."""
        values = {name: getattr(self, name) for name in SETTINGS}
        return {**values, "sampling": self.sampling.model_dump(exclude_none=True)}

    def start(self) -> "MemoryLLM":
        """Start an engine."""
        from deltamem_vllm.offline import MemoryLLM

        return MemoryLLM(
            self.model, self.adapter, store=self.store, tenant=self.tenant, **self.engine_args
        )


class Rest:
    """The rows that a run has to do.

    Without a store, the memories of an earlier run are gone: of a session that is not finished all
    rows are run again, and the results that are there already stay.

    Args:
        rows: are read once here, and again by each iteration.
        finished: keys of rows that have their results.
        has_store: whether sessions outlive a run.
    """

    def __init__(self, rows: Iterable[Placed], finished: Container[str], has_store: bool) -> None:
        self._rows = rows
        self._done: set[str] = set()
        self.total = 0
        """Rows of the input."""

        begun: set[str] = set()
        left: set[str] = set()
        for placed in rows:
            self.total += 1
            is_finished = placed.key in finished
            if is_finished:
                self._done.add(placed.key)
            if not has_store and placed.row is not None and placed.row.session is not None:
                (begun if is_finished else left).add(placed.row.session)
        self._again = begun & left
        """Sessions whose finished rows are run again."""

    @property
    def num_before(self) -> int:
        """Rows that are finished."""
        return len(self._done)

    def __iter__(self) -> Iterator[Placed]:
        for placed in self._rows:
            if placed.key not in self._done or (
                placed.row is not None and placed.row.session in self._again
            ):
                yield placed


def run(source: Path, output: Path, spec: BatchSpec, *, llm: "MemoryLLM | None" = None) -> Report:
    """Run a batch in this process, or what is left of it.

    Args:
        source: a file or folder, see `Source`.
        output: a folder, see `Output`.
        spec: what rows are run with.
        llm: an engine made with the spec; None starts one, if any row is left.

    Raises:
        DeltaMemError: the batch cannot be run; the same call goes on with it.
    """
    rows = Source(source)
    with Output(output, spec.settings) as kept:
        rest = Rest(rows, kept.finished, spec.store is not None)
        tally = Tally()
        if rest.num_before < rest.total:
            _run(rest, kept, tally, spec, llm)
        report = tally.report(rest.num_before)
        kept.write_report(report)
    return report


def _run(rest: Rest, kept: Output, tally: Tally, spec: BatchSpec, llm: "MemoryLLM | None") -> None:
    from deltamem_vllm.batch.conversation import Conversations
    from deltamem_vllm.batch.runner import Runner

    engine = spec.start() if llm is None else llm
    try:
        kept.begin()
        runner = Runner(engine, Conversations(engine, kept.job.job, spec.sampling), spec.in_flight)
        with progress(rest) as bar:

            def keep(results: Sequence[Result]) -> None:
                new = kept.write(results)
                tally.add(new)
                bar.update(len(new))

            tally.start()
            runner.run(rest, keep)
    finally:
        if llm is None:
            engine.close()


def progress(rest: Rest) -> Any:
    """A bar of rows, on stderr."""
    return tqdm(total=rest.total, initial=rest.num_before, unit="row", desc="Rows", smoothing=0.1)
