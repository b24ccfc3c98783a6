"""minipref and scale are clients of the kit: float32, bfloat16, and sharded over eight devices."""

import json
import os
import subprocess
import sys

import pytest

from reference.conformance.dialects import DIALECTS

pytestmark = pytest.mark.slow

LOSSES = {
    ("dpo", "plain"),
    ("ipo", "paper"),
    ("ipo", "sum"),
    ("distillation", "d-dpo"),
    ("ensemble", "batch-min"),
    ("ensemble", "hull"),
    ("ensemble", "mean"),
    ("pessimistic", "sampled-kl"),
    ("pessimistic", "exact-kl"),
    ("reward", "bradley-terry"),
}
MODELS = {("logps", "sum"), ("logps", "shared-prefix")} | {
    key for key in DIALECTS if key[0] == "training"
}
DATA = {key for key in DIALECTS if key[0] == "data"}
SUPPORTED = {"minipref": LOSSES | MODELS, "scale": DATA | MODELS}
CONSTANT = {
    "grads.ref_chosen_logps",
    "grads.ref_rejected_logps",
}  # neither differentiates in the reference

CLIENTS = {
    "benchmarks.adapters.minipref:adapter": 1,
    "benchmarks.adapters.minipref:bfloat16": 1,
    "benchmarks.adapters.scale:adapter": 1,
    "benchmarks.adapters.scale:bfloat16": 1,
    "benchmarks.adapters.scale:adapter on 8": 8,
    "benchmarks.adapters.scale:sharded": 8,
}


def python(devices, *arguments):
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize("client", CLIENTS)
def test_client_passes(client):
    kit = ("-W", "error", "-m", "reference.conformance", "--json", "--adapter")
    done = python(CLIENTS[client], *kit, client.split()[0])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads(done.stdout)["results"]
    passed = {(r["objective"], r["dialect"]) for r in results if r["outcome"] == "passed"}
    assert passed == SUPPORTED[client.split(":")[0].split(".")[-1]]
    assert {r["outcome"] for r in results} == {"passed", "skipped"}
    assert {name for r in results for name in r["unchecked"]} <= CONSTANT


SHARDED = """
import numpy as np
from benchmarks.adapters.scale import sharded, table_model
from scale.parallel.mesh import make_runtime
table = table_model(np.ones((8, 8)), make_runtime(sharded.runtime)).table
sharding = table.sharding
assert len(sharding.device_set) == 8 and sharding.shard_shape(table.shape) == (4, 4), sharding
"""


def test_sharded_client_is_sharded():
    done = python(8, "-c", SHARDED)
    assert done.returncode == 0, done.stderr[-2000:]
