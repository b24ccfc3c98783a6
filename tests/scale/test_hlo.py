"""Counts of hand-made HLO by hand, and of compiled programs by theory: on 8 simulated CPU devices and for real TPUs.

Run as a program (`python test_hlo.py cpu|tpu FOLDER`) it compiles those programs and writes their HLO; XLA must find
its environment set before it starts.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from scale.errors import InputError
from scale.plan.hlo import count

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
TOPOLOGIES = {  # name, tensor axis, keywords of get_topology_desc
    "v5e": (2, {"topology_name": "v5e:2x4"}),
    "v4": (4, {"topology_name": "v4:2x2x4", "chips_per_host_bounds": (2, 2, 1), "chip_config_name": "megacore"}),
    "slices": (
        2,
        {
            "topology_name": "v4:2x2x1",
            "chips_per_host_bounds": (2, 2, 1),
            "chip_config_name": "megacore",
            "num_slices": 2,
        },
    ),
}
LAYERS, ROWS, D, F = 8, 512, 512, 1024  # of the compiled programs; ROWS over all devices
PRODUCT = 2 * ROWS * D * D


# ---- hand-made


DOT = "dot({0}, {0}), lhs_contracting_dims={{0}}, rhs_contracting_dims={{0}}"


def module(body: str, *others: str) -> str:
    entry = "ENTRY %main (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n" + body + "\n}\n"
    return "HloModule m, is_scheduled=true\n\n" + "".join(f"{other}\n\n" for other in others) + entry


def test_dots_by_hand():
    """3 products [4, 6] x [6, 8], and one [5] . [5]."""
    text = module("""\
  %a = f32[3,4,6]{2,1,0} constant({...})
  %b = bf16[3,6,8]{2,1,0:T(8,128)(2,1)S(1)} constant({...})
  %c = f32[5]{0} constant({...})
  %d = f32[3,4,8]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_contracting_dims={1}
  ROOT %e = f32[] dot(%c, %c), lhs_contracting_dims={0}, rhs_contracting_dims={0}""")
    assert count(text, MESH).flops == 2 * 3 * 4 * 6 * 8 + 2 * 5


@pytest.mark.parametrize(
    ("shapes", "attributes", "products"),
    [
        (("4,128,1024", "1024,64,1", "4,128,64"), "window={size=1}, dim_labels=0bf_io0->0bf", 4 * 128 * 1024 * 64),
        (("4,128,1024", "4,128,64", "1024,64,1"), "window={size=4}, dim_labels=0fb_0io->bf0", 4 * 128 * 1024 * 64),
        (
            ("8,16,32", "8,32,64", "8,16,64"),
            "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf",
            8 * 16 * 32 * 64,
        ),
        (("2,4,5", "3,5,7", "2,4,7"), "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * 10 * 5 * 7),
        (("2,9,5", "3,5,7", "2,3,7"), "window={size=3 rhs_dilate=2 stride=2}, dim_labels=b0f_0io->b0f", 2 * 9 * 5 * 7),
        (("2,4,6", "1,3,8", "2,4,8"), "window={size=1}, dim_labels=b0f_0io->b0f, feature_group_count=2", 2 * 4 * 3 * 8),
        (("6,4,5", "1,5,9", "2,4,9"), "window={size=1}, dim_labels=b0f_0io->b0f, batch_group_count=3", 2 * 4 * 5 * 9),
        (("7,3", "3,2", "7,2"), "dim_labels=bf_io->bf", 7 * 3 * 2),
    ],
)
def test_convolutions_by_hand(shapes, attributes, products):
    """Dots as the TPU compiler writes them (the third has a batch of 8); padding of one on each side loses 2 of 12
    positions; groups multiply only their own channels, or their own rows."""
    left, kernel, out = shapes
    text = module(f"""\
  %a = f32[{left}]{{2,1,0}} constant({{...}})
  %b = f32[{kernel}]{{2,1,0}} constant({{...}})
  ROOT %c = f32[{out}]{{2,1,0}} convolution(%a, %b), {attributes}""")
    assert count(text, MESH).flops == 2 * products


def loop(
    start: str = "0", step: str = "add(%i, %one)", limit: str = "8", direction: str = "LT", attributes: str = ""
) -> str:
    """A loop around one product of 2 x 8 FLOPs; its state is the counter, a vector, a constant 5."""
    state = "(s32[], f32[8]{0}, s32[])"
    body = f"""\
