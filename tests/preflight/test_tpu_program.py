"""The price of a TPU program, on programs made by hand and on some that the TPU's compiler
makes."""

import functools

import jax
import jax.numpy as jnp
import pytest

from diffit_jax.preflight import compiler, preflight, schedule
from diffit_jax.preflight.cost import Kernel, cost, group_size, kernels, parse, type_bytes
from diffit_jax.runtime import backend, parallel
from diffit_jax.runtime.backend import CHIPS, chip_of


def estimate(cycles):
    return f'backend_config={{"flag_configs":[],"window_config":{{"estimated_cycles":"{cycles}"}}}}'


def priced(text, **options):
    return cost(parse(text), bytes_per_cycle=100.0, **options)


LOOP = """
%inner_condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %bound = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%inner_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %x = f32[8]{0:T(128)} get-tuple-element(%p), index=1
  %work = f32[8]{0:T(128)} fusion(%x), kind=kLoop, calls=%nothing, CYCLES10
  ROOT %out = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%p, %work)
}

%outer_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %once = f32[8]{0:T(128)} fusion(%p), kind=kLoop, calls=%nothing, CYCLES7
  ROOT %inner = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%p), condition=%inner_condition, \
body=%inner_body
}

%outer_condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  ROOT %less = pred[] fusion(%p), kind=kLoop, calls=%fused_compare
}

%fused_compare (p: s32[]) -> pred[] {
  %p = s32[] parameter(0)
  %bound = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%p, %bound), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0:T(128)} parameter(0)
  %start = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%x, %x)
  ROOT %outer = (s32[]{:T(128)}, /*index=1*/f32[8]{0:T(128)}) while(%start), \
condition=%outer_condition, body=%outer_body
}
""".replace("CYCLES10", estimate(10)).replace("CYCLES7", estimate(7))


def test_nested_loops():
    """Three times 7 plus five times 10; the bounds are in the condition, once inside a fusion, or
    known to the compiler."""
    # The conditions have no estimate: a bool from a state of 36 bytes, and from two numbers of 4.
    outer, inner = 3 * (1 + 36) / 100, (1 + 8) / 100
    result = priced(LOOP)
    assert (
        result.cycles == pytest.approx(3 * (7 + 5 * (10 + inner)) + outer)
        and not result.unknown_loops
    )
    known = LOOP.replace(
        "body=%inner_body", 'body=%inner_body, backend_config={"known_trip_count":{"n":"2"}}'
    )
    assert priced(known).cycles == pytest.approx(3 * (7 + 2 * (10 + inner)) + outer)


def test_a_loop_of_unknown_length_is_listed():
    unknown = LOOP.replace(
        "%bound = s32[]{:T(128)} constant(5)", "%bound = s32[]{:T(128)} parameter(1)"
    )
    result = priced(unknown)
    assert result.unknown_loops == ["inner"] and result.cycles == pytest.approx(
        3 * (7 + 10), rel=0.1
    )


CONDITIONAL = f"""
%rarely (p: f32[8]) -> f32[8] {{
  %p = f32[8] parameter(0)
  ROOT %a = f32[8] fusion(%p), kind=kLoop, calls=%nothing, {estimate(1000)}
}}

%mostly (p: f32[8]) -> f32[8] {{
  %p = f32[8] parameter(0)
  ROOT %b = f32[8] fusion(%p), kind=kLoop, calls=%nothing, {estimate(10)}
}}

ENTRY %main (x: f32[8], i: s32[]) -> f32[8] {{
  %x = f32[8] parameter(0)
  %i = s32[] parameter(1)
  ROOT %c = f32[8] conditional(%i, %x, %x), branch_computations={{%rarely, %mostly}}, \
metadata={{op_name="jit(f)/guidance/cond"}}
}}
"""


def test_branches_of_a_conditional_count_alike():
    assert priced(CONDITIONAL).cycles == 505 and priced(CONDITIONAL).even_conditionals == ["c"]


