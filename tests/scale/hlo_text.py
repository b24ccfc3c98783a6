"""HLO by hand, and the mesh for which it is."""

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def module(body: str, *others: str) -> str:
    entry = "ENTRY %main (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n" + body + "\n}\n"
    return "\n\n".join(("HloModule m, is_scheduled=true", *others, entry))
