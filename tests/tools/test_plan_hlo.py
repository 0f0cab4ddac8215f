"""Reading collectives out of HLO text: kinds, bytes, groups and how often they run."""

from __future__ import annotations

import pytest

from tools.plan_hlo import Collective, parse_collectives, totals

# Written by hand in the form that XLA prints, with one of everything.
TEXT = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.3 (operand: bf16[1024,64]) -> bf16[128,64] {
  %operand = bf16[1024,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.7 = bf16[1024,64]{1,0:T(8,128)(2,1)} all-reduce(%operand), channel_id=4, replica_groups=[2,8]<=[16], use_global_device_ids=true, to_apply=%add
  ROOT %piece = bf16[128,64]{1,0} dynamic-slice(%all-reduce.7, %zero), dynamic_slice_sizes={128,64}
}

%body (state: (s32[], bf16[256,64])) -> (s32[], bf16[256,64]) {
  %state = (s32[], bf16[256,64]{1,0}) parameter(0)
  %weights = bf16[32,64]{1,0} get-tuple-element(%state), index=1
  %all-gather.1 = bf16[256,64]{1,0:T(8,128)(2,1)} all-gather(%weights), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}, dimensions={0}, metadata={op_name="jit(step)/jvp()/weights/all_gather" stack_frame_id=3}
  ROOT %next = (s32[], bf16[256,64]{1,0}) tuple(%count, %all-gather.1)
}

%condition (state: (s32[], bf16[256,64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %state = (s32[], bf16[256,64]{1,0}) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  ROOT %less = pred[] compare(%count, %limit), direction=LT
}

%endless (state: (s32[], f32[8])) -> pred[] {
  %state = (s32[], f32[8]{0}) parameter(0)
  %flag = pred[] get-tuple-element(%state), index=0
  ROOT %copy = pred[] copy(%flag)
}

%scatter_async (operand: f32[64]) -> f32[4] {
  %operand = f32[64]{0} parameter(0)
  ROOT %reduce-scatter.2 = f32[4]{0} reduce-scatter(%operand), replica_groups=[1,16]<=[16], dimensions={0}, to_apply=%add
}

ENTRY %main (p: bf16[32,64]) -> f32[] {
  %p = bf16[32,64]{1,0} parameter(0)
  %kernel = bf16[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block":"{\\"rows\\": 8}"
}}
  %loop = (s32[], bf16[256,64]{1,0}) while(%start), condition=%condition, body=%body
  %noted = (s32[], bf16[256,64]{1,0}) while(%start), condition=%endless, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %unknown = (s32[], f32[8]{0}) while(%start), condition=%endless, body=%other
  %fused = bf16[128,64]{1,0} fusion(%gradient), kind=kCustom, calls=%all-reduce-scatter.3
  %permute-start = (f32[10]{0}, f32[10]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%q), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %permute-done = f32[10]{0} collective-permute-done(%permute-start)
  %rs-start = ((f32[64]{0}), f32[4]{0}) async-start(%g), calls=%scatter_async
  %rs-done = f32[4]{0} async-done(%rs-start), calls=%scatter_async
  %gather-start = (bf16[2,8]{1,0}, s8[4]{0}, bf16[16,8]{1,0}, s8[32]{0}) all-gather-start(%a, %b), replica_groups=[2,8]<=[8,2]T(1,0), dimensions={0}
  %gather-done = (bf16[16,8]{1,0}, s8[32]{0}) all-gather-done(%gather-start)
  %pair-start = ((f16[64]{0}, f16[32]{0}), (f16[8]{0}, f16[4]{0})) reduce-scatter-start(%g, %h), replica_groups=[2,8]<=[16], dimensions={0}, to_apply=%add
  %pair-done = (f16[8]{0}, f16[4]{0}) reduce-scatter-done(%pair-start)
  %alone = f32[100]{0} all-reduce(%l), replica_groups={{0},{1},{2},{3}}, to_apply=%add
  ROOT %total = (f32[]{:T(128)}, f32[3]{0}) all-reduce(%l, %n), replica_groups={}, to_apply=%add
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def found() -> list[Collective]:
    return parse_collectives(TEXT, devices=16)[0]


def one(found, kind, **fields):
    matching = [
        c for c in found if c.kind == kind and all(getattr(c, k) == v for k, v in fields.items())
    ]
    assert len(matching) == 1, found
    return matching[0]


def test_a_gather_in_loops_counts_its_result_once_per_trip(found):
    gather = one(found, "all-gather", dtype="bf16")
    assert (gather.bytes, gather.group, gather.times) == (256 * 64 * 2, 8, 5 + 3)
    assert gather.wire_bytes == 8 * 256 * 64 * 2 * 7 / 8
    assert "/weights/" in gather.scope


def test_loops_whose_length_is_not_known_are_reported(found):
    assert parse_collectives(TEXT, devices=16)[1] == 1


def test_a_fused_all_reduce_scatter_is_a_reduce_scatter_of_its_operand(found):
    scatter = one(found, "reduce-scatter", dtype="bf16")
    assert (scatter.bytes, scatter.group, scatter.times) == (1024 * 64 * 2, 8, 1)


def test_an_asynchronous_pair_is_one_operation(found):
    assert one(found, "reduce-scatter", dtype="f32").bytes == 64 * 4
    assert one(found, "reduce-scatter", dtype="f16").bytes == (64 + 32) * 2  # as on GPUs
    assert one(found, "collective-permute").bytes == 10 * 4
    mixed = one(found, "all-gather", dtype="mixed")
    assert mixed.bytes == 16 * 8 * 2 + 32  # results only, of both


def test_reductions_name_all_devices_by_naming_none_and_groups_of_one_send_nothing(found):
    total = one(found, "all-reduce")
    assert (total.bytes, total.group) == (4 + 12, 16)
    assert total.wire_bytes == 2 * 16 * 15 / 16


def test_groups_tell_the_mesh_axes(found):
    mesh = {"data": 2, "fsdp": 8}
    assert one(found, "all-gather", dtype="bf16").axes(mesh) == ("fsdp",)
    strided = one(found, "all-gather", dtype="mixed")  # [8, 2] transposed: every other device
    assert strided.members == (0, 2, 4, 6, 8, 10, 12, 14)
    assert one(found, "all-reduce").axes(mesh) == ("data", "fsdp")


def test_totals_are_by_kind_and_dtype_and_the_largest_come_first(found):
    sums = totals(found)
    assert next(iter(sums)) == "all-gather bf16"
    assert sums["all-gather bf16"] == {
        "operations": 8, "bytes": 8 * 32768, "wire_bytes": 8 * 32768 * 7 / 8, "largest": 32768
    }  # fmt: skip


def test_what_is_no_compiled_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse_collectives("module @jit_step {}", devices=2)
