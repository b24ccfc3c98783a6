"""A program that answers each line with a line, in bounded time and memory."""

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

TIMEOUT = 120.0
"""Seconds of an answer, at most."""
LONGEST = 16 * 2**20
"""Bytes of an answer, at most."""
SHOWN = 2**20
"""Bytes of the program's standard error that are shown."""
STARTS = 3
"""A program that was lost is started again until it was started so often."""
TICK = 0.2
"""Seconds between two looks at the memory that the program takes."""
CHUNK = 2**16


class Program:
    """A program in a session of its own. What it writes on standard error is shown, up to a bound.

    Args:
        words: the program and its arguments.
        name: what errors call it.
        timeout: how long to wait for an answer, in seconds.
        memory: bytes that it and the processes that it started may hold, where /proc tells.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self, words: list[str], name: str, timeout: float = TIMEOUT, memory: int | None = None
    ):
        self.words, self.name, self.timeout = words, name, timeout
        self.memory = memory or machine_memory() // 2
        self.starts, self.shown = 0, 0
        self._start()

    def _start(self) -> None:
        pipe, self.starts = subprocess.PIPE, self.starts + 1
        self.process = subprocess.Popen(
            self.words, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, start_new_session=True
        )
        self.stdin, self.stdout, self.stderr = (
            stream.fileno()  # type: ignore[union-attr]
            for stream in (self.process.stdin, self.process.stdout, self.process.stderr)
        )
        self.readable = [self.stdout, self.stderr]
        for pipe in (self.stdin, *self.readable):
            os.set_blocking(pipe, False)

    def exchange(self, line: str) -> str:
        """Write one line and read one line.

        Args:
            line: without its end.

        Returns:
            The answer.

        Raises:
            ConnectionError: there is none within the bounds. The program is then gone, and the next
                call starts it again, so often and no more.
        """
        if self.process.stdin.closed:  # type: ignore[union-attr]
            if self.starts >= STARTS:
                raise ConnectionError(f"{self.name} is gone")
            self._start()
        left, answer = line.encode() + b"\n", bytearray()
        deadline = time.monotonic() + self.timeout
        look = time.monotonic() + TICK
        while b"\n" not in answer:
            left = self._step(left, answer)
            if len(answer) > LONGEST:
                self.lose(f"answered more than {LONGEST >> 20} MiB")
            if (now := time.monotonic()) > deadline:
                self.lose(f"was silent for {self.timeout:g} s")
            if now > look and resident(self.process.pid) > self.memory:
                self.lose(f"took more than {self.memory / 2**30:.3g} GiB of memory")
            look = now + TICK if now > look else look
        return answer.decode("utf-8", "replace")

    def _step(self, left: bytes, answer: bytearray) -> bytes:
        """Write and read what goes at once; returns what is left to be written."""
        ready, free, _ = select.select(self.readable, [self.stdin] if left else [], [], TICK)
        if free:
            try:
                left = left[os.write(self.stdin, left) :]
            except OSError:  # it does not read; it may have answered
                left = b""
        if self.stderr in ready:
            self._show()
        if self.stdout in ready:
            answer += (chunk := os.read(self.stdout, CHUNK))
        if (self.stdout in ready and not chunk) or not (ready or self.process.poll() is None):
            self.lose()
        return left

    def _show(self) -> bool:
        """Pass on what the program writes on standard error; returns whether there was any."""
        if not (chunk := os.read(self.stderr, CHUNK)):
            self.readable = [self.stdout]
        text = chunk[: max(0, SHOWN - self.shown)].decode("utf-8", "replace")
        if self.shown < SHOWN <= self.shown + len(chunk):
            text += f"\n... {self.name} writes more than {SHOWN >> 20} MiB on standard error\n"
        self.shown += len(chunk)
        sys.stderr.write(text)
        return bool(chunk)

    def lose(self, reason: str = "") -> NoReturn:
        """End the program.

        Args:
            reason: what it did; that it ended, where there is none.

        Raises:
            ConnectionError: always.
        """
        self._end()
        raise ConnectionError(
            f"{self.name} {reason or f'ended with status {self.process.returncode}'}"
        )

    def close(self) -> None:
        """End the program and the processes that it started, for good."""
        self.starts = STARTS
        self._end()

    def _end(self) -> None:
        """Kill the whole group, since a shell's child would go on and hold the pipes open."""
        streams = self.process.stdin, self.process.stdout, self.process.stderr
        if self.process.stdin.closed:  # type: ignore[union-attr]
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with suppress(OSError):
            while self.stderr in self.readable and self.shown < SHOWN and self._show():
                pass
        for stream in streams:
            stream.close()  # type: ignore[union-attr]


def machine_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def resident(session: int) -> int:
    """The memory that the processes of a session hold.

    Args:
        session: its leader's process id.

    Returns:
        Bytes; 0 where there is no /proc.
    """
    pages = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
            pages += int(fields[21]) if int(fields[3]) == session else 0
    return pages * os.sysconf("SC_PAGE_SIZE")
