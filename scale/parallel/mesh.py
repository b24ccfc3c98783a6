"""The devices of a run, and how they compute. Results depend on neither, up to rounding."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, TypeAlias

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from scale.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes of the mesh that split a batch

AttentionKind: TypeAlias = Literal["plain", "dot_product", "splash"]
RematPolicy: TypeAlias = Literal["none", "dots", "full"]
Remat: TypeAlias = Literal["auto", RematPolicy]
Dtype: TypeAlias = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Runtime:
    """How a model is computed, a static part of it: another runtime is another compiled program.

    Attributes:
        mesh: The devices; None for one device.
        attention: The implementation of attention.
        remat: What the backward pass recomputes, as in `RuntimeConfig`.
        dtype: The type of activations and products.
    """

    mesh: Mesh | None = None
    attention: AttentionKind = "plain"
    remat: Remat = "auto"
    dtype: Dtype = "float32"

    def constrain(self, array: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
        """The array, each dimension split over these axes of the mesh (None: not split)."""
        if self.mesh is None:
            return array
        return jax.lax.with_sharding_constraint(array, self.sharding(*axes))

    def sharding(self, *axes: str | tuple[str, ...] | None) -> NamedSharding:
        """The sharding whose dimensions are split over these axes of the mesh."""
        assert self.mesh is not None
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    @property
    def platform(self) -> str:
        """The kind of the devices: cpu, gpu or tpu."""
        device = jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]
        return device.platform

    @property
    def needs_layout(self) -> bool:
        """Whether rows must be packed with a layout."""
        return self.attention == "splash"

    @property
    def batch_shards(self) -> int:
        """Into how many parts a batch is split."""
        return prod(self.sizes.get(axis, 1) for axis in BATCH)

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis of the mesh."""
        return {} if self.mesh is None else dict(self.mesh.shape)

    @property
    def devices(self) -> int:
        """How many devices there are."""
        return prod(self.sizes.values())


ONE_DEVICE = Runtime()


@dataclass(frozen=True)
class RuntimeConfig:
    """The devices of a run and how they compute."""

    data: int = 1
    """Devices along the axis that copies parameters and splits batches; on several TPU slices, a
    multiple of their number."""
    fsdp: int = 0
    """Devices along the axis that splits parameters and batches. 0: all remaining devices."""
    tensor: int = 1
    """Devices along the axis that splits heads and d_ff."""
    attention: Literal["auto", "plain", "dot_product", "splash"] = "auto"
    """Implementation of attention. auto: by platform."""
    remat: Remat = "auto"
    """What the backward pass recomputes. none: nothing; dots: all but products with weights; full:
    each layer from its input. auto: none for at most 8 layers on a CPU, otherwise dots."""
    dtype: Dtype = "float32"
    """Type of activations and products; parameters, log-probs and losses are float32."""
    processes: int = 1
    """Processes of the run, this one included. 0: as Cloud TPU, Slurm or Kubernetes says."""
    process: int = 0
    """Index of this process; not read where processes is 0."""
    coordinator: str = "localhost:8476"
    """Address and port of process 0; not read where processes is 0."""


def make_runtime(config: RuntimeConfig, devices: Sequence[Any] | None = None) -> Runtime:
    """The runtime of a configuration. One device of this machine needs no mesh.

    Args:
        config: The options.
        devices: The devices to use; None for all of the run.

    Returns:
        The runtime that a model carries.

    Raises:
        InputError: The devices do not form the mesh or cannot run the attention, or a plan or
            several processes leave some out.
    """
    available = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(available))
    size, total = prod(shape), len(available)
    if size < total and (devices or jax.process_count() > 1):
        raise InputError(
            f"mesh {shape}: {size} devices; a plan and several processes must use all {total}"
        )
    kind = config.attention
    platform = available[0].platform
    attention = default_attention(platform) if kind == "auto" else kind
    if attention == "splash" and platform != "tpu":
        raise InputError(f"--runtime.attention splash: runs on TPUs, not on {platform}")
    mesh = make_mesh(shape, available[:size]) if devices or size > 1 else None
    return Runtime(mesh, attention, config.remat, config.dtype)


def default_attention(platform: str) -> AttentionKind:
    """The implementation for "cpu", "gpu" (also "cuda", "rocm") or "tpu"."""
    kinds: dict[str, AttentionKind] = {"cpu": "plain", "tpu": "splash"}
    return kinds.get(platform, "dot_product")


def make_mesh(shape: tuple[int, int, int], devices: Sequence[Any]) -> Mesh:
    """A mesh (data, fsdp, tensor).

    `data` runs over the slices of a TPU pod, because the network between slices is slow.

    Raises:
        InputError: The slices do not divide `data`.
    """
    on_tpu = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1
    if shape[0] % slices:
        raise InputError(f"data {shape[0]}: does not run over {slices} slices")
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        inner = (shape[0] // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_shape(config: RuntimeConfig, devices: int) -> tuple[int, int, int]:
    """The sizes of (data, fsdp, tensor) for a number of devices.

    Raises:
        InputError: The axes need more devices than there are, or do not divide them.
    """
    fsdp = config.fsdp or devices // (config.data * config.tensor)
    shape = (config.data, fsdp, config.tensor)
    if not 0 < prod(shape) <= devices or (not config.fsdp and prod(shape) < devices):
        sizes = f"data {config.data} x fsdp {config.fsdp or '?'} x tensor {config.tensor}"
        raise InputError(f"--runtime: {sizes} devices, of {devices}")
    return shape
