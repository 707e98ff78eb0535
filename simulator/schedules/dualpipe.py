"""DualPipe and DualPipeV: overlap a whole forward with a whole backward, so that each hides the other's communication.

DualPipe feeds microbatches from both ends of the pipeline: rank r holds stages r and P-1-r, half of the microbatches
enter at rank 0, the other half at rank P-1. A rank then always has a forward of one direction to pair with a backward
of the other. DualPipeV is DualPipe cut in half: P ranks hold 2P stages in a V (r and 2P-1-r), and the two lanes of a
rank are the two arms of the V. The same eight steps write both.

Notation of DeepSeek's code: on every rank "0" is its own direction (on which it is the nearer to the entrance), "1" the
other; ``F0B1`` written together is an overlapped pair; I stands for their zero-bubble backward ("B with enable_zb").

Bubble (PP/2-1)(F&B + B - 3W), exact for F = I = W and an upper bound otherwise; PP+1 activations and twice the
parameters per device, PP being the number of stages.

Sources: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.2.1 and Table 2; github.com/deepseek-ai/DualPipe,
``dualpipe.py`` and ``dualpipev.py``, method ``step``; ``ScheduleDualPipeV`` of PyTorch.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from simulator.schedules.actions import Action, Overlapped, Schedule, Step
from simulator.schedules.writing import Lane, rank_by_rank, require, require_sizes


def dualpipe(ranks: int, microbatches: int) -> Schedule:
    """Return the bidirectional DualPipe schedule of P ranks and M microbatches (both even, M >= 2P).

    Microbatches 0 .. M/2-1 run from rank 0 to rank P-1, on stage r at rank r; microbatches M/2 .. M-1 run the other
    way, on stage P-1-r at rank r. Peak activations: P+1 on every rank.

    Raises:
        InvalidInput: P or M is odd, or M < 2P.
    """
    require_sizes("dualpipe", ranks, microbatches)
    require(
        ranks % 2 == 0 and microbatches % 2 == 0 and microbatches >= 2 * ranks,
        "dualpipe needs an even number of pipeline ranks and an even number of microbatches, at least 2 per rank; "
        f"got {microbatches} microbatches on {ranks} ranks",
    )
    half = microbatches // 2
    from_rank_0, from_last_rank = range(half), range(half, microbatches)

    def steps(rank: int) -> list[Step]:
        down, up = Lane(rank, from_rank_0), Lane(ranks - 1 - rank, from_last_rank)
        own, other = (down, up) if rank < ranks // 2 else (up, down)
        return _EightSteps(own, other, ranks // 2, min(rank, ranks - 1 - rank), half).written()

    return rank_by_rank("dualpipe", microbatches, [(rank, ranks - 1 - rank) for rank in range(ranks)], steps)


def dualpipev(ranks: int, microbatches: int) -> Schedule:
    """Return the DualPipeV schedule of P ranks, 2P stages in a V, and M >= 2P microbatches.

    Rank r holds stages r and 2P-1-r. Peak chunk activations: 2P+1 on every rank.

    Raises:
        InvalidInput: M < 2P, or no rank.

    >>> " ".join(map(str, dualpipev(1, 2).steps[0]))
    '0F0 1F0 0F1 1B0 (1F1;0B0)OVERLAP_F_B 1B1 0I1 0W1'
    """
    require_sizes("dualpipev", ranks, microbatches)
    require(
        microbatches >= 2 * ranks,
        f"dualpipev needs at least 2 microbatches per rank; got {microbatches} microbatches on {ranks} ranks",
    )

    def steps(rank: int) -> list[Step]:
        own, other = (Lane(stage, range(microbatches)) for stage in (rank, 2 * ranks - 1 - rank))
        return _EightSteps(own, other, ranks, rank, microbatches).written()

    return rank_by_rank("dualpipev", microbatches, [(rank, 2 * ranks - 1 - rank) for rank in range(ranks)], steps)


@dataclass
class _EightSteps:
    """Writes one rank's list in DeepSeek's eight steps.

    ``depth`` D is the number of ranks from an entrance to the middle of the pipe (P/2 for DualPipe, P for DualPipeV),
    ``from_end`` h the rank's distance from its entrance, ``lane_length`` N the microbatches of one lane.
    """

    own: Lane
    other: Lane
    depth: int
    from_end: int
    lane_length: int
    steps: list[Step] = field(default_factory=list)
    weights: deque[Action] = field(default_factory=deque)
    """W passes put off, first in first out over both lanes."""

    @property
    def to_middle(self) -> int:
        """D-h-1: ranks between this one and the middle."""
        return self.depth - self.from_end - 1

    def written(self) -> list[Step]:
        """Return the whole list."""
        self._warm_up()
        self._steady()
        self._drain()
        self._cool_down()
        return self.steps

    def _warm_up(self) -> None:
        # Step 1, 2(D-h-1) x F0: fill the own direction.
        for _ in range(2 * self.to_middle):
            self._forward(self.own)
        # Step 2, (h+1) x F0 F1: the other direction has arrived.
        for _ in range(self.from_end + 1):
            self._forward(self.own)
            self._forward(self.other)
        # Step 3, (D-h-1) x I1 W1 F1: the other direction turns round; its gradient goes on before its weights are done.
        for _ in range(self.to_middle):
            self._backward(self.other, split=True)
            self._weight()
            self._forward(self.other)

    def _steady(self) -> None:
        # Step 4, (N-2D+h+1) x F0B1 F1B0, the main step, every forward under a backward. On the two middle ranks (the
        # last rank of DualPipeV) DeepSeek leaves the very first pair apart: its forward is handed on sooner.
        for turn in range(self.lane_length - 2 * self.depth + self.from_end + 1):
            if turn == 0 and self.to_middle == 0:
                self._forward(self.own)
                self._backward(self.other)
            else:
                self._pair(self.own, self.other)
            self._pair(self.other, self.own)

    def _drain(self) -> None:
        # Step 5, (D-h-1) x B1 F1B0: no new microbatch in the own direction.
        for _ in range(self.to_middle):
            self._backward(self.other)
            self._pair(self.other, self.own)
        # Step 6, (h+1) x B1 B0: only backwards are left; the second half of them keeps its W for later.
        for turn in range(self.from_end + 1):
            self._backward(self.other, split=2 * turn >= self.from_end + 1)
            self._backward(self.own, split=2 * turn + 1 >= self.from_end + 1)

    def _cool_down(self) -> None:
        # Step 7, (D-h-1) x W I0: weights while the last gradients travel to the entrance.
        for _ in range(self.to_middle):
            self._weight()
            self._backward(self.own, split=True)
        # Step 8, (h+1) x W: the weights that are still waiting.
        for _ in range(self.from_end + 1):
            self._weight()

    def _forward(self, lane: Lane) -> None:
        self.steps.append(lane.take("F"))

    def _backward(self, lane: Lane, *, split: bool = False) -> None:
        self.steps.append(action := lane.take("I" if split else "B"))
        if split:
            self.weights.append(action._replace(kind="W"))

    def _pair(self, forward_lane: Lane, backward_lane: Lane) -> None:
        self.steps.append(Overlapped(forward_lane.take("F"), backward_lane.take("B")))

    def _weight(self) -> None:
        self.steps.append(self.weights.popleft())
