import hashlib
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from scale.files import atomic, fingerprint, read_json, write_json
from scale.io import arrays as arrays_module
from scale.io.arrays import all_finite, load_tree, save_tree


def test_atomic_replaces_the_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic(path) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".txt"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="halfway"), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("halfway")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_without_a_name_names_the_file(tmp_path):
    """NumPy on a full disk says how many numbers it wrote, and not where."""
    with (
        pytest.raises(OSError, match=r"a\.npy: cannot be written: 9 requested and 5 written"),
        atomic(tmp_path / "a.npy"),
    ):
        raise OSError("9 requested and 5 written")


def test_json_round_trip(tmp_path):
    value = {"a": [1, 2.5, None, "é"], "b": {"c": True}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", [float("nan")])
    assert read_json(tmp_path / "a.json") == 1


def test_fingerprint_of_a_file_is_its_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert fingerprint(tmp_path / "a") == "ba7816bf8f01cfea"
    assert hashlib.sha256(b"abc").hexdigest().startswith("ba7816bf8f01cfea")


def test_fingerprint_of_a_folder_sees_names_and_contents_and_not_its_place(tmp_path):
    def folder(name: str, files: dict[str, str]) -> str:
        for file, text in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(text)
        return fingerprint(tmp_path / name)

    first = folder("first", {"a": "1", "sub/b": "2"})
    assert len(first) == 16
    assert folder("same", {"sub/b": "2", "a": "1"}) == first
    others = [
        {"a": "1", "sub/b": "3"},
        {"a": "1", "sub/c": "2"},
        {"a": "1"},
        {"a": "12", "sub/b": ""},
    ]
    assert len({first, *(folder(f"other{i}", files) for i, files in enumerate(others))}) == 5


def test_fingerprint_of_several_paths_has_an_order_and_boundaries(tmp_path):
    for name, text in {"a": "ab", "b": "c", "c": "a", "d": "bc"}.items():
        (tmp_path / name).write_text(text)
    a, b, c, d = (tmp_path / name for name in "abcd")
    assert len({fingerprint(a, b), fingerprint(b, a), fingerprint(c, d), fingerprint(a)}) == 4


class Toy(eqx.Module):
    weights: jax.Array
    scalar: jax.Array
    layers: list[eqx.nn.Linear]
    step: np.ndarray
    other: dict[str, Any]
    name: str = eqx.field(static=True)


def toy(seed: int) -> Toy:
    keys = jax.random.split(jax.random.key(seed), 3)
    return Toy(
        weights=jax.random.normal(keys[0], (3, 2)).astype(jnp.bfloat16),
        scalar=jnp.asarray(seed + 0.5, jnp.bfloat16),
        layers=[eqx.nn.Linear(2, 3, key=key) for key in keys[1:]],
        step=np.asarray(2**40 + seed),
        other={
            "mask": jnp.arange(4) % 2 == seed,
            "empty": jnp.zeros((0, 2)),
            "act": jax.nn.relu,
            "rate": 0.1,
        },
        name="toy",
    )


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y)
        if eqx.is_array(x) or isinstance(x, np.ndarray):
            assert x.dtype == y.dtype and x.shape == y.shape
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_tree_round_trip(tmp_path):
    save_tree(tmp_path / "m.safetensors", toy(0))
    assert_same(load_tree(tmp_path / "m.safetensors", toy(1)), toy(0))
    assert list(tmp_path.iterdir()) == [tmp_path / "m.safetensors"]


def test_a_tree_is_restored_into_a_skeleton_of_shapes(tmp_path):
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.asarray(1)}
    save_tree(tmp_path / "m.safetensors", tree)
    assert_same(load_tree(tmp_path / "m.safetensors", jax.eval_shape(lambda: tree)), tree)


def test_arrays_of_any_memory_layout_keep_their_values(tmp_path):
    grid = np.arange(6).reshape(2, 3)
    tree = {"fortran": np.asfortranarray(grid), "strided": grid[:, ::2], "transposed": grid.T}
    save_tree(tmp_path / "m.safetensors", tree)
    loaded = load_tree(tmp_path / "m.safetensors", tree)
    for name, array in tree.items():
        np.testing.assert_array_equal(loaded[name], array)