%body (s: {state}) -> {state} {{
  %one = s32[] constant(1)
  %s = {state} parameter(0)
  %i.raw = s32[] get-tuple-element(%s), index=0
  %i = s32[]{{:T(128)S(6)}} copy(%i.raw)
  %v = f32[8]{{0}} get-tuple-element(%s), index=1
  %five = s32[] get-tuple-element(%s), index=2
  %dot = f32[] dot(%v, %v), lhs_contracting_dims={{0}}, rhs_contracting_dims={{0}}
  %next = s32[] {step}
  ROOT %t = {state} tuple(%next, %v, %five)
}}"""
    condition = f"""\
%condition (s.1: {state}) -> pred[] {{
  %s.1 = {state} parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %five.1 = s32[] get-tuple-element(%s.1), index=2
  %limit = s32[] constant({limit})
  ROOT %c = pred[] compare(%i.1, {"%five.1" if limit == "5" else "%limit"}), direction={direction}
}}"""
    entry = f"""\
  %zero = s32[] constant({start})
  %start = s32[] copy(%zero)
  %five.2 = s32[] constant(5)
  %t.1 = {state} tuple(%start, %p, %five.2)
  %while.1 = {state} while(%t.1), condition=%condition, body=%body{attributes}
  ROOT %r = f32[8]{{0}} get-tuple-element(%while.1), index=1"""
    return module(entry, body, condition)


@pytest.mark.parametrize(
    ("text", "trips"),
    [
        (loop(), 8),
        (loop(limit="5"), 5),
        (loop(direction="LE"), 9),
        (loop(direction="NE"), 8),
        (loop(start="2", step="add(%five, %i)", limit="10"), 2),
        (loop(start="2", step="add(%i, %five)", limit="12"), 2),
        (loop(start="2", step="add(%i, %five)", limit="13"), 3),
        (loop(start="8", step="subtract(%i, %one)", limit="0", direction="GT"), 8),
        (loop(start="8", step="subtract(%i, %one)", limit="0", direction="GE"), 9),
        (loop(start="9"), 0),
        (
            loop(
                attributes=', backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}'
            ),
            3,
        ),
    ],
)
def test_loops_count_as_often_as_they_run(text, trips):
    counts = count(text, MESH)
    assert (counts.flops, counts.uncounted) == (trips * 2 * 8, {})


@pytest.mark.parametrize(
    "change",
    [
        {"step": "multiply(%i, %five)"},
        {"direction": "GT"},
        {"step": "subtract(%one, %i)"},
        {"direction": "NE", "start": "9"},
    ],
)
def test_a_loop_that_cannot_be_told_is_named(change):
    counts = count(loop(**change), MESH)
    assert (counts.flops, counts.uncounted) == (16, {"while while.1: unknown trip count": 1})


def test_a_loop_in_a_loop_and_a_condition_in_a_fusion():
    """The inner loop's start and limit are constants of the outer one's state; 3 x (5 - 1) products."""
    state, inner = "(s32[], s32[], s32[], f32[8]{0})", "(s32[], s32[], f32[8]{0})"
    less = """\
%less (l: s32[], r: s32[]) -> pred[] {
  %l = s32[] parameter(0)
  %r = s32[] parameter(1)
  ROOT %c = pred[] compare(%l, %r), direction=LT
}"""
    plus = """\
%plus (q: s32[]) -> s32[] {
  %q = s32[] parameter(0)
  %k = s32[] constant(1)
  ROOT %s = s32[] add(%q, %k)
}"""
    inner_body = f"""\
%inner_body (a: {inner}) -> {inner} {{
  %a = {inner} parameter(0)
  %ai = s32[] get-tuple-element(%a), index=0
  %al = s32[] get-tuple-element(%a), index=1
  %av = f32[8]{{0}} get-tuple-element(%a), index=2
  %ad = f32[] dot(%av, %av), lhs_contracting_dims={{0}}, rhs_contracting_dims={{0}}
  %an = s32[] fusion(%ai), kind=kLoop, calls=%plus
  ROOT %at = {inner} tuple(%an, %al, %av)
}}"""
    inner_condition = f"""\
%inner_condition (b: {inner}) -> pred[] {{
  %b = {inner} parameter(0)
  %bi = s32[] get-tuple-element(%b), index=0
  %bl = s32[] get-tuple-element(%b), index=1
  ROOT %bc = pred[] fusion(%bi, %bl), kind=kLoop, calls=%less
}}"""
    outer_body = f"""\
