"""One run of the tests compiles a program once: its processes share JAX's cache on disk.

The tokens of its rows go to a cache of its own, too.
"""

import os
from tempfile import TemporaryDirectory

os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = TemporaryDirectory(prefix="programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
if "MINIPREF_TEST_CACHE" not in os.environ:
    cache = TemporaryDirectory(prefix="cache-")
    os.environ["MINIPREF_TEST_CACHE"] = os.environ["XDG_CACHE_HOME"] = cache.name
