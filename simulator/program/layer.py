"""One stage's work as chains: dense segments and expert phases, forward, input gradient and weight gradient.

A stage is a row of blocks. Cut at the expert all-to-alls it becomes

    S_0 | dispatch E_0 combine | S_1 | dispatch E_1 combine | ... | S_n

where a segment S holds everything between two expert phases (the rest of one layer and the beginning of the next).
The backward pass runs the same row from the right: the gradient of a combine is a dispatch-shaped exchange, that of a
dispatch is combine-shaped (DeepSeek's published training trace shows both).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from simulator.layout import Layout
from simulator.spec.scenario import Scenario
from simulator.timing.classes import Item
from simulator.workload.ops import AttentionCore, Collective, Gemm, MemoryOp, moe_ordinals
from simulator.workload.recompute import fully_repeated, repeated


@dataclass(frozen=True)
class Entry:
    """One op of a segment in its place; ``repeat``: computed again in the backward pass."""

    item: Item
    repeat: bool
    block: int


@dataclass
class Phase:
    """The expert part of one MoE layer; ``beside``: shared experts, and their collectives, under its exchange."""

    layer: int
    stack: str
    dispatch: Collective
    combine: Collective | None = None
    entries: list[Entry] = field(default_factory=list)
    beside: list[Entry] = field(default_factory=list)
    full_repeat: bool = False


@dataclass
class StageWork:
    """Segments and phases of one stage: ``len(segments) == len(phases) + 1``."""

    segments: list[list[Entry]]
    phases: list[Phase]
    stack: str


def stage_work(scenario: Scenario, layout: Layout, stage: Sequence[int]) -> StageWork:
    """Cut the blocks of a stage at their expert all-to-alls; collectives of groups of one rank are left out."""
    training, beside = scenario.training, "shared_experts" in layout.overlap
    work = StageWork([[]], [], layout.blocks[stage[-1]].stack if stage else "decoder")
    ordinals = moe_ordinals(layout.blocks)
    whole = fully_repeated(training, layout.blocks, stage)
    for index in stage:
        full = index in whole
        again = frozenset(
            position for position, op in enumerate(layout.blocks[index].ops) if repeated(op, training, full=full)
        )
        _add_block(work, layout, index, ordinals.get(index, -1), again, full=full, beside=beside)
    return work


def _add_block(
    work: StageWork, layout: Layout, index: int, layer: int, again: frozenset[int], *, full: bool, beside: bool
) -> None:
    block = layout.blocks[index]
    family = "mtp" if block.kind == "mtp" else None
    waiting: list[Entry] = []
    for position, op in enumerate(block.ops):
        if isinstance(op, Collective) and op.kind == "dispatch":
            work.phases.append(Phase(layer, block.stack, op, beside=waiting, full_repeat=full))
            waiting = []
            continue
        if isinstance(op, Collective) and op.kind == "combine":
            work.phases[-1].combine = op
            work.segments.append([])
            continue
        if isinstance(op, Collective) and layout.spans[op.group].size <= 1:
            continue
        entry = Entry(Item(op, block.stack, family or op.family), position in again, index)
        if beside and (op.family == "shared_expert" or op.name.startswith("shared_expert ")):
            waiting.append(entry)
        elif len(work.phases) == len(work.segments):
            work.phases[-1].entries.append(entry)
        else:
            work.segments[-1].append(entry)


def runs(
    entries: Sequence[Entry], *, by_block: bool = False, joined: frozenset[str] = frozenset()
) -> list[list[Entry]]:
    """Split a segment into stretches of compute; a collective is a stretch of its own.

    ``by_block`` also cuts at block borders, for parameters that are gathered layer by layer. Collectives of the groups
    in ``joined`` may run beside the product (or attention) that they feed or follow: the two are one stretch of two.
    """
    result: list[list[Entry]] = []
    partner = _partners(entries, joined)
    for index, entry in enumerate(entries):
        tail = result[-1] if result else None
        if tail is not None and partner.get(index) == index - 1:
            tail.append(entry)
            continue
        alone = isinstance(entry.item.op, Collective) or index in partner or tail is None or collective_of(tail)
        if alone or (by_block and tail is not None and tail[-1].block != entry.block):
            result.append([entry])
        else:
            result[-1].append(entry)
    return result


def collective_of(stretch: Sequence[Entry]) -> Entry | None:
    """The collective of a stretch, if it has one."""
    return next((entry for entry in stretch if isinstance(entry.item.op, Collective)), None)


def _partners(entries: Sequence[Entry], joined: frozenset[str]) -> dict[int, int]:
    """Index of each collective and of its neighbour, both ways: what it feeds (enter, ring) or follows (exit)."""
    result: dict[int, int] = {}
    for index, entry in enumerate(entries):
        op = entry.item.op
        if not isinstance(op, Collective) or op.group not in joined:
            continue
        other = index - 1 if op.kind == "exit" else index + 1
        wanted = AttentionCore if op.kind == "ring" else Gemm
        inside = 0 <= other < len(entries) and other not in result
        if inside and isinstance(entries[other].item.op, wanted) and entries[other].block == entry.block:
            result[index], result[other] = other, index
    return result


def has_work(entries: Sequence[Entry]) -> bool:
    """Whether a stretch has anything to compute."""
    return any(not isinstance(entry.item.op, MemoryOp) or entry.item.op.elements for entry in entries)
