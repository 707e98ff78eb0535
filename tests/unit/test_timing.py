"""How long one op takes alone: kernels and collectives worked out by hand on a machine of round numbers.

The machine has 100 multiprocessors, 1000 TFLOP/s in BF16 and 2000 in FP8, 1 TB/s of memory, nodes of 4 chips joined by
100 GB/s and a network of 10 GB/s for each chip. The product form is that fitted to NVIDIA aiconfigurator's kernel
tables; ring volumes are those of reduce-scatter and all-gather, N (d-1)/d for each rank; the all-to-all on a torus is
that of the Scaling Book (github.com/jax-ml/scaling-book, "Sharded matrices").
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest

from simulator.layout import Span, resolve
from simulator.routing import expert_load
from simulator.routing.traffic import distinct, distinct_groups
from simulator.spec import Scenario, load_profile, load_scenario
from simulator.spec.curves import CollectiveCurve
from simulator.spec.hardware import HardwareProfile
from simulator.timing import Bulk, Compute, Exchange, Fixed, Item, OpClass, Pricer, Region, Send, Update
from simulator.timing.collectives import FREE, Kind, comm_sms, transfer
from simulator.timing.kernels import (
    Device,
    Pass,
    attention_seconds,
    cast_bytes,
    cast_seconds,
    gemm_seconds,
    grouped_gemm_seconds,
    memory_seconds,
    padded_rows,
    routing_seconds,
)
from simulator.timing.unfused import unfused_attention_seconds
from simulator.workload.ops import AttentionCore, Collective, Gemm, GroupedGemm, MemoryOp

Counts = npt.NDArray[np.int64]

US = 1e-6
PASSES: tuple[Pass, ...] = get_args(Pass)
RINGS: tuple[Kind, ...] = ("all_gather", "all_reduce")


def leaf(value: Any) -> dict[str, Any]:
    return {"value": value, "source": "here", "kind": "assumed"}


def leaves(**values: Any) -> dict[str, Any]:
    return {name: leaf(value) for name, value in values.items()}


PROFILE: dict[str, Any] = {
    "name": "Round numbers",
    "vendor": "nobody",
    "sources": {"here": "made up for this test"},
    "accelerator": {
        "peak": leaves(bf16="1000 TFLOP/s", fp8="2000 TFLOP/s"),
        **leaves(memory_bytes="80 GB", usable_fraction=0.9, memory_bandwidth="1 TB/s", sm_count=100),
    },
    "tiers": [
        {
            "name": "inside",
            "kind": "switch",
            "size": 4,
            **leaves(bandwidth="100 GB/s", alpha="2 us"),
            "collectives": {
                "all_to_all": leaves(latency="10 us", efficiency=0.5, comm_sms=20, overlap_efficiency=0.8),
                "all_gather": leaves(latency="10 us", hop="1 us", efficiency=0.8),
                "all_reduce": leaves(latency="20 us", efficiency=0.8, sqrt_coefficient=1e-9),
                "point_to_point": leaves(latency="5 us", efficiency=0.5),
            },
        },
        {
            "name": "between",
            "kind": "rail",
            **leaves(bandwidth="10 GB/s", alpha="3 us"),
            "collectives": {
                "all_to_all": leaves(latency="30 us", efficiency=0.5, comm_sms=12),
                "point_to_point": leaves(latency="6 us", efficiency=0.5),
            },
        },
    ],
    "kernels": {
        "gemm": {
            "bf16": leaves(
                launch="2 us",
                efficiency=0.8,
                k_half=250,
                throttle_per_decade=0.05,
                wave_weight=0.5,
                dgrad_scale=0.5,
                wgrad_scale=0.25,
            ),
            "fp8": leaves(
                launch="4 us",
                efficiency=0.8,
                k_half=250,
                throttle_per_decade=0.0,
                wave_weight=0.5,
                quantize_passes=1.0,
                dgrad_scale=1.0,
                wgrad_scale=1.0,
            ),
        },
        "grouped_gemm": {
            "bf16": leaves(
                launch="10 us",
                per_expert="1 us",
                efficiency=0.8,
                k_half=250,
                tile_rows=64,
                wgrad_rows_half=100,
                dgrad_scale=0.5,
                wgrad_scale=0.25,
            )
        },
        "attention": {"mha": leaves(rate="500 TFLOP/s", s_half=1000, backward_scale=0.5, launch="5 us")},
        "memory": leaves(launch="3 us", fraction=0.8, permute_fraction=0.4),
    },
    "stacks": {"plain": {"released": "2025-01-01", "versions": "none", **leaves(gap_fraction=0.0)}},
    "price": {"usd_per_hour": "2 USD/h", "kind": "test", "observed": "2025-01-01", "source": "here"},
}

MACHINE = HardwareProfile.model_validate(PROFILE)
WHOLE = Device.of(MACHINE)


def number(value: float) -> SimpleNamespace:
    """A number of a profile, without its source."""
    return SimpleNamespace(value=value)


def with_kernels(**changes: object) -> Device:
    """The machine with other curves."""
    return Device.of(MACHINE.model_copy(update={"kernels": MACHINE.kernels.model_copy(update=changes)}))


def root4(compute: float, memory: float) -> float:
    return float((compute**4 + memory**4) ** 0.25)


def gemm(m: float, n: float, k: float, which: Pass = "F", form: str = "bf16", device: Device = WHOLE) -> float:
    return float(gemm_seconds(device, form, which, m, n, k))


# Dense products


def test_one_full_wave() -> None:
    """[1280, 1000] x [1000, 1280] is 100 tiles on 100 multiprocessors: q = 1, 5.12 us to compute, 10.496 us to move."""
    compute = 100 * 128 * 128 * 2 * 1000 / (1000e12 * 0.8) * (1 + 250 / 1000)
    memory = (2 * (1280 * 1000 + 1000 * 1280) + 2 * 1280 * 1280) / 0.8e12

    assert [compute / US, memory / US] == pytest.approx([5.12, 10.496])
    assert gemm(1280, 1280, 1000) == pytest.approx(2 * US + root4(compute, memory))


def test_a_second_wave_weighs_half() -> None:
    """1281 rows are 110 tiles: q = 0.5 x 2 + 0.5 x 1.1 = 1.55."""
    compute = 1.55 * 5.12 * US
    memory = (2 * (1281 * 1000 + 1000 * 1280) + 2 * 1281 * 1280) / 0.8e12

    assert gemm(1281, 1280, 1000) == pytest.approx(2 * US + root4(compute, memory))


def test_a_small_product_uses_smaller_tiles() -> None:
    """64 rows would fill a tenth of a wave; the time is capped at 60 % of the achieved rate."""
    compute = 2 * 64 * 1280 * 1000 / (0.6 * 800e12) * 1.25
    memory = (2 * (64 * 1000 + 1000 * 1280) + 2 * 64 * 1280) / 0.8e12

    assert gemm(64, 1280, 1000) == pytest.approx(2 * US + root4(compute, memory))


def test_large_products_throttle_by_five_percent_per_decade() -> None:
    """16384 cubed is 8.8e12 FLOP, 1.944 decades over 1e11; 16384 tiles are 163.84 waves."""
    size = 16384
    waves = 0.5 * 164 + 0.5 * 163.84
    compute = waves * 100 * 128 * 128 * 2 * size / 800e12 * (1 + 250 / size) * (1 + 0.05 * np.log10(2 * size**3 / 1e11))
    memory = 3 * 2 * size * size / 0.8e12

    assert gemm(size, size, size) == pytest.approx(2 * US + root4(compute, memory))


def test_the_gradient_products_are_the_forward_with_its_sides_exchanged() -> None:
    """Input gradient [m, n] x [n, k] at half the rate; weight gradient [n, m] x [m, k] at a quarter, 8 bytes a sum."""
    m, n, k = 2560, 1280, 5120
    tiles = {"I": 20 * 40, "W": 10 * 40}
    dgrad = tiles["I"] / 100 * 100 * 128 * 128 * 2 * n / (800e12 * 0.5) * (1 + 250 / n)
    wgrad = tiles["W"] / 100 * 100 * 128 * 128 * 2 * m / (800e12 * 0.25) * (1 + 250 / m)
    dgrad_bytes = 2 * (m * n + n * k) + 2 * m * k
    wgrad_bytes = 2 * (n * m + m * k) + 8 * n * k

    assert gemm(m, n, k, "I") == pytest.approx(2 * US + root4(dgrad, dgrad_bytes / 0.8e12))
    assert gemm(m, n, k, "W") == pytest.approx(2 * US + root4(wgrad, wgrad_bytes / 0.8e12))


def test_fp8_computes_twice_as_fast() -> None:
    """A scale of 4 bytes for 128 FP8 numbers."""
    m = n = k = 4096
    compute = (0.5 * 11 + 0.5 * 10.24) * 100 * 128 * 128 * 2 * k / 1600e12 * (1 + 250 / k)
    memory = (2 * m * k * (1 + 4 / 128) + 2 * m * n) / 0.8e12

    assert gemm(m, n, k, form="fp8") == pytest.approx(4 * US + root4(compute, memory))


def test_a_product_that_is_small_along_one_side_is_slower() -> None:
    """(1 + 128/1280)(1 + 640/1280)(1 + 250/1000) on 100 FLOP-true tiles of side 1."""
    curve = MACHINE.kernels.gemm["bf16"].model_copy(
        update={"rows_half": number(128.0), "columns_half": number(640.0), "tile": number(1)}
    )
    device = with_kernels(gemm={"bf16": curve})
    compute = 2 * 1280 * 1280 * 1000 / 800e12 * 1.1 * 1.5 * 1.25
    memory = (2 * (1280 * 1000 + 1000 * 1280) + 2 * 1280 * 1280) / 0.8e12

    assert gemm(1280, 1280, 1000, device=device) == pytest.approx(2 * US + root4(compute, memory))


def test_bytes_inside_a_cache_move_at_its_bandwidth() -> None:
    """1 MB of 3 at 1.6 TB/s, the rest at 0.8; gathers are slower by the same factor inside and outside."""
    curve = MACHINE.kernels.memory.model_copy(update={"cache_bytes": number(1e6), "cache_bandwidth": number(1.6e12)})
    device = with_kernels(memory=curve)
    inside, outside = 1e6 / 1.6e12, 2e6 / 0.8e12

    assert memory_seconds(device, 3e6) == pytest.approx(3 * US + inside + outside)
    assert memory_seconds(device, 3e6, permute=True) == pytest.approx(3 * US + 2 * (inside + outside))
    assert memory_seconds(device, 0.5e6) == pytest.approx(3 * US + 0.5e6 / 1.6e12)


def test_choosing_experts_costs_launches_and_tokens_rather_than_bytes() -> None:
    assert routing_seconds(WHOLE, 8e9, 4096) == memory_seconds(WHOLE, 8e9)  # where the profile says nothing else
    curve = MACHINE.kernels.memory.model_copy(update={"routing_launch": number(150 * US)})
    assert routing_seconds(with_kernels(memory=curve), 8e9, 1000) == pytest.approx(150 * US)
    curve = curve.model_copy(update={"routing_per_token": number(0.2 * US)})
    assert routing_seconds(with_kernels(memory=curve), 8e9, 1000) == pytest.approx(350 * US)


def test_attention_without_a_fused_core_moves_its_scores() -> None:
    """1000 queries, 10 heads of 100, 500 keys: 5 M scores; 2 GFLOP forward, 4 backward, at 1 + 250/100 of full rate."""
    op = AttentionCore("core", "attention_core", heads=10, qk_dim=100, value_dim=100, context=250.0, context_full=500.0)

    def core(which: Pass, *, dropout: bool, ranks: int = 1) -> float:
        return unfused_attention_seconds(WHOLE, op, "bf16", which, tokens=1000, ranks=ranks, size=2, dropout=dropout)

    scores, rate = 5e6, 800e12 / (1 + 250 / 100)
    assert core("F", dropout=False) == pytest.approx(3 * 2 * US + 2e9 / rate + scores * 8 / 0.8e12)
    assert core("F", dropout=True) == pytest.approx(4 * 2 * US + 2e9 / rate + scores * 13 / 0.8e12)
    assert core("I", dropout=True) == pytest.approx(6 * 2 * US + 4e9 / rate + scores * 19 / 0.8e12)
    assert core("F", dropout=False, ranks=2) - 6 * US == pytest.approx((core("F", dropout=False) - 6 * US) / 2)


def test_operands_are_cast_once_for_each_direction_of_their_tiles() -> None:
    """Input 1000 wide, output 300: 3 bytes to read BF16 and write FP8, 1 more by columns, 2 to write FP8 anew."""
    assert [cast_bytes(which, 1000, 300) for which in PASSES] == [3000, 1200, 2000]
    assert [cast_bytes(which, 0, 300) for which in PASSES] == [0, 1200, 0]
    curves = MACHINE.kernels.gemm
    assert cast_seconds(WHOLE, curves["fp8"], 8e5) == pytest.approx(1 * US)
    assert cast_seconds(WHOLE, curves["bf16"], 8e5) == 0.0


def test_a_format_without_a_curve_of_its_own_is_timed_as_bf16() -> None:
    assert gemm(4096, 4096, 4096, form="fp32") == gemm(4096, 4096, 4096, form="bf16")


def test_no_rows_take_no_time() -> None:
    assert [gemm(0, 1280, 1000, which) for which in PASSES] == [0.0] * 3
    both = np.asarray(gemm_seconds(WHOLE, "bf16", "F", np.array([0.0, 1280.0]), 1280, 1000))
    assert both.tolist() == [0.0, gemm(1280, 1280, 1000)]


@pytest.mark.parametrize("which", PASSES)
def test_more_of_anything_is_never_faster(which: Pass) -> None:
    sizes = np.unique(np.geomspace(1, 100_000, 200).round())
    times = [
        [gemm(size, 1000, 1000, which) for size in sizes],
        [gemm(1000, size, 1000, which) for size in sizes],
        [gemm(1000, 1000, size, which) for size in sizes],
    ]

    assert all(series == sorted(series) for series in times)


def test_compute_slows_down_in_proportion_to_the_multiprocessors_that_communication_holds() -> None:
    """20 of 100 held: the peak is 800 TFLOP/s, and 8192 tiles are 102.4 waves of 80 instead of 81.92 of 100."""
    fewer = Device.of(MACHINE, comm_sms=20)
    compute = (0.5 * 103 + 0.5 * 102.4) * 80 * 128 * 128 * 2 * 8192 / (800e12 * 0.8) * (1 + 250 / 8192)
    throttle = 1 + 0.05 * np.log10(2 * 16384 * 8192 * 8192 / 1e11)
    memory = 2 * (16384 * 8192 + 8192 * 8192 + 16384 * 8192) / 0.8e12

    assert fewer.peak("bf16") == pytest.approx(800e12)
    assert gemm(16384, 8192, 8192, device=fewer) == pytest.approx(2 * US + root4(compute * throttle, memory))


# Grouped products


def grouped(rows: float, padded: float, active: float, which: Pass = "F", n: float = 2000, k: float = 1000) -> float:
    arrays = {name: np.array([value]) for name, value in {"rows": rows, "padded": padded, "active": active}.items()}
    return float(grouped_gemm_seconds(WHOLE, "bf16", which, **arrays, n=n, k=k)[0])


def test_rows_are_padded_to_tiles_for_each_expert() -> None:
    """Experts with 1, 64, 65 and no rows need 64 + 64 + 128 + 0 rows of tiles."""
    assert padded_rows(np.array([[1, 64, 65, 0], [0, 0, 0, 0]]), 64).tolist() == [256.0, 0.0]


def test_a_grouped_product_pads_rows_reads_active_weights_and_launches_once() -> None:
    """1000 rows in 4 active experts, 1088 with padding: 10 us + 4 x 1 us + the larger of computing and moving."""
    compute = 1088 * 2 * 2000 * 1000 / 800e12 * (1 + 250 / 1000)
    memory = (4 * 2000 * 1000 * 2 + 1000 * (1000 * 2 + 2000 * 2)) / 0.8e12

    assert grouped(1000, 1088, 4) == pytest.approx(14 * US + root4(compute, memory))


def test_its_gradients() -> None:
    """The input gradient contracts over n; the weight gradient over the rows, with 100 rows lost for each expert."""
    dgrad = 1088 * 2 * 2000 * 1000 / (800e12 * 0.5) * (1 + 250 / 2000)
    dgrad_bytes = 4 * 2000 * 1000 * 2 + 1000 * (2000 * 2 + 1000 * 2)
    wgrad = (1000 + 4 * 100) * 2 * 2000 * 1000 / (800e12 * 0.25)
    wgrad_bytes = 4 * 2000 * 1000 * 8 + 1000 * (1000 * 2 + 2000 * 2)

    assert grouped(1000, 1088, 4, "I") == pytest.approx(14 * US + root4(dgrad, dgrad_bytes / 0.8e12))
    assert grouped(1000, 1088, 4, "W") == pytest.approx(14 * US + root4(wgrad, wgrad_bytes / 0.8e12))


def test_a_rank_without_rows_takes_no_time() -> None:
    assert [grouped(0, 0, 0, which) for which in PASSES] == [0.0] * 3


# Attention and memory


def test_attention_reaches_half_of_its_rate_at_s_half() -> None:
    """1 TFLOP at 1000 tokens: 250 TFLOP/s forward, 4 ms; 2.5 times the work at half the rate backward, 20 ms."""
    forward = attention_seconds(WHOLE, "mha", 1e12, 1000, "F")
    backward = attention_seconds(WHOLE, "mha", 1e12, 1000, "I")

    assert [forward, backward] == pytest.approx([5 * US + 4e-3, 5 * US + 20e-3])
    assert attention_seconds(WHOLE, "mha", 1e12, 9000, "F") == pytest.approx(5 * US + 1e12 / 450e12)
    assert attention_seconds(WHOLE, "mla", 1e12, 1000, "F") == forward  # no curve of its own on this machine
    assert attention_seconds(Device.of(MACHINE, 20), "mha", 1e12, 1000, "F") == pytest.approx(5 * US + 5e-3)


def test_memory_bound_kernels_and_permutations() -> None:
    """8 GB at 80 % of 1 TB/s take 10 ms, gathered at 40 % 20 ms."""
    assert memory_seconds(WHOLE, 8e9) == pytest.approx(3 * US + 10e-3)
    assert memory_seconds(WHOLE, 8e9, permute=True) == pytest.approx(3 * US + 20e-3)
    assert memory_seconds(WHOLE, 0.0) == 3 * US


# Collectives


@pytest.mark.parametrize(
    ("span", "inside", "between"),
    [
        (Span(4, (4, 1)), 3 / 4, None),  # one node
        (Span(4, (1, 4)), None, 3 / 4),  # four nodes, one rank in each
        (Span(8, (4, 2)), 7 / 8, 1 / 8),  # two nodes: half of the buffer crosses, over four ports
        (Span(64, (4, 16)), 63 / 64, 15 / 64),
    ],
)
def test_ring_volumes(span: Span, inside: float | None, between: float | None) -> None:
    """N (d-1)/d inside the node, N (n-1)/(n L) over each rank's own port; all-reduce moves both twice."""
    size = 1e9
    gather, reduce = (transfer(MACHINE, span, kind, size) for kind in RINGS)
    volumes = {0: inside, 1: between}
    rates = {0: 100e9 * 0.8, 1: 10e9}
    expected = {tier: share * size / rates[tier] for tier, share in volumes.items() if share is not None}

    assert {flow.tier: flow.seconds for flow in gather.flows} == pytest.approx(expected)
    assert [flow.demand for flow in gather.flows] == [(0.8, 1.0)[tier] for tier in expected]
    assert [flow.tier for flow in reduce.flows] == [flow.tier for flow in gather.flows]
    ramp = [1e-9 * (2 * share * size) ** 0.5 for share in (inside,) if share is not None]
    doubled = [2 * flow.seconds for flow in gather.flows]
    assert [flow.seconds for flow in reduce.flows] == pytest.approx(
        [a + b for a, b in zip(doubled, [*ramp, 0], strict=False)]
    )
    assert gather.seconds == gather.latency + max(flow.seconds for flow in gather.flows)


