"""An independent answer: transformers in fp32, the sequential definition, request by request."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from deltamem_vllm.adapter import Adapter, load_adapter
from deltamem_vllm.engine.probe import CorrectionNorms, probed_head, probed_layer
from deltamem_vllm.training.attached import AttachedMemory


class Answer(NamedTuple):
    """What a model makes of one token sequence."""

    logprobs: Tensor  # [T, vocab] fp32: row t predicts token t + 1
    state: dict[str, Tensor]  # layer name -> [H, r, r] after the last token


class Prompt(NamedTuple):
    """Tokens that are written by spans."""

    start: int
    end: int
    spans: Sequence[tuple[int, int]]


class SpanMemory(AttachedMemory):
    """A memory that can be written by spans: reads are taken before a prompt, and each span writes
    the mean of what the layer saw. And whose first tokens may have nothing to do with it."""

    prompt: Prompt | None = None
    prefix: int = 0

    def _advance(self, index: int, hidden: Tensor) -> None:
        heads, rank, _ = self.config.state_shape
        if hidden.shape[1] > self.prefix:
            self._advance_behind(index, hidden[:, self.prefix :])
        else:
            self._states.setdefault(index, hidden.new_zeros(1, heads, rank, rank))
            self._reads[index] = hidden.new_zeros(len(hidden), 0, heads * rank)
        reads = self._reads[index]
        nothing = reads.new_zeros(len(reads), self.prefix, reads.shape[-1])
        self._reads[index] = torch.cat([nothing, reads], dim=1)

    def _advance_behind(self, index: int, hidden: Tensor) -> None:
        """`prompt`, and the mask of tokens that write, are counted from the prefix on."""
        if self.prompt is None:
            super()._advance(index, hidden)
            return
        start, end, spans = self.prompt
        layer, state = self.layer(index), self._states.get(index)
        if state is None:
            state = hidden.new_zeros(1, *self.config.state_shape)
        reads = []
        if start:
            before, state = layer.read_and_write(hidden[:, :start], state, None)
            reads.append(before)
        reads.append(layer.read(hidden[:, start:end], state))
        for first, last in spans:
            mean = hidden[:, first:last].mean(dim=1, keepdim=True)
            _, state = layer.read_and_write(mean, state, None)
        if end < hidden.shape[1]:
            after, state = layer.read_and_write(hidden[:, end:], state, None)
            reads.append(after)
        self._states[index], self._reads[index] = state, torch.cat(reads, dim=1)


class Oracle:
    """A backbone with its adapter, run token by token through the definition of the memory."""

    def __init__(self, model: Path, adapter: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="eager"
        )
        loaded = load_adapter(adapter)
        config = loaded.config.model_copy(update={"memory_write_granularity": "token"})
        self.memory = SpanMemory(self.model, config)
        self.memory.load_adapter(Adapter.from_tensors(config, loaded.tensors))

    @torch.no_grad()
    def __call__(
        self,
        tokens: list[int],
        *,
        state: dict[str, Tensor] | None = None,
        writes: bool = True,
        reads: bool = True,
        written: Sequence[bool] | None = None,
        prompt: Prompt | None = None,
        prefix: int = 0,
    ) -> Answer:
        """`written`: which of the tokens write; None: all of them. `prompt` is written by spans.
        The first `prefix` tokens neither read nor write."""
        self.memory.reset()
        self.memory.prefix = prefix
        if prompt is not None:
            start, end, spans = prompt
            behind = [(first - prefix, last - prefix) for first, last in spans]
            prompt = Prompt(start - prefix, end - prefix, behind)
        self.memory.prompt = prompt
        if written is not None:
            self.memory.token_mask = torch.tensor([list(written)[prefix:]])
        self.memory.write_enabled, self.memory.read_enabled = writes, reads
        if state is not None:
            self.memory.load_states(
                {int(name.split(".")[2]): value[None] for name, value in state.items()}
            )
        logits = self.model(torch.tensor([tokens]), use_cache=False).logits[0]
        states = {
            f"model.layers.{index}.self_attn": value[0].clone()
            for index, value in self.memory.states.items()
        }
        return Answer(torch.log_softmax(logits, dim=-1), states)

    @contextmanager
    def corrections(self, layer: int, head: str) -> Iterator[list[Tensor]]:
        """Collect what memory does to one projection's output, by calls made inside.

        Yields:
            A list with [2, T] fp32 per call: each token's squared norm of the correction, and of
            the output that it is added to.
        """
        projection = getattr(self.model.model.layers[layer].self_attn, f"{head}_proj")
        seen: list[Tensor] = []
        found: list[Tensor] = []

        def note(_: object, __: object, output: Tensor) -> None:
            seen.append(output[0])
            if len(seen) == 2:
                plain, corrected = seen
                found.append(torch.stack([corrected - plain, plain]).square().sum(-1))
                seen.clear()

        # Before and after the hook of the memory.
        handles = [projection.register_forward_hook(note, prepend=first) for first in (True, False)]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


def correction_norms(
    oracle: Oracle,
    adapter_dir: Path,
    texts: Sequence[list[int]],
    state: dict[str, Tensor] | None = None,
    writes: bool = True,
) -> CorrectionNorms:
    """What a probe adds up over `texts`, each of which starts from `state`.

    The first token of an empty memory reads nothing, and does not count.
    """
    adapter = load_adapter(adapter_dir)
    head = probed_head(adapter.config)
    assert head is not None
    with oracle.corrections(probed_layer(adapter), head) as found:
        for tokens in texts:
            oracle(tokens, state=state, writes=writes)
    first = 1 if state is None else 0
    correction, corrected = torch.cat([norms[:, first:] for norms in found], dim=1).sum(-1).tolist()
    return CorrectionNorms(correction, corrected)
