"""Sharding as data: annotations name a parameter's logical axes, and rules map them to mesh axes.

`query: Float[Array, "*layers D H k"]` has the logical axes D, H and k. Leading axes, of layers and
of the reward models of an ensemble, are never split. The rules decide the shardings of whatever has
the structure of the parameters (gradients, optimizer states), and of initialisation and loading, so
no host holds a whole model.
"""

import re
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, get_args, get_type_hints

import equinox as eqx
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey, SequenceKey, keystr, tree_map_with_path

from scale.errors import InputError
from scale.parallel.mesh import ONE_DEVICE, Runtime

Rules = Mapping[str, str | None]

RULES: dict[str, str | None] = {
    "D": "fsdp",  # residual width, of all kernels
    "H": "tensor",  # query heads
    "G": "tensor",  # key/value heads
    "F": "tensor",  # d_ff
    "V": "fsdp",  # rows of an embedding: 256,000 are not divisible by 12-way tensor
    "E": "tensor",  # residual width, of embeddings
    "k": None,  # head_dim
}


def shardings(tree: Any, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> Any:
    """The sharding of each array of a tree of modules.

    Args:
        tree: Arrays that are not fields of a module are copied to every device.
        mesh: The mesh.
        rules: The mesh axis of each logical axis; None does not split it.

    Returns:
        A tree of shardings with the structure of `tree`.

    Raises:
        InputError: A logical axis has no rule, a rule names an axis that the mesh does not have, a
            parameter uses a mesh axis twice, or a mesh axis does not divide a dimension. The
            message names the parameter.
    """

    def sharding_of(path: Any, leaf: Any) -> NamedSharding:
        axes = logical_axes(tree, path)
        return NamedSharding(
            mesh, partition_spec(keystr(path), axes, leaf.shape, mesh.shape, rules)
        )

    return tree_map_with_path(sharding_of, tree)


def logical_axes(tree: Any, path: tuple[Any, ...]) -> tuple[str, ...]:
    """The axes in the annotation of the module field at `path`, leading `*axes` left out.

    A field whose annotation is `...` has the axes of the field that holds its module.
    """
    *parents, field = path
    module = reduce(subtree, parents, tree)
    if not isinstance(module, eqx.Module):
        return ()
    hint = get_type_hints(type(module))[field.name]
    dims = next(t for t in (hint, *get_args(hint)) if hasattr(t, "dim_str")).dim_str
    if dims == "...":
        return logical_axes(tree, tuple(parents))
    return tuple(name for name in dims.split() if not name.startswith("*"))


def subtree(tree: Any, key: Any) -> Any:
    """The child of a tree at one key of a path."""
    if isinstance(key, GetAttrKey):
        return getattr(tree, key.name)
    return tree[key.idx if isinstance(key, SequenceKey) else key.key]


def partition_spec(
    name: str,
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    mesh: Mapping[str, int],
    rules: Rules,
) -> PartitionSpec:
    """The mesh axis of each dimension of a parameter.

    Args:
        name: The parameter, for errors.
        axes: The logical axes of the last dimensions; a number is not split.
        shape: Its shape; a dimension of size 1 is not split.
        mesh: Devices along each axis of the mesh.
        rules: The mesh axis of each logical axis.

    Returns:
        The partition.

    Raises:
        InputError: As in `shardings`.
    """
    num_leading = len(shape) - len(axes)
    if num_leading < 0:
        return PartitionSpec()  # an optimizer's placeholder for a moment that it does not keep
    split = [
        None if size == 1 else mesh_axis(name, axis, size, mesh, rules)
        for axis, size in zip(axes, shape[num_leading:], strict=True)
    ]
    used = [axis for axis in split if axis]
    for axis in used:
        if used.count(axis) > 1:
            raise InputError(
                f"parameter {name} ({' '.join(axes)}): mesh axis {axis!r} is used twice"
            )
    return PartitionSpec(*[None] * num_leading, *split)


def mesh_axis(name: str, axis: str, size: int, mesh: Mapping[str, int], rules: Rules) -> str | None:
    """The mesh axis of one logical axis of a parameter; raises InputError as `shardings` does."""
    if re.fullmatch(r"\d+", axis):
        return None
    if axis not in rules:
        raise InputError(
            f"parameter {name}: no rule for its logical axis {axis!r}; rules are for "
            f"{', '.join(rules)}"
        )
    target = rules[axis]
    if target is None:
        return None
    if target not in mesh:
        raise InputError(
            f"parameter {name}: the rule {axis} -> {target!r} names no mesh axis, which are "
            f"{', '.join(mesh)}"
        )
    if size % mesh[target]:
        raise InputError(
            f"parameter {name}: axis {axis} of {size} is not divisible by {target} = {mesh[target]}"
        )
    return target


def runtime_of(tree: Any) -> Runtime:
    """The runtime of the model in a tree of modules, such as the trunk of a reward model."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: hasattr(node, "runtime"))
    return next((node.runtime for node in nodes if hasattr(node, "runtime")), ONE_DEVICE)


def abstract_sharded(like: Any, runtime: Runtime) -> Any:
    """The tree of shapes `like`, with the sharding of each."""
    if runtime.mesh is None:
        return like
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        like,
        shardings(like, runtime.mesh),
    )


def constrain(tree: Any, runtime: Runtime) -> Any:
    """The tree, each array sharded by the rules; inside a jitted function."""
    if runtime.mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, shardings(tree, runtime.mesh))


def initialise(
    make: Callable[..., Any],
    *args: Any,
    donate: tuple[int, ...] = (),
    options: dict[str, Any] | None = None,
) -> Any:
    """Compute a tree that contains a model, sharded by the rules: no host ever holds it whole.

    Args:
        make: Returns the tree.
        *args: Arguments of `make`. What differs from run to run, such as a random key, is one, so
            that the compiled program is found again.
        donate: The arguments whose buffers the tree may take over.
        options: Of the compiler.

    Returns:
        `make(*args)`.
    """

    def make_sharded(*args: Any) -> Any:
        tree = make(*args)
        return constrain(tree, runtime_of(tree))

    return jax.jit(make_sharded, donate_argnums=donate, compiler_options=options)(*args)
