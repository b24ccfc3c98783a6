"""`python -m reference.conformance --adapter module:attribute`: an implementation against the vectors.

Exits with 1 on any unexpected failure, with 2 where the kit cannot run.
"""

import argparse
import json
import sys
from pathlib import Path

from reference.conformance.lines import CommandAdapter
from reference.conformance.report import as_json, cases_named, load_adapter, read_expected_failures, run, table


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("python -m reference.conformance", description=__doc__)
    tested = made.add_mutually_exclusive_group(required=True)
    tested.add_argument("--adapter", metavar="MODULE:ATTRIBUTE", help="a Python object with supports and evaluate")
    tested.add_argument("--command", help="a program that speaks JSON lines on standard input and output")
    made.add_argument("--dtype", choices=("float64", "float32", "bfloat16"), help="judge at this precision")
    made.add_argument("--only", metavar="OBJECTIVE[/DIALECT]", help="these cases alone")
    made.add_argument("--xfail", metavar="FILE", type=Path, help="ids of cases that are expected to fail, one a line")
    made.add_argument("--json", action="store_true", help="print JSON in place of the table")
    return made


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    try:
        cases = cases_named(given.only)
        xfail = read_expected_failures(given.xfail, cases) if given.xfail else frozenset()
        adapter = load_adapter(given.adapter) if given.adapter else CommandAdapter(given.command)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    report = run(adapter, cases, xfail, given.dtype)
    print(json.dumps(as_json(report)) if given.json else table(report))
    return 1 if report.unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
