"""Forms that a curve of the hardware profile can take, from few parameters to many; a fit chooses among them.

A form names the parameters that are fitted, with bounds that physics sets, and the fields that it holds fixed:

    gemm, grouped_gemm   flat: launch and efficiency; inner: + k_half; sides: + rows_half, columns_half;
                         streams: + a bandwidth of its own for the operands;
                         tiles (GPU): whole waves of 128 x 128 tiles and throttling, with k_half
    attention            constant: one rate; growing: with the context
    memory               plain: launch and bandwidth; cache: a first part of the bytes moves faster; each also with
                         a rate of its own for the backward
    routing              a cost of each layer and of each token
    all_to_all           straight: latency and bandwidth; ramp: + c sqrt(bytes); knee: slower beyond a size; by the
                         bytes of the busiest rank or of all ranks

Efficiencies are shares of the best rate that was measured on the machine, and at most 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from simulator.spec.fields import Contract, Sourced
from simulator.spec.hardware import HardwareProfile
from validation.least_squares import Parameter

TINY = 1e-3
"""A half-size below this has no effect: the lower bound in place of zero."""

SOURCE = "this-machine"


@dataclass(frozen=True)
class Form:
    """Fitted parameters and fixed values of one curve, by dotted path into the profile."""

    name: str
    parameters: tuple[Parameter, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)


def products(path: str, *, grouped: bool, device: str) -> list[Form]:
    """Forms of a dense (or grouped) matrix product."""
    launch = Parameter(f"{path}.launch", 5e-6, 1e-7, 1e-3)
    efficiency = Parameter(f"{path}.efficiency", 0.8, 0.01, 1.0)
    scales = [Parameter(f"{path}.{name}", 0.95, 0.2, 1.5) for name in ("dgrad_scale", "wgrad_scale")]
    if grouped:
        scales.append(Parameter(f"{path}.per_expert", 1e-6, 1e-8, 1e-3))
        scales.append(Parameter(f"{path}.wgrad_rows_half", 4.0, TINY, 4096.0))
    inner = Parameter(f"{path}.k_half", 16.0, TINY, 2048.0)
    sides = [Parameter(f"{path}.{name}", 8.0, TINY, 2048.0) for name in ("rows_half", "columns_half")]
    smooth: dict[str, Any] = (
        {f"{path}.tile_rows": 1}
        if grouped
        else {
            f"{path}.tile": 1,
            f"{path}.wave_weight": 0.0,
            f"{path}.throttle_per_decade": 0.0,
        }
    )
    streams = Parameter(f"{path}.stream_fraction", 0.5, 0.01, 1.0)
    still = dict(smooth)
    smooth[streams.path] = None
    none = {f"{path}.rows_half": None, f"{path}.columns_half": None}
    forms = [
        Form("flat", (launch, efficiency, *scales), {**smooth, **none, f"{path}.k_half": 0.0}),
        Form("inner", (launch, efficiency, inner, *scales), {**smooth, **none}),
        Form("sides", (launch, efficiency, inner, *sides, *scales), smooth),
        Form("streams", (launch, efficiency, inner, *sides, *scales, streams), still),
    ]
    if device == "cuda" and grouped:
        forms += [
            Form(f"tiles of {size}", (launch, efficiency, inner, *scales), {**none, f"{path}.tile_rows": size})
            for size in (64, 128)
        ]
    elif device == "cuda":
        waves = Parameter(f"{path}.wave_weight", 0.2, TINY, 1.0)
        throttle = Parameter(f"{path}.throttle_per_decade", 0.03, 1e-4, 0.5)
        forms.append(
            Form("tiles", (launch, efficiency, inner, waves, throttle, *scales), {**none, f"{path}.tile": 128})
        )
    return forms


def attention(path: str, fastest_flop_per_s: float) -> list[Form]:
    """One rate, or one that grows with the context; no core is faster than the peak."""
    rest = (
        Parameter(f"{path}.rate", 0.5 * fastest_flop_per_s, 1e-3 * fastest_flop_per_s, fastest_flop_per_s),
        Parameter(f"{path}.backward_scale", 0.8, 0.1, 2.0),
        Parameter(f"{path}.launch", 1e-5, 1e-7, 1e-2),
    )
    growing = Parameter(f"{path}.s_half", 64.0, TINY, 8192.0)
    return [Form("constant", rest, {f"{path}.s_half": 0.0}), Form("growing", (*rest, growing))]


def memory(fastest_bytes_per_s: float, *, updates: bool) -> list[Form]:
    """Without and with a cache; nothing in the cache is faster than the fastest op that was measured.

    ``updates``: the optimizer's was measured too, and has a bandwidth of its own.
    """
    path = "kernels.memory"
    plain: tuple[Parameter, ...] = (
        Parameter(f"{path}.launch", 5e-6, 1e-7, 1e-3),
        Parameter(f"{path}.fraction", 0.6, 0.01, 1.0),
        Parameter(f"{path}.permute_fraction", 0.4, 0.01, 1.0),
    )
    cache = (
        Parameter(f"{path}.cache_bytes", 8e6, 1e4, 1e9),
        Parameter(
            f"{path}.cache_bandwidth", 0.6 * fastest_bytes_per_s, 0.01 * fastest_bytes_per_s, fastest_bytes_per_s
        ),
    )
    if updates:
        plain = (*plain, Parameter(f"{path}.update_fraction", 0.8, 0.01, 1.0))
    backward = Parameter(f"{path}.backward_scale", 0.7, 0.1, 2.0)
    none, alike = {f"{path}.cache_bytes": None, f"{path}.cache_bandwidth": None}, {backward.path: None}
    return [
        Form("plain", plain, none | alike),
        Form("cache", (*plain, *cache), alike),
        Form("plain, backward", (*plain, backward), none),
        Form("cache, backward", (*plain, *cache, backward)),
    ]


def routing() -> list[Form]:
    """Choosing experts and planning rows: a cost of each layer, and of each token."""
    path = "kernels.memory"
    launch = Parameter(f"{path}.routing_launch", 1e-4, 1e-6, 1e-1)
    return [Form("per token", (launch, Parameter(f"{path}.routing_per_token", 1e-7, 1e-12, 1e-4)))]


def all_to_all(ranks: Sequence[int]) -> list[Form]:
    """Straight or with a knee, by either load measure; a cost of each further rank where several numbers were used."""
    path, forms = "tiers.0.collectives.all_to_all", []
    for measure in ("total", "max"):
        parts = [Parameter(f"{path}.latency", 2e-4, 1e-6, 1e-1), Parameter(f"{path}.efficiency", 0.4, 0.01, 1.0)]
        parts += [Parameter(f"{path}.hop", 2e-4, 1e-8, 1e-1)] if len(set(ranks)) > 1 else []
        knee = [Parameter(f"{path}.knee_bytes", 2e6, 1e4, 1e9), Parameter(f"{path}.beyond_knee", 0.15, 0.01, 1.0)]
        fixed = {f"{path}.load_measure": measure}
        no_knee = {f"{path}.knee_bytes": None, f"{path}.beyond_knee": None}
        no_ramp = {f"{path}.sqrt_coefficient": None}
        slow = Parameter(f"{path}.sqrt_coefficient", 1e-8, 1e-12, 1e-4)
        forms += [
            Form(f"{measure}, straight", tuple(parts), {**fixed, **no_knee, **no_ramp}),
            Form(f"{measure}, ramp", (*parts, slow), {**fixed, **no_knee}),
            Form(f"{measure}, knee", (*parts, *knee), {**fixed, **no_ramp}),
        ]
    return forms


def with_values(profile: HardwareProfile, values: Mapping[str, Any]) -> HardwareProfile:
    """The profile with some numbers changed, by dotted path; not validated, so that a fit can call it often."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        node = tree
        *way, last = path.split(".")
        for name in way:
            node = node.setdefault(name, {})
        node[last] = value
    changed = _changed(profile, tree)
    assert isinstance(changed, HardwareProfile)
    return changed


def _changed(node: Any, tree: Mapping[str, Any]) -> Any:
    if isinstance(node, tuple):
        return tuple(_changed(each, tree[str(at)]) if str(at) in tree else each for at, each in enumerate(node))
    known = node if isinstance(node, dict) else node.__dict__
    update = {}
    for name, value in tree.items():
        old = known.get(name)
        if isinstance(value, Mapping):
            update[name] = _changed(old, value)
        elif isinstance(old, Sourced):
            update[name] = None if value is None else old.model_copy(update={"value": value})
        elif value is None or isinstance(value, str):
            update[name] = value
        else:
            update[name] = Sourced.model_construct(value=value, source=SOURCE, kind="fitted", error=None, note=None)
    if isinstance(node, Contract):
        return node.model_copy(update=update)
    return {**node, **update}


__all__ = ["SOURCE", "Form", "all_to_all", "attention", "memory", "products", "routing", "with_values"]
