"""`python -m benchmarks.conformance`: the code of other libraries against the conformance kit.

The command writes `results/conformance.md`: what each library claims and computes, what passes, and
the findings. It leaves out libraries that are not installed.
"""

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.peers.findings import KINDS, Finding, findings_of
from benchmarks.peers.registry import PEERS, Peer

RESULTS = Path(__file__).parent / "results" / "conformance.md"
COLUMNS = ("passed", "noted", "failed", "errored")
TOTALS = """| library | package | version | passed | noted | failed | errored | not claimed |
|---|---|---|---|---|---|---|---|"""
EXPLANATION = """A library has to do what its documentation claims, or, where the documentation is
silent, what the name of its code says. What it computes is what the kit says: a hypothesis that
reproduces its numbers on all cases. A noted case is a convention. The library's own code runs,
unchanged, in float32 on the CPU; `benchmarks/peers/` shows the calls. OpenRLHF, LLaMA-Factory and
ms-swift run with a newer transformers than they ask for, and OpenRLHF without DeepSpeed and
FlashAttention."""
CLAIMS = """| library | claims | computes | where it claims so | passed | noted | failed | errored |
|---|---|---|---|---|---|---|---|"""


def main() -> None:
    """Write the page and print it."""
    peers = [peer for peer in PEERS if not peer.missing()]
    reports = {peer.name: report(peer) for peer in peers}
    answers = {module: probed(module) for module in dict.fromkeys(peer.module for peer in peers)}
    RESULTS.write_text(page(peers, reports, answers), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


def report(peer: Peer) -> dict[str, Any]:
    """The JSON that the kit prints of one adapter.

    Raises:
        RuntimeError: The kit did not run, or its failures are not those of the list.
    """
    answer = json.loads(output(peer.command, {0, 1}))
    unexpected, mended = answer["unexpected"], answer["mended"]
    if unexpected or mended:
        raise RuntimeError(f"{peer.xfail}: unexpected {unexpected}, mended {mended}")
    return answer


def probed(module: str) -> dict[str, Any]:
    """Title of each finding -> what the installed library answers.

    It has a process of its own: some libraries exclude each other.
    """
    command = [sys.executable, "-m", "benchmarks.peers.findings", module]
    return json.loads(output(command, {0}).splitlines()[-1])


def output(command: list[str], expected: set[int]) -> str:
    """What a command prints; its exit status has to be one of `expected`."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode not in expected:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return done.stdout


def page(peers: list[Peer], reports: dict[str, dict], answers: dict[str, dict]) -> str:
    """The page in Markdown."""
    paragraphs = [
        "`python -m benchmarks.conformance`",
        describe(),
        "\n".join(
            [CLAIMS, *(row for peer in peers for row in claim_rows(peer, reports[peer.name]))]
        ),
        EXPLANATION,
        "\n".join([TOTALS, *(totals_row(peer, reports[peer.name]) for peer in peers)]),
        "## Findings",
        "\n".join(f"- *{kind}*: {meaning}" for kind, meaning in KINDS.items()),
        *(
            description(peer, finding, answers[peer.module][finding.title])
            for peer in peers
            for finding in findings_of(peer.module)
            if finding.adapter == peer.adapter
        ),
    ]
    return "\n\n".join(paragraphs) + "\n"


def totals_row(peer: Peer, report: dict[str, Any]) -> str:
    numbers = [str(report["totals"][outcome]) for outcome in (*COLUMNS, "skipped")]
    return table_row(peer.library, peer.package, peer.version(), *numbers)


def table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def claim_rows(peer: Peer, report: dict[str, Any]) -> list[str]:
    """A row of the table for each dialect that the library claims."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for result in report["results"]:
        counts[f"{result['objective']}/{result['dialect']}"][result["outcome"]] += 1
    rows = []
    for name, where in peer.claims.items():
        numbers = [str(counts[name][outcome] or "") for outcome in COLUMNS]
        rows.append(table_row(peer.library, name, computed(name, report), where, *numbers))
    return rows


def computed(name: str, report: dict[str, Any]) -> str:
    """What is computed in place of a dialect, whatever is refused."""
    parts = [p for d in report["diagnoses"] if d["dialect"] == name for p in d["parts"]]
    wrong = [part for part in parts if part["outputs"] != ["refusals"]]
    if not wrong:
        return "as claimed"
    said = [" or ".join(h["name"] for h in p["hypotheses"]) or "unknown" for p in wrong]
    return "; ".join(dict.fromkeys(said))


def description(peer: Peer, finding: Finding, answer: Any) -> str:
    """A finding in Markdown."""
    by_hand = finding.by_hand.replace("\n", "\n    ")
    paragraphs = [
        f"### {peer.library}: {finding.title} ({finding.kind})",
        f"Documentation: {finding.documentation}",
        f"Code: {finding.code}",
        f"    {by_hand}\n    {peer.package} {peer.version()}: {json.dumps(answer)}",
    ]
    return "\n\n".join(paragraphs)


if __name__ == "__main__":
    main()