%outer_body (d: {state}) -> {state} {{
  %d = {state} parameter(0)
  %di = s32[] get-tuple-element(%d), index=0
  %ds = s32[] get-tuple-element(%d), index=1
  %dl = s32[] get-tuple-element(%d), index=2
  %dv = f32[8]{{0}} get-tuple-element(%d), index=3
  %dt = {inner} tuple(%ds, %dl, %dv)
  %dw = {inner} while(%dt), condition=%inner_condition, body=%inner_body
  %dn = s32[] fusion(%di), kind=kLoop, calls=%plus
  ROOT %dr = {state} tuple(%dn, %ds, %dl, %dv)
}}"""
    outer_condition = f"""\
%outer_condition (e: {state}) -> pred[] {{
  %e = {state} parameter(0)
  %ei = s32[] get-tuple-element(%e), index=0
  %three = s32[] constant(3)
  ROOT %ec = pred[] compare(%ei, %three), direction=LT
}}"""
    entry = f"""\
  %zero = s32[] constant(0)
  %one = s32[] constant(1)
  %five = s32[] constant(5)
  %t = {state} tuple(%zero, %one, %five, %p)
  %w = {state} while(%t), condition=%outer_condition, body=%outer_body
  ROOT %r = f32[8]{{0}} get-tuple-element(%w), index=3"""
    counts = count(module(entry, less, plus, inner_body, inner_condition, outer_body, outer_condition), MESH)
    assert (counts.flops, counts.uncounted) == (3 * 4 * 16, {})


def test_calls_and_the_largest_branch():
    """One product called, one fused, one in an asynchronous wrapper; of branches of 1 and 2 the 2."""
    dot = "dot(%{0}, %{0}), lhs_contracting_dims={{0}}, rhs_contracting_dims={{0}}"
    parts = [
        f"%{name} ({name}.p: f32[8]) -> f32[] {{\n  %{name}.p = f32[8]{{0}} parameter(0)\n"
        + (f"  %{name}.d = f32[] {dot.format(name + '.p')}\n" if name == "two" else "")
        + f"  ROOT %{name}.r = f32[] {dot.format(name + '.p')}\n}}"
        + (', execution_thread="main"' if name == "wrapped" else "")
        for name in ("called", "fused", "wrapped", "one", "two")
    ]
    entry = """\
  %which = s32[] constant(1)
  %a = f32[] call(%p), to_apply=%called
  %b = f32[] fusion(%p), kind=kCustom, calls=%fused, backend_config={"fusion_config":{"kind":"__ynn_fusion"}}
  %c = ((f32[8]{0}), f32[], u32[]) async-start(%p), calls=%wrapped
  %d = f32[] async-done(%c), calls=%wrapped
  ROOT %e = f32[] conditional(%which, %p, %p), branch_computations={%one, %two}"""
    assert count(module(entry, *parts), MESH).flops == 16 * (3 + 2)


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
    text = collective(
        f"all-reduce(%x), channel_id=1, replica_groups={groups}, use_global_device_ids=true, to_apply=%add"
    )
    assert count(text, MESH).collective_bytes == {axes: 400 * 2 * (group - 1) / group}


@pytest.mark.parametrize(
    ("operation", "sent"),
    [
        ("all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}", 3 * 200),
        ("reduce-scatter(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add", 150),
        ("all-to-all(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}", 150),
        ("all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add", 300),
        ("all-reduce(%x, %x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add", 600),
        ("collective-permute(%x), source_target_pairs={{0,3},{3,0},{4,7},{7,4}}", 200),
    ],
)
def test_bytes_by_the_ring_algorithms(operation, sent):
    """Of 100 bfloat16 in groups of 4; a started collective counts once, and not again when it is done."""
    once = count(collective(operation, operand="bf16[100]{0:T(256)(128)(2,1)}"), MESH).collective_bytes
    name, arguments = operation.split("(", 1)
    started = module(f"""\
  %x = bf16[100]{{0}} constant({{...}})
  %s = (bf16[100]{{0}}, bf16[400]{{0}}, u32[]) {name}-start({arguments}
  ROOT %y = bf16[400]{{0}} {name}-done(%s)""")
    assert once == count(started, MESH).collective_bytes == {"fsdp+tensor": sent}


def test_groups_of_one_send_nothing():
    assert count(collective("all-reduce(%x), replica_groups=[8,1]<=[8], to_apply=%add"), MESH).collective_bytes == {}


def test_an_asynchronous_collective_fusion_counts_once():
    """The gather of 100 float32 stands in the fusions that start it, compute meanwhile, and end it."""

    def part(name: str, root: str) -> str:
        return f"""\
%{name} ({name}.x: f32[100]) -> f32[200] {{
  %{name}.x = f32[100]{{0}} parameter(0)
  %{name}.g = f32[200]{{0}} all-gather(%{name}.x), channel_id=7, replica_groups={{{{0,2}},{{4,6}},{{1,3}},{{5,7}}}}, \
dimensions={{0}}, backend_config={{"async_collective_fusion_config":{{"flag_start":"2","flag_end":"8"}}}}
  {root}
}}"""

    parts = [
        part(
            "start",
            'ROOT %start.r = (f32[100], f32[200]) custom-call(%start.g), custom_call_target="AsyncCollectiveStart"',
        ),
        part("middle", "ROOT %middle.r = (f32[100], f32[200]) tuple(%middle.x, %middle.g)"),
        part("end", 'ROOT %end.r = f32[200] custom-call(%end.x, %end.g), custom_call_target="AsyncCollectiveDone"'),
    ]
    entry = """\
  %x = f32[100]{0} constant({...})
  %s = (f32[100]{0}, f32[200]{0}) fusion(%x), kind=kCustom, calls=%start
  %sx = f32[100]{0} get-tuple-element(%s), index=0
  %m = (f32[100]{0}, f32[200]{0}) fusion(%sx), kind=kOutput, calls=%middle
  %mx = f32[100]{0} get-tuple-element(%m), index=0
  ROOT %e = f32[200]{0} fusion(%mx), kind=kCustom, calls=%end"""
    counts = count(module(entry, *parts), MESH)
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
    entry = (
        "  %x = f32[100]{0} constant({...})\n  ROOT %y = f32[50]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter"
    )
    assert count(module(entry, fused), MESH).collective_bytes == {"tensor": 200}


@pytest.mark.parametrize("target", ['"{1,2}x{0:3}"', '"{1:2}x{0:3}"', "{{100000,200000},{100001,200001}}"])
def test_sends_between_slices_count_for_the_first_axis(target):
    send = (
        "  %after = token[] after-all()\n  %send.1 = (f32[8]{0}, u32[], token[]) send(%p, %after), "
        f'frontend_attributes={{_xla_megascale_target={target},_xla_megascale_transfer_type="ALL_REDUCE"}}'
    )
    assert count(module(send), MESH).collective_bytes == {"data": 32}


def test_custom_calls_by_their_estimate_or_by_name():
    """A kernel's metadata may hold line ends."""
    kernel = 'f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call"'
    estimate = '{"custom_call_config":{"body":"AA","cost_estimate":{"flops":"123","transcendentals":"7"}}}'
    metadata = 'frontend_attributes={kernel_metadata={\n"a":"{}"\n}}, metadata={op_name="kernel"}'
    text = module(f"""\
  %estimated.1 = {kernel}, {metadata}, backend_config={estimate}
  %kernel_fwd.1.clone.2 = {kernel}, {metadata}
  ROOT %b = f32[8]{{0}} custom-call(), custom_call_target="AllocateBuffer"\
""")
    counts = count(text, MESH)
    assert (counts.flops, counts.uncounted) == (123, {"tpu_custom_call kernel_fwd": 1})


def test_main_memory_by_hand():
    """A loop's body reads one slice of a stack and updates another in place; `S(1)` is on the chip."""
    text = module(
        """\
  %stack = f32[10,8]{1,0} constant({...})
  %i = s32[]{:S(6)} constant(0)
  %chip = f32[8]{0:T(128)S(1)} copy(%p)
  %sliced = f32[8]{0} fusion(%stack, %i), kind=kLoop, calls=%take
  %whole = f32[8]{0} add(%sliced, %p)
  ROOT %put_in = f32[10,8]{1,0} fusion(%stack, %chip, %i), kind=kLoop, calls=%put""",
        """\
%take (t: f32[10,8], ti: s32[]) -> f32[8] {
  %t = f32[10,8]{1,0} parameter(0)
  %ti = s32[] parameter(1)
  %ts = f32[1,8]{1,0} dynamic-slice(%t, %ti, %ti), dynamic_slice_sizes={1,8}
  ROOT %tb = f32[8]{0} bitcast(%ts)
}""",
        """\
%put (u: f32[10,8], v: f32[8], ui: s32[]) -> f32[10,8] {
  %u = f32[10,8]{1,0} parameter(0)
  %v = f32[8]{0} parameter(1)
  %ui = s32[] parameter(2)
  %vb = f32[1,8]{1,0} bitcast(%v)
  ROOT %d = f32[10,8]{1,0} dynamic-update-slice(%u, %vb, %ui, %ui)
}""",
    )
    assert count(text, MESH).hbm_bytes == 32 + (32 + 32) + (32 + 32 + 32) + 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "no ENTRY computation"),
        (module("  ROOT %x = f32[8] mystery"), "cannot read the instruction 'ROOT %x = f32\\[8\\] mystery'"),
        (
            collective("all-reduce(%x), replica_groups=[2,8]<=[16]"),
            "device 15 in groups .*, but the mesh is {'data': 2",
        ),
        (collective("all-reduce(%x), replica_groups=everyone"), "all-reduce y: no replica groups that can be read"),
    ],
)
def test_what_cannot_be_read_is_an_error(text, message):
    with pytest.raises(InputError, match=message):
        count(text, MESH)


