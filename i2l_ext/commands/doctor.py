"""``i2l doctor``: what a bug report needs."""

from __future__ import annotations

import argparse
import json

from i2l_ext.commands.arguments import add_arguments, add_command, request_of
from i2l_ext.requests import DoctorRequest


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = add_command(subparsers, "doctor", run_doctor, "print what a bug report needs")
    add_arguments(parser, DoctorRequest, skip=("host",))


def run_doctor(args: argparse.Namespace) -> int:
    """Print the facts; 1 where the self-test found something wrong."""
    from i2l_ext.operations import Context, perform

    found = perform(request_of(args, DoctorRequest), Context())
    print(json.dumps(found.json(), indent=2) if args.json else found.text)
    return int(found.failed)
