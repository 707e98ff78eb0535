"""A machine that is known exactly, and measurements of it with noise: what a fit must find again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from simulator.spec.hardware import HardwareProfile
from validation import shapes
from validation.cases import Case
from validation.fitted import Fitted
from validation.predict import ROUTING, piece_seconds
from validation.records import Environment, Record, Recording
from validation.samples import Sample
from validation.suites import distributed

ENVIRONMENT = Environment(
    id="0",
    device="Known processor",
    kind="cpu",
    threads=1,
    torch="2.13.0",
    python="3.11.7",
    date="2026-01-02T03:04:05",
    cores=4,
    memory_bytes=24 * 2**30,
    driver=None,
    noise_floor=0.02,
)


def number(value: object) -> dict[str, Any]:
    return {"value": value, "source": "known", "kind": "measured"}


def numbers(**values: object) -> dict[str, Any]:
    return {name: number(value) for name, value in values.items()}


DENSE = numbers(
    launch="4 us",
    efficiency=0.95,
    k_half=6.0,
    rows_half=16.0,
    columns_half=39.0,
    throttle_per_decade=0.0,
    wave_weight=0.0,
    tile=1,
    dgrad_scale=0.97,
    wgrad_scale=0.92,
)
EXPERTS = numbers(
    launch="20 us",
    per_expert="2 us",
    efficiency=0.9,
    k_half=6.0,
    rows_half=16.0,
    columns_half=39.0,
    tile_rows=1,
    wgrad_rows_half=5.0,
    dgrad_scale=0.97,
    wgrad_scale=0.92,
)
EXCHANGE = numbers(latency="166 us", hop="200 us", efficiency=0.3, knee_bytes="2.7 MB", beyond_knee=0.16)


def known_machine() -> HardwareProfile:
    """One processor core of 104 GFLOP/s with a cache, whose layers take longer than their kernels."""
    stack = {"released": "2026-01-01", "versions": "known", "gap_fraction": number(0.0)}
    exchange = {**EXCHANGE, "load_measure": "total"}
    return HardwareProfile.model_validate(
        {
            "name": "known",
            "vendor": "known",
            "sources": {"known": "made up for tests"},
            "accelerator": {
                "peak": numbers(fp32="104 GFLOP/s", bf16="104 GFLOP/s"),
                **numbers(memory_bytes="24 GB", usable_fraction=0.9, memory_bandwidth="19 GB/s", sm_count=1),
            },
            "tiers": [
                {
                    "name": "loopback",
                    "kind": "switch",
                    "size": 4,
                    **numbers(bandwidth="19 GB/s", alpha="166 us"),
                    "collectives": {"all_to_all": exchange},
                }
            ],
            "kernels": {
                "gemm": {"fp32": DENSE},
                "grouped_gemm": {"fp32": EXPERTS},
                "attention": {
                    "mha": numbers(rate="70 GFLOP/s", s_half=100.0, backward_scale=0.8, launch="50 us"),
                },
                "memory": numbers(
                    launch="5 us",
                    fraction=0.8,
                    permute_fraction=0.5,
                    cache_bytes="4 MB",
                    cache_bandwidth="35 GB/s",
                    routing_launch="120 us",
                    routing_per_token="0.2 us",
                ),
                "composition": numbers(forward=1.09, backward=1.05),
            },
            "stacks": {"pytorch": stack, "pytorch-2-ranks": {**stack, "gap_fraction": number(0.12)}},
        }
    )


def small_suite() -> list[Case]:
    """Layers, attention, steps in strides and capacity factors, exchanges, layers on two ranks."""
    groups = [
        *shapes.layers(18, 1, 4e9),
        *shapes.attentions(8, 2, 2048),
        *shapes.steps(("b", "c", "e", "f"), (1, 2, 4), (1.0, 1.5)),
    ]
    exchanges = distributed((2, 3), "gloo", 26, shapes.cpu_exchanged(8))
    cases = [case for group in (*groups, *exchanges.values()) for case in group]
    return list({case.key: case for case in cases}.values())


def measured(cases: Sequence[Case], noise: float, *, seed: int = 0) -> Recording:
    """Two passes over the cases on the known machine; times vary by ``noise``, always upwards."""
    profile, rng = known_machine(), np.random.default_rng(seed)
    machine = Fitted(dict.fromkeys(("batched", "grouped", "loop"), profile), "batched")
    listed = [Sample(case.key, case.kind, dict(case.fields), 1.0, "", 1.0) for case in cases]
    seconds = machine.seconds(listed)
    for index, case in enumerate(cases):
        if case.fields.get("op") in ROUTING:  # the simulator prices the two of them together
            half = 0.5 * piece_seconds(profile, "routing", [{"tokens": case.fields["rows"]}])
            plain = piece_seconds(profile, "memory", [case.fields])
            seconds[index] = float((half if case.fields["which"] == "F" else plain)[0])
    records = [
        Record(
            key=case.key,
            kind=case.kind,
            number=number,
            environment=ENVIRONMENT.id,
            case=dict(case.fields),
            seconds=float(least * np.exp(abs(rng.normal(0.0, noise)))),
            median_s=float(least * (1.0 + noise)),
            spread=noise,
            repeats=9,
            reference_s=2e-3,
        )
        for number in (1, 2)
        for case, least in zip(cases, seconds, strict=True)
    ]
    return Recording(ENVIRONMENT, tuple(records))
