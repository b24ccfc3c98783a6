"""What one device does in a compiled program, read from the text of its optimized HLO.

    counts = count(compiled.as_text(), {"data": 1, "fsdp": 256, "tensor": 8})

`parse` reads text into computations of instructions. `products`, `collectives` and `memory` say
what one instruction does, `loops` how often a loop runs, and `count` adds everything up.

XLA's own `cost_analysis` counts the body of a loop once. And products are not counted in the jaxpr,
because it cannot show what the partitioner repeats: on a mesh of rows alone the jaxpr gives the
same FLOPs, but for PaLM 540B with 12 devices along `tensor` it gives 0.6% too few, since all 12
compute the same keys and values in one of the passes.
"""

from scale.plan.hlo.count import Counts, count

__all__ = ["Counts", "count"]
