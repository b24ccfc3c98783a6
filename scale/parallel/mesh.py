"""How a model is computed and where its arrays lie; nothing here changes what is computed, but for rounding."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, TypeAlias

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from scale.errors import InputError

Kind: TypeAlias = Literal["plain", "dot_product", "splash"]


BATCH = ("data", "fsdp")  # the axes of the mesh that split rows


def kind_for(platform: str) -> Kind:
    """The implementation for "cpu", "gpu" (also "cuda", "rocm") or "tpu"."""
    kinds: dict[str, Kind] = {"cpu": "plain", "tpu": "splash"}
    return kinds.get(platform, "dot_product")


RematPolicy: TypeAlias = Literal["none", "dots", "full"]


Remat: TypeAlias = Literal["auto", RematPolicy]


AXES = ("data", "fsdp", "tensor")


@dataclass(frozen=True)
class Runtime:
    """A static part of a model: two models that differ in it compile to different programs."""

    mesh: Mesh | None = None
    attention: Kind = "plain"
    remat: Remat = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def constrain(self, array: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
        """`array` with its dimensions split over these mesh axes (None: not split)."""
        return array if self.mesh is None else jax.lax.with_sharding_constraint(array, self.sharding(*axes))

    def sharding(self, *axes: str | tuple[str, ...] | None) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    @property
    def platform(self) -> str:
        """Of the devices that compute: cpu, gpu or tpu."""
        device = jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]
        return device.platform

    @property
    def regions(self) -> bool:
        """Whether rows must have one static layout."""
        return self.attention == "splash"

    @property
    def batch_shards(self) -> int:
        """Devices that share out a batch's rows."""
        return prod(self.sizes.get(axis, 1) for axis in BATCH)

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis of the mesh."""
        return {} if self.mesh is None else dict(self.mesh.shape)

    @property
    def devices(self) -> int:
        return prod(self.sizes.values())


ONE_DEVICE = Runtime()


@dataclass(frozen=True)
class RuntimeConfig:
    """On what and how to compute: results agree within rounding."""

    data: int = 1
    """Devices along the axis that copies the parameters and splits the batch; several slices lie along it."""
    fsdp: int = 0
    """Devices along the axis that splits parameters and batch. 0: all that the other axes leave."""
    tensor: int = 1
    """Devices along the axis that splits heads and d_ff."""
    attention: Literal["auto", "plain", "dot_product", "splash"] = "auto"
    """Implementation of attention. auto: by platform."""
    remat: Remat = "auto"
    """What the backward pass computes again. none: nothing; dots: all but products with weights; full: each layer from
    its input. auto: none for at most 8 layers on a CPU, else dots."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and products; parameters, log-probs and losses are float32."""
    processes: int = 1
    """Processes of the run, this one included. 0: found out (Cloud TPU, Slurm, Kubernetes)."""
    process: int = 0
    """Which of them this one is, where they are not found out."""
    coordinator: str = "localhost:8476"
    """Address and port of process 0, where they are not found out."""


def make_runtime(compute: RuntimeConfig, devices: Sequence[Any] | None = None) -> Runtime:
    """What a model carries. One device of this machine needs no mesh."""
    here = jax.devices() if devices is None else devices
    shape = mesh_shape(compute, len(here))
    if prod(shape) < len(here) and (devices or jax.process_count() > 1):
        raise InputError(f"mesh {shape}: {prod(shape)} devices; a plan and several processes must use all {len(here)}")
    kind = kind_for(here[0].platform) if compute.attention == "auto" else compute.attention
    mesh = make_mesh(shape, here[: prod(shape)]) if devices or prod(shape) > 1 else None
    return Runtime(mesh, kind, compute.remat, compute.dtype)


def make_mesh(shape: tuple[int, int, int], devices: Sequence[Any]) -> Mesh:
    """A mesh (data, fsdp, tensor); `data` runs over the slices of a TPU pod, between which the network is slow."""
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if shape[0] % slices:
        raise InputError(f"data {shape[0]}: does not run over {slices} slices")
    inner = (shape[0] // slices, *shape[1:])
    grid = (mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True) if slices == 1
            else mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices, allow_split_physical_axes=True))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_shape(compute: RuntimeConfig, devices: int) -> tuple[int, int, int]:
    """Errors: InputError where the axes need more devices than there are, or do not divide them."""
    shape = (compute.data, compute.fsdp or devices // (compute.data * compute.tensor), compute.tensor)
    if not 0 < prod(shape) <= devices or (not compute.fsdp and prod(shape) < devices):
        sizes = f"data {compute.data} x fsdp {compute.fsdp or '?'} x tensor {compute.tensor}"
        raise InputError(f"--runtime: {sizes} devices, of {devices}")
    return shape