def test_bytes_beyond_the_knee_move_slower() -> None:
    """3 MB on four ranks: 2.25 MB each, 1 MB at 80 GB/s and 1.25 MB at 20."""
    inside, *rest = MACHINE.tiers
    curve = inside.collectives["all_gather"].model_copy(update={"knee_bytes": number(1e6), "beyond_knee": number(0.2)})
    tier = inside.model_copy(update={"collectives": {"all_gather": curve}})
    profile = MACHINE.model_copy(update={"tiers": (tier, *rest)})

    assert transfer(profile, Span(4, (4, 1)), "all_gather", 3e6).seconds == pytest.approx(
        12 * US + 1e6 / 80e9 + 1.25e6 / 20e9
    )


def test_latencies_add_over_the_tiers() -> None:
    """10 us and 1 us for each rank after the second inside; without a curve 3 us for each step between nodes."""
    assert transfer(MACHINE, Span(4, (4, 1)), "all_gather", 1.0).latency == pytest.approx((10 + 2) * US)
    assert transfer(MACHINE, Span(12, (4, 3)), "all_gather", 1.0).latency == pytest.approx((10 + 2 + 2 * 3) * US)
    assert transfer(MACHINE, Span(8, (4, 2)), "all_to_all", 1.0).latency == pytest.approx((10 + 30) * US)


