"""Checkpoints of a training run (Orbax): sharded, atomic, written while training goes on."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from scale.errors import InputError, as_input_error
from scale.io.arrays import leaf_types, named, require_alike


@dataclass(frozen=True)
class Checkpoints:
    """The latest complete checkpoint of a run, `FOLDER/STEP/`.

    With several processes, all must call each method.

    Attributes:
        folder: The folder of this run's checkpoints.
        record: A JSON object that identifies the run: another run's checkpoint is refused.
    """

    folder: Path
    record: dict[str, Any]

    @cached_property
    def manager(self) -> Any:
        """Orbax's, imported when the first checkpoint is read or written: short runs have none."""
        import orbax.checkpoint as ocp

        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # every error is also raised
        sys.unraisablehook = without_late_failures(sys.unraisablehook)
        options = ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True)
        folder, names = self.folder.absolute(), ("state", "record")
        return ocp.CheckpointManager(folder, options=options, item_names=names)

    @property
    def latest(self) -> int | None:
        """The step of the latest one; None where there is none."""
        return self.manager.latest_step() if self.folder.exists() else None

    def restore(self, state: Any) -> Any:
        """The latest checkpoint, or `state` where there is none.

        Args:
            state: A state whose shardings the result has; the mesh and the number of processes may
                differ from those that saved. Its buffers are deleted where there is a checkpoint.

        Returns:
            The restored state.

        Raises:
            InputError: The checkpoint is another run's, does not fit `state` or cannot be read.
        """
        step = self.latest
        if step is None:
            return state
        with as_input_error(self.folder / str(step)):
            return self.read(step, state)

    def read(self, step: int, state: Any) -> Any:
        """The checkpoint of a step, as in `restore`."""
        from orbax.checkpoint.args import Composite, JsonRestore, StandardRestore

        record = self.manager.restore(step, args=Composite(record=JsonRestore()))["record"]
        self.require_same_run(record["run"])
        require_alike(self.folder, state, record["arrays"])
        arrays = named(state)
        like = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
            for name, array in arrays.items()
        }
        for array in arrays.values():
            array.delete()  # two states may be more than the devices hold
        restored = self.manager.restore(step, args=Composite(state=StandardRestore(like)))["state"]
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: restored.get(jax.tree_util.keystr(path), leaf), state
        )

    def require_same_run(self, saved: dict[str, Any]) -> None:
        """Raise InputError where a checkpoint's record is not this run's."""
        keys = self.record.keys() | saved.keys()
        differing = sorted(key for key in keys if self.record.get(key) != saved.get(key))
        if differing:
            raise InputError(
                f"{self.folder}: begun with other {', '.join(differing)}; delete it to start anew"
            )

    def save(self, step: int, state: Any) -> None:
        """Start to save a state, after the previous save is complete.

        The buffers of `state` may be donated as soon as this returns.
        """
        from orbax.checkpoint.args import Composite, JsonSave, StandardSave

        record = {"run": self.record, "arrays": leaf_types(state)}
        items = Composite(state=StandardSave(named(state)), record=JsonSave(record))
        with as_os_error(self.folder):
            self.manager.save(step, args=items, force=True)

    def close(self) -> None:
        """Wait for the last save; raise its error if it failed."""
        if "manager" in self.__dict__:
            with as_os_error(self.folder):
                self.manager.close()


def without_late_failures(hook: Callable[[Any], None]) -> Callable[[Any], None]:
    """A `sys.unraisablehook` that says nothing of the arrays that fail after the first one.

    Orbax raises the first array's error and closes its event loop. TensorStore then calls the hook,
    from its own threads, for each further array, which finds that loop closed.
    """

    def show(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    return show


@contextmanager
def as_os_error(path: Path) -> Iterator[None]:
    """Raise what goes wrong in writing below `path`, such as a full disk, as OSError."""
    try:
        yield
    except ValueError as error:  # TensorStore's
        raise OSError(f"{path}: cannot be written: {str(error).splitlines()[0]}") from error
