"""One training run: a backbone and conversations in, an adapter with its model card out."""

import math
import random
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from deltamem_vllm.adapter import Adapter, BackboneShape, resolve_base_dir, save_adapter
from deltamem_vllm.adapter.names import ADAPTER_FILES
from deltamem_vllm.errors import BackboneError, TrainingError
from deltamem_vllm.state.fingerprint import checkpoint_digests
from deltamem_vllm.training import checkpoint
from deltamem_vllm.training.adapter_trainer import (
    AdapterBatch,
    AdapterStepper,
    AdapterTraining,
    EncodedHistory,
    ask_questions,
    collate,
    greedy_matches,
    weighted_answer_loss,
    write_histories,
)
from deltamem_vllm.training.attached import AttachedMemory
from deltamem_vllm.training.chat_encoding import ChatMode, TemplateEncoder
from deltamem_vllm.training.checkpoint import Evaluation, RunState
from deltamem_vllm.training.conversations import (
    MarkedConversation,
    also_learned,
    digest,
    read_conversations,
)
from deltamem_vllm.training.loading import check_architecture, load_backbone, load_tokenizer
from deltamem_vllm.training.report import CARD, PLOT, write_card, write_plot
from deltamem_vllm.training.settings import TrainSettings

BATCHES_SORTED = 8
"""Batches whose conversations are sorted by length together, so that little is padded."""

Encoded = dict[ChatMode, EncodedHistory]
"""A conversation in each mode that it may be written in."""

Say = Callable[[str], None]


class Split(NamedTuple):
    """The data of a run."""

    training: list[Encoded]
    held_out: list[Encoded]


@dataclass(frozen=True)
class Outcome:
    """What a run made."""

    adapter: Adapter
    state: RunState
    best: Evaluation


