"""Traffic of hand-made HLO, by hand: collectives, main memory, what cannot be read."""

import pytest

from scale.errors import InputError
from scale.plan.hlo import count
from tests.scale.hlo_text import MESH, module


def collective(text: str, shape: str = "f32[100]{0}", operand: str = "f32[100]{0}") -> str:
    return module(f"  %x = {operand} constant({{...}})\n  ROOT %y = {shape} {text}")


@pytest.mark.parametrize(
    ("groups", "axes", "group"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", "tensor", 2),
        ("{{0,2},{4,6},{1,3},{5,7}}", "fsdp", 2),
        ("{{0,4},{1,5},{2,6},{3,7}}", "data", 2),
        ("{{0,2,4,6},{1,3,5,7}}", "data+fsdp", 4),
        ("{{0,1,2,3},{4,5,6,7}}", "fsdp+tensor", 4),
        ("{}", "data+fsdp+tensor", 8),
        ("[4,2]<=[8]", "tensor", 2),
        ("[4,2]<=[4,2]T(1,0)", "fsdp", 2),
        ("[4,2]<=[2,4]T(1,0)", "data", 2),
        ("[4,2]<=[2,2,2]T(0,2,1)", "fsdp", 2),
        ("[2,4]<=[4,2]T(1,0)", "data+fsdp", 4),
        ("[1,8]<=[8]", "data+fsdp+tensor", 8),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_0'}", "data+fsdp", 4),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", "tensor", 2),
        ("mesh['axis_0'=8] {'axis_0':(2)2}", "fsdp", 2),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'}", "tensor", 2),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", "data+fsdp", 4),
        ("mesh['a'=2,'b'=4] {'a','b':(2)2}", "data+tensor", 4),
    ],
)
def test_groups_in_every_notation(groups, axes, group):
    attributes = f"channel_id=1, replica_groups={groups}, use_global_device_ids=true"
    text = collective(f"all-reduce(%x), {attributes}, to_apply=%add")
    assert count(text, MESH).collective_bytes == {axes: 400 * 2 * (group - 1) / group}


@pytest.mark.parametrize(
    ("operation", "sent"),
    [
        ("all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}", 3 * 200),
        ("reduce-scatter(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add", 150),
        ("all-to-all(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}", 150),
        ("all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add", 300),
        ("all-reduce(%x, %x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add", 600),
        ("collective-permute(%x), source_target_pairs={{0,3},{3,0},{4,7},{7,4}}", 200),
    ],
)
def test_bytes_by_the_ring_algorithms(operation, sent):
    """Of 100 bfloat16 in groups of 4; a started collective does not count again when it is done."""
    text = collective(operation, operand="bf16[100]{0:T(256)(128)(2,1)}")
    name, arguments = operation.split("(", 1)
    started = module(f"""\
  %x = bf16[100]{{0}} constant({{...}})
  %s = (bf16[100]{{0}}, bf16[400]{{0}}, u32[]) {name}-start({arguments}
  ROOT %y = bf16[400]{{0}} {name}-done(%s)""")
    for variant in (text, started):
        assert count(variant, MESH).collective_bytes == {"fsdp+tensor": sent}


def test_groups_of_one_send_nothing():
    text = collective("all-reduce(%x), replica_groups=[8,1]<=[8], to_apply=%add")
    assert count(text, MESH).collective_bytes == {}


GATHER = """\
%NAME (NAME.x: f32[100]) -> f32[200] {
  %NAME.x = f32[100]{0} parameter(0)
  %NAME.g = f32[200]{0} all-gather(%NAME.x), channel_id=7, \
replica_groups={{0,2},{4,6},{1,3},{5,7}}, dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
  ROOT %NAME.r = RESULT
}"""