def test_equal_trees_give_equal_files(tmp_path):
    for name in ("a", "b"):
        save_tree(tmp_path / name, toy(0))
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": shape(2), "b": shape(3), "c": shape(1)}, r"m\.safetensors: missing leaf \['c'\]"),
        ({"a": shape(2)}, r"m\.safetensors: unexpected leaf \['b'\]"),
        (
            {"a": shape(2), "b": shape(3, 1)},
            r"m\.safetensors: leaf \['b'\] is float32\[3\], expected float32\[3, 1\]",
        ),
        (
            {"a": shape(2), "b": shape(3, dtype=jnp.bfloat16)},
            r"m\.safetensors: leaf \['b'\] is float32\[3\], expected bfloat16\[3\]",
        ),
    ],
)
def test_a_tree_that_does_not_fit_is_refused_by_name(tmp_path, like, message):
    save_tree(tmp_path / "m.safetensors", {"a": jnp.zeros(2), "b": jnp.zeros(3)})
    with pytest.raises(ValueError, match=message):
        load_tree(tmp_path / "m.safetensors", like)


def test_a_damaged_file_is_refused_by_name(tmp_path):
    save_tree(tmp_path / "m.safetensors", {"a": jnp.zeros(64)})
    whole = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"m\.safetensors: not a safetensors file"):
        load_tree(tmp_path / "m.safetensors", {"a": jnp.zeros(64)})