ASYNC = f"""
%gathered (p: bf16[4,8]) -> bf16[64,8] {{
  %p = bf16[4,8] parameter(0)
  ROOT %g = bf16[64,8] all-gather(%p), channel_id=3, dimensions={{0}}
}}

%reduced (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}}

ENTRY %main (x: bf16[4,8], y: f32[100]) -> f32[100] {{
  %x = bf16[4,8] parameter(0)
  %y = f32[100] parameter(1)
  %start = (bf16[4,8], bf16[64,8]) all-gather-start(%x), channel_id=1, \
replica_groups=[2,16]<=[32], dimensions={{0}}
  %between = f32[100] fusion(%y), kind=kLoop, calls=%nothing, {estimate(50)}
  %done = bf16[64,8] all-gather-done(%start)
  %first = (bf16[64,8], u32[]) fusion(%x), kind=kCustom, calls=%gathered
  %second = (bf16[64,8], u32[]) fusion(%x), kind=kOutput, calls=%gathered, {estimate(20)}
  %sum = (f32[100], f32[20]) all-reduce(%y, %y), channel_id=2, to_apply=%reduced
  %fetch = (f32[100], f32[100], u32[]) copy-start(%y)
  %fetched = f32[100] copy-done(%fetch)
  ROOT %out = f32[100] copy(%fetched)
}}
"""


def test_collectives_and_asynchronous_pairs_count_once():
    """A pair counts at its start; a collective that two fusions share counts once; a sum is sent
    twice."""
    result = priced(ASYNC)
    # Sixteen members gather: each has a sixteenth already. The sum does not say how many take part.
    assert result.collectives == {
        "all-gather": [2, (64 * 8 * 2) * 15 / 16 + 64 * 8 * 2],
        "all-reduce": [1, 2 * (100 + 100) * 4],
    }
    assert result.async_copies == [1, 400]
    # The last copy has no estimate: 400 bytes in, 400 out, 100 a cycle.
    assert result.cycles == 50 + 20 + 8 and result.cycles_by_bytes == 8


def test_fusions_without_an_estimate():
    """By the estimates inside, if there are any; else by what they read and write."""
    text = f"""
%inside (p: f32[100]) -> f32[100] {{
  %p = f32[100] parameter(0)
  ROOT %a = f32[100] fusion(%p), kind=kLoop, calls=%nothing, {estimate(30)}
}}

ENTRY %main (x: f32[100]) -> f32[100] {{
  %x = f32[100] parameter(0)
  %one = f32[100] fusion(%x), kind=kLoop, calls=%inside
  ROOT %two = f32[100] fusion(%one), kind=kLoop, calls=%nothing
}}
"""
    result = priced(text)
    assert result.cycles == 38 and result.cycles_by_bytes == 8


KERNELS = """
ENTRY %main (x: bf16[2,4,8,16]) -> bf16[2,4,8,16] {
  %x = bf16[2,4,8,16]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %a = bf16[2,4,8,16] custom-call(%x), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/jvp(tmsa_forward)/pallas_call"}
  %m = bf16[2,4,8,16] custom-call(%a), custom_call_target="ConcatBitcast"
  %t = bf16[2,4,8,16] custom-call(%a), custom_call_target="TopK"
  ROOT %b = bf16[2,4,8,16] custom-call(%m), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/shard_map/other/pallas_call"}
}
"""


def test_kernels_are_priced_by_their_schedule_or_listed():
    """Never silently free."""
    found = {kernel.name: kernel for kernel in kernels(parse(KERNELS))}
    size = 2 * 4 * 8 * 16 * 2
    assert found == {
        name: Kernel(name, ("bf16[2,4,8,16]",), 2 * size) for name in ("tmsa_forward", "other")
    }
    result = priced(KERNELS, kernels=lambda kernel: {"tmsa_forward": 77.0}.get(kernel.name))
    assert result.cycles == 77 and result.unpriced == {"other": 1, "TopK": 1}


