"""Flags of a command out of a pydantic model: its fields are the only place where they are told.

Each field is a flag of its name; its docstring is the help, its bounds and choices are checked by
the model alone, so that a command, a file and a program are refused with the same words.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from deltamem_vllm.errors import DeltaMemError

Model = TypeVar("Model", bound=BaseModel)


def command_of(
    model: type[Model], run: Callable[[Model], None], problem: type[DeltaMemError]
) -> Callable[..., None]:
    """A command whose options are the model's fields.

    Args:
        model: frozen, with docstrings of its fields (`use_attribute_docstrings`).
        run: what the command does; its docstring is the command's help.
        problem: raised, with the flag's name, for what the model refuses.
    """

    def command(**given: Any) -> None:
        try:
            settings = model(**given)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            flag = flag_name(str(first["loc"][0])) if first["loc"] else "the flags"
            raise problem(f"{flag}: {first['msg']}, not {first['input']!r}") from None
        run(settings)

    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=... if field.is_required() else field.get_default(call_default_factory=True),
            annotation=_annotation(name, field),
        )
        for name, field in model.model_fields.items()
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    command.__doc__ = run.__doc__
    return command


def flag_name(field: str) -> str:
    """The flag of a field."""
    return f"--{field.replace('_', '-')}"


def _annotation(name: str, field: FieldInfo) -> Any:
    help_text = " ".join((field.description or "").split())
    option = typer.Option(flag_name(name), help=help_text, metavar=_metavar(field.annotation))
    return Annotated[_plain(field.annotation), option]


def _plain(annotation: Any) -> Any:
    """The type that a command line knows: choices are texts there, which the model checks."""
    if get_origin(annotation) is Literal:
        return str
    options = [each for each in get_args(annotation) if each is not type(None)]
    return annotation if not options else Union[options[0], None]  # noqa: UP007


def _metavar(annotation: Any) -> str | None:
    if get_origin(annotation) is Literal:
        return f"[{'|'.join(map(str, get_args(annotation)))}]"
    if annotation is Path or Path in get_args(annotation):
        return "PATH"
    return None
