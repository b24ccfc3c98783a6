"""The tensors of a Llama-architecture checkpoint as data, and reading and writing a model by that table.

Names and layouts are those of Hugging Face. A model is read tensor by tensor, each only as far as this process's
devices need it, and written into arrays that lie on the devices: the host never holds more than one tensor of the file.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path
from jaxtyping import Int

from scale.errors import InputError
from scale.io import arrays as files
from scale.model.config import ModelConfig
from scale.model.transformer import Transformer
from scale.parallel.mesh import Runtime
from scale.parallel.sharding import abstract_sharded

Window = tuple[slice, ...]


Read = Callable[[str, Window], np.ndarray]


Bounds = tuple[tuple[int | None, int | None], ...]  # slices as what can be a dictionary's key


@dataclass(frozen=True)
class Parameter:
    """One of our parameters, and the tensors that it is made of."""

    axes: str
    """Our axes; `n` counts layers and `2` the tensors of a layer, neither of which the tensors have."""
    layout: str
    """A tensor's axes, `G*k` being two of ours as one."""
    names: tuple[str, ...]
    """The tensors along axis `2`; `{}` is the layer."""

    def sizes(self, shape: tuple[int, ...]) -> dict[str, int]:
        return dict(zip(self.axes.split(), shape, strict=True))

    @property
    def groups(self) -> list[list[str]]:
        return [group.split("*") for group in self.layout.split()]

    @property
    def flat(self) -> list[str]:
        return [axis for group in self.groups for axis in group]

    @property
    def order(self) -> list[str]:
        """A tensor's axes in our order."""
        return [axis for axis in self.axes.split() if axis in self.flat]

    def tensors(self, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Each tensor's name, and where in our parameter it begins."""
        axes = self.axes.split()
        for layer in range(shape[0]) if axes[0] == "n" else [0]:
            for part, name in enumerate(self.names):
                place = {"n": layer, "2": part}
                yield name.format(layer), tuple(place.get(axis, 0) for axis in axes)

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        sizes = self.sizes(shape)
        return tuple(prod(sizes[axis] for axis in group) for group in self.groups)

    def piece_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """One tensor's part of a parameter of this shape."""
        return tuple(size if axis in self.flat else 1 for axis, size in self.sizes(shape).items())


LAYER = "model.layers.{}."


ATTENTION = LAYER + "self_attn."


TABLE = {
    ".embedding": Parameter("V E", "V E", ("model.embed_tokens.weight",)),
    ".head": Parameter("V E", "V E", ("lm_head.weight",)),
    ".norm": Parameter("D", "D", ("model.norm.weight",)),
    ".blocks.norm": Parameter("n D", "D", (LAYER + "input_layernorm.weight",)),
    ".blocks.mlp_norm": Parameter("n D", "D", (LAYER + "post_attention_layernorm.weight",)),
    ".blocks.query": Parameter("n D H k", "H*k D", (ATTENTION + "q_proj.weight",)),
    ".blocks.key_value": Parameter(
        "n D 2 G k", "G*k D", (ATTENTION + "k_proj.weight", ATTENTION + "v_proj.weight")
    ),
    ".blocks.query_bias": Parameter("n H k", "H*k", (ATTENTION + "q_proj.bias",)),
    ".blocks.key_value_bias": Parameter("n 2 G k", "G*k", (ATTENTION + "k_proj.bias", ATTENTION + "v_proj.bias")),
    ".blocks.query_norm": Parameter("n k", "k", (ATTENTION + "q_norm.weight",)),
    ".blocks.key_norm": Parameter("n k", "k", (ATTENTION + "k_norm.weight",)),
    ".blocks.attention_out": Parameter("n H k D", "D H*k", (ATTENTION + "o_proj.weight",)),
    ".blocks.gate_up": Parameter("n D 2 F", "F D", (LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight")),
    ".blocks.mlp_out": Parameter("n F D", "D F", (LAYER + "mlp.down_proj.weight",)),
}


IGNORED = ("lm_head.weight", "rotary_emb.inv_freq")  # of a tied model; of old files


@dataclass(frozen=True)
class Weights:
    """An opened checkpoint: what it holds is known, none of it is read."""

    path: Path
    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    """Of each tensor, under Hugging Face's name."""
    read: Read
    """A window of a tensor, in a floating-point type."""

    def load(self, runtime: Runtime) -> Transformer:
        """The model, in float32, each array where `runtime` has it.

        Errors: InputError naming the tensors that are missing, unexpected or of another shape than the config says.
        """
        skeleton = eqx.filter_eval_shape(Transformer, self.config, jax.random.key(0), runtime)
        self.check(skeleton)
        return tree_map_with_path(partial(load_parameter, self.read), abstract_sharded(skeleton, runtime))

    def check(self, skeleton: Transformer) -> None:
        wanted = {name: entry.shape for name, entry in entries(skeleton).items()}
        for name in wanted.keys() - self.shapes.keys():
            raise InputError(f"{self.path}: tensor {name} is missing")
        for name in self.shapes.keys() - wanted.keys():
            if not name.endswith(IGNORED):
                raise InputError(f"{self.path}: tensor {name} is unexpected")
        for name, shape in wanted.items():
            if self.shapes[name] != shape:
                raise InputError(f"{self.path}: tensor {name} is {list(self.shapes[name])}, not {list(shape)}")


@dataclass(frozen=True)
class Entry:
    """A tensor that a model is written as."""

    parameter: Parameter
    leaf: Any
    start: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parameter.tensor_shape(self.leaf.shape)

    def array(self) -> np.ndarray:
        """The tensor, on the host. Where other processes hold some of it, all of these call this."""
        order, sizes = self.parameter.order, self.parameter.sizes(self.leaf.shape)
        size = self.parameter.piece_shape(self.leaf.shape)
        part = files.piece(self.leaf, tuple(slice(at, at + n) for at, n in zip(self.start, size, strict=True)))
        ours = part.reshape([sizes[axis] for axis in order])
        turned = ours.transpose([order.index(axis) for axis in self.parameter.flat])
        return np.ascontiguousarray(turned.reshape(self.shape))


def entries(model: Transformer) -> dict[str, Entry]:
    """The tensors of a model, or of its skeleton of shapes, by name and in our parameters' order."""
    found = {}
    for path, leaf in tree_leaves_with_path(model):
        parameter = TABLE[keystr(path)]
        found.update({name: Entry(parameter, leaf, start) for name, start in parameter.tensors(leaf.shape)})
    return found


def load_parameter(read: Read, path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros on the devices, into which the parameter's tensors are written one by one."""
    parameter = TABLE[keystr(path)]
    array = jnp.zeros(like.shape, like.dtype, device=like.sharding)
    for name, start in parameter.tensors(like.shape):
        value = load_tensor(partial(piece, read, name, parameter, like.shape), parameter.piece_shape(like.shape), array)
        array = written(array, value, start, array.sharding).block_until_ready()
    return array


def load_tensor(window: Callable[[Bounds], np.ndarray], shape: tuple[int, ...], array: jax.Array) -> jax.Array:
    """Split over the devices as `array` is; copies on several devices are read once."""
    once = cache(window)
    return jax.make_array_from_callback(shape, array.sharding, lambda index: once(bounds(index or ())))


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def written(
    array: jax.Array, value: jax.Array, start: tuple[Int[jax.Array, ""], ...], sharding: jax.sharding.Sharding
) -> jax.Array:
    """`array`, whose memory is used again, with `value` at `start`."""
    whole = jax.lax.dynamic_update_slice(array, value.astype(array.dtype), start)
    return jax.lax.with_sharding_constraint(whole, sharding)


def bounds(index: Window) -> Bounds:
    return tuple((s.start, s.stop) for s in index)


def piece(read: Read, name: str, parameter: Parameter, shape: tuple[int, ...], index: Bounds) -> np.ndarray:
    """A window of one tensor's part of a parameter of this shape, in our layout.

    Of axes that are one in the file, such as heads and head size, the first one's window is read, and then cut.
    """
    sizes, flat = parameter.sizes(shape), parameter.flat
    cuts = {axis: slice(*slice(*bound).indices(sizes[axis])) for axis, bound in zip(sizes, index, strict=True)}
    steps = {first: prod(sizes[axis] for axis in rest) for first, *rest in parameter.groups}
    raw = read(name, tuple(slice(cuts[axis].start * step, cuts[axis].stop * step) for axis, step in steps.items()))
    apart = raw.reshape([cuts[axis].stop - cuts[axis].start if axis in steps else sizes[axis] for axis in flat])
    asked = apart[tuple(slice(None) if axis in steps else cuts[axis] for axis in flat)]
    turned = asked.transpose([flat.index(axis) for axis in parameter.order])
    return np.expand_dims(turned, [i for i, axis in enumerate(sizes) if axis not in flat])
