"""What counts cannot say, against tokens that stand in a queue one after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from simulator.layout import resolve
from simulator.routing import ExpertLoad, expert_load, over_steps
from simulator.routing import capacity as capacities
from simulator.spec import Scenario, load_scenario

Array = npt.NDArray[np.float64]

EXPERTS, TOP_K, SEQUENCE, LAYERS = 16, 2, 512, 4


def small(**changes: Any) -> Scenario:
    """8 ranks of one sequence each make one expert group of 4096 tokens."""
    written = {
        "name": "small",
        "model": {
            "name": "small",
            "layers": LAYERS,
            "hidden_size": 256,
            "vocabulary_size": 1000,
            "context": SEQUENCE,
            "mixer": {"kind": "mha", "heads": 4, "head_dim": 64},
            "moe": {"experts": EXPERTS, "top_k": TOP_K, "expert_ffn_size": 256, "router": {"groups": 8}},
        },
        "cluster": {"profile": "h100-sxm", "accelerators": 8},
        "parallelism": {"expert": 8},
        "training": {"tokens": "1B", "sequence_length": SEQUENCE, "global_batch_sequences": 64},
        "routing": {"load": {"kind": "logits", "population": 0.4}},
    }
    return load_scenario(written, changes)


def load_of(scenario: Scenario) -> ExpertLoad:
    load = expert_load(scenario, resolve(scenario))
    assert load is not None
    return load


def kept_in_a_queue(
    logits: Array, slots: int, order: str, *, reroute: bool, device: int, rng: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Which tokens of one capacity group an expert takes: one by one.

    If rerouted, who found no slot asks for the best expert with room that it does not use, and who is refused again.
    """
    picks = np.argsort(-logits, axis=-1)[:, :TOP_K]
    scores = np.take_along_axis(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), picks, axis=-1).ravel()
    turn = {"arrival": np.arange(picks.size), "random": rng.permutation(picks.size), "score": np.argsort(-scores)}
    holders, room = (picks.ravel() // device).tolist(), [slots] * (EXPERTS // device)
    kept, waiting = np.zeros(len(logits), dtype=bool), []
    for place in turn[order].tolist():
        if room[holders[place]]:
            room[holders[place]] -= 1
            kept[place // TOP_K] = True
        else:
            waiting.append(place // TOP_K)
    uses = {token: set(picks[token].tolist()) for token in waiting}
    while reroute and waiting:
        asked, refused = list(room), []
        for token in waiting:
            free = [expert for expert in np.argsort(-logits[token]) if asked[expert] and expert not in uses[token]]
            if free and room[free[0]]:
                room[free[0]] -= 1
                kept[token] = True
            elif free:
                refused.append(token)
            uses[token].update(free[:1])  # in use, or full by now
        waiting = refused
    return kept


def lost_by_token(scenario: Scenario, size: int, tokens: int = 49_152) -> float:
    """Share of tokens lost in capacity groups of one size, each with documents of its own, over all layers."""
    routing, rng = scenario.routing, np.random.default_rng(11)
    assert isinstance(routing.capacity_factor, float)
    ((treated, _),) = over_steps(scenario, resolve(scenario), [None])
    device = EXPERTS // 8 if routing.capacity_over == "device" else 1
    slots = capacities.slots(routing.capacity_factor, size, TOP_K, EXPERTS // device)
    kept: list[npt.NDArray[np.bool_]] = []
    for popular in treated.tendencies.logits:
        for _ in range(tokens // LAYERS // size):
            documents = treated.tendencies.domain * rng.standard_normal((max(1, size // SEQUENCE), EXPERTS))
            logits = popular + np.repeat(documents, min(size, SEQUENCE), axis=0) + rng.gumbel(size=(size, EXPERTS))
            reroute = routing.overflow == "reroute"
            kept.append(kept_in_a_queue(logits, slots, routing.drop_order, reroute=reroute, device=device, rng=rng))
    sequence = np.arange(sum(map(len, kept))) // SEQUENCE
    exempt = sequence % 10 < 10 * routing.exempt_sequence_fraction
    return float((~np.concatenate(kept) & ~exempt).mean())


CASES: dict[str, dict[str, Any]] = {
    "arrival": {},
    "random": {"routing.drop_order": "random"},
    "score": {"routing.drop_order": "score"},
    "rerouted": {"routing.overflow": "reroute", "routing.capacity_factor": 0.7},
    "rerouted by score": {
        "routing.overflow": "reroute",
        "routing.capacity_factor": 0.7,
        "routing.drop_order": "score",
    },
    "exempt": {"routing.exempt_sequence_fraction": 0.3},
    "documents": {"routing.load": {"kind": "logits", "domain": 0.8}},
    "devices": {"routing.load": {"kind": "logits", "population": 0.8}, "routing.capacity_over": "device"},
}


@pytest.mark.parametrize("size", [64, 512, 4096])
@pytest.mark.parametrize("case", CASES)
def test_lost_tokens_are_those_of_a_queue(case: str, size: int) -> None:
    """Within 15 %, whatever the number of tokens that share a capacity."""
    changes = {"routing.capacity_factor": 1.0, "routing.capacity_group_tokens": size, **CASES[case]}
    scenario = small(**changes)

    assert load_of(scenario).lost_fraction == pytest.approx(lost_by_token(scenario, size), rel=0.15)


def test_a_capacity_group_larger_than_a_block_loses_what_a_block_of_its_share_loses() -> None:
    """65,536 tokens share one capacity, eight times the block: the lost tokens are those of the whole queue."""
    wide = {"routing.capacity_factor": 1.0, "routing.capacity_group_tokens": 65_536}
    scenario = small(**wide, **{"routing.load": {"kind": "logits", "population": 0.6}})

    expected = lost_by_token(scenario, 65_536, tokens=4 * 65_536)
    assert load_of(scenario).lost_fraction == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "sampled"),
    [
        ({}, False),
        ({"routing.placement": {"kind": "balanced"}}, False),  # contiguous, since all experts are alike
        ({"routing.placement": {"kind": "balanced", "redundant_experts": 8}}, True),
        ({"routing.load": {"kind": "logits", "population": 0.5}}, True),
    ],
)
def test_under_a_limit_on_groups_the_ranks_of_a_token_are_sampled_where_groups_are_torn(
    changes: dict[str, Any], sampled: bool
) -> None:
    """At most two of eight devices for a token; copies of experts are anywhere, so that it reaches more."""
    limit = {"model.moe.router.group_limit": 2, "model.moe.top_k": 4, "routing.load": {"kind": "balanced"}}
    scenario = small(**{**limit, **changes})
    moe, load = scenario.model.moe, load_of(scenario)
    assert moe is not None
    ((_, copies),) = load.copies_by_tier(moe, (8, 1))

    assert (load.picks is not None) == sampled
    if load.placement.in_order:
        assert copies == pytest.approx(2 * 7 / 8)
    else:
        assert copies > 2 * 7 / 8
