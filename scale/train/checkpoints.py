"""Checkpoints of a training run: sharded, written while training goes on, whole or not there at all (Orbax)."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from scale.errors import InputError
from scale.io.arrays import leaf_types, named, require_alike


@dataclass(frozen=True)
class Checkpoints:
    """The latest complete checkpoint of a run, `FOLDER/STEP/`. Of several processes, all must call each method.

    `record`, a JSON object, says which run it is: what another run saved is refused.
    """

    folder: Path
    record: dict[str, Any]

    @cached_property
    def manager(self) -> Any:
        """Made, and Orbax imported, when the first checkpoint is read or written: most short runs have none."""
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.CRITICAL)  # whatever goes wrong is raised too
        options = ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True)
        return ocp.CheckpointManager(self.folder.absolute(), options=options, item_names=("state", "record"))

    def restore(self, state: Any) -> Any:
        """The latest checkpoint's arrays in the shardings of `state`, or `state` where there is no checkpoint.

        The mesh and the number of processes may be others than those that saved. Raises InputError where the
        checkpoint is of another run, does not fit `state` or cannot be read.
        """
        step = self.manager.latest_step() if self.folder.exists() else None
        if step is None:
            return state
        with refusing(self.folder / str(step)):
            return self.read(step, state)

    def read(self, step: int, state: Any) -> Any:
        from orbax.checkpoint.args import Composite, JsonRestore, StandardRestore

        record = self.manager.restore(step, args=Composite(record=JsonRestore()))["record"]
        differing = [key for key in self.record.keys() | record["run"].keys()
                     if self.record.get(key) != record["run"].get(key)]
        if differing:
            raise InputError(f"{self.folder}: begun with other {', '.join(sorted(differing))}; delete it to start anew")
        require_alike(self.folder, state, record["arrays"])
        like = {k: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for k, a in named(state).items()}
        for leaf in named(state).values():
            leaf.delete()  # two states may be more than the devices hold
        arrays = self.manager.restore(step, args=Composite(state=StandardRestore(like)))["state"]
        return jax.tree_util.tree_map_with_path(lambda key, leaf: arrays.get(jax.tree_util.keystr(key), leaf), state)

    def save(self, step: int, state: Any) -> None:
        """Start to save `state`, whose buffers may be donated as soon as this returns. Waits for the save before."""
        from orbax.checkpoint.args import Composite, JsonSave, StandardSave

        record = {"run": self.record, "arrays": leaf_types(state)}
        self.manager.save(step, args=Composite(state=StandardSave(named(state)), record=JsonSave(record)), force=True)

    def close(self) -> None:
        """Wait for the last save; raises what went wrong with it."""
        if "manager" in self.__dict__:
            self.manager.close()


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # Orbax and TensorStore raise nothing narrower
        raise InputError(f"{path}: cannot be read: {error}") from error
