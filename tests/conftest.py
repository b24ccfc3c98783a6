"""One run of the tests compiles a program once: its processes share JAX's cache on disk.

The tokens of its rows go to a cache of its own, too.
"""

import os
from tempfile import TemporaryDirectory

import pytest

os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = TemporaryDirectory(prefix="programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
if "MINIPREF_TEST_CACHE" not in os.environ:
    cache = TemporaryDirectory(prefix="cache-")
    os.environ["MINIPREF_TEST_CACHE"] = os.environ["XDG_CACHE_HOME"] = cache.name


def pytest_configure(config):
    """Programs compile without LLVM's optimisation, which would take a third of the tests' time."""
    flag = "--xla_backend_optimization_level=0"
    flags = os.environ.get("XLA_FLAGS", "").split()
    if flag not in flags:
        os.environ["XLA_FLAGS"] = " ".join([*flags, flag])


@pytest.fixture(scope="module", autouse=True)
def heard():
    """A module begins with a console that prints, whatever the tests before it left."""
    from scale.console import console

    console.quiet = False
