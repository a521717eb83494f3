"""What of a generating request cannot be combined with what it says about its memory."""

from deltamem_vllm.api.folding import check_foldable
from deltamem_vllm.api.rendering import template_of
from deltamem_vllm.api.schemas import GenerationRequest, MemoryChatRequest
from deltamem_vllm.errors import MemoryRequestError


def refuse(request: GenerationRequest) -> None:
    """Refuse such a request.

    Raises:
        MemoryRequestError: names the field.
    """
    memory = request.memory
    assert memory is not None
    if getattr(request, "kv_transfer_params", None):
        raise MemoryRequestError("kv_transfer_params cannot be combined with memory. Leave it out.")
    if request.use_beam_search and request.stream:
        raise MemoryRequestError("memory cannot be combined with beam search in a stream.")
    if memory.spans is not None:
        if isinstance(request, MemoryChatRequest):
            raise MemoryRequestError(
                "memory.spans belong to prompts; those of a chat are found by its template. Leave "
                "them out."
            )
        if request.use_beam_search:
            raise MemoryRequestError("memory.spans cannot be combined with beam search.")
        if request.truncate_prompt_tokens is not None:
            raise MemoryRequestError(
                "truncate_prompt_tokens with memory.spans: they would be of another prompt. Leave "
                "it out."
            )
    if memory.writes:
        if template_of(request) is not None:
            raise MemoryRequestError(
                "chat_template with read_write memory: sessions belong to the server's template "
                "(--chat-template). Leave it out, or use read_only."
            )
        if isinstance(request, MemoryChatRequest) and request.truncate_prompt_tokens is not None:
            raise MemoryRequestError(
                "truncate_prompt_tokens with read_write memory: the session would count messages "
                "as written that were cut off. Leave it out."
            )
        if request.max_tokens == 0:
            raise MemoryRequestError(
                "max_tokens=0 with read_write memory: to write without generating, use the ingest "
                "route."
            )
        if (request.n or 1) > 1:
            raise MemoryRequestError(
                f"n={request.n} with read_write memory: a session has one future. Use n=1 or "
                "read_only."
            )
        if request.use_beam_search:
            raise MemoryRequestError(
                "beam search with read_write memory: a session has one future. Use read_only."
            )
    if memory.share_prefix:
        if not isinstance(request, MemoryChatRequest):
            raise MemoryRequestError(
                "memory.share_prefix is about what stands before a chat's messages; a completion "
                "has none. Leave it out."
            )
        if request.truncate_prompt_tokens is not None:
            raise MemoryRequestError(
                "memory.share_prefix and truncate_prompt_tokens exclude each other."
            )
    if memory.window is None:
        return
    if not isinstance(request, MemoryChatRequest):
        raise MemoryRequestError("memory.window folds messages; a completion has none.")
    check_foldable(
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        truncate_prompt_tokens=request.truncate_prompt_tokens,
    )