def test_a_ring_over_nodes_passes_every_rank_of_them() -> None:
    """Three nodes of four ranks: 30 us, 4 us for the third node, 2 us for each of three ranks in two further nodes."""
    inside, between = MACHINE.tiers
    curve = CollectiveCurve.model_validate(leaves(latency="30 us", hop="4 us", inner_hop="2 us", efficiency=0.5))
    tiers = (inside, between.model_copy(update={"collectives": {"all_gather": curve}}))
    profile = MACHINE.model_copy(update={"tiers": tiers})

    assert transfer(profile, Span(12, (4, 3)), "all_gather", 1.0).latency == pytest.approx((10 + 2 + 30 + 4 + 12) * US)
    assert transfer(profile, Span(3, (1, 3)), "all_gather", 1.0).latency == pytest.approx((30 + 4) * US)


def test_a_tiny_message_costs_its_latency_and_nothing_costs_nothing() -> None:
    """Eight bytes: 12 us of latency and a tenth of a nanosecond."""
    tiny = transfer(MACHINE, Span(4, (4, 1)), "all_gather", 8.0)

    assert tiny.seconds == pytest.approx(12 * US, rel=1e-4)
    assert transfer(MACHINE, Span(1, (1, 1)), "all_gather", 1e9) == FREE
    assert transfer(MACHINE, Span(4, (4, 1)), "all_gather", 0.0) == FREE


