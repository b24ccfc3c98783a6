"""`python -m benchmarks.conformance`: other libraries' own code against the conformance kit.

Writes `results/conformance.md`: what each claims, what passes, and what was found. What is not installed is left out.
"""

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.peers.findings import KINDS, Finding, of
from benchmarks.peers.registry import PEERS, Peer

RESULTS = Path(__file__).parent / "results" / "conformance.md"
COLUMNS = ("passed", "failed", "errored")
TOTALS = """| library | package | version | passed | failed | errored | skipped: not claimed |
|---|---|---|---|---|---|---|"""
HELD = """Cases by dialect. A library is held to what its documentation claims, or else to what its code is named after.
Its own code runs, unchanged, in float32 on the CPU; `benchmarks/peers/` says how it is called. OpenRLHF and
LLaMA-Factory run with a newer transformers than they ask for, OpenRLHF without DeepSpeed and FlashAttention."""
CLAIMS = """| library | claims | where | passed | failed | errored | follows in fact |
|---|---|---|---|---|---|---|"""


def main() -> None:
    peers = [peer for peer in PEERS if not peer.missing()]
    reports = {peer.name: report(peer) for peer in peers}
    answers = {module: probed(module) for module in dict.fromkeys(peer.module for peer in peers)}
    RESULTS.write_text(page(peers, reports, answers), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


def report(peer: Peer) -> dict[str, Any]:
    """Errors: RuntimeError where the kit did not run, or found what the list of expected failures does not have."""
    found = json.loads(output(peer.command, {0, 1}))
    if found["unexpected"] or found["mended"]:
        raise RuntimeError(f"{peer.xfail}: unexpected {found['unexpected']}, mended {found['mended']}")
    return found


def probed(module: str) -> dict[str, Any]:
    """The library's answers to its findings' questions, in a process of its own: some libraries exclude each other."""
    return json.loads(output([sys.executable, "-m", "benchmarks.peers.findings", module], {0}).splitlines()[-1])


def output(command: list[str], expected: set[int]) -> str:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode not in expected:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return done.stdout


def page(peers: list[Peer], reports: dict[str, dict], answers: dict[str, dict]) -> str:
    return "\n".join([
        "`python -m benchmarks.conformance`", "", describe(), "", TOTALS,
        *(total(peer, reports[peer.name]) for peer in peers), "", HELD, "", CLAIMS,
        *(row for peer in peers for row in dialects(peer, reports[peer.name])), "", "## Findings", "",
        *(f"- *{kind}*: {meaning}" for kind, meaning in KINDS.items()), "",
        *(told(peer, finding, answers[peer.module][finding.title])
          for peer in peers for finding in of(peer.module) if finding.adapter == peer.adapter),
    ]).rstrip() + "\n"


def total(peer: Peer, found: dict[str, Any]) -> str:
    numbers = [str(found["totals"][outcome]) for outcome in (*COLUMNS, "skipped")]
    return table_row(peer.library, peer.package, peer.version(), *numbers)


def table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def dialects(peer: Peer, found: dict[str, Any]) -> list[str]:
    counts: dict[str, Counter] = defaultdict(Counter)
    for result in found["results"]:
        counts[f"{result['objective']}/{result['dialect']}"][result["outcome"]] += 1
    return [line(peer, name, counts[name], found["follows"].get(name, [])) for name in peer.claims]


def line(peer: Peer, name: str, counts: Counter, follows: list[str]) -> str:
    numbers = [str(counts[outcome] or "") for outcome in COLUMNS]
    return table_row(peer.library, name, peer.claims[name], *numbers, ", ".join(follows))


def told(peer: Peer, finding: Finding, answer: Any) -> str:
    by_hand = finding.by_hand.replace("\n", "\n    ")
    return "\n".join([
        f"### {peer.library}: {finding.title} ({finding.kind})", "",
        f"Documentation: {finding.says}", "", f"Code: {finding.does}", "",
        f"    {by_hand}", f"    {peer.package} {peer.version()}: {json.dumps(answer)}", "",
    ])


if __name__ == "__main__":
    main()
