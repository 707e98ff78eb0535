"""Seconds of a measured case by a hardware profile: the simulator's own kernel and collective forms, and nothing else.

A case is the mapping that a record carries: which kernel in which format on which shape. Here are the pieces, all
cases of a kind at once, as a fit needs them; whole layers and steps, which go the way of an estimate, are in
:mod:`validation.compose`.

    gemm, grouped_gemm, attention, memory     :mod:`simulator.timing.kernels`
    all_to_all                                :mod:`simulator.timing.collectives`

A grouped product is priced by the rows that each expert holds; rows padded to a capacity are rows. An exchange is
priced by the bytes that the curve's ``load_measure`` names: of all ranks together, or of the busiest one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from simulator.layout import Span
from simulator.spec.hardware import HardwareProfile
from simulator.timing.collectives import combine
from simulator.timing.kernels import (
    Device,
    FloatArray,
    Pass,
    attention_seconds,
    gemm_seconds,
    grouped_gemm_seconds,
    memory_seconds,
    padded_rows,
    routing_seconds,
    update_seconds,
)

Case = Mapping[str, Any]
Rule = Callable[[HardwareProfile], FloatArray]
PIECES = ("gemm", "grouped_gemm", "attention", "memory", "all_to_all")
PERMUTES = ("permute", "unpermute")
"""Memory-bound ops that gather or scatter rows: they have a rate of their own."""
UPDATES = ("adam",)
"""The optimizer's update."""
ROUTING = ("top_k", "plan")
"""Ops that choose experts and plan their rows: many small kernels, which the simulator prices together."""


def piece_seconds(profile: HardwareProfile, kind: str, cases: Sequence[Case]) -> FloatArray:
    """Seconds of pieces of one kind [cases]."""
    return seconds_by_profile(kind, cases)(profile)


def seconds_by_profile(kind: str, cases: Sequence[Case]) -> Rule:
    """The same as a function of the profile: a fit asks it a thousand times for the same cases."""
    return {
        "gemm": _gemm,
        "grouped_gemm": _grouped,
        "attention": _attention,
        "memory": _memory,
        "routing": _routing,
        "all_to_all": _all_to_all,
    }[kind](cases)


def _joined(count: int, groups: Sequence[tuple[list[int], Rule]]) -> Rule:
    """One rule for all cases from rules for groups of them."""

    def seconds(profile: HardwareProfile) -> FloatArray:
        result = np.zeros(count)
        for chosen, rule in groups:
            result[chosen] = rule(profile)
        return result

    return seconds


def _gemm(cases: Sequence[Case]) -> Rule:
    def rule(form: str, which: Pass, m: FloatArray, n: FloatArray, k: FloatArray) -> Rule:
        sizes: Any = (m, n, k)
        return lambda profile: np.asarray(gemm_seconds(Device.of(profile), form, which, *sizes))

    groups = [
        (chosen, rule(form, which, *(_column(cases, chosen, name) for name in ("m", "n", "k"))))
        for (form, which), chosen in _alike(cases, "form", "which")
    ]
    return _joined(len(cases), groups)


def _grouped(cases: Sequence[Case]) -> Rule:
    def rule(form: str, which: Pass, chosen: Sequence[int]) -> Rule:
        counts = [np.asarray(cases[index]["counts"], dtype=np.int64) for index in chosen]
        rows = np.array([float(each.sum()) for each in counts])
        active = np.array([float((each > 0).sum()) for each in counts])
        n, k = (_column(cases, chosen, name) for name in ("n", "k"))
        padded: dict[int, FloatArray] = {}

        def seconds(profile: HardwareProfile) -> FloatArray:
            curves = profile.kernels.grouped_gemm
            tile = (curves.get(form) or curves["bf16"]).tile_rows.value  # type: ignore[call-overload]
            if tile not in padded:
                padded[tile] = np.array([float(padded_rows(each, tile)) for each in counts])
            sizes: Any = {"rows": rows, "padded": padded[tile], "active": active, "n": n, "k": k}
            return grouped_gemm_seconds(Device.of(profile), form, which, **sizes)

        return seconds

    groups = [(chosen, rule(form, which, chosen)) for (form, which), chosen in _alike(cases, "form", "which")]
    return _joined(len(cases), groups)