# ---- compiled


def array(shape, dtype, mesh: Mesh, *axes) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def compiled(function, *arrays, out=None) -> str:
    return jax.jit(function, out_shardings=out).lower(*arrays).compile().as_text()


def layer(x, weight):
    return jnp.tanh(x @ weight), None


def loss(weights, x, remat: bool):
    return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, weights)[0].astype(jnp.float32).sum()


def layers_of(mesh: Mesh) -> dict[str, str]:
    """Programs of one device."""
    x, weights = array((ROWS, D), jnp.bfloat16, mesh), array((LAYERS, D, D), jnp.bfloat16, mesh)
    heads = array((4, 128, 8, 64), jnp.bfloat16, mesh)
    return {
        "one": compiled(lambda x, w: layer(x, w)[0], x, array((D, D), jnp.bfloat16, mesh)),
        "scan": compiled(lambda x, w: jax.lax.scan(layer, x, w)[0], x, weights),
        "gradient": compiled(jax.grad(lambda w, x: loss(w, x, False), (0, 1)), weights, x),
        "remat": compiled(jax.grad(lambda w, x: loss(w, x, True), (0, 1)), weights, x),
        "heads": compiled(lambda q, k: jnp.einsum("bthk,bshk->bhts", q, k), heads, heads),
    }


