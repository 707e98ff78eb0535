"""Laws of admission, and a queue that is served by hand: one assignment after the other, in plain loops."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.routing import capacity as capacities
from simulator.routing.admission import Admission, admit, group_sizes

Ints = npt.NDArray[np.int64]


@dataclass
class Case:
    """A router's choices and how they are served."""

    choices: Ints
    capacity: int
    order: Any
    scores: Any
    seed: int
    overflow: Any
    alternatives: Any
    exempt: Any
    groups: int
    total: int

    def admit(self, **changes: Any) -> Admission:
        given_ = {**vars(self), **changes}
        choices, capacity, seed = given_.pop("choices"), given_.pop("capacity"), given_.pop("seed")
        return admit(choices, capacity, rng=np.random.default_rng(seed), **given_)


@st.composite
def cases(draw: st.DrawFn, overflow: tuple[str, ...] = ("drop", "reroute", "none"), exempt: bool = True) -> Case:
    """Up to 40 tokens in up to 4 groups, skewed choices of up to 9 experts, some of them absent, few or many slots."""
    total = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, total))
    tokens, groups = draw(st.integers(0, 40)), draw(st.integers(1, 4))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    liking = draw(st.sampled_from([0.0, 1.0, 4.0])) * rng.standard_normal(total) + rng.gumbel(size=(tokens, total))
    choices = np.argsort(-liking, axis=-1)[:, :top_k]
    scores = np.take_along_axis(liking, choices, axis=-1)
    if draw(st.booleans()):
        scores = scores.round()  # ties
    if draw(st.booleans()):
        choices = np.where(rng.random(choices.shape) < 0.2, -1, choices)
    if draw(st.booleans()):
        liking = np.where(rng.random(liking.shape) < 0.2, -np.inf, liking)
    return Case(
        choices,
        draw(st.integers(0, 12)),
        draw(st.sampled_from(["arrival", "score", "random"])),
        scores,
        seed,
        draw(st.sampled_from(overflow)),
        draw(st.sampled_from([liking, None])),
        rng.random(tokens) < 0.3 if exempt and draw(st.booleans()) else None,
        groups,
        total,
    )


def group_of(case: Case) -> list[int]:
    return [group for group, size in enumerate(group_sizes(len(case.choices), case.groups)) for _ in range(size)]


def served_by_hand(case: Case) -> tuple[list[list[int]], list[list[bool]]]:
    """Experts and acceptance of every assignment, by walking along the queue."""
    tokens, top_k = case.choices.shape
    group = group_of(case)
    queue = [(token, k) for token in range(tokens) for k in range(top_k) if case.choices[token, k] >= 0]
    if case.order == "score":
        queue.sort(key=lambda place: -case.scores[place])
    if case.order == "random":
        queue = [queue[n] for n in np.random.default_rng(case.seed).permutation(len(queue))]
    experts = case.choices.tolist()
    accepted = [[False] * top_k for _ in range(tokens)]
    taken: Counter[tuple[int, int]] = Counter()

    def ask(token: int, k: int, expert: int) -> bool:
        if taken[group[token], expert] >= case.capacity and case.overflow != "none":
            return False
        taken[group[token], expert] += 1
        experts[token][k], accepted[token][k] = expert, True
        return True

    waiting = [(token, k) for token, k in queue if not ask(token, k, experts[token][k])]
    used = [set(row) for row in experts]
    while waiting and case.overflow == "reroute":
        wishes = []
        for token, k in waiting:
            liking = [0.0] * case.total if case.alternatives is None else case.alternatives[token]
            free = [
                expert
                for expert in range(case.total)
                if expert not in used[token]
                and taken[group[token], expert] < case.capacity
                and liking[expert] > -np.inf
            ]
            if free:
                best = max(free, key=lambda expert: liking[expert])  # the first of equals
                used[token].add(best)
                wishes.append((token, k, best))
        waiting = [(token, k) for token, k, expert in wishes if not ask(token, k, expert)]
    if case.exempt is not None:
        for token, k in queue:
            accepted[token][k] |= bool(case.exempt[token])
    return experts, accepted


@settings(deadline=None, max_examples=400)
@given(cases())
def test_admission_is_a_queue_served_by_hand(case: Case) -> None:
    result = case.admit()

    assert (result.experts.tolist(), result.accepted.tolist()) == served_by_hand(case)
    assert result.chosen is case.choices


