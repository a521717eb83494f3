"""Messages as tokens, by vLLM's own renderer, exactly as its chat handler renders them."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from deltamem_vllm.engine.compat import TokenizeParams, is_mistral_tokenizer
from deltamem_vllm.errors import MemoryRequestError


def template_of(request: Any) -> Any:
    """The chat template that a request brings along; None for most."""
    in_arguments = (getattr(request, "chat_template_kwargs", None) or {}).get("chat_template")
    return getattr(request, "chat_template", None) or in_arguments


class ChatRenderer:
    """Renders with the server's chat template, or the request's own where the server trusts it.

    Args:
        online_renderer: vLLM's `OnlineRenderer` of this API server.
    """

    def __init__(self, online_renderer: Any) -> None:
        self._online = online_renderer

    async def tokens(
        self, request: Any, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool
    ) -> list[int]:
        """The tokens of `messages`, with the tools and template arguments of `request`.

        Args:
            request: vLLM's chat request.
            messages: as clients send them; any number of tokens.
            add_generation_prompt: whether the template begins the assistant's answer.

        Raises:
            MemoryRequestError: the request brings a template, and the server trusts none.
        """
        if not messages:
            return []
        online = self._online
        # vLLM refuses it too, but later. Templates are programs.
        if template_of(request) is not None and not online.trust_request_chat_template:
            raise MemoryRequestError(
                "chat_template: this server runs no templates of requests "
                "(--trust-request-chat-template). Leave it out."
            )
        has_no_tools = request.tools is None or (
            request.tool_choice == "none" and online.exclude_tools_when_tool_choice_none
        )
        defaults = {
            **online.default_chat_template_kwargs,
            "tools": None if has_no_tools else [tool.model_dump() for tool in request.tools],
            "tokenize": is_mistral_tokenizer(online.renderer.tokenizer)
            or online.model_config.enable_prompt_embeds,
        }
        asked = request.model_copy(
            update={
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": False,
            }
        )
        # vLLM 0.33 has one.
        effort_map = getattr(online, "reasoning_effort_map", None)
        further = {"reasoning_effort_map": effort_map} if effort_map else {}
        chat_params = asked.build_chat_params(
            online.chat_template, online.chat_template_content_format, **further
        ).with_defaults(defaults)
        tok_params = TokenizeParams(
            max_total_tokens=None, add_special_tokens=request.add_special_tokens
        )
        _, (prompt,) = await online.renderer.render_chat_async(
            # Copied wholly: vLLM parses the arguments of tool calls in place.
            [copy.deepcopy(list(messages))],
            chat_params,
            tok_params,
        )
        return list(prompt["prompt_token_ids"])

    async def text_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of plain texts, of any length, without special ones."""
        tok_params = TokenizeParams(max_total_tokens=None, add_special_tokens=False)
        prompts = await self._online.renderer.render_cmpl_async(
            [{"prompt": text} for text in texts], tok_params
        )
        return [list(prompt["prompt_token_ids"]) for prompt in prompts]