def test_an_asynchronous_collective_fusion_counts_once():
    """The gather of 100 float32 stands in the fusions that start it, go on with it, and end it."""
    pair, target = "(f32[100], f32[200])", 'custom_call_target="AsyncCollective'
    results = {
        "start": (pair, f'custom-call(%start.g), {target}Start"'),
        "middle": (pair, "tuple(%middle.x, %middle.g)"),
        "end": ("f32[200]", f'custom-call(%end.x, %end.g), {target}Done"'),
    }
    fused = [
        GATHER.replace("RESULT", f"{shape} {root}").replace("NAME", name)
        for name, (shape, root) in results.items()
    ]
    entry = """\
  %x = f32[100]{0} constant({...})
  %s = (f32[100]{0}, f32[200]{0}) fusion(%x), kind=kCustom, calls=%start
  %sx = f32[100]{0} get-tuple-element(%s), index=0
  %m = (f32[100]{0}, f32[200]{0}) fusion(%sx), kind=kOutput, calls=%middle
  %mx = f32[100]{0} get-tuple-element(%m), index=0
  ROOT %e = f32[200]{0} fusion(%mx), kind=kCustom, calls=%end"""
    counts = count(module(entry, *fused), MESH)
    assert (counts.collective_bytes, counts.uncounted) == ({"fsdp": 400}, {})
    assert counts.hbm_bytes == 400 + 800  # the shard is read once and the whole written once


def test_an_all_reduce_that_a_fusion_slices_is_a_reduce_scatter():
    fused = """\
%all-reduce-scatter (a: f32[100]) -> f32[50] {
  %a = f32[100]{0} parameter(0)
  %r = f32[100]{0} all-reduce(%a), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %i = s32[] constant(0)
  %b = f32[100]{0} bitcast(%r)
  ROOT %d = f32[50]{0} dynamic-slice(%b, %i), dynamic_slice_sizes={50}
}"""
    entry = """\
  %x = f32[100]{0} constant({...})
  ROOT %y = f32[50]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter"""
    assert count(module(entry, fused), MESH).collective_bytes == {"tensor": 200}


@pytest.mark.parametrize(
    "target", ['"{1,2}x{0:3}"', '"{1:2}x{0:3}"', "{{100000,200000},{100001,200001}}"]
)
def test_sends_between_slices_count_for_the_first_axis(target):
    kind = '_xla_megascale_transfer_type="ALL_REDUCE"'
    send = f"""\
  %after = token[] after-all()
  %send.1 = (f32[8]{{0}}, u32[], token[]) send(%p, %after), \
frontend_attributes={{_xla_megascale_target={target},{kind}}}"""
    assert count(module(send), MESH).collective_bytes == {"data": 32}


FUSED_SLICE = """\
%take (t: f32[10,8], ti: s32[]) -> f32[8] {
  %t = f32[10,8]{1,0} parameter(0)
  %ti = s32[] parameter(1)
  %ts = f32[1,8]{1,0} dynamic-slice(%t, %ti, %ti), dynamic_slice_sizes={1,8}
  ROOT %tb = f32[8]{0} bitcast(%ts)
}"""
FUSED_UPDATE = """\
%put (u: f32[10,8], v: f32[8], ui: s32[]) -> f32[10,8] {
  %u = f32[10,8]{1,0} parameter(0)
  %v = f32[8]{0} parameter(1)
  %ui = s32[] parameter(2)
  %vb = f32[1,8]{1,0} bitcast(%v)
  ROOT %d = f32[10,8]{1,0} dynamic-update-slice(%u, %vb, %ui, %ui)
}"""


def test_main_memory_by_hand():
    """A slice of a stack is read, another updated in place; `S(1)` is on the chip."""
    entry = """\
  %stack = f32[10,8]{1,0} constant({...})
  %i = s32[]{:S(6)} constant(0)
  %chip = f32[8]{0:T(128)S(1)} copy(%p)
  %sliced = f32[8]{0} fusion(%stack, %i), kind=kLoop, calls=%take
  %whole = f32[8]{0} add(%sliced, %p)
  ROOT %put_in = f32[10,8]{1,0} fusion(%stack, %chip, %i), kind=kLoop, calls=%put"""
    counts = count(module(entry, FUSED_SLICE, FUSED_UPDATE), MESH)
    assert counts.hbm_bytes == 32 + (32 + 32) + (32 + 32 + 32) + 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "no ENTRY computation"),
        (module("  ROOT %x = f32[8] mystery"),
         r"cannot read the instruction 'ROOT %x = f32\[8\] mystery'"),
        (
            collective("all-reduce(%x), replica_groups=[2,8]<=[16]"),
            "device 15 in groups .*, but the mesh is {'data': 2",
        ),
        (collective("all-reduce(%x), replica_groups=everyone"),
         "all-reduce y: no replica groups that can be read"),
    ],
)
def test_what_cannot_be_read_is_an_error(text, message):
    with pytest.raises(InputError, match=message):
        count(text, MESH)
