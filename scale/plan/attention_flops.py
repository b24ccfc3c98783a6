"""FLOPs of splash attention's kernels, which a compiled program does not state."""

from scale.data.layout import Layout
from scale.model.splash import SharedPrefixMask, block_sizes

PRODUCTS = {"_fwd_": 2, "_dkv_": 4, "_dq_": 3}
"""Products of queries with keys in each kernel, by a part of its name."""


def kernel_flops(calls: dict[str, int], layout: Layout, heads: float, head_dim: int) -> float:
    """FLOPs of the kernels on one device.

    Args:
        calls: Executions of custom calls by name: `Counts.uncounted`.
        layout: That of the rows.
        heads: Query heads on the device, of all its rows.
        head_dim: Size of a head.

    Returns:
        FLOPs, in the blocks that the mask does not skip.
    """
    products = sum(
        times * PRODUCTS[part] for name, times in calls.items() for part in PRODUCTS if part in name
    )
    return products * heads * visited_pairs(layout) * 2 * head_dim


def visited_pairs(layout: Layout) -> int:
    """Pairs of query and key in the blocks that the mask does not skip.

    Args:
        layout: That of a row.

    Returns:
        Their number in one head of one row.
    """
    size, mask = block_sizes(layout.length).block_q, SharedPrefixMask(layout)
    starts = range(0, layout.length, size)
    visited = [mask[q : q + size, k : k + size].any() for q in starts for k in starts]
    return size**2 * sum(map(bool, visited))
