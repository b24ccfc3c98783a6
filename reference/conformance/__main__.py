"""`python -m reference.conformance --adapter module:attribute` judges an implementation."""

import argparse
import json
import os
import sys
from contextlib import ExitStack, closing, redirect_stdout
from pathlib import Path

from reference.conformance.cases import load_cases
from reference.conformance.isolated import IsolatedAdapter
from reference.conformance.judge import DTYPES, Adapter, dtype_of
from reference.conformance.lines import CommandAdapter
from reference.conformance.loading import cases_named, load_adapter, read_expected_failures
from reference.conformance.program import TIMEOUT
from reference.conformance.record import record
from reference.conformance.report import run
from reference.conformance.text import table

MODULE = "python -m reference.conformance"
INSTALLED = "preference-conformance"
"""The command that the wheel installs."""
WHAT = (
    "Puts every test vector to an implementation of preference optimisation and says which of them "
    "it meets."
)
EXIT = (
    "Exits with 0 where all did as expected, with 1 on any other failure, with 2 where the kit "
    "cannot run."
)


def parser() -> argparse.ArgumentParser:
    """The command line of the kit."""
    arguments = argparse.ArgumentParser(_typed(), description=WHAT, epilog=EXIT)
    tested = arguments.add_mutually_exclusive_group(required=True)
    adapter = "a Python object with supports and evaluate"
    tested.add_argument("--adapter", metavar="MODULE:ATTRIBUTE", help=adapter)
    command = "a program that speaks JSON lines on standard input and output"
    tested.add_argument("--command", help=command)
    dtype = "judge at this precision, whatever the adapter says of itself"
    arguments.add_argument("--dtype", choices=DTYPES, help=dtype)
    only = "these cases alone; may be given several times"
    arguments.add_argument("--only", metavar="OBJECTIVE[/DIALECT]", action="append", help=only)
    xfail = "ids of cases that are expected to fail, one a line"
    arguments.add_argument("--xfail", metavar="FILE", type=Path, help=xfail)
    timeout = "seconds that an answer may take; the import of an adapter is one"
    arguments.add_argument("--timeout", type=float, default=TIMEOUT, metavar="S", help=timeout)
    here = "run the adapter in this process, for a debugger; it may then end the report"
    arguments.add_argument("--in-process", action="store_true", help=here)
    arguments.add_argument("--json", action="store_true", help="print JSON in place of the table")
    return arguments


def main(arguments: list[str] | None = None) -> int:
    """Judge the implementation that the command line names, and print the report.

    Args:
        arguments: the command line; None reads `sys.argv`.

    Returns:
        The exit status: 0, 1 or 2, as the help explains them.
    """
    options = parser().parse_args(arguments)
    with ExitStack() as stack:
        # Whatever the implementation prints goes to standard error; the report stands alone.
        stack.enter_context(redirect_stdout(sys.stderr))
        try:
            cases = cases_named(options.only)
            xfail = read_expected_failures(options.xfail, load_cases()) if options.xfail else set()
            adapter = _open_adapter(options, stack)
        except (ValueError, OSError) as error:
            return _cannot_run(" ".join(str(error).split()))
        report = run(adapter, cases, frozenset(xfail), options.dtype, announce)
    if options.json:
        named, dtype = options.adapter or options.command, options.dtype or dtype_of(adapter)
        _print(json.dumps(record(report, named, dtype)))
    else:
        _print(table(report))
    if all(result.outcome == "skipped" for result in report.results):
        return _cannot_run("nothing was tested: none of these cases is supported")
    return 1 if report.unexpected else 0


def announce(dialect: str) -> None:
    """Say on standard error what the kit is busy with.

    Args:
        dialect: whose cases fail.
    """
    print(f"searching for what is computed in place of {dialect} ...", file=sys.stderr)


def _open_adapter(options: argparse.Namespace, stack: ExitStack) -> Adapter:
    """The implementation under test; the stack ends its program."""
    if options.in_process and options.adapter:
        return load_adapter(options.adapter)
    if options.adapter:
        return stack.enter_context(closing(IsolatedAdapter(options.adapter, options.timeout)))
    return stack.enter_context(closing(CommandAdapter(options.command, timeout=options.timeout)))


def _typed() -> str:
    """The command that was typed."""
    return INSTALLED if Path(sys.argv[0]).stem == INSTALLED else MODULE


def _cannot_run(reason: str) -> int:
    """Print why the kit cannot run; returns the exit status for it."""
    print(f"{_typed()}: error: {reason}", file=sys.stderr)
    return 2


def _print(text: str) -> None:
    """A reader that stops early, as `head` does, is no error; what is left goes nowhere."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
