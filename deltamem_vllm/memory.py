"""`Memory`: what a request says about its memory."""

from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deltamem_vllm.errors import MemoryRequestError
from deltamem_vllm.state.page import MemoryMode


class Memory(BaseModel):
    """The memory of one request; without any, a request has an ephemeral one.

    Raises:
        MemoryRequestError: a field is unknown, mistyped, or contradicts another.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    session: str | None = Field(default=None, min_length=1, max_length=256)
    """Name of the session whose state is read; required unless `mode` is "off"."""

    mode: MemoryMode = "read_write"
    """read_write leaves the request's final state in the session; read_only leaves the session as
    it is; off runs the base model without memory."""

    def __init__(self, **fields: object) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc'])) or 'memory'}: {item['msg']}"
                for item in error.errors()
            )
            raise MemoryRequestError(f"memory is not valid: {problems}") from None
        if self.mode == "off" and self.session is not None:
            raise MemoryRequestError(
                'memory: mode "off" runs without memory, so it cannot name a session.'
            )
        if self.mode != "off" and self.session is None:
            raise MemoryRequestError(
                f"memory: mode {self.mode!r} needs a session. Leave `memory` out for an ephemeral "
                "memory."
            )


OFF: Final = Memory(mode="off")
