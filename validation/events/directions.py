"""Which of two set-ups is faster, where experience or arithmetic leaves no doubt. Evaluated by max-plus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from simulator.campaign import Step, simulate_step
from simulator.events import bubbles
from simulator.spec import load_scenario
from validation.checks import Check, at_least, at_most

GROUP = "directions"
V3, MIXTRAL = "deepseek-v3", "mixtral-8x7b"
PLAIN_OVERLAP = ["gradient_reduce", "parameter_gather", "pipeline"]
ACROSS = ["expert_tensor", "expert_data", "expert", "pipeline"]
"""Expert groups strided over the nodes instead of filling one."""


def checks() -> Iterator[Check]:
    """One row per comparison; both numbers are ours."""
    yield from _deepseek()
    yield from _mixtral()


def _deepseek() -> Iterator[Check]:
    shipped = _step(V3)
    plain = _step(V3, **{"parallelism.schedule": "1f1b", "parallelism.overlap": PLAIN_OVERLAP})
    source = "arXiv 2412.19437, section 3.2.1"
    yield _not_slower("DeepSeek-V3: DualPipe against 1F1B", plain, shipped, source)
    blocking = _step(V3, **{"parallelism.overlap": PLAIN_OVERLAP})
    yield _not_slower("DeepSeek-V3: all-to-all under compute against not", blocking, shipped, source)
    nothing = _step(V3, **{"parallelism.overlap": []})
    yield _not_slower("DeepSeek-V3: gradients and parameters under compute against not", nothing, blocking, source)

    kept, repeated = (_step(V3, **{"training.recompute": what}) for what in ("none", "full"))
    source = "arXiv 2205.05198: memory for time"
    yield _not_slower("DeepSeek-V3: no recomputation against selective", shipped, kept, source)
    yield _not_slower("DeepSeek-V3: selective recomputation against full", repeated, shipped, source)
    for name, less, more in (("none above selective", shipped, kept), ("selective above full", repeated, shipped)):
        peaks = (less.memory.peak_bytes, more.memory.peak_bytes)
        yield at_least(GROUP, f"DeepSeek-V3: memory, recomputation {name}", *peaks, "B", source)

    for tier in ("nvlink", "infiniband"):
        rate = next(each.bandwidth.value for each in shipped.scenario.cluster.profile.tiers if each.name == tier)
        double = _step(V3, **{"cluster.overrides": {f"tiers.{tier}.bandwidth": f"{2 * rate / 1e9} GB/s"}})
        yield _not_slower(f"DeepSeek-V3: twice the {tier} bandwidth", shipped, double, "more bandwidth costs no time")


def _mixtral() -> Iterator[Check]:
    shipped = _step(MIXTRAL)
    across = _step(MIXTRAL, **{"parallelism.expert_rank_order": ACROSS})
    source = "an expert group inside a node sends over its switch only"
    yield _not_slower("Mixtral: expert groups inside nodes against across", across, shipped, source)

    tensor = {"parallelism.tensor": 4, "parallelism.sequence_parallel": True}
    folded = _step(MIXTRAL, **tensor)
    unfolded = _step(MIXTRAL, **tensor, **{"parallelism.expert_tensor": 4})
    source = "parallel folding, arXiv 2504.14960: expert groups laid over the tensor-parallel ranks"
    yield _not_slower(
        "Mixtral, TP4: expert groups folded against experts split by tensor too", unfolded, folded, source
    )
    strided = _step(MIXTRAL, **tensor, **{"parallelism.expert_rank_order": ACROSS})
    yield _not_slower("Mixtral, TP4: expert groups folded into a node against across", strided, folded, source)

    source = "arXiv 2104.04473: the bubble is divided by the chunks per rank"
    means = {}
    for chunks in (1, 2, 4):
        schedule = "interleaved" if chunks > 1 else "1f1b"
        step = _step(MIXTRAL, **{"parallelism.schedule": schedule, "parallelism.virtual_stages": chunks})
        means[chunks] = float(bubbles(step.timeline)[0].mean())
    for fewer, more in ((1, 2), (2, 4)):
        name = f"Mixtral: bubble of {more} chunks per rank against {fewer}"
        yield at_most(GROUP, name, means[fewer], means[more], "s", source)

    slow = {"cluster.overrides": {"tiers.infiniband.bandwidth": "5 GB/s"}}
    first, third = (_step(MIXTRAL, **slow, **{"parallelism.zero_stage": stage}) for stage in (1, 3))
    source = "arXiv 1910.02054: sharded parameters are gathered in every pass"
    yield _not_slower("Mixtral on 5 GB/s: ZeRO 1 against ZeRO 3", third, first, source)


def _step(name: str, **changes: Any) -> Step:
    return simulate_step(load_scenario(name, changes), "max-plus")


def _not_slower(name: str, slower: Step, faster: Step, source: str) -> Check:
    return at_most(GROUP, name, slower.seconds, faster.seconds, "s", source)


__all__ = ["checks"]
