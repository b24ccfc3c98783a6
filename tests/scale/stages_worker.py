"""One process of a run of several commands, for `test_distributed.py`.

python stages_worker.py PROCESSES PROCESS PORT COMMAND..., each command one argument
"""

import shlex
import sys

from scale.parallel.processes import join
from scale.run import parse
from scale.stages.stage import execute


def main(processes, process, port, *commands):
    runtime = ["--runtime.processes", processes, "--runtime.process", process]
    runtime += ["--runtime.coordinator", f"localhost:{port}"]
    stages = [parse([*shlex.split(command), *runtime]) for command in commands]
    join(stages[0].runtime)
    for stage in stages:
        execute(stage)


if __name__ == "__main__":
    main(*sys.argv[1:])
