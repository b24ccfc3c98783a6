"""Other libraries against the conformance kit: they fail what is recorded, and nothing else."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.peers.findings import findings_of
from benchmarks.peers.registry import PEERS

pytestmark = pytest.mark.slow


def run(peer, command):
    """In a process of its own: some of them warn when imported, and some exclude each other."""
    if missing := peer.missing():
        pytest.skip(f"needs {missing}; see benchmarks/README.md")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_kit(peer):
    report = run(peer, peer.command)
    assert (report["unexpected"], report["mended"], report["follows"]) == ([], [], peer.follows)
    answered = {
        f"{r['objective']}/{r['dialect']}" for r in report["results"] if r["outcome"] != "skipped"
    }
    assert answered == set(peer.claims)


@pytest.mark.parametrize(
    "peer", {peer.module: peer for peer in PEERS}.values(), ids=lambda peer: peer.module
)
def test_findings(peer):
    answers = run(peer, [sys.executable, "-m", "benchmarks.peers.findings", peer.module])
    np.testing.assert_equal(
        answers, {finding.title: finding.answer for finding in findings_of(peer.module)}
    )