@settings(deadline=None, max_examples=150)
@given(cases())
def test_assigned_is_accepted_plus_dropped(case: Case) -> None:
    result = case.admit()
    asked = int((case.choices >= 0).sum())

    assert result.assigned.sum() == asked == result.accepted.sum() + result.dropped.sum()
    assert result.processed.sum() == result.accepted.sum()
    assert not (result.accepted & result.dropped).any()
    assert not result.accepted[case.choices < 0].any()
    assert 0.0 <= result.lost_fraction <= 1.0
    assert result.profile(7).max() <= 1.0
    assert np.isclose(result.share_of_drops(7).sum(), float(result.dropped.any()))
    if case.overflow == "none":
        assert not result.dropped.any()
    if case.exempt is not None:
        assert not result.dropped[case.exempt].any()


@settings(deadline=None, max_examples=150)
@given(cases(overflow=("drop", "reroute"), exempt=False))
def test_no_expert_exceeds_its_slots_and_no_token_meets_an_expert_twice(case: Case) -> None:
    result, group = case.admit(), np.array(group_of(case), dtype=np.int64)
    for number in range(case.groups):
        mine = group == number
        assert np.bincount(result.experts[mine][result.accepted[mine]], minlength=1).max() <= case.capacity
    for row in result.experts:
        assert len(set(row[row >= 0])) == (row >= 0).sum()


@settings(deadline=None, max_examples=150)
@given(cases(overflow=("reroute",), exempt=False))
def test_rerouting_drops_nothing_while_there_is_room_for_the_token(case: Case) -> None:
    """And it never drops more than dropping does; who is served where it wanted to be is the same."""
    result, strict, group = case.admit(), case.admit(overflow="drop"), group_of(case)
    room = np.full((case.groups, case.total), case.capacity)
    for token, k in np.argwhere(result.accepted):
        room[group[token], result.experts[token, k]] -= 1
    for token, _ in np.argwhere(result.dropped):
        allowed = np.ones(case.total) if case.alternatives is None else case.alternatives[token] > -np.inf
        free = set(np.flatnonzero((room[group[token]] > 0) & (allowed > 0)))
        assert free <= set(result.experts[token]) | set(result.chosen[token])
    assert (result.accepted >= strict.accepted).all()
    assert (result.experts == result.chosen)[strict.accepted].all()


@settings(deadline=None, max_examples=100)
@given(cases(overflow=("drop", "none")))
def test_one_more_slot_never_drops_anyone_else(case: Case) -> None:
    few, many = case.admit(), case.admit(capacity=case.capacity + 1)

    assert (many.accepted >= few.accepted).all()


@settings(deadline=None, max_examples=150)
@given(cases(), st.randoms(use_true_random=False))
def test_experts_have_no_names(case: Case, random: Any) -> None:
    """Renumbering the experts renumbers the result; only rerouting without likings goes by the numbers."""
    if case.alternatives is None and case.overflow == "reroute":
        case.overflow = "drop"
    name = np.array(random.sample(range(case.total), case.total))
    back = np.argsort(name)
    renamed = case.admit(
        choices=np.where(case.choices >= 0, name[case.choices], -1),
        alternatives=None if case.alternatives is None else case.alternatives[:, back],
    )
    result = case.admit()

    assert (renamed.accepted == result.accepted).all()
    assert (renamed.experts == np.where(result.experts >= 0, name[result.experts], -1)).all()
    assert (renamed.processed == result.processed[back]).all()


@settings(deadline=None, max_examples=150)
@given(cases(overflow=("drop", "none"), exempt=False))
def test_counts_say_the_same_in_every_order(case: Case) -> None:
    group = np.repeat(group_of(case), case.choices.shape[1]).astype(np.int64)
    real = case.choices.ravel() >= 0
    cells = (group * case.total + case.choices.ravel())[real]
    counts = np.bincount(cells, minlength=case.groups * case.total).reshape(case.groups, case.total)
    outcome = capacities.apply(counts, case.capacity, overflow=case.overflow)

    for order in ("arrival", "score", "random"):
        result = case.admit(order=order)
        assert (result.processed == outcome.processed.sum(0)).all()
        assert result.dropped.sum() == outcome.dropped.sum()


@settings(deadline=None, max_examples=150)
@given(cases(overflow=("reroute",), exempt=False))
def test_counts_bound_rerouting_from_above(case: Case) -> None:
    """Counts fill every slot; tokens may find only their own experts, or forbidden ones, with room."""
    group = np.repeat(group_of(case), case.choices.shape[1]).astype(np.int64)
    real = case.choices.ravel() >= 0
    cells = (group * case.total + case.choices.ravel())[real]
    counts = np.bincount(cells, minlength=case.groups * case.total).reshape(case.groups, case.total)
    result, outcome = case.admit(), capacities.apply(counts, case.capacity, overflow="reroute")

    assert result.processed.sum() <= outcome.processed.sum()
    if case.choices.shape[1] == 1 and (case.alternatives is None or np.isfinite(case.alternatives).all()):
        assert result.processed.sum() == outcome.processed.sum()
