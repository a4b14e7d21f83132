"""A command's options as a pydantic model: its command line, its help, and one line for a wrong value."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from sglang_dflash.errors import UserError


class Options(BaseModel):
    """Fields become flags: ``max_new: int`` is ``--max-new N``, a bool ``--x`` and ``--no-x``.

    A list takes several words and may be repeated; numbers in it may also be parted by commas.
    Nothing is read from the environment, where ``OUT`` or ``SEED`` mean something else.
    """

    model_config = ConfigDict(extra="forbid")


_WORDS = {int: "N", float: "X", Path: "PATH", str: "TEXT"}
_O = TypeVar("_O", bound=Options)


def _kind(field: FieldInfo) -> tuple[Any, bool]:
    """The field's type (of one value), and whether it holds a list of them."""
    kind = field.annotation
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (part for part in get_args(kind) if part is not type(None))
    many = get_origin(kind) is list
    if many:
        (kind,) = get_args(kind)
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind, many


def _default(value: Any) -> str:
    """How help shows a default; nothing where the description says it."""
    if value is None or value == "" or value == [] or isinstance(value, bool):
        return ""
    if isinstance(value, list):
        return f" (default: {' '.join(map(str, value))})"
    return f" (default: {value})"


def description(text: str | None, prog: str) -> str:
    """A docstring for a terminal: without markup, and without the command's name, which stands above."""
    plain = inspect.cleandoc(text or "").replace("``", "").removeprefix(f"{prog}: ")
    return plain[:1].upper() + plain[1:]


def parser_of(text: str | None, prog: str) -> argparse.ArgumentParser:
    """A parser for ``prog`` that is described by a docstring."""
    return argparse.ArgumentParser(
        prog=prog,
        description=description(text, prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _parser(model: type[Options], prog: str) -> argparse.ArgumentParser:
    parser = parser_of(model.__doc__, prog)
    for name, field in model.model_fields.items():
        kind, many = _kind(field)
        text = ((field.description or "") + _default(field.default)).strip().replace("%", "%%")
        # What is absent here is left to the model's defaults.
        how: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            how["choices"] = get_args(kind)
        else:
            how["metavar"] = _WORDS[kind]
        if many:
            how |= {"action": "extend", "nargs": "+"}
        parser.add_argument(f"--{name.replace('_', '-')}", **how)
    return parser


def parse(model: type[_O], prog: str, argv: Sequence[str]) -> _O:
    """Read a command line; raises :class:`UserError` for a value that the model does not take."""
    given = vars(_parser(model, prog).parse_args(list(argv)))
    for name, value in given.items():
        kind, many = _kind(model.model_fields[name])
        if many and kind in (int, float):
            given[name] = [part for word in value for part in word.split(",") if part]
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        flag = f"--{str(first['loc'][0]).replace('_', '-')}"
        raise UserError(f"{flag} {first['input']}: {str(first['msg']).lower()}") from None