def attention_flop(case: Case) -> float:
    """Counted FLOPs of one forward of an attention core: half of the matrix when causal."""
    context = case["tokens"] / (2.0 if case["causal"] else 1.0)
    widths = case["head_dim"] + case.get("value_dim", case["head_dim"])
    return float(2.0 * case["heads"] * widths * context * case["tokens"] * case["batch"])


def attention_kind(case: Case) -> Literal["mha", "mla"]:
    """Latent attention has values that are narrower than its keys."""
    return "mla" if case.get("value_dim", case["head_dim"]) != case["head_dim"] else "mha"


def _attention(cases: Sequence[Case]) -> Rule:
    named = [{**case, "kind": attention_kind(case)} for case in cases]

    def rule(kind: Literal["mha", "mla"], form: str, which: Pass, chosen: Sequence[int]) -> Rule:
        flop = np.array([attention_flop(cases[index]) for index in chosen])
        context: Any = _column(cases, chosen, "tokens")

        def seconds(profile: HardwareProfile) -> FloatArray:
            device = Device.of(profile)
            slower = max(1.0, device.peak("bf16") / device.peak(form))  # the curve is that of bf16
            return np.asarray(slower * attention_seconds(device, kind, flop, context, which))

        return seconds

    groups = [
        (chosen, rule(kind, form, which, chosen))
        for (kind, form, which), chosen in _alike(named, "kind", "form", "which")
    ]
    return _joined(len(cases), groups)


def _memory(cases: Sequence[Case]) -> Rule:
    def rule(sort: str, backward: bool, size: FloatArray) -> Rule:
        def seconds(profile: HardwareProfile) -> FloatArray:
            device = Device.of(profile)
            if sort == "update":
                return np.asarray(update_seconds(device, size))
            return np.asarray(memory_seconds(device, size, permute=sort == "permute", backward=backward))

        return seconds

    sorts = {**dict.fromkeys(PERMUTES, "permute"), **dict.fromkeys(UPDATES, "update")}
    named = [
        {"sort": sorts.get(case["op"], "other"), "backward": case.get("which") == "I", "bytes": case["bytes"]}
        for case in cases
    ]
    groups = [
        (chosen, rule(sort, backward, _column(named, chosen, "bytes")))
        for (sort, backward), chosen in _alike(named, "sort", "backward")
    ]
    return _joined(len(cases), groups)


def _routing(cases: Sequence[Case]) -> Rule:
    tokens = np.array([float(case["tokens"]) for case in cases])
    return lambda profile: np.asarray(routing_seconds(Device.of(profile), 0.0, tokens))


def exchanged_bytes(case: Case, measure: str) -> float:
    """Bytes of an exchange that leave their rank: of all ranks together, or the most that one sends or receives."""
    sent = np.array(case["sent"], dtype=np.float64)
    np.fill_diagonal(sent, 0.0)
    return float(sent.sum() if measure == "total" else max(sent.sum(0).max(), sent.sum(1).max()))


def _all_to_all(cases: Sequence[Case]) -> Rule:
    sizes = {measure: np.array([exchanged_bytes(case, measure) for case in cases]) for measure in ("total", "max")}

    def rule(ranks: int, chosen: list[int]) -> Rule:
        def seconds(profile: HardwareProfile) -> FloatArray:
            curve = profile.tiers[0].collectives.get("all_to_all")
            size = sizes[curve.load_measure if curve else "max"][chosen]
            span = Span(ranks, (ranks, *[1] * (len(profile.tiers) - 1)))
            return np.asarray(combine(profile, span, "all_to_all", [(0, size)]).seconds)

        return seconds

    groups = [(chosen, rule(int(ranks), chosen)) for (ranks,), chosen in _alike(cases, "ranks")]
    return _joined(len(cases), groups)


def _alike(cases: Sequence[Case], *names: str) -> Iterator[tuple[tuple[Any, ...], list[int]]]:
    """Groups of cases that agree in some fields, and where they are."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, case in enumerate(cases):
        groups.setdefault(tuple(case[name] for name in names), []).append(index)
    yield from groups.items()


def _column(cases: Sequence[Case], chosen: Sequence[int], name: str) -> FloatArray:
    return np.array([float(cases[index][name]) for index in chosen])


__all__ = [
    "PERMUTES", "PIECES", "ROUTING", "UPDATES", "Case", "attention_flop", "attention_kind", "exchanged_bytes",
    "piece_seconds", "seconds_by_profile",
]  # fmt: skip