def test_a_kernel_that_reads_a_stack_is_priced_by_the_slice():
    """What takes a layer out of the stack was fused into it, and moves nothing by itself."""
    text = """
%fused (stack: bf16[28,2,4,8,16], layer: s32[]) -> bf16[2,4,8,16] {
  %stack = bf16[28,2,4,8,16] parameter(0)
  %layer = s32[] parameter(1)
  %slice = bf16[2,4,8,16] fusion(%stack, %layer), kind=kLoop, calls=%taken
  ROOT %a = bf16[2,4,8,16] custom-call(%slice), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/jvp(tmsa_forward)/pallas_call"}
}

ENTRY %main (x: bf16[28,2,4,8,16], i: s32[]) -> bf16[2,4,8,16] {
  %x = bf16[28,2,4,8,16] parameter(0)
  %i = s32[] parameter(1)
  ROOT %b = bf16[2,4,8,16] fusion(%x, %i), kind=kCustom, calls=%fused
}
"""
    seen = []

    def price(kernel):
        seen.append(kernel)
        return 77.0

    result = priced(text, kernels=price)
    assert result.cycles == result.cycles_by_bytes == 77 and not result.unpriced
    assert seen == [Kernel("tmsa_forward", ("bf16[2,4,8,16]",), 2 * 2 * 4 * 8 * 16 * 2)]


@pytest.mark.parametrize(
    ("topology", "queries", "cycles"),
    [
        ("v5e:4x4", "4,16,72,1024", 16 * (100 + 4 * 1000)),  # a head of an example is a step
        ("v5e:4x4", "8,9,256,128", 9 * (100 + 2 * 1000)),  # four examples are
        ("v5p:2x2x4", "8,9,1024,128", 9 * (100 + 4 * 1000)),  # each core has half of the batch,
        ("v5p:2x2x4", "3,9,1024,128", 5 * (100 + 3 * 1000)),  # or heads, where that is odd
    ],
)
def test_cycles_of_a_kernel_are_those_of_its_grid(monkeypatch, topology, queries, cycles):
    """1,000 bundles a step and 100 once a head, as long as memory keeps up."""
    monkeypatch.setattr(schedule, "_schedule", lambda *_: {"tmsa_forward": (1000, 100)})
    tokens = 256 if "256" in queries else 1024
    heads = int(queries.split(",")[1])
    strip = f"f32[{heads},{round(tokens**0.5)},{2 * tokens}]"
    operands = (*[f"bf16[{queries}]"] * 3, strip)
    assert schedule.kernel_cycles(Kernel("tmsa_forward", operands, 0), topology) == cycles
    slow = schedule.kernel_cycles(Kernel("tmsa_forward", operands, 10**9), topology)
    chip = chip_of(topology)
    assert slow == pytest.approx(10**9 / chip.memory_bandwidth * chip.clock)
    assert schedule.kernel_cycles(Kernel("other", operands, 0), topology) is None


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}, x={}", 3),
        ("replica_groups=[16,8]<=[8,16]T(1,0)", 8),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=16,'axis_2'=4] {'axis_1'}, use", 16),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=16,'axis_2'=4] {'axis_0','axis_2'}", 8),
        ("channel_id=4", None),
    ],
)
def test_who_takes_part_in_a_collective(text, size):
    assert group_size(text) == size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("f32[3,4]{1,0:T(8,128)}", 48),
        ("(bf16[2]{0}, /*index=1*/(pred[], s8[5]))", 10),
        ("f8e4m3fn[7]", 7),
        ("token[]", 0),
        ("f32[]", 4),
    ],
)
def test_sizes_of_types(text, size):
    assert type_bytes(text) == size


