"""Collectives and traffic read from programs: from a text by hand, and from what XLA compiles."""

import jax
import jax.numpy as jnp
import pytest

from vgen import hlo

# As XLA writes for a TPU: a loop of 5 whose number stands in its condition, arrays on the chip (S(1)), a slice of a
# stack that is read, and a stack that is changed in place.
TEXT = """HloModule jit_f, is_scheduled=true

%fused_computation.1 (p0: bf16[5,4,8], p1: s32[]) -> bf16[4,8] {
  %p0 = bf16[5,4,8]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice = bf16[1,4,8]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,4,8}
  ROOT %bitcast.1 = bf16[4,8]{1,0:T(8,128)(2,1)} bitcast(%slice)
}

%fused_computation.2 (p0.2: f32[5,16], p1.2: f32[1,16], p2.2: s32[]) -> f32[5,16] {
  %p0.2 = f32[5,16]{1,0} parameter(0)
  %p1.2 = f32[1,16]{1,0} parameter(1)
  %p2.2 = s32[] parameter(2)
  %zero.2 = s32[] constant(0)
  ROOT %update = f32[5,16]{1,0} dynamic-update-slice(%p0.2, %p1.2, %p2.2, %zero.2)
}

%body (arg: (s32[], bf16[5,4,8], f32[5,16])) -> (s32[], bf16[5,4,8], f32[5,16]) {
  %arg = (s32[]{:T(128)}, bf16[5,4,8]{2,1,0}, f32[5,16]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %stack = bf16[5,4,8]{2,1,0} get-tuple-element(%arg), index=1
  %sums = f32[5,16]{1,0} get-tuple-element(%arg), index=2
  %one = bf16[4,8]{1,0:T(8,128)(2,1)} fusion(%stack, %i), kind=kLoop, calls=%fused_computation.1
  %gathered = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%one), channel_id=1, dimensions={0}
  %row = f32[1,16]{1,0} reduce(%gathered, %i), dimensions={1}, to_apply=%add
  %new = f32[5,16]{1,0} fusion(%sums, %row, %i), kind=kLoop, calls=%fused_computation.2
  ROOT %out = (s32[]{:T(128)}, bf16[5,4,8]{2,1,0}, f32[5,16]{1,0}) tuple(%i, %stack, %new)
}

%condition (arg.2: (s32[], bf16[5,4,8], f32[5,16])) -> pred[] {
  %arg.2 = (s32[]{:T(128)}, bf16[5,4,8]{2,1,0}, f32[5,16]{1,0}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%arg.2), index=0
  %five = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%i.2, %five), direction=LT
}

ENTRY %main (x: (s32[], bf16[5,4,8], f32[5,16])) -> f32[5,16] {
  %x = (s32[]{:T(128)}, bf16[5,4,8]{2,1,0}, f32[5,16]{1,0}) parameter(0)
  %loop = (s32[]{:T(128)}, bf16[5,4,8]{2,1,0}, f32[5,16]{1,0}) while(%x), condition=%condition, body=%body
  %sums.2 = f32[5,16]{1,0} get-tuple-element(%loop), index=2
  ROOT %total = f32[5,16]{1,0} all-reduce(%sums.2), channel_id=2, to_apply=%add
}
"""


def test_a_program_by_hand():
    found = hlo.traffic(TEXT)
    assert found.collectives == {"all-gather": (5, 5 * 16 * 8 * 2), "all-reduce": (1, 5 * 16 * 4)}
    one, row, index = 4 * 8 * 2, 16 * 4, 4
    inside = (one + index + one) + one + (index + row) + (row + index + row)  # slice; gather into the chip; sums; place
    assert found.memory == 5 * inside + 2 * 5 * 16 * 4


def test_a_collective_in_pieces_counts_once():
    """As TPUs run it inside of several products: what begins, goes on with and ends it has one number."""
    piece = "  %again = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%one), channel_id=1, dimensions={0}\n"
    other = piece.replace("again", "third").replace("channel_id=1", "channel_id=3")
    text = TEXT.replace("  %row = f32[1,16]", piece + "  %row = f32[1,16]")
    assert hlo.traffic(text).collectives == hlo.traffic(TEXT).collectives
    text = TEXT.replace("  %row = f32[1,16]", other + "  %row = f32[1,16]")
    assert hlo.traffic(text).collectives["all-gather"] == (10, 2 * 5 * 16 * 8 * 2)


def test_a_loop_of_unknown_length_needs_a_number():
    five = "%five = s32[]{:T(128)} "
    text = TEXT.replace(five + "constant(5)", five + "get-tuple-element(%arg.2), index=0")
    with pytest.raises(ValueError, match="how often loop runs"):
        hlo.traffic(text)
    assert hlo.traffic(text, steps=7).collectives["all-gather"][0] == 7
    annotated = text.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert hlo.traffic(annotated).collectives["all-gather"][0] == 3
    with pytest.raises(ValueError, match="there is no ENTRY"):
        hlo.traffic("HloModule empty")


def test_what_xla_compiles_here():
    """A chain of matrices in a scan: each is read at least once, and at most cut out first; never the whole stack."""

    def chain(ws, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    def moved(depth):
        ws, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((depth, 256, 256), (8, 256)))
        return hlo.traffic(jax.jit(chain).lower(ws, x).compile().as_text()).memory

    one = 256 * 256 * 4
    assert 8 * one <= moved(12) - moved(4) <= 1.2 * 3 * 8 * one
