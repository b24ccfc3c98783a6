"""The tensors of a Llama-architecture checkpoint as a table, and models read and written by it.

Names and layouts are those of Hugging Face. A model is read tensor by tensor, each only as far as
this process's devices need it, into arrays that lie on the devices: the host holds one tensor of
the file at most.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import einops
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path
from jaxtyping import Int

from scale.errors import InputError, as_input_error
from scale.io.arrays import all_finite
from scale.io.boxes import Box, box_shape, to_devices, to_host
from scale.model.adapters import stored
from scale.model.config import ModelConfig
from scale.model.transformer import Transformer
from scale.parallel.mesh import Dtype, Runtime
from scale.parallel.sharding import abstract_sharded

Read = Callable[[str, Box], np.ndarray]


@dataclass(frozen=True)
class Parameter:
    """One of our parameters, and the tensors that it is made of, in einops' notation."""

    axes: str
    """Our axes; `layer` and `part` count tensors, which do not have these axes."""
    tensor_axes: str
    """The axes of each tensor."""
    names: tuple[str, ...]
    """The names of the tensors along `part`; `{}` is the layer."""

    @property
    def slab_axes(self) -> str:
        """The axes of a slab: what one tensor fills of our parameter."""
        return self.axes.replace("layer", "1").replace("part", "1")

    @property
    def groups(self) -> list[list[str]]:
        """For each axis of a tensor, our axes that it flattens."""
        groups = re.findall(r"\(.*?\)|\w+", self.tensor_axes)
        return [group.strip("()").split() for group in groups]

    def sizes(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Our axes with their sizes."""
        return dict(zip(self.axes.split(), shape, strict=True))

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of each tensor of a parameter of this shape."""
        sizes = self.sizes(shape)
        return tuple(prod(sizes[axis] for axis in group) for group in self.groups)

    def slabs(self, shape: tuple[int, ...]) -> Iterator[tuple[str, Box]]:
        """The name of each tensor, and the box of the parameter that it fills."""
        sizes = self.sizes(shape)
        for layer in range(sizes.get("layer", 1)):
            for part, name in enumerate(self.names):
                starts = {"layer": layer, "part": part}
                yield (
                    name.format(layer),
                    tuple(
                        slice(starts[axis], starts[axis] + 1) if axis in starts else slice(0, size)
                        for axis, size in sizes.items()
                    ),
                )

    def to_tensor(self, slab: np.ndarray) -> np.ndarray:
        """A slab in the layout of the tensor."""
        return einops.rearrange(slab, f"{self.slab_axes} -> {self.tensor_axes}")

    def read_slab(
        self, read: Callable[[Box], np.ndarray], shape: tuple[int, ...], box: Box
    ) -> np.ndarray:
        """A box of a slab, in our layout.

        A tensor may flatten several of our axes into one, such as (heads, head_dim). `read` is
        asked for a range of the first of them; the others are cut from the result.

        Args:
            read: Reads a box of the tensor.
            shape: The shape of the parameter.
            box: A part of the slab.

        Returns:
            The values of the box, in the axes of the slab.
        """
        sizes = self.sizes(shape)
        cuts = dict(zip(sizes, box, strict=True))
        inner = {axis: sizes[axis] for _, *rest in self.groups for axis in rest}
        steps = {first: prod(sizes[axis] for axis in rest) for first, *rest in self.groups}
        tensor = read(
            tuple(
                slice(cuts[axis].start * step, cuts[axis].stop * step)
                for axis, step in steps.items()
            )
        )
        slab = einops.rearrange(tensor, f"{self.tensor_axes} -> {self.slab_axes}", **inner)
        return slab[tuple(cuts[axis] if axis in inner else slice(None) for axis in sizes)]


LAYER = "model.layers.{}."
ATTENTION = LAYER + "self_attn."
MLP = LAYER + "mlp."
KEY_VALUE = ATTENTION + "k_proj.", ATTENTION + "v_proj."

TABLE = {
    ".embedding": Parameter("V E", "V E", ("model.embed_tokens.weight",)),
    ".head": Parameter("V E", "V E", ("lm_head.weight",)),
    ".norm": Parameter("D", "D", ("model.norm.weight",)),
    ".blocks.norm": Parameter("layer D", "D", (LAYER + "input_layernorm.weight",)),
    ".blocks.mlp_norm": Parameter("layer D", "D", (LAYER + "post_attention_layernorm.weight",)),
    ".blocks.query": Parameter("layer D H k", "(H k) D", (ATTENTION + "q_proj.weight",)),
    ".blocks.key_value": Parameter(
        "layer D part G k", "(G k) D", tuple(name + "weight" for name in KEY_VALUE)
    ),
    ".blocks.query_bias": Parameter("layer H k", "(H k)", (ATTENTION + "q_proj.bias",)),
    ".blocks.key_value_bias": Parameter(
        "layer part G k", "(G k)", tuple(name + "bias" for name in KEY_VALUE)
    ),
    ".blocks.query_norm": Parameter("layer k", "k", (ATTENTION + "q_norm.weight",)),
    ".blocks.key_norm": Parameter("layer k", "k", (ATTENTION + "k_norm.weight",)),
    ".blocks.attention_out": Parameter("layer H k D", "D (H k)", (ATTENTION + "o_proj.weight",)),
    ".blocks.gate_up": Parameter(
        "layer D part F", "F D", (MLP + "gate_proj.weight", MLP + "up_proj.weight")
    ),
    ".blocks.mlp_out": Parameter("layer F D", "D F", (MLP + "down_proj.weight",)),
}
IGNORED = ("lm_head.weight", "rotary_emb.inv_freq")  # of a model with tied embeddings; of old files


@dataclass(frozen=True)
class Weights:
    """An opened checkpoint: its names and shapes are known, none of its tensors is read."""

    path: Path
    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    """The shape of each tensor, under Hugging Face's name."""
    read: Read
    """Reads a box of a tensor, in a floating-point dtype."""

    def load(self, runtime: Runtime, dtype: Dtype = "float32") -> Transformer:
        """The model with the shardings of a runtime; its matrices have this dtype.

        Raises:
            InputError: A tensor is missing, unexpected, of another shape than the config says, or
                not finite.
        """

        def make() -> Transformer:
            return stored(Transformer(self.config, jax.random.key(0), runtime), dtype)

        self.check_sizes()
        with as_input_error(self.path):
            skeleton = eqx.filter_eval_shape(make)
        self.check(skeleton)
        load = partial(load_parameter, self.read)
        model = tree_map_with_path(load, abstract_sharded(skeleton, runtime))
        for path, leaf in tree_leaves_with_path(model):
            if not all_finite(leaf):
                names = TABLE[keystr(path)].names
                raise InputError(f"{self.path}: a weight of {' or '.join(names)} is not finite")
        return model

    def check_sizes(self) -> None:
        """Refuse a config of a much larger model, whose shapes alone would take time."""
        config, sides = self.config, [side for shape in self.shapes.values() for side in shape]
        for number, most, what in (
            (config.num_layers, len(self.shapes), "layers"),
            (max(config.vocab_size, config.d_model, config.d_ff), max(sides, default=0), "a side"),
            (config.num_heads * config.head_dim, max(sides, default=0), "heads"),
        ):
            if number > most:
                raise InputError(f"{self.path}: {what} of {number} by its config, {most} at most")

    def check(self, skeleton: Transformer) -> None:
        """Compare names and shapes with those of a model's skeleton."""
        expected = {name: tensor.shape for name, tensor in tensors_of(skeleton).items()}
        for name in expected.keys() - self.shapes.keys():
            raise InputError(f"{self.path}: tensor {name} is missing")
        for name in self.shapes.keys() - expected.keys():
            if not name.endswith(IGNORED):
                raise InputError(f"{self.path}: tensor {name} is unexpected")
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                in_file = list(self.shapes[name])
                raise InputError(
                    f"{self.path}: tensor {name} is {in_file} in the file, {list(shape)} by its "
                    "config"
                )


@dataclass(frozen=True)
class ModelTensor:
    """A tensor of the file that a model is written to."""

    parameter: Parameter
    leaf: Any
    box: Box
    """The part of the leaf that it holds."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parameter.tensor_shape(self.leaf.shape)

    def array(self) -> np.ndarray:
        """The tensor on the host. Where other processes hold some of it, all of these call this."""
        return np.ascontiguousarray(self.parameter.to_tensor(to_host(self.leaf, self.box)))


def tensors_of(model: Transformer) -> dict[str, ModelTensor]:
    """The tensors of a model, or of its skeleton of shapes, in the order of our parameters."""
    leaves = [(TABLE[keystr(path)], leaf) for path, leaf in tree_leaves_with_path(model)]
    return {
        name: ModelTensor(parameter, leaf, box)
        for parameter, leaf in leaves
        for name, box in parameter.slabs(leaf.shape)
    }


def load_parameter(read: Read, path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros on the devices, into which the parameter's tensors are written one by one."""
    parameter = TABLE[keystr(path)]
    array = jnp.zeros(like.shape, like.dtype, device=like.sharding)
    for name, box in parameter.slabs(like.shape):
        read_slab = partial(parameter.read_slab, partial(read, name), like.shape)
        slab = to_devices(box_shape(box), array.sharding, read_slab)
        starts = tuple(side.start for side in box)
        array = written(array, slab, starts, array.sharding).block_until_ready()
    return array


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def written(
    array: jax.Array,
    slab: jax.Array,
    starts: tuple[Int[jax.Array, ""], ...],
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    """An array, whose memory is used again, with a slab in its place."""
    array = jax.lax.dynamic_update_slice(array, slab.astype(array.dtype), starts)
    return jax.lax.with_sharding_constraint(array, sharding)
