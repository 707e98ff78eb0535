"""The machine as a profile before any curve is fitted: peaks, memory bandwidth, network tier, and curves to be filled.

On a processor the peak of a format is the best rate that any measured product reached, and the memory bandwidth the
best rate of a streaming op, so that a fitted efficiency is a share of what this machine can do. A GPU that is among the
shipped profiles has the peaks, the bandwidth and the multiprocessors of its datasheet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from simulator.spec import available, load_profile
from simulator.spec.hardware import HardwareProfile
from validation.forms import SOURCE
from validation.predict import attention_kind
from validation.records import Environment
from validation.samples import Sample

STREAMING = ("norm", "residual", "activation", "adam")
STREAM_BYTES = 64e6
"""Ops that move more than this cannot live in a cache."""

Leaf = dict[str, Any]


def blank(found: Mapping[str, Sequence[Sample]], environment: Environment) -> HardwareProfile:
    """A profile whose curves wait for their values; ``found``: samples by kind."""
    known = shipped(environment)
    chip = _chip(found, environment) if known is None else known.accelerator.model_dump(mode="json", by_alias=True)
    sources = {} if known is None else dict(known.sources)
    core = {
        "rate": leaf(chip["peak"]["bf16"]["value"]),
        "s_half": leaf(1.0),
        "backward_scale": leaf(1.0),
        "launch": leaf("1 us"),
    }
    gap = leaf(0.0, "assumed", note="gaps between kernels are in kernels.composition")
    return HardwareProfile.model_validate(
        {
            "name": environment.device,
            "vendor": environment.device.split()[0],
            "sources": {**sources, SOURCE: source_text(environment)},
            "accelerator": chip,
            "tiers": [_tier(found, environment, known)],
            "kernels": {
                "gemm": {each.case["form"]: _product() for each in found["gemm"]},
                "grouped_gemm": {},
                "attention": {attention_kind(each.case): core for each in found.get("attention", ())},
                "memory": {"launch": leaf("1 us"), "fraction": leaf(1.0), "permute_fraction": leaf(1.0)},
            },
            "stacks": {
                "pytorch": {
                    "released": environment.date[:10],
                    "versions": f"PyTorch {environment.torch}, Python {environment.python}",
                    "gap_fraction": gap,
                }
            },
        }
    )


def leaf(value: object, kind: str = "fitted", **more: str) -> Leaf:
    """A number of this machine with its provenance."""
    return {"value": value, "source": SOURCE, "kind": kind, **more}


def digits(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def shipped(environment: Environment) -> HardwareProfile | None:
    """The shipped profile of a GPU: the one of its name whose memory is nearest."""
    if environment.kind != "cuda":
        return None
    profiles = [load_profile(name) for name in available("profiles")]
    named = [each for each in profiles if each.name.split()[0] in environment.device.split()]
    return min(
        named, key=lambda each: abs(each.accelerator.memory_bytes.value - environment.memory_bytes), default=None
    )


def source_text(environment: Environment) -> str:
    """What a profile says about where its numbers come from."""
    threads = f"{environment.threads} thread" + ("s" if environment.threads != 1 else "")
    where = f"{environment.device}, {threads}" if environment.kind == "cpu" else environment.device
    return (
        f"moesim calibrate on {where}, PyTorch {environment.torch}, {environment.date[:10]}; a fixed product varied by "
        f"{environment.noise_floor:.1%} during it"
    )


def with_product(profile: HardwareProfile, form: str) -> HardwareProfile:
    """The profile with an expert product in one more format, still to be fitted."""
    tree = profile.model_dump(mode="json", by_alias=True)
    tree["kernels"]["grouped_gemm"][form] = _grouped()
    return HardwareProfile.model_validate(tree)


def with_composition(profile: HardwareProfile) -> HardwareProfile:
    """The profile with factors on whole layers, still to be fitted."""
    tree = profile.model_dump(mode="json", by_alias=True)
    tree["kernels"]["composition"] = {"forward": leaf(1.0), "backward": leaf(1.0)}
    return HardwareProfile.model_validate(tree)


def _chip(found: Mapping[str, Sequence[Sample]], environment: Environment) -> Leaf:
    peaks: dict[str, float] = {}
    for sample in (*found["gemm"], *found.get("grouped_gemm", ())):
        case = sample.case
        rows = case["m"] if sample.kind == "gemm" else sum(case["counts"])
        rate = 2.0 * rows * case["n"] * case["k"] / sample.seconds
        peaks[case["form"]] = max(peaks.get(case["form"], 0.0), rate)
    note = "best rate of a measured product"
    peak = {name: leaf(f"{digits(rate)} FLOP/s", "measured", note=note) for name, rate in sorted(peaks.items())}
    if "bf16" not in peak:
        peak["bf16"] = leaf(f"{digits(peaks['fp32'])} FLOP/s", "assumed", note="not measured: as fp32")
    return {
        "peak": peak,
        "memory_bytes": leaf(f"{environment.memory_bytes} B", "measured"),
        "usable_fraction": leaf(0.9, "assumed"),
        "memory_bandwidth": leaf(f"{_streaming(found['memory'])} B/s", "measured", note="best rate of a streaming op"),
        "sm_count": leaf(max(1, environment.threads), "assumed", note="threads of a product"),
    }


def _streaming(samples: Sequence[Sample]) -> float:
    """Best bytes per second of an op too large for a cache; without one, of the largest that were measured."""
    streams = [each for each in samples if each.case["op"] in STREAMING and each.case["which"] == "F"] or list(samples)
    largest = max(float(each.case["bytes"]) for each in streams)
    large = [each for each in streams if each.case["bytes"] >= min(STREAM_BYTES, 0.5 * largest)]
    return digits(max(each.case["bytes"] / each.seconds for each in large))


def _tier(
    found: Mapping[str, Sequence[Sample]], environment: Environment, known: HardwareProfile | None
) -> dict[str, Any]:
    """Ranks side by side on this machine; one alone where no exchange was measured."""
    exchanges = found.get("all_to_all")
    if not exchanges:
        unknown: dict[str, Any] = {"note": "not measured: one rank only"}
        unmeasured = {"bandwidth": leaf("1 GB/s", "assumed", **unknown), "alpha": leaf("0 s", "assumed", **unknown)}
        return {"name": "none", "kind": "switch", "size": 1, **unmeasured}
    ranks = max(int(each.case["ranks"]) for each in exchanges)
    latency = f"{digits(min(each.seconds for each in exchanges))} s"
    curve = {"latency": leaf(latency), "efficiency": leaf(1.0), "load_measure": "total"}
    return {
        "name": "loopback" if environment.kind == "cpu" else "node",
        "kind": "switch",
        "size": max(ranks, environment.cores if environment.kind == "cpu" else 1),
        "bandwidth": _link(found, known),
        "alpha": leaf(latency, "measured", note="smallest exchange"),
        "collectives": {"all_to_all": curve},
    }


def _link(found: Mapping[str, Sequence[Sample]], known: HardwareProfile | None) -> Leaf:
    """What bounds an exchange: the datasheet's link, or the memory through which ranks on one machine copy."""
    if known is not None:
        return dict(known.tiers[0].model_dump(mode="json", by_alias=True)["bandwidth"])
    return leaf(f"{_streaming(found['memory'])} B/s", "measured", note="exchanges are copies in memory")


def _product() -> Leaf:
    numbers = {"launch": leaf("1 us"), "efficiency": leaf(1.0), "k_half": leaf(0.0)}
    smooth = {"throttle_per_decade": leaf(0.0), "wave_weight": leaf(0.0), "tile": None}
    return {**numbers, **smooth, "dgrad_scale": leaf(1.0), "wgrad_scale": leaf(1.0)}


def _grouped() -> Leaf:
    numbers = {"launch": leaf("1 us"), "per_expert": leaf("0 s"), "efficiency": leaf(1.0), "k_half": leaf(0.0)}
    rows = {"tile_rows": leaf(1, "assumed"), "wgrad_rows_half": leaf(0.0)}
    return {**numbers, **rows, "dgrad_scale": leaf(1.0), "wgrad_scale": leaf(1.0)}


__all__ = [
    "blank", "digits", "leaf", "shipped", "source_text", "with_composition", "with_product",
]  # fmt: skip
