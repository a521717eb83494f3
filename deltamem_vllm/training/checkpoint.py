"""What a training run leaves behind to be gone on with: tensors in safetensors, all else in JSON.

    checkpoint/state.json             how far the run is, and which file below belongs to it
    checkpoint/step-000200.safetensors   parameters, AdamW's state, and the best parameters so far

The tensors are written first, and `state.json`, which names them, is then replaced in one go; so
whatever is killed, the folder holds a whole checkpoint. No random generator has a state: all chance
of a run follows from its seed and the number of the step.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import safetensors.torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from deltamem_vllm.adapter.files import write_atomically
from deltamem_vllm.errors import TrainingError

FOLDER: Final = "checkpoint"
STATE: Final = "state.json"
TENSORS: Final = "step-{:06}.safetensors"


class Evaluation(BaseModel):
    """One look at what is held out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    loss: float
    exact: float
    """Share of answers every token of which is the most likely one."""


class RunState(BaseModel):
    """How far a run is."""

    model_config = ConfigDict(extra="forbid")

    format: int = 1
    settings: dict[str, Any]
    """That decide the weights."""

    data: str = ""
    """Digest of the conversations."""

    backbone: dict[str, str] = {}
    """Digests of its parts, see `checkpoint_digests`."""

    step: int = 0
    losses: list[float] = []
    """Of each step."""

    evaluations: list[Evaluation] = []
    finished: bool = False

    @property
    def best(self) -> Evaluation | None:
        """The look with the lowest loss; the first of several."""
        return min(self.evaluations, key=lambda one: one.loss, default=None)

    @property
    def looks_since_best(self) -> int:
        """Looks after that one."""
        best = self.best
        return 0 if best is None else len(self.evaluations) - self.evaluations.index(best) - 1


class Checkpoint(NamedTuple):
    """A run that can be gone on with, or a finished one, without tensors."""

    state: RunState
    tensors: dict[str, Tensor]


def make_folder(out: Path) -> None:
    """Make a run's folder, and look whether it can be written, before hours are spent.

    Raises:
        OSError: it cannot.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        pass


def save(out: Path, state: RunState, tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint in the place of the one before.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    name = TENSORS.format(state.step)
    write_atomically(folder / name, safetensors.torch.save(dict(tensors)))
    write_atomically(folder / STATE, state.model_dump_json(indent=1).encode())
    for old in folder.glob("*.safetensors"):
        if old.name != name:
            old.unlink()


def finish(out: Path, state: RunState) -> None:
    """Mark a run as finished, and remove what it would be gone on with.

    Raises:
        OSError: the folder cannot be written.
    """
    state.finished = True
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / STATE, state.model_dump_json(indent=1).encode())
    for tensors in folder.glob("*.safetensors"):
        tensors.unlink()


def load(out: Path) -> Checkpoint | None:
    """The checkpoint of a run's folder; None if it holds none.

    Raises:
        TrainingError: it is damaged.
    """
    path = out / FOLDER / STATE
    if not path.exists():
        return None
    advice = f"remove {out / FOLDER} to begin anew"
    try:
        state = RunState.model_validate(json.loads(path.read_bytes()))
    except (ValidationError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise TrainingError(f"{path}: is no checkpoint ({first}); {advice}") from None
    if state.finished:
        return Checkpoint(state, {})
    tensors = path.with_name(TENSORS.format(state.step))
    try:
        return Checkpoint(state, safetensors.torch.load_file(tensors))
    except (safetensors.SafetensorError, OSError) as error:
        raise TrainingError(f"{tensors}: cannot be read ({error}); {advice}") from None
