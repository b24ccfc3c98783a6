"""Sharding as data: a parameter's annotation names its logical axes, and rules map those to mesh axes.

`query: Float[Array, "*layers D H k"]` has the logical axes D, H and k; leading layers (and members of an ensemble) are
never split. From the rules follow both the shardings of whatever is made of parameters (gradients, optimiser states)
and sharded initialisation and loading, so that no host holds a whole model.
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

RULES: dict[str, str | None] = {
    "D": "fsdp",  # residual width, of all kernels
    "H": "tensor",  # query heads
    "G": "tensor",  # key/value heads
    "F": "tensor",  # d_ff
    "V": "fsdp",  # rows of an embedding: 256,000 are not divisible by 12-way tensor
    "E": "tensor",  # residual width, of embeddings
    "k": None,  # head size
}


def shardings(tree: Any, mesh: Mesh | AbstractMesh, rules: Mapping[str, str | None] = RULES) -> Any:
    """The sharding of each array of a tree of modules; arrays that are no module's parameter are on every device.

    Errors: InputError, naming the parameter, for a logical axis without a rule, a rule for an axis that the mesh has
    not, a mesh axis used twice, or a dimension that its mesh axis does not divide.
    """

    def one(path: Any, leaf: Any) -> NamedSharding:
        axes = logical_axes(tree, path)
        return NamedSharding(mesh, partition_spec(keystr(path), axes, leaf.shape, mesh.shape, rules))

    return tree_map_with_path(one, tree)


def logical_axes(tree: Any, path: tuple[Any, ...]) -> tuple[str, ...]:
    """The names in the annotation of the module field at `path`, those of layers and members left out."""
    *way, last = path
    owner = reduce(child, way, tree)
    if not isinstance(owner, eqx.Module):
        return ()
    hint = get_type_hints(type(owner))[last.name]
    dims = next(t for t in (hint, *get_args(hint)) if hasattr(t, "dim_str")).dim_str
    return tuple(name for name in dims.split() if not name.startswith("*"))


def child(tree: Any, key: Any) -> Any:
    if isinstance(key, GetAttrKey):
        return getattr(tree, key.name)
    return tree[key.idx if isinstance(key, SequenceKey) else key.key]


def partition_spec(
    name: str, axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mapping[str, int], rules: Mapping[str, str | None]
) -> PartitionSpec:
    """The mesh axis of each dimension, `axes` naming the last ones. A dimension of 1 or a number is not split."""
    if len(shape) < len(axes):
        return PartitionSpec()  # an optimiser's placeholder for what it does not keep
    lead = len(shape) - len(axes)
    split = [None if size == 1 else mesh_axis(name, axis, size, mesh, rules)
             for axis, size in zip(axes, shape[lead:], strict=True)]
    used = [axis for axis in split if axis]
    for axis in used:
        if used.count(axis) > 1:
            raise InputError(f"parameter {name} ({' '.join(axes)}): mesh axis {axis!r} is used twice")
    return PartitionSpec(*[None] * lead, *split)


def mesh_axis(name: str, axis: str, size: int, mesh: Mapping[str, int], rules: Mapping[str, str | None]) -> str | None:
    if re.fullmatch(r"\d+", axis):
        return None
    if axis not in rules:
        raise InputError(f"parameter {name}: no rule for its logical axis {axis!r}; rules are for {', '.join(rules)}")
    target = rules[axis]
    if target is None:
        return None
    if target not in mesh:
        known = ", ".join(mesh)
        raise InputError(f"parameter {name}: the rule {axis} -> {target!r} names no mesh axis, which are {known}")
    if size % mesh[target]:
        raise InputError(f"parameter {name}: axis {axis} of {size} is not divisible by {target} = {mesh[target]}")
    return target


def runtime_of(model: Any) -> Runtime:
    """That of the (one) model in a tree of modules, such as a reward model's trunk."""
    nodes = jax.tree.leaves(model, is_leaf=lambda node: hasattr(node, "runtime"))
    return next((node.runtime for node in nodes if hasattr(node, "runtime")), ONE_DEVICE)


def abstract_sharded(like: Any, runtime: Runtime) -> Any:
    """`like`, a tree of shapes, with the sharding of each."""
    if runtime.mesh is None:
        return like
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                        like, shardings(like, runtime.mesh))


def constrain(tree: Any, runtime: Runtime) -> Any:
    """Inside a jitted function: every array where the rules say."""
    if runtime.mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, shardings(tree, runtime.mesh))


def initialise(make: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
    """`make(*args)`, a tree with a model, computed where the rules put it: no host ever holds it whole.

    The buffers of the arguments in `donate` are taken over.
    """

    def constrained(*args: Any) -> Any:
        made = make(*args)
        return constrain(made, runtime_of(made))

    return jax.jit(constrained, donate_argnums=donate)(*args)
