"""How a request is described: each field of a frozen dataclass carries its default, its range and its help.

The command line, the tab, HTTP and the engine's messages take their options, checks and descriptions from here. What
comes from outside is checked twice: ``from_json`` holds the types, ``validate`` the ranges. Standard library only.
"""

from __future__ import annotations

import dataclasses
import shlex
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from i2l_ext.converters.errors import UserError, unknown_choice

Self = TypeVar("Self", bound="Request")


@dataclass(frozen=True)
class FieldInfo:
    """What is known of a field beside its type.

    ``minimum`` and ``maximum`` are inclusive; ``nonzero`` forbids 0. ``choices`` are the only values. ``flags`` are
    the command line's names where they are not ``--field-name``; ``()`` makes it a positional argument. ``prose`` may
    hold line breaks. ``local`` fields are paths and orders of this machine: no browser and no HTTP client fills them.
    ``syntax`` raises UserError for a text that is not of the right form.
    """

    help: str
    choices: Sequence[str] = ()
    minimum: float | None = None
    maximum: float | None = None
    nonzero: bool = False
    flags: tuple[str, ...] | None = None
    metavar: str | None = None
    prose: bool = False
    local: bool = False
    syntax: Callable[[str], object] | None = None


def option(help: str, default: Any = MISSING, **info: Any) -> Any:
    """A field of a request. Without ``default`` it must be given."""
    return dataclasses.field(default=default, metadata={"info": FieldInfo(help, **info)})


@dataclass(frozen=True)
class Field:
    """A field as the doors need it: ``type`` is str, int, float, bool, Path or Mapping; ``many``: a tuple of them;
    ``optional``: None is allowed."""

    name: str
    type: type
    many: bool
    optional: bool
    default: Any
    info: FieldInfo

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def flags(self) -> tuple[str, ...]:
        """The command line's names for it; () for a positional argument."""
        return (f"--{self.name.replace('_', '-')}",) if self.info.flags is None else self.info.flags

    @property
    def words(self) -> str:
        """Its name in a message."""
        return self.name.replace("_", " ")

    def accepts(self, value: Any) -> bool:
        """Whether a JSON value is of this field's type."""
        if value is None:
            return self.optional
        if self.many:
            return isinstance(value, (list, tuple)) and all(map(self._is_one, value))
        return self._is_one(value)

    def _is_one(self, value: Any) -> bool:
        return _IS[self.type](value) and (self.type is not str or self.info.prose or value.isprintable())

    def parse(self, value: Any) -> Any:
        """The Python value of a JSON value that ``accepts`` takes."""
        if value is None:
            return None
        return tuple(map(_PARSE[self.type], value)) if self.many else _PARSE[self.type](value)

    def check(self, value: Any) -> None:
        """Raises UserError where the value is out of range, no choice, or a text of the wrong form."""
        for one in value if self.many and value is not None else (value,):
            if one is not None:
                self.check_one(one)

    def check_one(self, one: Any) -> None:
        """`check` of a value that is not None, or of one of many."""
        info = self.info
        if info.choices and one not in info.choices:
            raise unknown_choice(self.words, str(one), info.choices)
        if info.syntax is not None:
            info.syntax(one)
        if self.type not in (int, float):
            return
        low = info.minimum is not None and one < info.minimum
        high = info.maximum is not None and one > info.maximum
        if low or high or not isfinite(one) or (info.nonzero and one == 0):
            raise UserError(f"{self.words} must be {self.range}, not {one:g}.", "out_of_range")

    @property
    def range(self) -> str:
        """The numbers that are allowed, in words."""
        info = self.info
        if info.minimum is not None and info.maximum is not None:
            words = f"from {info.minimum:g} to {info.maximum:g}"
        elif info.minimum is not None:
            words = f"{info.minimum:g} or greater"
        else:
            words = "a number"
        return f"{words} and not 0" if info.nonzero else words


def _is_path(value: Any) -> bool:
    """From outside only whole paths are taken: the engine works in a folder of its own."""
    if isinstance(value, Path):
        return True
    return isinstance(value, str) and "\0" not in value and Path(value).is_absolute()


_IS: Mapping[type, Callable[[Any], bool]] = {
    str: lambda value: isinstance(value, str) and "\0" not in value,
    bool: lambda value: isinstance(value, bool),
    int: lambda value: type(value) is int and abs(value) < 1 << 53,
    float: lambda value: type(value) in (int, float) and isfinite(value),
    Path: _is_path,
}

_PARSE: Mapping[type, Callable[[Any], Any]] = {str: str, bool: bool, int: int, float: float, Path: Path}


class Request:
    """Base of all requests. A subclass is a frozen dataclass with a ``kind`` that names it in messages."""

    kind: ClassVar[str]
    _fields: ClassVar[Mapping[str, Field]]

    @classmethod
    def fields(cls) -> Mapping[str, Field]:
        """The fields by name, in order."""
        fields = cls.__dict__.get("_fields")  # of this very class: a dataclass is described once
        if fields is None:
            fields = cls._fields = _describe(cls)
        return fields

    @classmethod
    def from_json(cls: type[Self], values: Any) -> Self:
        """The request that a JSON object describes.

        Raises UserError (``bad_request``) for anything else: a field that is missing, unknown or of another type.
        """
        if not isinstance(values, Mapping):
            raise bad_request(f"the request {cls.kind!r}")
        known = cls.fields()
        for name in values:
            if name not in known:
                raise bad_request(repr(str(name)[:80]))
        given = {}
        for name, field in known.items():
            if name not in values:
                if field.required:
                    raise bad_request(f"{name!r}, which is missing")
                continue
            if not field.accepts(values[name]):
                raise bad_request(repr(name))
            given[name] = field.parse(values[name])
        return cls(**given)

    def json(self) -> dict[str, Any]:
        """The JSON object from which ``from_json`` makes an equal request."""
        return {name: _plain(getattr(self, name)) for name in self.fields()}

    def command_line(self) -> str:
        """The command of ``i2l`` that asks for the same, quoted for a shell; what is the default is left out."""
        words = ["i2l", self.kind]
        for name, field in self.fields().items():
            value = getattr(self, name)
            if value == field.default and not field.required:
                continue
            flag = field.flags[:1]
            if value is True:
                words += flag
            else:
                words += [*flag, *map(_word, value if field.many else (value,))]
        return shlex.join(words)

    def validate(self) -> None:
        """Raises UserError where a value is out of its range, or where two do not fit together."""
        for name, field in self.fields().items():
            field.check(getattr(self, name))


def bad_request(what: str) -> UserError:
    """The error for a message that this version does not understand."""
    return UserError(
        f"The engine does not understand {what}. If the extension was updated while the WebUI ran, restart the WebUI.",
        "bad_request",
    )


def _word(value: Any) -> str:
    """A value as a word of the command line. A path that begins with a dash is not to be taken for an option."""
    return f"./{value}" if isinstance(value, Path) and str(value).startswith("-") else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def _describe(cls: Any) -> dict[str, Field]:
    hints = typing.get_type_hints(cls)
    return {one.name: _field(one, hints[one.name]) for one in dataclasses.fields(cls)}


def _field(described: dataclasses.Field[Any], hint: Any) -> Field:
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    optional = type(None) in parts
    [kind] = [part for part in parts if part is not type(None)]
    many = typing.get_origin(kind) is tuple
    if many:
        kind = typing.get_args(kind)[0]
    return Field(described.name, kind, many, optional, described.default, described.metadata["info"])