def test_a_message_to_the_next_stage_uses_one_port_at_its_own_rate() -> None:
    """1 MB at half of 10 GB/s across nodes, at half of 100 GB/s inside; alone on the link it takes half of it."""
    across = transfer(MACHINE, Span(4, (1, 4)), "point_to_point", 1e6)
    inside = transfer(MACHINE, Span(4, (4, 1)), "point_to_point", 1e6)

    assert [across.latency, across.seconds] == pytest.approx([6 * US, 206 * US])
    assert [inside.latency, inside.seconds] == pytest.approx([5 * US, 25 * US])
    assert [(flow.tier, flow.demand) for flow in (*across.flows, *inside.flows)] == [(1, 0.5), (0, 0.5)]


def test_oversubscription_thins_a_tier() -> None:
    thin = HardwareProfile.model_validate(
        {**PROFILE, "tiers": [PROFILE["tiers"][0], {**PROFILE["tiers"][1], "oversubscription": leaf(4.0)}]}
    )
    plain, slowed = (transfer(machine, Span(4, (1, 4)), "all_gather", 1e9) for machine in (MACHINE, thin))

    assert slowed.flows[0].seconds == pytest.approx(4 * plain.flows[0].seconds)


def test_communication_holds_the_multiprocessors_of_its_greediest_tier() -> None:
    assert [comm_sms(MACHINE, Span(8, ways)) for ways in ((4, 2), (1, 8), (1, 1))] == [20.0, 12.0, 0.0]


