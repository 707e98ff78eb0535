"""The laws that the lists of a schedule obey: complete, well ordered, and free of deadlock."""

from __future__ import annotations

from collections.abc import Iterator

from simulator.schedules.actions import Action, Overlapped, Schedule, Step, parts


def check(schedule: Schedule) -> None:
    """Verify that a schedule is complete, well ordered and free of deadlock.

    1. Every (stage, microbatch) has exactly one F and one B, or exactly one F, one I and one W, on the right rank.
    2. On that rank F comes before I or B, and I before W.
    3. Played one step at a time per rank, all ranks reach their ends: F(s) waits for F(s-1), I or B of s waits for F(s)
       and for I or B of s+1, W waits for I, an overlapped pair waits for what either part needs.

    Raises:
        ValueError: a law is broken; the text names the rank and the action.
    """
    if not schedule.ranks == len(schedule.steps) == len(schedule.placement):
        raise ValueError(
            f"{schedule.name}: {schedule.ranks} ranks, but {len(schedule.steps)} step lists "
            f"and {len(schedule.placement)} placements"
        )
    _check_placement(schedule)
    seen: set[Action] = set()
    for rank in range(schedule.ranks):
        _check_rank(schedule, rank, seen)
    _check_complete(schedule, seen)
    _check_progress(schedule)


def _check_placement(schedule: Schedule) -> None:
    """Each stage sits on one rank, or each on two."""
    copies = {stage: len(schedule.holders.get(stage, ())) for stage in range(schedule.stages)}
    if len(schedule.holders) != schedule.stages or set(copies.values()) not in ({1}, {2}):
        raise ValueError(f"{schedule.name}: ranks per stage must be all 1 or all 2, the placement gives {copies}")


def _check_rank(schedule: Schedule, rank: int, seen: set[Action]) -> None:
    """Walk through one rank's list: right rank, no repetition, F before I or B, I before W."""

    def refuse(step: Step, why: str) -> None:
        raise ValueError(f"{schedule.name}: rank {rank}, {step}: {why}")

    for step in schedule.steps[rank]:
        if isinstance(step, Overlapped) and (step.forward.kind != "F" or step.backward.kind not in "IB"):
            refuse(step, "an overlapped pair is a forward (F) with a backward (I or B)")
        for action in parts(step):
            stage, kind, microbatch = action
            if not (0 <= stage < schedule.stages and 0 <= microbatch < schedule.microbatches):
                refuse(action, f"there are {schedule.stages} stages and {schedule.microbatches} microbatches")
            home = schedule.rank_of(stage, microbatch)
            if home != rank:
                refuse(action, f"stage {stage} of microbatch {microbatch} belongs to rank {home}")
            if action in seen:
                refuse(action, "appears twice")
            if kind in "IB" and (forward := Action(stage, "F", microbatch)) not in seen:
                refuse(action, f"comes before {forward}")
            if kind == "W" and (for_input := Action(stage, "I", microbatch)) not in seen:
                refuse(action, f"comes before {for_input}")
            seen.add(action)


def _check_complete(schedule: Schedule, seen: set[Action]) -> None:
    """Demand F with B, or F with I and W, for every stage and microbatch."""
    for stage in range(schedule.stages):
        for microbatch in range(schedule.microbatches):
            full = Action(stage, "B", microbatch)
            forward, for_input, for_weight = (Action(stage, kind, microbatch) for kind in ("F", "I", "W"))
            where = f"{schedule.name}: rank {schedule.rank_of(stage, microbatch)}"
            if full in seen and for_input in seen:
                raise ValueError(f"{where}, {full}: the backward is there twice, {for_input} is part of it")
            backward = (for_input, for_weight) if for_input in seen else (full,)
            for action in (forward, *backward):
                if action not in seen:
                    raise ValueError(f"{where}, {action}: missing")


def _needs(step: Step, last_stage: int) -> Iterator[Action]:
    """Yield what must have ended before a step can start. The gradient of a stage is written I, split or not."""
    for stage, kind, microbatch in parts(step):
        if kind == "F" and stage > 0:
            yield Action(stage - 1, "F", microbatch)
        elif kind == "W":
            yield Action(stage, "I", microbatch)
        elif kind in "IB":
            yield Action(stage, "F", microbatch)
            if stage < last_stage:
                yield Action(stage + 1, "I", microbatch)


def _check_progress(schedule: Schedule) -> None:
    """Play all ranks until none can move; whoever is not at its end by then never gets there."""
    last_stage = schedule.stages - 1
    done: set[Action] = set()
    position = [0] * schedule.ranks
    moved = True
    while moved:
        moved = False
        for rank, steps in enumerate(schedule.steps):
            while position[rank] < len(steps) and done.issuperset(_needs(steps[position[rank]], last_stage)):
                for action in parts(steps[position[rank]]):
                    done.add(action._replace(kind="I") if action.kind == "B" else action)
                position[rank] += 1
                moved = True
    if waiting := [rank for rank, steps in enumerate(schedule.steps) if position[rank] < len(steps)]:
        texts = [_waits_for(schedule, rank, schedule.steps[rank][position[rank]], done) for rank in waiting]
        raise ValueError(f"{schedule.name}: deadlock: {'; '.join(texts)}")


def _waits_for(schedule: Schedule, rank: int, step: Step, done: set[Action]) -> str:
    need = next(need for need in _needs(step, schedule.stages - 1) if need not in done)
    if need not in schedule.actions(schedule.rank_of(need.stage, need.microbatch)):
        need = need._replace(kind="B")
    return f"rank {rank} waits at {step} for {need}"
