"""Slow ranks and links: where they are felt, what they cost, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator import estimate, simulate_step
from simulator.errors import InvalidInput
from simulator.events.faults import Slowness, slowness
from simulator.layout import resolve
from simulator.program import COMPUTE
from simulator.spec import EngineName, Scenario, load_scenario
from simulator.timing import Bulk, Compute, Exchange, Region, Send
from tests.scenarios import two_stages

SMALL = two_stages(accelerators=32, sequences=64)
FAULTS = "cluster.faults"
ENGINES: tuple[EngineName, ...] = ("events", "max-plus")


def small(faults: list[dict[str, Any]], **changes: Any) -> Scenario:
    return load_scenario(SMALL, {**changes, FAULTS: faults})


def rank(number: int, compute: float = 0.5) -> dict[str, Any]:
    return {"rank": number, "compute": compute}


def node(number: int, tier: str = "infiniband", bandwidth: float = 0.5) -> dict[str, Any]:
    return {"node": number, "tier": tier, "bandwidth": bandwidth}


def felt(*faults: dict[str, Any], **changes: Any) -> Slowness:
    scenario = small(list(faults), **changes)
    found = slowness(scenario, resolve(scenario))
    assert found is not None
    return found


def where(values: Any) -> list[list[int]]:
    places: list[list[int]] = np.argwhere(np.asarray(values) > 1.0).tolist()
    return places


# Where a fault is felt: 32 ranks are 2 pipeline ranks x 2 replicas x 8 lanes.


@pytest.mark.parametrize(("number", "place"), [(0, [0, 0]), (7, [0, 7]), (13, [0, 5]), (16, [1, 0]), (29, [1, 5])])
def test_a_slow_rank_is_one_lane_of_one_pipeline_rank(number: int, place: list[int]) -> None:
    slow = felt(rank(number, 0.8))

    assert where(slow.dense) == where(slow.expert) == [place]
    assert slow.dense[tuple(place)] == pytest.approx(1.25)
    assert not where(slow.links)
    assert not where(slow.bulk)
    assert not slow.combined


def test_tensor_and_context_parallel_ranks_are_slow_together_but_their_experts_are_not() -> None:
    """Rank 5 of tensor groups 4-5 and, with context, of ranks 4 to 7."""
    split = {"parallelism.tensor": 2, "parallelism.sequence_parallel": True}
    slow = felt(rank(5), **split)
    assert (where(slow.dense), where(slow.expert)) == ([[0, 4], [0, 5]], [[0, 5]])

    slow = felt(rank(5), **split, **{"parallelism.context": 2})
    assert (where(slow.dense), where(slow.expert)) == ([[0, lane] for lane in (4, 5, 6, 7)], [[0, 5]])


def test_expert_tensor_ranks_are_one_lane() -> None:
    """Two ranks for each expert: rank 5 is half of lane 2."""
    assert where(felt(rank(5), **{"parallelism.expert_tensor": 2}).expert) == [[0, 2]]


def test_a_slow_node_holds_eight_ranks() -> None:
    slow = felt(node(3))  # ranks 24 to 31: the second replica of the second stage

    assert where(slow.links) == where(slow.regions) == [[1, lane, 1] for lane in range(8)]
    assert where(slow.bulk) == [[1, 1]]
    assert not where(slow.dense)
    assert where(felt(node(0, "nvlink"), **{"parallelism.expert": 4}).links) == [[0, lane, 0] for lane in range(4)]


def test_both_copies_of_a_dualpipe_stage_reduce_over_the_slow_link() -> None:
    slow = felt(node(0), **{"parallelism.schedule": "dualpipe"})

    assert where(slow.bulk) == [[0, 1], [1, 1]]


def test_faults_of_two_replicas_are_combined_and_said_to_be() -> None:
    scenario = small([rank(1, 0.8), rank(8, 0.5), rank(9, 0.5)])  # lanes 1 | 0 and 1 of the other replica
    slow = slowness(scenario, resolve(scenario))
    assert slow is not None
    assert not slow.combined  # the second replica is as slow in every lane
    assert slow.dense[0, :2].tolist() == [2.0, 2.0]

    assert felt(rank(1), rank(8)).combined
    combined = small([rank(1), rank(8)])
    assert any("several replicas" in line for line in estimate(combined, "max-plus").assumptions)
    alone = estimate(small([rank(1)]), "max-plus").assumptions
    assert any("1 fault lasts the whole training" in line for line in alone)
    assert not any("several replicas" in line for line in alone)


# What it costs


@pytest.mark.parametrize("engine", ENGINES)
def test_only_the_kernels_of_the_slow_lane_take_longer(engine: EngineName) -> None:
    quick = {"cluster.overrides": {"stacks.megatron-core.issue": "0 us"}}
    plain, slow = (simulate_step(small(faults, **quick), engine) for faults in ([], [rank(13, 0.8)]))
    ratio = [
        (step.timeline.end - step.timeline.start)[(step.program.stream == COMPUTE) & (step.program.rank == 0)]
        for step in (plain, slow)
    ]
    works = np.array([isinstance(slow.program.classes[c], Compute) for c in slow.program.cls])
    works = works[(slow.program.stream == COMPUTE) & (slow.program.rank == 0)]
    factor = (ratio[1] / np.where(ratio[0] > 0, ratio[0], 1.0))[works]

    assert factor[:, 5] == pytest.approx(1.25)
    assert np.delete(factor, 5, axis=1) == pytest.approx(1.0)
    assert slow.seconds > plain.seconds
    assert slow.timeline.breakdown["waiting"] > plain.timeline.breakdown["waiting"]
    assert slow.timeline.breakdown.total == pytest.approx(slow.seconds)


def test_a_slow_link_stretches_the_flows_that_cross_it_and_nothing_else() -> None:
    """Expert groups of 16 over two nodes; node 1 is slow between nodes."""
    changes = {"parallelism.expert": 16, "parallelism.pipeline": 2}
    plain, slow = (simulate_step(small(faults, **changes), "max-plus") for faults in ([], [node(1)]))
    for number, cls in enumerate(slow.program.classes):
        ranks = set(slow.program.rank[slow.program.cls == number].tolist())
        if number < len(plain.program.classes) or not ranks:
            continue
        original = plain.program.classes.index(cls)
        old, new = plain.prices.row[original], slow.prices.row[number]
        factor = slow.prices.flow_seconds[new] / np.maximum(plain.prices.flow_seconds[old], 1e-30)
        used = plain.prices.flow_seconds[old] > 0
        if isinstance(cls, Exchange | Bulk) and ranks == {0}:
            assert factor[used] == pytest.approx(np.array([1.0, 2.0])[used])
        elif isinstance(cls, Compute):
            assert slow.prices.seconds[new] == pytest.approx(plain.prices.seconds[old])
    assert slow.seconds > plain.seconds


def test_messages_are_slow_in_the_lanes_of_the_slow_node_alone_sent_or_received() -> None:
    changes = {"parallelism.expert": 16}
    step = simulate_step(small([node(1)], **changes), "max-plus")  # lanes 8 to 15 of the first pipeline rank
    sends = [
        number
        for number, cls in enumerate(step.program.classes)
        if isinstance(cls, Send) and (step.program.cls == number).any()
    ]
    for number in sends:
        seconds = step.prices.seconds[step.prices.row[number]]
        flow = step.prices.flow_seconds[step.prices.row[number], 1]
        assert len(sends) == 2  # forward from rank 0, backward from rank 1
        assert seconds[:8] == pytest.approx(np.full(8, seconds[0]))
        assert seconds[8:] - seconds[0] == pytest.approx(np.full(8, flow / 2))


def test_tensor_parallel_collectives_are_slow_in_the_groups_of_a_slow_node() -> None:
    split = {"parallelism.tensor": 2, "parallelism.sequence_parallel": True, "parallelism.expert": 16}
    step = simulate_step(small([node(0, "nvlink")], **split), "max-plus")
    slow = [
        step.prices.seconds[step.prices.row[number]]
        for number, cls in enumerate(step.program.classes)
        if isinstance(cls, Region) and set(step.program.rank[step.program.cls == number].tolist()) == {0}
    ]
    assert slow
    assert all((each[:8] > each[8:]).all() for each in slow if each.any())


@pytest.mark.parametrize("engine", ENGINES)
def test_factor_one_changes_nothing_to_the_bit(engine: EngineName) -> None:
    plain = simulate_step(small([]), engine).timeline
    healthy = simulate_step(small([rank(3, 1.0), node(1, "nvlink", 1.0)]), engine).timeline

    assert healthy.end.tobytes() == plain.end.tobytes()
    assert healthy.program.classes == plain.program.classes


def test_balanced_lanes_that_no_expert_told_apart_are_told_apart_by_a_fault() -> None:
    dense = {"model.moe": None, "model.ffn": {"size": 4096}, "parallelism.expert": 1}
    plain, slow = (simulate_step(small(faults, **dense), "max-plus") for faults in ([], [rank(13, 0.5)]))

    assert plain.prices.lanes == slow.prices.lanes == 1
    assert slow.seconds > plain.seconds


@st.composite
def faults(draw: st.DrawFn) -> list[dict[str, Any]]:
    ranks = st.builds(rank, st.integers(0, 31), st.floats(0.2, 1.0))
    nodes = st.builds(node, st.integers(0, 3), st.sampled_from(["nvlink", "infiniband"]), st.floats(0.2, 1.0))
    return draw(st.lists(st.one_of(ranks, nodes), min_size=1, max_size=3))


@settings(deadline=None, max_examples=30)
@given(
    faults(),
    st.sampled_from(["1f1b", "zb1p", "dualpipe"]),
    st.sampled_from([4, 8, 16]),
    st.sampled_from([{"kind": "balanced"}, {"kind": "logits", "population": 0.5}]),
)
def test_a_fault_never_makes_a_step_faster(
    stated: list[dict[str, Any]], schedule: str, expert: int, load: dict[str, Any]
) -> None:
    changes = {"parallelism.schedule": schedule, "parallelism.expert": expert, "routing.load": load}
    plain, slow = (simulate_step(small(each, **changes), "max-plus") for each in ([], stated))
    assert (slow.timeline.end >= plain.timeline.end - 1e-12).all()

    events = simulate_step(small(stated, **changes), "events")
    assert events.seconds >= slow.seconds * (1 - 1e-9)


# What is refused


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({}, "cluster.faults.0: names neither rank nor node; write rank with compute, or node with tier and bandwidth"),
        ({"rank": 1, "node": 1}, "cluster.faults.0: names both rank and node; write rank with compute, or node with "),
        (rank(32), "cluster.faults.0.rank: no rank 32; allowed: 0 to 31"),
        (node(4), "cluster.faults.0.node: no node 4; allowed: 0 to 3"),
        (node(0, "infinibad"), "unknown tier 'infinibad'; did you mean 'infiniband'? Allowed: infiniband, nvlink"),
        ({"rank": 1}, "cluster.faults.0: a slow rank needs compute"),
        ({"node": 1, "bandwidth": 0.5}, "cluster.faults.0: a slow node needs tier"),
        ({"node": 1}, "cluster.faults.0: a slow node needs tier and bandwidth"),
        ({**rank(1), "bandwidth": 0.5}, "cluster.faults.0.bandwidth: a slow rank has compute, not bandwidth"),
        ({**node(1), "compute": 0.5}, "cluster.faults.0.compute: a slow node has tier and bandwidth, not compute"),
        (rank(1, 0.0), "cluster.faults.0.compute: must be greater than 0"),
        (node(1, bandwidth=0.0), "cluster.faults.0.bandwidth: must be greater than 0"),
        (rank(1, 1.5), "cluster.faults.0.compute: must be at most 1"),
        ({"rank": -1, "compute": 0.5}, "cluster.faults.0.rank: must be at least 0"),
    ],
)
def test_a_fault_names_one_place_that_exists_and_what_is_slow_there(fault: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        small([fault])

    assert message in str(caught.value)
