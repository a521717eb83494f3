"""Small chat templates in the manner of known ones, and a tokenizer of single characters.

Each template comes with what it makes of one message, written down again in Python, so that tests
know where every message lies without asking the code under test.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deltamem_vllm.api.messages import Message

SPECIAL = (
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|head|>",
    "<|/head|>",
    "<|eot|>",
    "[INST]",
)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, per special string, and for two line breaks together."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline = "\N{LATIN CAPITAL LETTER C WITH DOT ABOVE}"  # as ByteLevel writes it
    vocabulary = {letter: index for index, letter in enumerate([*letters, 2 * newline])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(newline, newline)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


TOKENIZER = character_tokenizer()

CALLS = (
    "{%- for call in m.tool_calls or [] -%}"
    "{{ '<call>' + call.function.name + ' ' + call.function.arguments + '</call>' }}"
    "{%- endfor -%}"
)

CHATML = (
    "{%- for m in messages -%}"
    "{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}" + CALLS + "{{ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

# Thinking is an empty block in replies after the last question, and gone in earlier ones.
THINKING = (
    "{%- set ns = namespace(last=-1) -%}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- for m in messages -%}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last -%}"
    "{{ '<think>\n' + (m.reasoning or '') + '\n</think>\n\n' }}"
    "{%- endif -%}"
    "{{ m.content or '' }}" + CALLS + "{{ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

# Texts are stripped; begins with a token of its own.
LLAMA = (
    "{{ '<s>' }}"
    "{%- for m in messages -%}"
    "{{ '<|head|>' + m.role + '<|/head|>\n\n' + (m.content or '') | trim }}"
    + CALLS
    + "{{ '<|eot|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|head|>assistant<|/head|>\n\n' }}{%- endif -%}"
)

# The system prompt belongs to the last user message; roles must alternate.
MERGED = (
    "{%- if messages[0].role == 'system' -%}"
    "{%- set system = messages[0].content + '\n\n' -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}"
    "{{ '<s>' }}"
    "{%- for m in turns -%}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('roles must alternate') }}"
    "{%- endif -%}"
    "{%- if m.role == 'user' -%}"
    "{%- set prefix = system if loop.index0 >= turns | length - 2 else '' -%}"
    "{{ '[INST] ' + prefix + m.content + ' [/INST]' }}"
    "{%- else -%}{{ ' ' + m.content + '</s>' }}{%- endif -%}"
    "{%- endfor -%}"
)

# Line breaks end one message and open the next, and two of them are one token.
PLAIN = (
    "{%- for m in messages -%}"
    "{{ '\n' + m.role + ': ' + m.content + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '\nassistant: ' }}{%- endif -%}"
)

# Definitions of tools come first, in a message of their own, with a system message if there is one.
TOOLS = (
    "{%- if tools -%}{{ '<|im_start|>system\n' }}"
    "{%- for t in tools -%}{{ t.function.name + '\n' }}{%- endfor -%}{{ '<|im_end|>\n' }}"
    "{%- endif -%}" + CHATML
)

# Definitions come behind the first question.
LATE_TOOLS = CHATML.replace(
    "{{ '<|im_end|>\n' }}{%- endfor -%}",
    "{%- if loop.first -%}{%- for t in tools or [] -%}{{ t.function.name }}{%- endfor -%}"
    "{%- endif -%}{{ '<|im_end|>\n' }}{%- endfor -%}",
)

BACKWARDS = "{%- for m in messages | reverse -%}{{ '<|im_start|>' + m.content }}{%- endfor -%}"


def calls_of(message: Message) -> str:
    return "".join(
        f"<call>{call['function']['name']} {call['function']['arguments']}</call>"
        for call in message.get("tool_calls") or ()
    )


def in_chatml(message: Message) -> str:
    """The message as CHATML renders it, and THINKING if a question comes after."""
    text = message["content"] or ""
    return f"<|im_start|>{message['role']}\n{text}{calls_of(message)}<|im_end|>\n"


def in_llama(message: Message) -> str:
    text = (message["content"] or "").strip()
    return f"<|head|>{message['role']}<|/head|>\n\n{text}{calls_of(message)}<|eot|>"


@dataclass
class Renderer:
    """Renders with a template, and counts."""

    template: str
    tokenizer: PreTrainedTokenizerFast = TOKENIZER
    tools: Sequence[Message] | None = None
    characters_rendered: int = 0

    def __call__(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
        self.characters_rendered += sum(len(message["content"] or "") for message in messages)
        tokens: Any = self.tokenizer.apply_chat_template(
            list(messages),
            chat_template=self.template,
            add_generation_prompt=add_generation_prompt,
            tools=None if self.tools is None else list(self.tools),
            tokenize=True,
            return_dict=False,
        )
        return list(tokens)

    def text(self, tokens: Sequence[int]) -> str:
        decoded: str = self.tokenizer.decode(list(tokens), skip_special_tokens=False)
        return decoded


IN_ORDER: dict[str, tuple[str, str, Callable[[Message], str]]] = {
    "chatml": (CHATML, "", in_chatml),
    "thinking": (THINKING, "", in_chatml),
    "llama": (LLAMA, "<s>", in_llama),
}
"""Templates that render one message after another: source, what they begin with, one message."""
