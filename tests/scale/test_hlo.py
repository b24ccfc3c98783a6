"""FLOPs of hand-made HLO, by hand: products, loops, calls."""

import re

import pytest

from scale.plan.hlo import count
from tests.scale.hlo_text import MESH, module


def test_dots_by_hand():
    """3 products [4, 6] x [6, 8], and one [5] . [5]."""
    text = module("""\
  %a = f32[3,4,6]{2,1,0} constant({...})
  %b = bf16[3,6,8]{2,1,0:T(8,128)(2,1)S(1)} constant({...})
  %c = f32[5]{0} constant({...})
  %d = f32[3,4,8]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, \
rhs_contracting_dims={1}
  ROOT %e = f32[] dot(%c, %c), lhs_contracting_dims={0}, rhs_contracting_dims={0}""")
    assert count(text, MESH).flops == 2 * 3 * 4 * 6 * 8 + 2 * 5


@pytest.mark.parametrize(
    ("shapes", "window", "products"),
    [
        ("4,128,1024 1024,64,1 4,128,64", "{size=1}, dim_labels=0bf_io0->0bf", 4 * 128 * 1024 * 64),
        ("4,128,1024 4,128,64 1024,64,1", "{size=4}, dim_labels=0fb_0io->bf0", 4 * 128 * 1024 * 64),
        ("8,16,32 8,32,64 8,16,64", "{size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf",
         8 * 16 * 32 * 64),
        ("2,4,5 3,5,7 2,4,7", "{size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * 10 * 5 * 7),
        ("2,9,5 3,5,7 2,3,7", "{size=3 rhs_dilate=2 stride=2}, dim_labels=b0f_0io->b0f",
         2 * 9 * 5 * 7),
        ("2,4,6 1,3,8 2,4,8", "{size=1}, dim_labels=b0f_0io->b0f, feature_group_count=2",
         2 * 4 * 3 * 8),
        ("6,4,5 1,5,9 2,4,9", "{size=1}, dim_labels=b0f_0io->b0f, batch_group_count=3",
         2 * 4 * 5 * 9),
        ("7,3 3,2 7,2", "{}, dim_labels=bf_io->bf", 7 * 3 * 2),
    ],
)
def test_convolutions_by_hand(shapes, window, products):
    """Dots as the TPU compiler writes them, the third with a batch of 8.

    Padding of one on both sides loses 2 of 12 positions; groups multiply only their own channels,
    or their own rows.
    """
    left, kernel, out = shapes.split()
    text = module(f"""\
  %a = f32[{left}]{{2,1,0}} constant({{...}})
  %b = f32[{kernel}]{{2,1,0}} constant({{...}})
  ROOT %c = f32[{out}]{{2,1,0}} convolution(%a, %b), window={window}""")
    assert count(text, MESH).flops == 2 * products


LOOP = """\
HloModule m

%body (s: STATE) -> STATE {
  %one = s32[] constant(1)
  %s = STATE parameter(0)
  %i.raw = s32[] get-tuple-element(%s), index=0
  %i = s32[]{:T(128)S(6)} copy(%i.raw)
  %v = f32[8]{0} get-tuple-element(%s), index=1
  %five = s32[] get-tuple-element(%s), index=2
  %dot = f32[] dot(%v, %v), lhs_contracting_dims={0}, rhs_contracting_dims={0}
  %next = s32[] NEXT
  ROOT %t = STATE tuple(%next, %v, %five)
}

%condition (s.1: STATE) -> pred[] {
  %s.1 = STATE parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %five.1 = s32[] get-tuple-element(%s.1), index=2
  %limit = s32[] constant(LIMIT)
  ROOT %c = pred[] compare(%i.1, RIGHT), direction=DIRECTION
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %zero = s32[] constant(START)
  %start = s32[] copy(%zero)
  %five.2 = s32[] constant(5)
  %t.1 = STATE tuple(%start, %p, %five.2)
  %while.1 = STATE while(%t.1), condition=%condition, body=%bodyATTRIBUTES
  ROOT %r = f32[8]{0} get-tuple-element(%while.1), index=1
}
"""


KNOWN = '{"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}'


def loop(
    start: str = "0",
    step: str = "add(%i, %one)",
    limit: str = "8",
    direction: str = "LT",
    attributes: str = "",
) -> str:
    """A loop around a product of 2 x 8 FLOPs; its state is a counter, a vector, a constant 5."""
    right = "%five.1" if limit == "5" else "%limit"
    values = {"STATE": "(s32[], f32[8]{0}, s32[])", "START": start, "NEXT": step, "LIMIT": limit}
    values |= {"RIGHT": right, "DIRECTION": direction, "ATTRIBUTES": attributes}
    return re.sub("|".join(values), lambda match: values[match[0]], LOOP)


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
        (loop(attributes=f", backend_config={KNOWN}"), 3),
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


NESTED = """\
HloModule m

%less (l: s32[], r: s32[]) -> pred[] {
  %l = s32[] parameter(0)
  %r = s32[] parameter(1)
  ROOT %c = pred[] compare(%l, %r), direction=LT
}

%plus (q: s32[]) -> s32[] {
  %q = s32[] parameter(0)
  %k = s32[] constant(1)
  ROOT %s = s32[] add(%q, %k)
}

%inner_body (a: INNER) -> INNER {
  %a = INNER parameter(0)
  %ai = s32[] get-tuple-element(%a), index=0
  %al = s32[] get-tuple-element(%a), index=1
  %av = f32[8]{0} get-tuple-element(%a), index=2
  %ad = f32[] dot(%av, %av), lhs_contracting_dims={0}, rhs_contracting_dims={0}
  %an = s32[] fusion(%ai), kind=kLoop, calls=%plus
  ROOT %at = INNER tuple(%an, %al, %av)
}

%inner_condition (b: INNER) -> pred[] {
  %b = INNER parameter(0)
  %bi = s32[] get-tuple-element(%b), index=0
  %bl = s32[] get-tuple-element(%b), index=1
  ROOT %bc = pred[] fusion(%bi, %bl), kind=kLoop, calls=%less
}

%outer_body (d: OUTER) -> OUTER {
  %d = OUTER parameter(0)
  %di = s32[] get-tuple-element(%d), index=0
  %ds = s32[] get-tuple-element(%d), index=1
  %dl = s32[] get-tuple-element(%d), index=2
  %dv = f32[8]{0} get-tuple-element(%d), index=3
  %dt = INNER tuple(%ds, %dl, %dv)
  %dw = INNER while(%dt), condition=%inner_condition, body=%inner_body
  %dn = s32[] fusion(%di), kind=kLoop, calls=%plus
  ROOT %dr = OUTER tuple(%dn, %ds, %dl, %dv)
}

%outer_condition (e: OUTER) -> pred[] {
  %e = OUTER parameter(0)
  %ei = s32[] get-tuple-element(%e), index=0
  %three = s32[] constant(3)
  ROOT %ec = pred[] compare(%ei, %three), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %one = s32[] constant(1)
  %five = s32[] constant(5)
  %t = OUTER tuple(%zero, %one, %five, %p)
  %w = OUTER while(%t), condition=%outer_condition, body=%outer_body
  ROOT %r = f32[8]{0} get-tuple-element(%w), index=3
}
"""


def test_a_loop_in_a_loop_and_a_condition_in_a_fusion():
    """Start and limit of the inner loop are constants of the outer state; 3 x (5 - 1) products."""
    text = NESTED.replace("INNER", "(s32[], s32[], f32[8]{0})")
    counts = count(text.replace("OUTER", "(s32[], s32[], s32[], f32[8]{0})"), MESH)
    assert (counts.flops, counts.uncounted) == (3 * 4 * 16, {})


def test_calls_and_the_largest_branch():
    """One product called, one fused, one asynchronous; of branches with 1 and 2, the one with 2."""
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
  %b = f32[] fusion(%p), kind=kCustom, calls=%fused, \
backend_config={"fusion_config":{"kind":"__ynn_fusion"}}
  %c = ((f32[8]{0}), f32[], u32[]) async-start(%p), calls=%wrapped
  %d = f32[] async-done(%c), calls=%wrapped
  ROOT %e = f32[] conditional(%which, %p, %p), branch_computations={%one, %two}"""
    assert count(module(entry, *parts), MESH).flops == 16 * (3 + 2)


def test_custom_calls_by_their_estimate_or_by_name():
    """A kernel's metadata may hold line ends."""
    kernel = 'f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call"'
    cost = '"cost_estimate":{"flops":"123","transcendentals":"7"}'
    estimate = f'{{"custom_call_config":{{"body":"AA",{cost}}}}}'
    metadata = 'frontend_attributes={kernel_metadata={\n"a":"{}"\n}}, metadata={op_name="kernel"}'
    text = module(f"""\
  %estimated.1 = {kernel}, {metadata}, backend_config={estimate}
  %kernel_fwd.1.clone.2 = {kernel}, {metadata}
  ROOT %b = f32[8]{{0}} custom-call(), custom_call_target="AllocateBuffer"\
""")
    counts = count(text, MESH)
    assert (counts.flops, counts.uncounted) == (123, {"tpu_custom_call kernel_fwd": 1})
