"""The demo model's tokenizer: a byte-level BPE trained on the demo's own sentences."""

import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deltamem_vllm.demo.facts import TrainingMix, training_conversation
from deltamem_vllm.demo.vocabulary import FAMILIES, SLOTS

END = "<|im_end|>"
PAD = "<|pad|>"
ROLE_TOKENS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
MAX_LENGTH = 2048

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role not in ['system', 'user', 'assistant'] -%}"
    "{{ raise_exception('the demo model knows the roles system, user and assistant') }}"
    "{%- endif -%}"
    "{{ '<|' + message.role + '|>' + message.content + '<|im_end|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


def _sentences(seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    for slot in SLOTS:
        family = slot.family
        for template in (*family.statements, *family.questions, family.answer):
            yield template.format(n=slot.noun, v="")
    for _ in range(2000):
        conversation = training_conversation(rng, TrainingMix(max_facts=8))
        yield from (message.content for message in conversation.messages)
        yield from (question.text for question in conversation.questions)
        yield from (question.answer for question in conversation.questions)
    for family in FAMILIES:
        for value in family.values:
            yield from [f" {value}"] * 500


def build_tokenizer(vocabulary: int, seed: int = 0) -> PreTrainedTokenizerFast:
    """Trains the BPE on generated sentences. Values repeat often enough to become single tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        _sentences(seed),
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[PAD, END, *ROLE_TOKENS.values()],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLE_TOKENS.values()),
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` (with the chat template inside)."""
    tokenizer.save_pretrained(directory, save_jinja_files=False)
