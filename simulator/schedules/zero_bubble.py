"""Zero-bubble schedules: split the backward into I and W, and move W to where the rank would otherwise wait.

Only I is on the way to the previous stage; W has no successor inside the step. ZB1P (the paper's ZB-H1) keeps the peak
memory of 1F1B and cuts its bubble to (P-1)(F+I-W). ZB-H2 spends up to twice that memory on more forwards in the
warm-up. ZB-V lays two chunks per rank out in a V, rank r holding stages r and 2P-1-r, so that the first and the last
stage share rank 0. Under both, with F = I = W no rank waits between its first and its last action; the pipe still takes
(P-1)F to fill, which a step that ends with a barrier pays.

Sources: Qi et al., Zero Bubble Pipeline Parallelism (arXiv 2401.10241), Table 2 (ZB-H1, ZB-H2) and section 6 (ZB-V);
orders of execution of ZB1P and ZB-V as ``ScheduleInterleavedZeroBubble`` with one stage per rank and
``ScheduleZBVZeroBubble`` of PyTorch. ZB-H2 is written here by a rule of its own; nobody else publishes its lists.
"""

from __future__ import annotations

from simulator.schedules.actions import Action, Kind, Schedule
from simulator.schedules.writing import Lane, rank_by_rank, require_sizes


def zb1p(ranks: int, microbatches: int) -> Schedule:
    """Return the ZB1P schedule: 1F1B with I in the place of B, and W of a microbatch r backwards later.

    Rank r holds P-1-r microbatches that wait for I and r that wait for W, so every rank has the same number in flight.
    Peak activations: min(P, M) on every rank. Bubble (P-1)(F+I-W).

    Raises:
        InvalidInput: fewer than 1 rank or 1 microbatch.

    >>> [" ".join(map(str, steps)) for steps in zb1p(2, 2).steps]
    ['0F0 0F1 0I0 0W0 0I1 0W1', '1F0 1I0 1F1 1I1 1W0 1W1']
    """
    require_sizes("zb1p", ranks, microbatches)
    one_each = [(rank,) for rank in range(ranks)]
    return rank_by_rank("zb1p", microbatches, one_each, lambda rank: _zb1p_steps(rank, ranks, microbatches))


def _zb1p_steps(rank: int, ranks: int, microbatches: int) -> list[Action]:
    lead = min(ranks - 1 - rank, microbatches)
    steps = [Action(rank, "F", microbatch) for microbatch in range(lead)]
    for microbatch in range(microbatches):
        if microbatch + lead < microbatches:
            steps.append(Action(rank, "F", microbatch + lead))
        steps.append(Action(rank, "I", microbatch))
        if microbatch >= rank:
            steps.append(Action(rank, "W", microbatch - rank))
    steps += [Action(rank, "W", microbatch) for microbatch in range(max(0, microbatches - rank), microbatches)]
    return steps


def zbh2(ranks: int, microbatches: int) -> Schedule:
    """Return the ZB-H2 schedule: warm up with forwards until the first gradient is back, and save W for the end.

    The first gradient reaches rank r after 2(P-r)-1 passes, so that many forwards fill the wait. Then I, W and the next
    forward take turns. Near the end rank 0 has no forwards left and takes a gradient every two passes; for the last
    2P-1 microbatches the others keep up with it by putting W off while they still have forwards, and these W fill
    their own ends.

    Peak activations: min(2P-1, M) on every rank. For W <= F, W <= I and M >= 2P-1 rank r idles (P-1-r)(F+I-2W) between
    its first and its last action, 0 if F = I = W; the bubble of the makespan is (P-1) max(F, F+I-2W).

    Raises:
        InvalidInput: fewer than 1 rank or 1 microbatch.

    >>> [" ".join(map(str, steps)) for steps in zbh2(2, 4).steps]
    ['0F0 0F1 0F2 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3', '1F0 1I0 1W0 1F1 1I1 1F2 1I2 1F3 1I3 1W1 1W2 1W3']
    """
    require_sizes("zbh2", ranks, microbatches)
    one_each = [(rank,) for rank in range(ranks)]
    return rank_by_rank("zbh2", microbatches, one_each, lambda rank: _zbh2_steps(rank, ranks, microbatches))


def _zbh2_steps(rank: int, ranks: int, microbatches: int) -> list[Action]:
    lead = min(2 * (ranks - rank) - 1, microbatches)
    lane = Lane(rank, range(microbatches))
    steps = [lane.take("F") for _ in range(lead)]
    for microbatch in range(microbatches):
        more, hurry = microbatch + lead < microbatches, microbatch > microbatches - 2 * ranks
        steps.append(lane.take("I"))
        if not (more and hurry):
            steps.append(lane.take("W"))
        if more:
            steps.append(lane.take("F"))
    steps += [lane.take("W") for _ in range(3 * microbatches - len(steps))]
    return steps


def zbv(ranks: int, microbatches: int) -> Schedule:
    """Return the ZB-V schedule of P ranks with two chunks each: stages r and 2P-1-r on rank r.

    Peak chunk activations: min(2P, 2M, M+1+r), for M >= 2P-1 the memory of P full stages, as 1F1B's. Fewer than 2P-1
    microbatches are the schedule of 2P-1 with the rest left out.

    Raises:
        InvalidInput: fewer than 1 rank or 1 microbatch.

    >>> " ".join(map(str, zbv(1, 2).steps[0]))
    '0F0 1F0 1I0 1W0 0F1 0I0 0W0 1F1 1I1 1W1 0I1 0W1'
    """
    require_sizes("zbv", ranks, microbatches)
    planned = max(microbatches, 2 * ranks - 1)

    def steps(rank: int) -> list[Action]:
        return [action for action in _zbv_steps(rank, ranks, planned) if action.microbatch < microbatches]

    return rank_by_rank("zbv", microbatches, [(rank, 2 * ranks - 1 - rank) for rank in range(ranks)], steps)


def _zbv_steps(rank: int, ranks: int, microbatches: int) -> list[Action]:
    """Write one rank's list for M >= 2P-1, phase by phase; lane 0 is the way down the V, lane 1 the way back up."""
    lane = (Lane(rank, range(microbatches)), Lane(2 * ranks - 1 - rank, range(microbatches)))
    steps: list[Action] = []

    def run(times: int, *actions: tuple[Kind, int]) -> None:
        steps.extend(lane[which].take(kind) for _ in range(times) for kind, which in actions)

    # Warm-up: fill lane 0, then serve both lanes, then start the backwards of lane 1.
    run(2 * (ranks - rank) - 1, ("F", 0))
    run(rank, ("F", 1), ("F", 0))
    run(ranks - rank, ("F", 1), ("I", 1), ("W", 1))
    # Steady state, in its last passes without new microbatches.
    new = microbatches - (2 * ranks - 1 - rank)
    run(new, ("F", 0), ("I", 0), ("W", 0), ("F", 1), ("I", 1), ("W", 1))
    run(microbatches - ranks - new, ("I", 0), ("W", 0), ("F", 1), ("I", 1), ("W", 1))
    # Cool-down: the gradients hurry on, the weights fill what is left.
    run(rank, ("I", 0), ("I", 1))
    run(ranks - rank, ("I", 0), ("W", 0))
    run(rank, ("W", 1))
    run(rank, ("W", 0))
    return steps