# The torus


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        (Span(4096, (4096, 1), (16, 16, 16)), 16 / 8),  # full axes have wrap-around links
        (Span(64, (64, 1), (4, 4, 4)), 4 / 8),  # whole cubes are rewired into rings
        (Span(36, (36, 1), (6, 6)), 6 / 4),  # part of a cube has no ring
        (Span(16, (16, 1), (16,)), 16 / 8),
        (Span(8, (8, 1), (2, 2, 2)), 2 / 8),  # two neighbours have both directions
    ],
)
def test_an_all_to_all_on_a_torus_is_limited_by_its_longest_axis(span: Span, expected: float) -> None:
    """Time b n / (8 W) with wrap-around, b n / (4 W) without: as many bytes as a link moves in one second."""
    profile = load_profile("tpu-v4")
    tier = profile.tiers[0]
    size = tier.bandwidth.value * tier.collectives["all_to_all"].efficiency.value

    assert transfer(profile, span, "all_to_all", size).flows[0].seconds == pytest.approx(expected)


def test_rings_on_a_torus_use_both_directions_of_every_axis() -> None:
    """All-gather of N bytes over 16 x 16 x 16 chips: N / (2 W x 3 axes); all-reduce twice that."""
    profile, span = load_profile("tpu-v4"), Span(4096, (4096, 1), (16, 16, 16))
    tier = profile.tiers[0]
    size = tier.bandwidth.value * tier.collectives["all_gather"].efficiency.value
    gather, reduce = (transfer(profile, span, kind, size) for kind in RINGS)

    assert gather.flows[0].seconds == pytest.approx(4095 / 4096 / 6)
    assert reduce.flows[0].seconds == pytest.approx(2 * gather.flows[0].seconds)