def mlp_of(mesh: Mesh) -> str:
    """Layers of two products, rows over data and fsdp, weights over fsdp and tensor."""
    rows = array((ROWS, D), jnp.bfloat16, mesh, ("data", "fsdp"))

    def mlp(x, weights):
        y = jnp.einsum("rf,fd->rd", jnp.tanh(jnp.einsum("rd,df->rf", x, weights[0])), weights[1])
        return jax.lax.with_sharding_constraint(x + y, rows.sharding), None

    first = array((LAYERS, D, F), jnp.bfloat16, mesh, None, "fsdp", "tensor")
    second = array((LAYERS, F, D), jnp.bfloat16, mesh, None, "tensor", "fsdp")
    return compiled(lambda x, *w: jax.lax.scan(mlp, x, w)[0], rows, first, second, out=rows.sharding)


def collectives_of(mesh: Mesh) -> str:
    """Each of them once, three times over."""
    t = mesh.shape["tensor"]

    def each(c, x):
        x = x + c
        sums = jax.lax.psum(jnp.sin(x), "tensor"), jax.lax.psum(jnp.log(x), ("data", "fsdp"))
        moved = jax.lax.all_gather(x, "fsdp"), jax.lax.all_to_all(jnp.tanh(x), "data", 0, 1, tiled=True)
        scattered = jax.lax.psum_scatter(jnp.cos(x), "fsdp", tiled=True)
        return c + 1, (
            *sums,
            *moved,
            scattered,
            jax.lax.ppermute(jnp.exp(x), "tensor", [(i, (i + 1) % t) for i in range(t)]),
        )

    specs = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec(None, tuple(MESH))}
    mapped = jax.shard_map(lambda x: jax.lax.scan(each, 0.0, x)[1], mesh=mesh, check_vma=False, **specs)
    return compiled(mapped, array((3, 1024, 1024), jnp.float32, mesh))


