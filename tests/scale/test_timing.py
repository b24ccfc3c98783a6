"""Where a run's time went, by a clock that only the parts themselves move."""

import jax
import jax.numpy as jnp

from scale.console import console
from scale.files import read_json
from scale.train.timing import Timing, ready


class Clock:
    """Stands still until it is moved."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def moved(self, seconds, result=None):
        self.now += seconds
        return result


class Running:
    """An array that the devices have not computed yet."""

    def is_ready(self):
        return False


UNREADY = {"loss": Running()}


def batches(clock, *seconds):
    for duration in seconds:
        yield clock.moved(duration, duration)


def test_each_second_is_in_one_part(tmp_path, capsys, monkeypatch):
    """A wait counts as one where the step before is done; a call that compiles is no step."""
    monkeypatch.setattr(console, "quiet", False)
    clock = Clock()
    timing, made = Timing(clock), batches(clock, 3.0, 5.0, 7.0)
    compile_anew = jax.jit(lambda x: x * 3 + 1)
    assert timing.next(made, {}) == 3.0  # before the first step nothing runs
    timing.step(lambda state, batch: (compile_anew(jnp.ones(3)), clock.moved(20.0)), None, None)
    timing.next(made, UNREADY)
    timing.next(made, {"loss": jax.block_until_ready(jnp.ones(2))})
    timing.step(lambda state, batch: clock.moved(11.0), None, None)
    timing.wait({"loss": jnp.ones(2)})
    clock.moved(54.0)
    timing.finish(2, tmp_path)
    written = read_json(tmp_path / "timing.json")
    assert written["programs"] >= 1
    assert written == {
        "steps": 2,
        "seconds": 100.0,
        "in the step": 16.0,
        "waiting for batches": 10.0,
        "compiling": 20.0,
        "log and checkpoints": 54.0,
        "programs": written["programs"],
    }
    printed = capsys.readouterr().out
    start = "  2 steps in 100.0 s: 16% in the step, 10% waiting for batches, 20% compiling ("
    assert printed.startswith(start)
    assert printed.endswith("), 54% log and checkpoints\n")


def test_a_program_is_counted_once_a_shape():
    timing = Timing()
    double = jax.jit(lambda x: x * 2)
    inputs = [jax.block_until_ready(jnp.zeros(n)) for n in (3, 4, 3, 4, 5)]
    counts = []
    for x in inputs:
        timing.step(lambda state, batch: double(batch), None, x)
        counts.append(timing.programs)
    assert counts == [1, 2, 2, 2, 3]


def test_ready():
    assert ready({}) and ready([jax.block_until_ready(jnp.ones(1)), 3.0, "text"])
    assert not ready([jax.block_until_ready(jnp.ones(1)), UNREADY])
