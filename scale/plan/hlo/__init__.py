"""What one device does in a compiled program, read from the text of its optimized HLO.

    counts = count(compiled.as_text(), {"data": 1, "fsdp": 256, "tensor": 8})

`parse` reads text into computations of instructions. `products`, `collectives` and `memory` say
what one instruction does, `loops` how often a loop runs, and `count` adds everything up.

XLA's own `cost_analysis` counts the body of a loop once. The jaxpr does not show what the
partitioner repeats: for PaLM 540B on a mesh with 12 devices along `tensor` it has 0.6% fewer FLOPs
than the program, in which all 12 compute the whole gradient of the key and value weights.
"""

from scale.plan.hlo.count import Counts, count

__all__ = ["Counts", "count"]
