"""Counts of compiled programs, by theory: on 8 simulated CPU devices and for real TPUs.

Run as a program (`python test_hlo_compiled.py cpu|tpu FOLDER`) it compiles those programs and
writes their HLO; XLA must find its environment set before it starts.
"""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from scale.plan.hlo import count

pytestmark = pytest.mark.slow

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
V4 = {"chips_per_host_bounds": (2, 2, 1), "chip_config_name": "megacore"}
TOPOLOGIES = {  # size of the tensor axis, keywords of get_topology_desc
    "v5e": (2, {"topology_name": "v5e:2x4"}),
    "v4": (4, {"topology_name": "v4:2x2x4", **V4}),
    "slices": (2, {"topology_name": "v4:2x2x1", "num_slices": 2, **V4}),
}
LAYERS, ROWS, D, F = 8, 512, 512, 1024  # of the compiled programs; ROWS over all devices
PRODUCT = 2 * ROWS * D * D


def array(shape, dtype, mesh: Mesh, *axes) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def compiled(function, *arrays, out=None) -> str:
    return jax.jit(function, out_shardings=out).lower(*arrays).compile().as_text()


def layer(x, weight):
    return jnp.tanh(x @ weight), None


def loss(weights, x, remat: bool):
    step = jax.checkpoint(layer) if remat else layer
    return jax.lax.scan(step, x, weights)[0].astype(jnp.float32).sum()


def layers_of(mesh: Mesh) -> dict[str, str]:
    """Programs of one device."""
    x, weights = array((ROWS, D), jnp.bfloat16, mesh), array((LAYERS, D, D), jnp.bfloat16, mesh)
    heads = array((4, 128, 8, 64), jnp.bfloat16, mesh)
    return {
        "one": compiled(lambda x, w: layer(x, w)[0], x, array((D, D), jnp.bfloat16, mesh)),
        "scan": compiled(lambda x, w: jax.lax.scan(layer, x, w)[0], x, weights),
        "gradient": compiled(jax.grad(lambda w, x: loss(w, x, False), (0, 1)), weights, x),
        "remat": compiled(jax.grad(lambda w, x: loss(w, x, True), (0, 1)), weights, x),
        "heads": compiled(lambda q, k: jnp.einsum("bthk,bshk->bhts", q, k), heads, heads),
    }


def mlp_of(mesh: Mesh) -> str:
    """Layers of two products, rows over data and fsdp, weights over fsdp and tensor."""
    rows = array((ROWS, D), jnp.bfloat16, mesh, ("data", "fsdp"))

    def mlp(x, weights):
        y = jnp.einsum("rf,fd->rd", jnp.tanh(jnp.einsum("rd,df->rf", x, weights[0])), weights[1])
        return jax.lax.with_sharding_constraint(x + y, rows.sharding), None

    first = array((LAYERS, D, F), jnp.bfloat16, mesh, None, "fsdp", "tensor")
    second = array((LAYERS, F, D), jnp.bfloat16, mesh, None, "tensor", "fsdp")

    def forward(x, *weights):
        return jax.lax.scan(mlp, x, weights)[0]

    return compiled(forward, rows, first, second, out=rows.sharding)


def collectives_of(mesh: Mesh) -> str:
    """A loop of three turns with one of every kind."""
    t = mesh.shape["tensor"]

    def turn(c, x):
        x = x + c
        return c + 1, (
            jax.lax.psum(jnp.sin(x), "tensor"),
            jax.lax.psum(jnp.log(x), ("data", "fsdp")),
            jax.lax.all_gather(x, "fsdp"),
            jax.lax.all_to_all(jnp.tanh(x), "data", 0, 1, tiled=True),
            jax.lax.psum_scatter(jnp.cos(x), "fsdp", tiled=True),
            jax.lax.ppermute(jnp.exp(x), "tensor", [(i, (i + 1) % t) for i in range(t)]),
        )

    specs = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec(None, tuple(MESH))}
    map_over = partial(jax.shard_map, mesh=mesh, check_vma=False, **specs)
    mapped = map_over(lambda x: jax.lax.scan(turn, 0.0, x)[1])
    return compiled(mapped, array((3, 1024, 1024), jnp.float32, mesh))


