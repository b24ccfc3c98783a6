import hashlib
import json
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scale.files import atomic, fingerprint, load_tree, read_json, read_metadata, save_tree, write_json


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
    assert fingerprint(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()[:16] == "ba7816bf8f01cfea"


def test_fingerprint_of_a_folder_sees_names_and_contents_and_not_its_place(tmp_path):
    def folder(name: str, files: dict[str, str]) -> str:
        for file, text in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(text)
        return fingerprint(tmp_path / name)

    first = folder("first", {"a": "1", "sub/b": "2"})
    assert len(first) == 16
    assert folder("same", {"sub/b": "2", "a": "1"}) == first
    others = [{"a": "1", "sub/b": "3"}, {"a": "1", "sub/c": "2"}, {"a": "1"}, {"a": "12", "sub/b": ""}]
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
    save_tree(tmp_path / "m.safetensors", toy(0), {"step": 3, "config": {"d": [64]}})
    assert_same(load_tree(tmp_path / "m.safetensors", toy(1)), toy(0))
    assert read_metadata(tmp_path / "m.safetensors") == {"step": 3, "config": {"d": [64]}}
    assert list(tmp_path.iterdir()) == [tmp_path / "m.safetensors"]


def test_a_tree_is_restored_into_a_skeleton_of_shapes(tmp_path):
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.asarray(1)}
    save_tree(tmp_path / "m.safetensors", tree)
    assert_same(load_tree(tmp_path / "m.safetensors", jax.eval_shape(lambda: tree)), tree)
    assert read_metadata(tmp_path / "m.safetensors") == {}


def test_arrays_of_any_memory_layout_keep_their_values(tmp_path):
    grid = np.arange(6).reshape(2, 3)
    tree = {"fortran": np.asfortranarray(grid), "strided": grid[:, ::2], "transposed": grid.T}
    save_tree(tmp_path / "m.safetensors", tree)
    loaded = load_tree(tmp_path / "m.safetensors", tree)
    for name, array in tree.items():
        np.testing.assert_array_equal(loaded[name], array)


def test_equal_trees_give_equal_files(tmp_path):
    for name in ("a", "b"):
        save_tree(tmp_path / name, toy(0), {"x": 1, "y": 2, "z": 3})
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": jnp.zeros(2), "b": jnp.zeros(3), "c": jnp.zeros(1)}, r"m\.safetensors: missing leaf \['c'\]"),
        ({"a": jnp.zeros(2)}, r"m\.safetensors: unexpected leaf \['b'\]"),
        (
            {"a": jnp.zeros(2), "b": jnp.zeros((3, 1))},
            r"m\.safetensors: leaf \['b'\] is float32\[3\], expected float32\[3, 1\]",
        ),
        (
            {"a": jnp.zeros(2), "b": jnp.zeros(3, jnp.bfloat16)},
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
    assert header.keys() == names | layers | {"__metadata__"}
