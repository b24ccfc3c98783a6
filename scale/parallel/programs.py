"""Compiled programs stay on disk for the next run: JAX's persistent compilation cache."""

import hashlib
import os
import platform
from pathlib import Path

import jax

from scale.files import remove_unused, user_cache

SECONDS = 0.1  # a program that takes longer to compile is kept


def keep_programs() -> None:
    """Keep what this process, and those that it starts, compile in the user's cache folder.

    JAX's own variables come first: `JAX_COMPILATION_CACHE_DIR` names another folder, and
    `JAX_ENABLE_COMPILATION_CACHE=0` keeps nothing.
    """
    try:
        folder = user_cache("programs", machine())
    except OSError:  # nothing is kept
        return
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": SECONDS,
    }
    for name, value in settings.items():
        if name.upper() not in os.environ:
            os.environ[name.upper()] = str(value)
            jax.config.update(name, value)
    # JAX itself removes nothing, and does not mend what a kill left half written
    remove_unused(folder, "*-cache")


def machine() -> str:
    """Identifies the processor: a program for a CPU has its instructions, and JAX does not look."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    traits = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    text = "\n".join([platform.machine(), platform.processor(), *sorted(set(traits))])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
