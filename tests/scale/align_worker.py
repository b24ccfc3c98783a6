"""One process of a run of `align` by each of the methods, for `test_distributed.py`.

python align_worker.py FOLDER OUT PROCESSES PROCESS PORT DATA,FSDP,TENSOR,PARTS METHOD...
"""

import sys
from pathlib import Path

from scale.data.dataset import Limits
from scale.parallel.mesh import RuntimeConfig
from scale.parallel.processes import join
from scale.stages.align import Align
from scale.stages.stage import execute
from scale.train.loop import TrainingConfig

STEPS = 3
LIMITS = Limits(8, 6)


def main(folder, out, processes, process, port, mesh, *methods):
    data, fsdp, tensor, parts = map(int, mesh.split(","))
    runtime = RuntimeConfig(
        data,
        fsdp,
        tensor,
        processes=int(processes),
        process=int(process),
        coordinator=f"localhost:{port}",
    )
    join(runtime)
    for method in methods:
        rows = "single" if method in ("d-dpo", "dp-dpo") else "ensemble"
        stage = Align(
            out=Path(out) / method,
            data=Path(folder) / f"{rows}.parquet",
            policy=Path(folder) / "policy",
            method=method,
            training=TrainingConfig(STEPS, 8, 1e-2, 1, accumulation=parts),
            limits=LIMITS,
            runtime=runtime,
        )
        execute(stage)


if __name__ == "__main__":
    main(*sys.argv[1:])