def programs(devices) -> dict[str, str]:
    """HLO of each program; the mesh's devices are in an order that is not that of their own numbers."""
    halves = np.array(devices).reshape(2, -1)
    order = np.concatenate([halves[:, ::2], halves[:, 1::2]], 1)
    mesh = Mesh(order.reshape(2, 2, -1), tuple(MESH))
    return layers_of(Mesh(order[0, :1], ("data",))) | {"mlp": mlp_of(mesh), "collectives": collectives_of(mesh)}


def main(platform: str, folder: str) -> None:
    found = {"cpu": programs(jax.devices())} if platform == "cpu" else {}
    for name, (_, options) in TOPOLOGIES.items() if platform == "tpu" else ():
        found[name] = programs(topologies.get_topology_desc(platform="tpu", **options).devices)
    Path(folder, "hlo.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Each platform's programs, compiled by a process of its own when first asked for."""
    found = {}

    def get(machine: str, program: str) -> str:
        platform = "cpu" if machine == "cpu" else "tpu"
        if platform == "tpu" and importlib.util.find_spec("libtpu") is None:
            pytest.skip("the real TPU compiler needs libtpu (extra `tpu`)")
        if machine not in found:
            found.update(compile_for(platform, tmp_path_factory.mktemp("hlo")))
        return found[machine][program]

    return get


def compile_for(platform: str, folder: Path) -> dict[str, dict[str, str]]:
    settings = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    command = [sys.executable, __file__, platform, str(folder)]
    subprocess.run(command, env={**os.environ, **settings}, check=True, timeout=300)
    return json.loads((folder / "hlo.json").read_text())


def tensor(machine: str) -> int:
    return TOPOLOGIES[machine][0] if machine in TOPOLOGIES else MESH["tensor"]


MACHINES = ("cpu", *TOPOLOGIES)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("program", "products"),
    [
        ("one", 1),
        ("scan", LAYERS),
        ("gradient", 3 * LAYERS),
        ("remat", 4 * LAYERS),
        ("heads", 4 * 8 * 128 * 128 * 64 / (ROWS * D * D)),
    ],
)
def test_compiled_flops(texts, machine, program, products):
    """8 layers cost 8 times one; a gradient 3 times the forward pass; with recomputation 4 times: 4/3 of that."""
    counts = count(texts(machine, program), {"data": 1})
    assert (counts.flops, counts.collective_bytes, counts.uncounted) == (products * PRODUCT, {}, {})


@pytest.mark.parametrize("machine", MACHINES)
def test_compiled_layers_gather_weights_and_sum_activations(texts, machine):
    """Each layer gathers both of its weights' fsdp shards and sums its rows' outputs over tensor."""
    t = tensor(machine)
    counts = count(texts(machine, "mlp"), MESH | {"tensor": t})
    gathered, summed = 2 * (D * F // t) / 2, 2 * (ROWS // 4 * D) * (t - 1) / t
    size = 4 if machine == "cpu" else 2  # bytes: the CPU compiler widens bfloat16
    assert counts.flops == LAYERS * 2 * 2 * ROWS * D * F / (4 * t)
    assert counts.collective_bytes["fsdp"] == LAYERS * gathered * size
    assert counts.collective_bytes["tensor"] == LAYERS * summed * size


@pytest.mark.parametrize("machine", ["cpu", "v5e", "v4"])
def test_compiled_collectives(texts, machine):
    """Of 4 MiB, three times, in units of that; data and fsdp are 2 devices each."""
    t = tensor(machine)
    counts = count(texts(machine, "collectives"), MESH | {"tensor": t})
    found = {axes: sent / (3 * 1024 * 1024 * 4) for axes, sent in counts.collective_bytes.items()}
    assert found == {"tensor": 2 * (t - 1) / t + 1, "data+fsdp": 2 * 3 / 4, "fsdp": 1 + 1 / 2, "data": 1 / 2}


def test_compiled_collectives_between_slices(texts):
    """A sum over data and fsdp is a sum in the slice, a sum of half of it between slices, and a gather of halves."""
    counts = count(texts("slices", "collectives"), MESH)
    found = {axes: sent / (3 * 1024 * 1024 * 4) for axes, sent in counts.collective_bytes.items()}
    assert found == {"tensor": 1 + 1, "data": 1 / 2 + 1 / 2, "fsdp": (1 + 1 / 2) + (1 + 1 / 2)}
    assert counts.uncounted == {}


if __name__ == "__main__":
    main(*sys.argv[1:])