def test_two_slices_exchange_only_the_shards_of_their_chips() -> None:
    """Gradients are summed in each slice first: every chip sends its 1/4096 to the other slice, twice half of it."""
    profile = load_profile("tpu-v4")
    span = Span(8192, (4096, 2), (16, 16, 16))
    size = 4096 * profile.tiers[1].bandwidth.value
    one = transfer(profile, Span(4096, (4096, 1), (16, 16, 16)), "all_reduce", size)
    two = transfer(profile, span, "all_reduce", size)

    assert two.flows[0] == one.flows[0]
    assert (two.flows[1].tier, two.flows[1].demand) == (1, 1.0)
    assert two.flows[1].seconds == pytest.approx(2 * 0.5)


# Op classes of a scenario


def scenario(**changes: Any) -> Scenario:
    tree = {
        "name": "classes",
        "model": {
            "name": "small",
            "layers": 4,
            "hidden_size": 1000,
            "vocabulary_size": 1000,
            "context": 1000,
            "mixer": {"kind": "mha", "heads": 10, "head_dim": 100},
            "moe": {"experts": 16, "top_k": 2, "expert_ffn_size": 500},
        },
        "cluster": {"profile": PROFILE, "accelerators": 16},
        "parallelism": {"expert": 8, "pipeline": 2},
        "training": {
            "tokens": "1B",
            "sequence_length": 1000,
            "global_batch_sequences": 64,
            "precision": {"router": "bf16"},
        },
    }
    return load_scenario(tree, changes)


def pricer(**changes: Any) -> Pricer:
    chosen = scenario(**changes)
    layout = resolve(chosen)
    return Pricer(chosen, layout, expert_load(chosen, layout))


DISPATCH = Collective("dispatch", "expert_all_to_all", group="expert", kind="dispatch", elements=1000, role="dispatch")


def test_an_exchange_moves_one_copy_per_node_and_per_rank_of_the_busiest() -> None:
    """8 ranks on two nodes: 1000 tokens of 2000 bytes to other nodes and ranks, times the busiest over the mean."""
    prices = pricer(**{"routing.load": {"kind": "logits", "population": 0.5}})
    exchange = Exchange("dispatch", DISPATCH, "decoder", layer=0, overlapped=False)
    priced = prices.price([exchange])
    assert prices.by_rank is not None
    rows = prices.by_rank[:, 0].sum(-1)
    nodes = rows.reshape(len(rows), 2, 4).sum(-1)
    rank_skew, node_skew = (each.max(-1) / each.mean(-1) for each in (rows, nodes))
    assert prices.load is not None
    assert prices.load.picks is not None  # what tokens choose together under this load
    ranks, other = distinct(prices.load.picks, 16, 8) * 3 / 4, distinct(prices.load.picks, 16, 2) * 1 / 2

    assert distinct(prices.load.picks, 16, 8) == pytest.approx(distinct_groups(16, 8, 2), rel=0.05)
    assert (priced.rows.tolist(), priced.lanes) == ([len(rows)], 1)
    assert (rank_skew > node_skew).all()
    assert priced.latency.tolist() == pytest.approx([40 * US] * len(rows))
    assert priced.flow_seconds[:, 0] == pytest.approx(1000 * 2000 * ranks * rank_skew / 50e9)
    assert priced.flow_seconds[:, 1] == pytest.approx(1000 * 2000 * other * node_skew / 5e9)
    assert priced.seconds[:, 0] == pytest.approx(priced.latency + priced.flow_seconds.max(-1))
    assert (priced.flow_demand == 0.5).all()


