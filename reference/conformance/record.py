"""A report for programs: one JSON object, as `record.schema.json` describes it."""

import hashlib
from datetime import UTC, datetime
from typing import Any

from reference.conformance import __version__
from reference.conformance.cases import VECTORS
from reference.conformance.diagnosis import Diagnosis
from reference.conformance.judge import Result
from reference.conformance.report import OUTCOMES, Report
from reference.conformance.sentences import sentences

FORMAT = 1
SEVERITIES = {"failed": "error", "errored": "error", "noted": "note"}


def record(report: Report, adapter: str, dtype: str) -> dict[str, Any]:
    """A report as plain JSON.

    Args:
        report: what `run` returned.
        adapter: the name of what was tested.
        dtype: how exact it was held to be.

    Returns:
        What `record.schema.json` describes.
    """
    outcomes = [result.outcome for result in report.results]
    return {
        "format": FORMAT,
        "kit": {"version": __version__, "vectors": VECTORS.name, "sha256": vectors_hash()},
        "adapter": adapter,
        "dtype": dtype,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "results": [_result(result, report) for result in report.results],
        "diagnoses": [_diagnosis(diagnosis) for diagnosis in report.diagnoses],
        "search_errors": report.search_errors,
        "follows": report.follows,
        "totals": {name: outcomes.count(name) for name in OUTCOMES},
        "unexpected": [result.case.id for result in report.unexpected],
        "mended": report.mended,
        "badge": _badge(report),
    }


def vectors_hash() -> str:
    """The SHA-256 of all vector files: of each its name, its size and its bytes, by name."""
    digest = hashlib.sha256()
    for path in sorted(VECTORS.glob("*/*.json")):
        content = path.read_bytes()
        digest.update(f"{path.parent.name}/{path.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _result(result: Result, report: Report) -> dict[str, Any]:
    return {
        "id": result.case.id,
        "objective": result.case.objective,
        "dialect": result.case.dialect,
        "flags": list(result.case.flags),
        "outcome": result.outcome,
        "severity": SEVERITIES.get(result.outcome),
        "expected_failure": result.case.id in report.expected_failures,
        "detail": result.detail,
        "unchecked": list(result.unchecked),
    }


def _diagnosis(diagnosis: Diagnosis) -> dict[str, Any]:
    parts = [
        {
            "outputs": list(part.outputs),
            "hypotheses": [{"name": h.name, "flags": list(h.flags)} for h in part.hypotheses],
        }
        for part in diagnosis.parts
    ]
    return {
        "dialect": diagnosis.dialect,
        "known": diagnosis.known,
        "whole": diagnosis.whole,
        "parts": parts,
        "smallest_failing_case": diagnosis.smallest.id,
        "furthest_failing_case": diagnosis.furthest.id,
        "text": sentences(diagnosis),
    }


def _badge(report: Report) -> dict[str, Any]:
    """What shields.io makes a badge of."""
    good = sum(r.outcome in ("passed", "noted") for r in report.results)
    tested = sum(r.outcome != "skipped" for r in report.results)
    failing = bool(report.unexpected) or not tested
    return {
        "schemaVersion": 1,
        "label": "preference conformance",
        "message": f"{good} of {tested} cases",
        "color": "red" if failing else "brightgreen" if good == tested else "yellow",
    }
