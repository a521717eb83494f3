"""What tests of the engine share."""

import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from vllm import LLM, SamplingParams

DATA = Path(__file__).parent / "parity" / "data"
"""Golden cases: `<case>/model` is a tiny checkpoint without tokenizer, with `<case>/adapter`."""

VOCAB = 320
"""Vocabulary of every golden case's backbone."""

SPECIAL_WORDS = ("<pad>", "<eos>", "<unk>", "system", "user", "assistant")

CHAT_TEMPLATE = (
    "{% for tool in tools or [] %}system {{ tool.function.name }} {% endfor %}"
    "{% for message in messages %}"
    "{% if message['content'] == 'unspeakable' %}{{ raise_exception('unspeakable!') }}{% endif %}"
    "{{ message['role'] }} {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


AnyLLM = TypeVar("AnyLLM", bound=LLM)


@contextmanager
def running(llm: AnyLLM) -> Iterator[AnyLLM]:
    """An engine, shut down at the end.

    Engines of one process share its process groups, which the first one to go takes along: they
    must run one after another, and not go at the garbage collector's whim.
    """
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def full_logprobs(rows: Sequence[Mapping[int, Any]], vocab: int = VOCAB) -> Tensor:
    """vLLM's per-token dicts of all logprobs as a tensor [rows, vocab]."""
    table = torch.full((len(rows), vocab), float("nan"))
    for index, row in enumerate(rows):
        for token, logprob in row.items():
            table[index, token] = logprob.logprob
    return table


def output_logprobs(output: Any) -> Tensor:
    """All logprobs of a request's sampled tokens, [tokens, vocab]."""
    table = full_logprobs(output.outputs[0].logprobs)
    assert not table.isnan().any()
    return table


def random_tokens(seed: int, length: int) -> list[int]:
    """Token ids of a golden case's vocabulary, without padding and end of text."""
    return random.Random(seed).choices(range(2, VOCAB), k=length)


def greedy(max_tokens: int = 4, **fields: Any) -> SamplingParams:
    """Greedy sampling with the logprobs of the whole vocabulary."""
    defaults = {"ignore_eos": True, "detokenize": False}
    return SamplingParams(
        temperature=0, max_tokens=max_tokens, logprobs=VOCAB, **{**defaults, **fields}
    )


def assert_states_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-5
) -> None:
    """All layers' states agree within `tolerance * max(1, max|S|)`."""
    assert set(actual) == set(expected)
    for name, state in expected.items():
        bound = tolerance * max(1.0, state.abs().max().item())
        torch.testing.assert_close(actual[name], state, rtol=0, atol=bound)


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object in a file; None removes the key."""
    content = {**json.loads(path.read_text()), **changes}
    kept = {name: value for name, value in content.items() if value is not None}
    path.write_text(json.dumps(kept))


def written_by(granularity: str, adapter: Path, folder: Path) -> Path:
    """A copy of an adapter, in `folder`, that writes by messages or sentences."""
    made = Path(shutil.copytree(adapter, folder / "adapter"))
    change_json(made / "delta_mem_config.json", memory_write_granularity=granularity)
    return made


def word(token: int) -> str:
    """A token's word in `with_word_tokenizer`."""
    return SPECIAL_WORDS[token] if token < len(SPECIAL_WORDS) else f"w{token}"


def with_word_tokenizer(model: Path, target: Path) -> Path:
    """A copy, by links, of a golden case's checkpoint that reads and writes text.

    A token is a word; the chat template puts roles and contents in one line, behind the names of
    tools.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    target.mkdir(parents=True)
    for file in model.iterdir():
        (target / file.name).symlink_to(file)
    words = {word(token): token for token in range(VOCAB)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(target)
    return target