class TrainingRun:
    """A run, from its settings or from where an earlier one stopped.

    Args:
        settings: what is asked for.
        say: is told what goes on, a line at a time.

    Raises:
        TrainingError: the output folder holds another run, a finished one, or what is no run's.
        TrainingDataError: a conversation is not valid; the message names file and line.
        BackboneError: there is no such backbone, or it is not one that is served with memory.
        OSError: the output folder cannot be made or written.
        ConfigError: the adapter asked for is not one.
    """

    def __init__(self, settings: TrainSettings, say: Say = print) -> None:
        self._settings, self._say = settings, say
        kept = _found(settings)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        config = settings.adapter_config()
        training, held_out = split(settings)
        folder = resolve_base_dir(settings.model)
        check_architecture(folder)
        shape = BackboneShape.from_dir(folder)
        if config.target_layers and max(config.target_layers) >= shape.num_layers:
            raise BackboneError(
                f"--layers {settings.layers!r}: the base has {shape.num_layers} layers, 0 to "
                f"{shape.num_layers - 1}"
            )
        checkpoint.make_folder(settings.out)
        backbone = checkpoint_digests(folder)
        if kept is not None:
            _refuse_other_backbone(settings, kept.state.backbone, backbone)
        self._encoder = TemplateEncoder(
            load_tokenizer(folder),
            config.memory_write_granularity,
            settings.segment_tokens,
            settings.value_weight,
        )
        # Held-out answers count as recalled: none may stand in the text.
        self._data = Split(
            self._encoded(training, settings.window_share), self._encoded(held_out, 0.0)
        )
        say(f"{len(training):,} conversations to learn from, {len(held_out):,} held out")
        if learned := also_learned(training, held_out):
            say(
                f"{learned:,} of those held out are learned from, too, word for word: what they "
                "reach says nothing of others"
            )
        self._model = load_backbone(folder, settings.dtype, settings.device)
        torch.manual_seed(settings.seed)
        self._memory = AttachedMemory(self._model, config)
        self._stepper = AdapterStepper(self._model, self._memory, _plan(settings))
        self._best: dict[str, Tensor] = {}
        self.state = RunState(
            settings=settings.deciding(), data=digest(training, held_out), backbone=backbone
        )
        if kept is not None:
            self._go_on(kept)

    def run(self, stop_after: int | None = None) -> Outcome | None:
        """Train to the end, and write the adapter.

        Args:
            stop_after: leave a checkpoint after this step, and return None.

        Raises:
            KeyboardInterrupt: after a checkpoint was written.
            TrainingError: the loss is no number any more.
            OSError: the folder cannot be written.
        """
        settings, state = self._settings, self.state
        progress = tqdm(total=settings.steps, initial=state.step, desc="training", unit="step")
        with progress, _interruptible() as interrupted:
            while not self._is_over():
                if state.step == stop_after or interrupted:
                    self._save()
                    if interrupted:
                        raise KeyboardInterrupt
                    return None
                state.losses.append(_finite(self._step(state.step), state.step + 1))
                state.step += 1
                progress.update()
                if state.step % settings.eval_every == 0 or state.step == settings.steps:
                    self._evaluate()
                if state.step % settings.checkpoint_every == 0:
                    self._save()
                recent = state.losses[-50:]
                shown = {"loss": f"{sum(recent) / len(recent):.3f}"}
                if state.best is not None:
                    shown["best held out"] = f"{state.best.loss:.3f}"
                progress.set_postfix(shown, refresh=False)
        return self._finish()

    def _is_over(self) -> bool:
        settings, state = self._settings, self.state
        return state.step >= settings.steps or state.looks_since_best >= settings.patience

    def _step(self, step: int) -> float:
        settings = self._settings
        chance = random.Random(f"{settings.seed}/{step}")
        writing = chance.random() < settings.writing_share
        first = step * settings.accumulate
        return self._stepper.step(
            [self._batch(first + offset) for offset in range(settings.accumulate)], writing
        )

    def _batch(self, number: int) -> AdapterBatch:
        """The batch of that number, counted through all epochs."""
        settings, training = self._settings, self._data.training
        per_epoch = -(-len(training) // settings.batch)
        epoch, place = divmod(number, per_epoch)
        rows = epoch_batches(
            [_length(one) for one in training], settings.batch, f"{settings.seed}/{epoch}"
        )[place]
        # One for the whole batch: rows that are written alike pad each other least.
        mode = random.Random(f"{settings.seed}/{number}/mode").choice(sorted(training[rows[0]]))
        return collate([training[row][mode] for row in rows], self._encoder.pad)

    @torch.no_grad()
    def _evaluate(self) -> None:
        losses, weights, exact, asked = 0.0, 0.0, 0, 0
        for start in range(0, len(self._data.held_out), self._settings.eval_batch):
            part = self._data.held_out[start : start + self._settings.eval_batch]
            # Each mode that is trained counts alike.
            for mode in part[0]:
                batch = collate([one[mode] for one in part], self._encoder.pad)
                batch = batch.to(self._model.device)
                write_histories(self._model, self._memory, batch)
                hidden = ask_questions(self._model, self._memory, batch)
                weight = float(batch.question_weights[:, 1:].sum())
                losses += weight * float(weighted_answer_loss(self._model, hidden, batch))
                weights += weight
                exact += sum(
                    greedy_matches(self._model, hidden, batch.question_ids, batch.question_weights)
                )
                asked += len(batch.owner)
        self._memory.reset()
        loss = _finite(losses / weights, self.state.step)
        look = Evaluation(step=self.state.step, loss=loss, exact=exact / asked)
        self.state.evaluations.append(look)
        if self.state.best is look:
            self._best = {
                name: tensor
                for name, tensor in self._stepper.tensors().items()
                if name.startswith("parameter.")
            }
        self._say(
            f"step {look.step}: held-out loss {look.loss:.4f}, answers exactly right "
            f"{look.exact:.3f}"
        )

    def _save(self) -> None:
        tensors = self._stepper.tensors()
        tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        checkpoint.save(self._settings.out, self.state, tensors)

    def _go_on(self, kept: checkpoint.Checkpoint) -> None:
        if kept.state.data != self.state.data:
            raise TrainingError(
                f"{self._settings.out}: the conversations changed since its run began; give "
                "another folder"
            )
        self.state = kept.state
        self._best = {
            name.removeprefix("best."): tensor
            for name, tensor in kept.tensors.items()
            if name.startswith("best.")
        }
        try:
            self._stepper.load_tensors(kept.tensors, kept.state.step)
        except (KeyError, RuntimeError) as error:
            raise TrainingError(
                f"{self._settings.out}: its checkpoint does not fit this backbone ({error}); give "
                "another folder"
            ) from None
        self._say(f"going on after step {kept.state.step}")

    def _finish(self) -> Outcome:
        settings, state = self._settings, self.state
        best = state.best
        assert best is not None, "the last step is followed by a look"
        self._stepper.load_tensors(self._best, done=0)
        adapter = self._memory.adapter()
        save_adapter(adapter, settings.out, overwrite=True)
        plotted = write_plot(settings.out, state)
        write_card(settings, state, best, adapter, self._counts(), plotted)
        if not plotted:
            self._say("no plot of the loss: pip install 'deltamem-vllm[train]' for matplotlib")
        checkpoint.finish(settings.out, state)
        return Outcome(adapter, state, best)

    def _counts(self) -> dict[str, int]:
        def questions(part: list[Encoded]) -> int:
            return sum(len(next(iter(one.values())).questions) for one in part)

        return {
            "training conversations": len(self._data.training),
            "training questions": questions(self._data.training),
            "held-out conversations": len(self._data.held_out),
            "held-out questions": questions(self._data.held_out),
        }

    def _encoded(
        self, conversations: Sequence[MarkedConversation], window_share: float
    ) -> list[Encoded]:
        asked = self._settings.history
        modes: tuple[ChatMode, ...] = ("joint", "turns") if asked == "mixed" else (asked,)
        chance = random.Random(f"{self._settings.seed}/windows")
        found = []
        for one in tqdm(conversations, desc="encoding", unit="conversation", leave=False):
            beside = chance.random() < window_share
            window = chance.randint(1, self._settings.window_turns) if beside else 0
            found.append({mode: self._encoder.history(one, mode, window) for mode in modes})
        return found


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Ctrl+C ends no step in its middle: signals are listed, and the loop looks. Twice ends it."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(number: int, _: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)


def split(settings: TrainSettings) -> tuple[list[MarkedConversation], list[MarkedConversation]]:
    """Conversations to learn from, and those held out.

    Raises:
        TrainingDataError: one is not valid.
        TrainingError: there are too few to hold any out.
    """
    conversations = read_conversations(settings.data)
    chance = random.Random(f"{settings.seed}/held out")
    if settings.held_out is not None:
        held_out = read_conversations(settings.held_out)
        chosen = chance.sample(held_out, min(len(held_out), settings.held_out_limit))
        return conversations, chosen
    wanted = max(1, round(settings.held_out_share * len(conversations)))
    if wanted >= len(conversations):
        raise TrainingError(
            f"{settings.data}: {len(conversations)} conversation(s) are too few to hold any out; "
            "give more, or --held-out"
        )
    chosen_rows = set(
        chance.sample(range(len(conversations)), min(wanted, settings.held_out_limit))
    )
    return (
        [one for row, one in enumerate(conversations) if row not in chosen_rows],
        [conversations[row] for row in sorted(chosen_rows)],
    )


def epoch_batches(lengths: Sequence[int], batch: int, seed: str) -> list[list[int]]:
    """The rows of each batch of one epoch: each row once, rows of similar length together."""
    chance = random.Random(seed)
    order = list(range(len(lengths)))
    chance.shuffle(order)

    def batches() -> Iterator[list[int]]:
        for start in range(0, len(order), BATCHES_SORTED * batch):
            some = sorted(order[start : start + BATCHES_SORTED * batch], key=lengths.__getitem__)
            yield from (some[at : at + batch] for at in range(0, len(some), batch))

    found = list(batches())
    chance.shuffle(found)
    return found


def _found(settings: TrainSettings) -> checkpoint.Checkpoint | None:
    """The unfinished run that the output folder holds.

    Raises:
        TrainingError: it holds another one, a finished one, or files that a run would replace.
    """
    kept = checkpoint.load(settings.out)
    if kept is None:
        # A model's folder takes no adapter, which would be said at the end.
        names = (*ADAPTER_FILES, CARD, PLOT, "config.json")
        present = [name for name in names if (settings.out / name).exists()]
        if present:
            raise TrainingError(
                f"{settings.out}: already holds {', '.join(present)}, not of an unfinished run; "
                "give another folder"
            )
        return None
    if kept.state.finished:
        raise TrainingError(f"{settings.out}: the run in it is finished; give another folder")
    if other := _differences(kept.state.settings, settings.deciding()):
        raise _of_another(settings.out, ", ".join(other))
    return kept


def _refuse_other_backbone(
    settings: TrainSettings, kept: Mapping[str, str], now: Mapping[str, str]
) -> None:
    """Refuse to go on with a backbone that was replaced where it lies."""
    if other := _differences(kept, now):
        raise _of_another(settings.out, f"model (its {', '.join(other)} changed)")


def _differences(kept: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in {*now, *kept} if now.get(name) != kept.get(name))


def _of_another(out: Path, what: str) -> TrainingError:
    return TrainingError(f"{out}: holds a run of another {what}; give the same, or another folder")


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise TrainingError(
            f"step {step}: the loss is {loss}; a lower --learning-rate may help. The last "
            "checkpoint, if there is one, is from before"
        )
    return loss


def _plan(settings: TrainSettings) -> AdapterTraining:
    return AdapterTraining(
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        warmup=settings.warmup,
        weight_decay=settings.weight_decay,
        reply_share=settings.reply_share,
        writing_questions_share=settings.writing_share,
        seed=settings.seed,
    )


def _length(one: Encoded) -> int:
    return sum(map(len, next(iter(one.values())).chunks))