def compiled_cycles(function, *shapes):
    """Cycles of a function of bfloat16 arrays on one v5e chip."""
    mesh = parallel.make_mesh(compiler.topology_devices("v5e:2x2")[:1])
    whole = parallel.replicated(mesh)
    text = (
        jax.jit(function)
        .lower(*(jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=whole) for shape in shapes))
        .compile()
        .as_text()
    )
    chip = chip_of("v5e:2x2")
    return cost(parse(text), chip.memory_bandwidth / chip.clock).cycles


def test_scanned_and_unrolled_cost_the_same():
    """Six layers as a loop and one by one, within 15 % (measured 11): the loop also copies what it
    carries, and fetches from a stack."""

    def layers(x, w_in, w_out, unroll):
        return jax.lax.scan(
            lambda x, w: (jnp.tanh(x @ w[0]) @ w[1], None), x, (w_in, w_out), unroll=unroll
        )[0]

    def cycles(depth, unroll):
        return compiled_cycles(
            functools.partial(layers, unroll=unroll),
            (1024, 1024),
            (depth, 1024, 4096),
            (depth, 4096, 1024),
        )

    looped = cycles(6, 1)
    assert looped == pytest.approx(cycles(6, 6), rel=0.15)
    assert looped == pytest.approx(2 * cycles(3, 1), rel=0.05)


@pytest.mark.parametrize(
    ("chip", "low", "high"), [("v5e", 0.87, 0.97), ("v5p", 0.89, 0.96), ("v6e", 0.45, 0.8)]
)
def test_large_matrix_products_come_near_the_peak(chip, low, high):
    """The three products of the calibration: near the peak on v5e and v5p, and not on v6e, which is
    therefore marked (Ironwood 0.78 to 0.81)."""
    shares = [row.share_of_peak for row in preflight.calibrate(CHIPS[chip].example).products]
    assert len(shares) == 3 and all(low <= fraction <= high for fraction in shares), shares
    assert CHIPS[chip].calibrated == (chip in ("v5e", "v5p"))


def test_a_chip_is_its_devices():
    """v4's two cores are devices of their own for the compiler."""
    v4, half = CHIPS["v4"], CHIPS["v4"].device()
    assert (half.peak_flops, half.memory, half.cores) == (v4.peak_flops / 2, v4.memory / 2, 1)
    assert len(compiler.topology_devices("v4:2x2x1")) == 8 and compiler.count_chips("v4:2x2x1") == 4
    # So are Ironwood's, for jax on the chip too: a device's peak is half of the chip's.
    (device,) = {x.device_kind for x in compiler.topology_devices("TPU7x:2x2x1")}
    assert compiler.count_chips("tpu7x:2x2x1") == 4
    assert backend.PEAK_FLOPS[device] == CHIPS["tpu7x"].peak_flops / 2


@pytest.mark.parametrize(
    ("name", "multipliers"),
    [
        ("v4", 4 * 128**2),
        ("v5e", 4 * 128**2),
        ("v5p", 4 * 128**2),
        ("v6e", 4 * 256**2),
        ("tpu7x", 4 * 256**2),
    ],
)
def test_clock_and_peak_agree(name, multipliers):
    """A multiply-add of every matrix unit of every core in each cycle is the peak."""
    chip = CHIPS[name]
    assert chip.clock * 2 * multipliers * chip.cores == pytest.approx(chip.peak_flops, rel=0.005)


def test_the_compilers_largest_number_is_no_estimate():
    """It wrote 2^63 - 1 for convolutions on v5p: they are priced by their bytes."""
    text = """
ENTRY %main (x: f32[800]) -> f32[800] {
  %x = f32[800]{0:T(128)} parameter(0)
  ROOT %y = f32[800]{0:T(128)} fusion(%x), kind=kLoop, calls=%nothing, CYCLES
}
"""
    told = priced(text.replace("CYCLES", estimate(7)))
    assert told.cycles == 7 and told.cycles_by_bytes == 0
    untold = priced(text.replace("CYCLES", estimate(2**63 - 1)))
    assert untold.cycles == untold.cycles_by_bytes == 2 * 4 * 800 / 100