def test_leaves_are_named_by_their_path_and_nothing_is_pickled(tmp_path):
    save_tree(tmp_path / "m.safetensors", toy(0))
    data = (tmp_path / "m.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    names = {".weights", ".scalar", ".step", ".other['mask']", ".other['empty']"}
    layers = {f".layers[{i}].{part}" for i in (0, 1) for part in ("weight", "bias")}
    assert header.keys() == names | layers


# ---- piece by piece


@pytest.mark.parametrize("piece", [1, 24, 100, 2**24])
def test_the_file_is_the_one_that_the_library_writes_of_whole_arrays(tmp_path, monkeypatch, piece):
    """Whatever the size of a piece: less than a number, a row, a matrix. The library orders leaves
    by dtype."""
    rng = np.random.default_rng(0)
    shapes = {
        "cube": (3, 5, 7),
        "row": (13,),
        "scalar": (),
        "empty": (2, 0, 3),
        "column": (9, 1),
        "one": (1, 1, 1),
    }
    arrays = {f"['{k}']": rng.normal(size=size).astype(np.float32) for k, size in shapes.items()}
    arrays["['half']"] = np.arange(30).reshape(5, 6).astype(jnp.bfloat16)
    arrays["['mask']"] = np.arange(11) % 2 == 0
    tree = {name[2:-2]: jnp.asarray(array) for name, array in arrays.items()}
    monkeypatch.setattr(arrays_module, "PIECE", max(piece, 4))
    save_tree(tmp_path / "m.safetensors", tree)
    assert (tmp_path / "m.safetensors").read_bytes() == safetensors.numpy.save(arrays)
    assert_same(load_tree(tmp_path / "m.safetensors", tree), tree)


def test_a_dtype_that_the_format_lacks_is_refused_by_leaf(tmp_path):
    message = r"m\.safetensors: leaf \['key'\]: safetensors has no dtype key<fry>"
    with pytest.raises(ValueError, match=message):
        save_tree(tmp_path / "m.safetensors", {"a": jnp.zeros(2), "key": jax.random.key(0)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_found(bad):
    for tree in ({"a": jnp.zeros((3, 2)).at[2, 1].set(bad)}, {"a": np.asarray(bad, jnp.bfloat16)}):
        assert not all_finite({"b": jnp.ones(2), "n": jnp.arange(3)} | tree)
    assert all_finite({"b": jnp.ones(2), "n": np.arange(3), "f": jax.nn.relu})


# ---- sharded arrays, in other processes: run as a script, this file is one of them

SPECS = {
    "a": PartitionSpec(None, "x", "y"),
    "b": PartitionSpec(("x", "y")),
    "c": PartitionSpec("y", None, "x"),
    "d": PartitionSpec(),
}


def on_mesh(mesh_shape: tuple[int, int], names: str) -> dict[str, Any]:
    """Arrays that count from 0, the first sharded by the spec of the first of `names` and so on."""
    mesh = jax.make_mesh(mesh_shape, ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    cube = np.arange(512, dtype=np.float32).reshape(8, 8, 8)
    tree = {name: cube + i for i, name in enumerate("abcd")}
    tree["b"] = tree["b"].astype(jnp.bfloat16)
    shardings = [NamedSharding(mesh, SPECS[name]) for name in names]
    return {
        name: jax.make_array_from_callback((8, 8, 8), sharding, array.__getitem__)
        for (name, array), sharding in zip(tree.items(), shardings, strict=True)
    }


def sharded(folder: str, port: str = "", index: str = "0") -> None:
    """Save on one mesh, load on others; the part of every device must be what it is when the tree
    is made there."""
    if port:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    arrays_module.PIECE = 300
    save_tree(Path(folder) / index / "m.safetensors", on_mesh((4, 2), "abcd"))
    for like in (on_mesh((4, 2), "abcd"), on_mesh((2, 4), "bcda"), on_mesh((1, 8), "cdab")):
        shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like
        )
        loaded = load_tree(Path(folder) / "0/m.safetensors", shapes)
        for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(like), strict=True):
            assert a.sharding == b.sharding and a.dtype == b.dtype
            for part, expected in zip(a.addressable_shards, b.addressable_shards, strict=True):
                np.testing.assert_array_equal(part.data, expected.data)
        bad = loaded["a"].at[7, 7, 7].set(jnp.nan)
        assert all_finite(loaded) and not all_finite(loaded | {"a": bad})


@pytest.fixture
def script() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts this file as a script: `script(devices, role, *arguments)`. None outlives its test."""
    started = []
    fixed = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}

    def start(devices: int, role: str, *arguments: object) -> subprocess.Popen:
        flags = f"--xla_force_host_platform_device_count={devices}"
        variables = os.environ | fixed | {"XLA_FLAGS": flags}
        command = [sys.executable, "-W", "error", __file__, role, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        started.append(subprocess.Popen(command, env=variables, text=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        with process:
            pass


def printed(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    return out


def require_counting(path: Path) -> None:
    arrays = safetensors.numpy.load_file(path)
    for i, name in enumerate("abcd"):
        expected = (np.arange(512, dtype=np.float32) + i).reshape(8, 8, 8)
        expected = expected.astype(jnp.bfloat16) if i == 1 else expected
        np.testing.assert_array_equal(arrays[f"['{name}']"], expected)


def test_sharded_arrays_are_saved_whole_and_loaded_in_parts(tmp_path, script):
    printed(script(8, "sharded", tmp_path))
    require_counting(tmp_path / "0/m.safetensors")


@pytest.mark.slow
def test_two_processes_save_one_file_and_each_loads_its_parts(tmp_path, script):
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    processes = [script(4, "sharded", tmp_path, port, i) for i in range(2)]
    outcomes = [(p.communicate(timeout=600)[0], p.returncode) for p in processes]
    assert [code for _, code in outcomes] == [0, 0], outcomes
    require_counting(tmp_path / "0/m.safetensors")
    written = [path.name for path in tmp_path.rglob("*.safetensors")]
    assert written == ["m.safetensors"]  # process 1 has written none


MEGABYTE, LARGEST, LEAVES = 2**20, 128, 8


def memory(folder: str, task: str, layout: str) -> None:
    """Prints the peak of this process's memory, in MB, beyond what it was before and the model of
    1 GB."""
    path, before = Path(folder) / "m.safetensors", resident()
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, SPECS["a"]) if layout == "sharded" else None
    size = 8, 2048, LARGEST * MEGABYTE // 4 // 8 // 2048
    leaf = jax.ShapeDtypeStruct(size, jnp.float32, sharding=sharding)
    if task == "save":
        make = jax.jit(
            lambda value: jnp.full(leaf.shape, value, jnp.float32), out_shardings=sharding
        )
        save_tree(path, {f"{i}": make(i) for i in range(LEAVES)})
    else:
        tree = load_tree(path, {f"{i}": leaf for i in range(LEAVES)})
        assert all_finite(tree)
        assert [float(a[-1, -1, -1]) for a in tree.values()] == list(range(LEAVES))
    print(highest() - before - LEAVES * LARGEST)


def highest() -> int:
    """Peak of this process: `ru_maxrss` starts at the size of the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024


def resident() -> int:
    jnp.zeros(1).block_until_ready()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // MEGABYTE


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layout", ["whole", "sharded"])
def test_saving_and_loading_need_memory_for_the_largest_array_and_not_for_the_model(
    tmp_path, script, layout
):
    for task in ("save", "load"):
        # A loaded machine frees a buffer late, never early: the least of three runs counts.
        peaks = (int(printed(script(8, "memory", tmp_path, task, layout))) for _ in range(3))
        assert any(peak < LARGEST + 150 for peak in peaks), task


if __name__ == "__main__":
    {"sharded": sharded, "memory": memory}[sys.argv[1]](*sys.argv[2:])