def test_beside_compute_an_exchange_keeps_part_of_its_rate_and_compute_part_of_its_multiprocessors() -> None:
    """overlap_efficiency 0.8 inside the node, none stated between: 1.25 times as long there, and 20 of 100 held."""
    prices = pricer()
    alone, beside = (
        prices.price([Exchange("dispatch", DISPATCH, "decoder", 0, overlapped)]) for overlapped in (False, True)
    )
    product = Item(Gemm("square", "attention", n=1000, k=1000), "decoder", "attention")
    free, held = (prices.price([Compute("F", (product,), (), None, overlapped)]) for overlapped in (False, True))

    assert np.allclose(beside.flow_seconds / alone.flow_seconds, [1.25, 1.0])
    assert free.seconds[0, 0] == pytest.approx(gemm(1000, 1000, 1000))
    assert held.seconds[0, 0] == pytest.approx(gemm(1000, 1000, 1000, device=Device.of(MACHINE, 20)))


def test_experts_have_a_time_for_every_microbatch_and_rank() -> None:
    prices = pricer(**{"routing.load": {"kind": "logits", "population": 0.5}})
    op = GroupedGemm("expert up", "expert", n=500, k=1000, experts=16, top_k=2)
    priced = prices.price([Compute("F", (Item(op, "decoder", "expert"),), (), 1, False)])
    assert prices.by_rank is not None
    counts = prices.by_rank[:, 1]

    def by_hand(lane: Counts) -> float:
        return grouped(float(lane.sum()), float(padded_rows(lane, 64)), float((lane > 0).sum()), n=500, k=1000)

    expected = np.array([[by_hand(lane) for lane in row] for row in counts])

    assert priced.seconds.shape == (len(counts), 8)
    assert priced.seconds == pytest.approx(expected)


def test_kernels_that_are_shorter_than_their_issue_wait_for_the_host() -> None:
    """Two ops at a second each; the weight gradient of the product alone at one; what is waited for is the stack's."""
    overrides = {"stacks.plain.issue": {"value": "1 s", "source": "here", "kind": "assumed"}}
    prices = pricer(**{"cluster.overrides": overrides})
    items = tuple(
        Item(op, "decoder", op.family)
        for op in (Gemm("square", "attention", n=1000, k=1000), MemoryOp("norm", "norm", elements=2000))
    )
    priced = prices.price([Compute(which, items, (), None, False) for which in ("F", "W")])

    assert priced.seconds[:, 0].tolist() == pytest.approx([2.0, 1.0])
    assert priced.share[0, priced.families.index("stack")] == pytest.approx(1.0, abs=1e-3)
    assert priced.share.sum(axis=1) == pytest.approx(1.0)


def test_a_stretch_of_kernels_is_their_sum_by_family_with_the_gaps_of_the_stack() -> None:
    """Forward of a product, an attention core and a norm, with 10 % of idle time between kernels."""
    prices = pricer(**{"cluster.overrides": {"stacks.plain.gap_fraction": 0.1}})
    product = Gemm("square", "attention", n=1000, k=1000)
    core = AttentionCore(
        "core", "attention_core", heads=10, kv_heads=10, qk_dim=100, value_dim=100, context=500, context_full=1000
    )
    norm = MemoryOp("norm", "norm", elements=2000)
    items = tuple(Item(op, "decoder", op.family) for op in (product, core, norm))
    kernels = {
        "attention": gemm(1000, 1000, 1000),
        "attention_core": float(attention_seconds(WHOLE, "mha", 2 * 10 * 200 * 500 * 1000, 1000, "F")),
        "norm": float(memory_seconds(WHOLE, 2000 * 2 * 1000)),
    }
    priced = prices.price([Compute("F", items, (), None, False)])
    total = sum(kernels.values())
    shares = dict(zip(priced.families, priced.share[0].tolist(), strict=True))

    assert priced.seconds[0, 0] == pytest.approx(1.1 * total)
    assert shares == pytest.approx({**{name: each / total / 1.1 for name, each in kernels.items()}, "stack": 0.1 / 1.1})
    assert sum(shares.values()) == pytest.approx(1.0)


