"""Compiled programs stay on disk for the next run: JAX's persistent compilation cache."""

import hashlib
import os
import platform
import time
from contextlib import suppress
from pathlib import Path

import jax

SECONDS = 0.1  # a program that takes longer to compile is kept
DAYS = 30  # how long; JAX itself removes nothing, and does not mend what a kill left half written


def keep_programs() -> None:
    """Keep what this process, and those that it starts, compile in the user's cache folder.

    JAX's own variables come first: `JAX_COMPILATION_CACHE_DIR` names another folder, and
    `JAX_ENABLE_COMPILATION_CACHE=0` keeps nothing.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "minipref/programs" / machine()
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": SECONDS,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # nothing is kept
        return
    for name, value in settings.items():
        if name.upper() not in os.environ:
            os.environ[name.upper()] = str(value)
            jax.config.update(name, value)
    with suppress(OSError):  # another process may remove the same ones
        for path in folder.glob("*-cache"):
            if time.time() - path.stat().st_mtime > DAYS * 86400:
                path.unlink()


def machine() -> str:
    """Identifies the processor: a program for a CPU has its instructions, and JAX does not look."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    traits = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    text = "\n".join([platform.machine(), platform.processor(), *sorted(set(traits))])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
