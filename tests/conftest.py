"""One run of the tests compiles a program once: its processes share JAX's cache on disk."""

import os
from tempfile import TemporaryDirectory

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = TemporaryDirectory(prefix="programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
