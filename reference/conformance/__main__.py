"""`python -m reference.conformance --adapter module:attribute`: an implementation against the vectors."""

import argparse
import json
import os
import sys
from contextlib import ExitStack, closing, redirect_stdout
from pathlib import Path

from reference.conformance.cases import load_cases
from reference.conformance.judge import DTYPES
from reference.conformance.lines import CommandAdapter
from reference.conformance.report import as_json, cases_named, load_adapter, read_expected_failures, run, table

NAME = "python -m reference.conformance"
WHAT = "Puts every test vector to an implementation of preference optimisation and says which of them it meets."
EXIT = "Exits with 0 where all did as expected, with 1 on any other failure, with 2 where the kit cannot run."


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(NAME, description=WHAT, epilog=EXIT)
    tested = made.add_mutually_exclusive_group(required=True)
    tested.add_argument("--adapter", metavar="MODULE:ATTRIBUTE", help="a Python object with supports and evaluate")
    tested.add_argument("--command", help="a program that speaks JSON lines on standard input and output")
    made.add_argument("--dtype", choices=DTYPES, help="judge at this precision, whatever the adapter says of itself")
    made.add_argument("--only", metavar="OBJECTIVE[/DIALECT]", help="these cases alone")
    made.add_argument("--xfail", metavar="FILE", type=Path, help="ids of cases that are expected to fail, one a line")
    made.add_argument("--json", action="store_true", help="print JSON in place of the table")
    return made


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))  # whatever the implementation prints; the report stands alone
        try:
            cases = cases_named(given.only)
            xfail = read_expected_failures(given.xfail, load_cases()) if given.xfail else frozenset()
            program = stack.enter_context(closing(CommandAdapter(given.command))) if given.command is not None else None
            adapter = program or load_adapter(given.adapter)
        except (ValueError, OSError) as error:
            print(f"{NAME}: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        report = run(adapter, cases, xfail, given.dtype)
    _print(json.dumps(as_json(report)) if given.json else table(report))
    if all(result.outcome == "skipped" for result in report.results):
        print(f"{NAME}: error: nothing was tested: none of these cases is supported", file=sys.stderr)
        return 2
    return 1 if report.unexpected else 0


def _print(text: str) -> None:
    """A reader that stops early, as `head` does, is no error; what is left goes nowhere."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
