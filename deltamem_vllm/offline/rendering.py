"""Messages as tokens, exactly as `LLM.chat` renders them, of any length."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Final

from vllm import LLM

from deltamem_vllm.api.boundaries import Render
from deltamem_vllm.api.messages import Message
from deltamem_vllm.engine.compat import ChatParams, TokenizeParams, is_mistral_tokenizer

CONTENT_FORMAT: Final = "chat_template_content_format"
TEMPLATE_ARGUMENTS: Final = "chat_template_kwargs"
TOKENIZATION: Final = "tokenization_kwargs"

RENDERING: Final = ("chat_template", CONTENT_FORMAT, TEMPLATE_ARGUMENTS, "tools", TOKENIZATION)
"""Arguments of `LLM.chat` from which messages become tokens."""


def own_template(arguments: Mapping[str, Any]) -> Any:
    """The chat template among the arguments of `LLM.chat`; None if they have none."""
    in_arguments = (arguments.get(TEMPLATE_ARGUMENTS) or {}).get("chat_template")
    return arguments.get("chat_template") or in_arguments


def chat_render(llm: LLM, arguments: Mapping[str, Any]) -> Render:
    """A function that renders messages.

    Args:
        llm: its template and tokenizer are used.
        arguments: of `LLM.chat`; those that rendering does not need are left alone.
    """
    renderer = llm.renderer
    add_special_tokens = (arguments.get(TOKENIZATION) or {}).get("add_special_tokens", False)
    tok_params = TokenizeParams(max_total_tokens=None, add_special_tokens=add_special_tokens)
    tokenize = is_mistral_tokenizer(renderer.tokenizer) or llm.model_config.enable_prompt_embeds

    def render(messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
        if not messages:
            return []
        chat_params = ChatParams(
            chat_template=arguments.get("chat_template") or llm.chat_template,
            chat_template_content_format=arguments.get(CONTENT_FORMAT, "auto"),
            chat_template_kwargs={
                **(arguments.get(TEMPLATE_ARGUMENTS) or {}),
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": False,
                "tools": arguments.get("tools"),
                "tokenize": tokenize,
            },
        )
        # Copied wholly: vLLM parses the arguments of tool calls in place.
        _, (prompt,) = renderer.render_chat(
            [copy.deepcopy(list(messages))], chat_params, tok_params
        )
        return list(prompt["prompt_token_ids"])

    return render


def text_tokens(llm: LLM, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of plain texts, of any length, without special ones."""
    tok_params = TokenizeParams(max_total_tokens=None, add_special_tokens=False)
    prompts = llm.renderer.render_cmpl([{"prompt": text} for text in texts], tok_params)
    return [list(prompt["prompt_token_ids"]) for prompt in prompts]