def programs(devices) -> dict[str, str]:
    """HLO by name; the devices of the mesh are not in the order of their own numbers."""
    halves = np.array(devices).reshape(2, -1)
    order = np.concatenate([halves[:, ::2], halves[:, 1::2]], 1)
    mesh = Mesh(order.reshape(2, 2, -1), tuple(MESH))
    whole = {"mlp": mlp_of(mesh), "collectives": collectives_of(mesh)}
    return layers_of(Mesh(order[0, :1], ("data",))) | whole


def main(platform: str, folder: str) -> None:
    texts = {"cpu": programs(jax.devices())} if platform == "cpu" else {}
    for name, (_, options) in TOPOLOGIES.items() if platform == "tpu" else ():
        texts[name] = programs(topologies.get_topology_desc(platform="tpu", **options).devices)
    Path(folder, "hlo.json").write_text(json.dumps(texts))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The programs of a platform, compiled by a process of its own when first asked for."""
    compiled = {}

    def get(machine: str, program: str) -> str:
        platform = "cpu" if machine == "cpu" else "tpu"
        if platform == "tpu" and importlib.util.find_spec("libtpu") is None:
            pytest.skip("the real TPU compiler needs libtpu (extra `tpu`)")
        if machine not in compiled:
            compiled.update(compile_for(platform, tmp_path_factory.mktemp("hlo")))
        return compiled[machine][program]

    return get


def compile_for(platform: str, folder: Path) -> dict[str, dict[str, str]]:
    settings = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    command = [sys.executable, __file__, platform, str(folder)]
    subprocess.run(command, env={**os.environ, **settings}, check=True, timeout=300)
    return json.loads((folder / "hlo.json").read_text())


def tensor(machine: str) -> int:
    return TOPOLOGIES[machine][0] if machine in TOPOLOGIES else MESH["tensor"]


MACHINES = ("cpu", *TOPOLOGIES)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("program", "products"),
    [
        ("one", 1),
        ("scan", LAYERS),
        ("gradient", 3 * LAYERS),
        ("remat", 4 * LAYERS),
        ("heads", 4 * 8 * 128 * 128 * 64 / (ROWS * D * D)),
    ],
)
def test_compiled_flops(texts, machine, program, products):
    """A gradient costs 3 times the forward pass, and 4 times with recomputation."""
    counts = count(texts(machine, program), {"data": 1})
    assert (counts.flops, counts.collective_bytes, counts.uncounted) == (products * PRODUCT, {}, {})


@pytest.mark.parametrize("machine", MACHINES)
def test_compiled_layers_gather_weights_and_sum_activations(texts, machine):
    """A layer gathers the fsdp shards of both weights and sums the outputs over tensor."""
    t = tensor(machine)
    counts = count(texts(machine, "mlp"), MESH | {"tensor": t})
    gathered, summed = 2 * (D * F // t) / 2, 2 * (ROWS // 4 * D) * (t - 1) / t
    size = 4 if machine == "cpu" else 2  # bytes: the CPU compiler widens bfloat16
    assert counts.flops == LAYERS * 2 * 2 * ROWS * D * F / (4 * t)
    assert counts.collective_bytes["fsdp"] == LAYERS * gathered * size
    assert counts.collective_bytes["tensor"] == LAYERS * summed * size


@pytest.mark.parametrize("machine", ["cpu", "v5e", "v4"])
def test_compiled_collectives(texts, machine):
    """Of 4 MiB, three times, in units of that; data and fsdp are 2 devices each."""
    t = tensor(machine)
    counts = count(texts(machine, "collectives"), MESH | {"tensor": t})
    sent = {axes: n / (3 * 1024 * 1024 * 4) for axes, n in counts.collective_bytes.items()}
    sums = {"tensor": 2 * (t - 1) / t + 1, "data+fsdp": 2 * 3 / 4}
    assert sent == sums | {"fsdp": 1 + 1 / 2, "data": 1 / 2}


def test_compiled_collectives_between_slices(texts):
    """A sum over data and fsdp: in the slice, of half of it between slices, a gather of halves."""
    counts = count(texts("slices", "collectives"), MESH)
    sent = {axes: n / (3 * 1024 * 1024 * 4) for axes, n in counts.collective_bytes.items()}
    assert sent == {"tensor": 1 + 1, "data": 1 / 2 + 1 / 2, "fsdp": (1 + 1 / 2) + (1 + 1 / 2)}
    assert counts.uncounted == {}


if __name__ == "__main__":
    main(*sys.argv[1:])