def test_weight_gradients_are_products_only_and_repeats_run_before_the_input_gradient() -> None:
    prices = pricer()
    product = Item(Gemm("square", "attention", n=1000, k=1000), "decoder", "attention")
    norm = Item(MemoryOp("norm", "norm", elements=2000), "decoder", "norm")
    weights, inputs, again = prices.price(
        [
            Compute("W", (product, norm), (), None, False),
            Compute("I", (product,), (), None, False),
            Compute("I", (product,), (product,), None, False),
        ]
    ).seconds[:, 0]

    assert weights == pytest.approx(gemm(1000, 1000, 1000, "W"))
    assert inputs == pytest.approx(gemm(1000, 1000, 1000, "I"))
    assert again == pytest.approx(inputs + gemm(1000, 1000, 1000, "F"))


def test_tensor_parallel_regions_with_and_without_sequence_parallelism() -> None:
    """Two ranks, 1000 tokens of 1000 numbers: all-reduce on leaving, or all-gather on entering and reduce-scatter.

    The input is kept in shards, so that the backward pass gathers it once more for the weight gradient.
    """
    enter = Collective("enter", "tensor", group="tensor", kind="enter", elements=1000)
    leave = Collective("exit", "tensor", group="tensor", kind="exit", elements=1000)
    classes = [Region(op, backward, "decoder") for op in (enter, leave) for backward in (False, True)]
    span = Span(2, (2, 1))
    found = {}
    for sequence in (False, True):
        dense = {"model.moe": None, "model.ffn": {"size": 4000}, "parallelism.expert": 1}
        prices = pricer(**dense, **{"parallelism.tensor": 2, "parallelism.sequence_parallel": sequence})
        found[sequence] = prices.price(classes).seconds[:, 0].tolist()
    reduce, gather, scatter = (
        transfer(MACHINE, span, kind, 2e6).seconds for kind in ("all_reduce", "all_gather", "reduce_scatter")
    )

    assert found[False] == [0.0, reduce, reduce, 0.0]
    assert found[True] == pytest.approx([gather, scatter + gather, scatter, gather])


def test_sends_updates_bulk_collectives_and_fixed_times() -> None:
    """2 MB to the next stage on another node, a reduction over 8 ranks, an update of 8 GB, 1 ms of overhead."""
    prices = pricer()
    classes: list[OpClass] = [Send("decoder"), Bulk("all_reduce", "gradient", 1e9), Update(8e9), Fixed("stack", 1e-3)]
    priced = prices.price(classes)
    expected = [
        transfer(MACHINE, Span(2, (1, 2)), "point_to_point", 2e6).seconds,
        transfer(MACHINE, Span(8, (4, 2)), "all_reduce", 1e9).seconds,
        3 * US + 10e-3,
        1e-3,
    ]

    assert priced.seconds[:, 0].tolist() == pytest.approx(expected)
    assert [dict(zip(priced.families, row, strict=True)) for row in priced.share[2:].tolist()] == [
        {"optimizer": 1.0, "stack": 0.0},
        {"optimizer": 0.0, "stack": 1.0},
    ]


def test_tensor_and_context_parallelism_divide_the_work_of_a_kernel() -> None:
    """Column-parallel products lose columns, row-parallel ones inner numbers; context parallelism divides the rows."""
    prices = pricer(**{"parallelism.tensor": 2, "parallelism.sequence_parallel": True, "parallelism.context": 2})
    ops = [
        Gemm("column", "attention", n=2000, k=1000, split="column"),
        Gemm("row", "attention", n=1000, k=2000, split="row"),
    ]
    ops.append(Gemm("none", "attention", n=2000, k=1000))
    times = [
        prices.price([Compute("F", (Item(op, "decoder", "attention"),), (), None, False)]).seconds[0, 0] for op in ops
    ]

    assert times == pytest.approx([gemm(500, 1000, 1000), gemm(500, 1000, 1000), gemm(250, 2000, 1000)])


def test_encoder_and_decoder_layers_see_their_own_tokens() -> None:
    """512 encoder and 114 decoder tokens: experts receive rows, and exchanges carry tokens, in that proportion."""
    lengths = {"encoder": 512, "decoder": 114}
    base = {
        "name": "switch",
        "model": "switch-base-16",
        "cluster": {"profile": PROFILE, "accelerators": 4},
        "parallelism": {"expert": 4},
        "training": {
            "tokens": "1B",
            "sequence_length": lengths,
            "global_batch_sequences": 64,
            "micro_batch_sequences": 8,
            "precision": {"router": "bf16"},
        },
    }
    chosen = load_scenario(base)
    layout = resolve(chosen)
    load = expert_load(chosen, layout)
    prices = Pricer(chosen, layout, load)
    assert load is not None
    exchanges = [
        Exchange("dispatch", DISPATCH, stack, layer, False) for stack, layer in (("encoder", 0), ("decoder", 6))
    ]
    priced = prices.price(exchanges)
    moved = [priced.flow_seconds[first, 0] for first in priced.row]
    busiest = load.by_rank.sum(-1)[0].max(-1)

    assert load.assigned[0].sum(-1).tolist() == [512 * 32] * 6 + [114 * 32] * 6
    assert moved[1] / moved[0] == pytest.approx(busiest[6] / busiest[0])
