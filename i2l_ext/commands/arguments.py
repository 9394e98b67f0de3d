"""From the fields of a request to the options of a command, and back."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from i2l_ext.converters.errors import UserError
from i2l_ext.requests import EngineOptions, Field, Request

Asked = TypeVar("Asked", bound=Request)


def add_command(
    subparsers: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """A command with ``--json``, which ``run`` carries out; its exit code is the command's."""
    parser = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    parser.set_defaults(run=run)
    return parser


def add_arguments(
    parser: argparse.ArgumentParser,
    request: type[Request],
    *,
    skip: Collection[str] = (),
    one_of: Collection[str] = (),
) -> None:
    """An option or positional argument for each field but those in ``skip``. Of ``one_of`` exactly one is needed."""
    group = parser.add_mutually_exclusive_group(required=True) if one_of else parser
    for name, field in request.fields().items():
        if name not in skip:
            (group if name in one_of else parser).add_argument(*_names(field), **_settings(field))


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Where and how the engine computes."""
    add_arguments(parser, EngineOptions, skip=("cache_bytes",))
    parser.add_argument("--no-cache", action="store_true", help="encode anew, and keep nothing of it")


def request_of(args: argparse.Namespace, request: type[Asked], **more: Any) -> Asked:
    """The request that was asked for, checked. Raises UserError where a value is out of its range."""
    values = {name: getattr(args, name) for name in request.fields() if hasattr(args, name)}
    asked = request(**{name: tuple(one) if isinstance(one, list) else one for name, one in {**values, **more}.items()})
    asked.validate()
    return asked


def engine_options_of(args: argparse.Namespace) -> EngineOptions:
    """Where and how to compute, as the options say."""
    return request_of(args, EngineOptions, cache_bytes=0 if args.no_cache else None)


def _names(field: Field) -> tuple[str, ...]:
    return field.flags or (field.name,)


def _settings(field: Field) -> dict[str, Any]:
    settings: dict[str, Any] = {"help": field.info.help.replace("%", "%%")}  # argparse formats it
    if field.flags and field.type is bool:
        return {**settings, "action": "store_true", "dest": field.name}
    listed = f"{{{','.join(field.info.choices)}}}" if field.info.choices else field.info.metavar
    settings |= {"type": _parser(field), "metavar": listed}
    if field.many:
        settings["nargs"] = "+"
    elif not field.flags and not field.required:
        settings["nargs"] = "?"
    if field.flags:
        settings |= {"dest": field.name, "required": field.required}
    return settings if field.required else {**settings, "default": field.default}


def _parser(field: Field) -> Callable[[str], Any]:
    """From a word of the command line to a value. A text of the wrong form, or that is no choice, is wrong usage (exit
    code 2)."""
    if field.info.syntax is None and not field.info.choices:
        return field.type

    def parse(text: str) -> str:
        try:
            field.check_one(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None
        return text

    return parse
