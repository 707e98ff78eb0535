"""Dense segments: stretches of compute, and the tensor- and context-parallel collectives between them.

A collective blocks the compute stream, unless its group is among the overlaps. Then it and its neighbour, the product
or attention that it feeds or follows, are cut into equal parts and run as a pipeline, each part as soon as its data
are there; more parts cost more launches, more latencies and smaller kernels:

* tensor: 4 parts. An all-gather part feeds a part of the product; a part of the product feeds a reduce-scatter part.
  This is the pipelined overlap of Transformer Engine's user buffers (``--tp-comm-overlap`` of Megatron-Core).
* tensor_backward: whole, beside the weight gradient of the same product. The collectives at the input of a
  column-parallel product are not needed before the next op of the input gradient (arXiv 2205.05198, section 4.2.2;
  Megatron-Core and Transformer Engine do so unless told otherwise). The gather of the kept input, which they run beside
  the input gradient, is issued with the reduction here: as much of it is hidden, a little later.
* context: one part for each rank of the ring. While a rank attends to one block of keys and values, it sends that block
  on and receives the next (ring attention, arXiv 2310.01889). The first block is its own. Backward, the sums of the
  blocks' gradients travel one step behind and the last of them comes home when all compute is done.

Nothing is hidden by assumption: what the parts of compute do not cover is exposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from simulator.program import sharding
from simulator.program.layer import Entry, collective_of, has_work, runs
from simulator.program.structure import GRADIENT
from simulator.program.template import Writer
from simulator.timing.classes import Beside, Compute
from simulator.timing.kernels import Pass
from simulator.workload.ops import Collective, Gemm, GroupedGemm

TENSOR_PARTS = 4
"""Parts of a tensor-parallel product that overlaps its collective; user buffers split by 4 unless told otherwise."""

_GROUPS = frozenset({"tensor", "context"})


class Segments(Writer):
    """Writes dense segments, forward and backward."""

    @property
    def joined(self) -> frozenset[str]:
        """Groups whose collectives may run beside their neighbours."""
        return self.layout.overlap & _GROUPS

    def dense(
        self,
        entries: Sequence[Entry],
        which: Pass,
        after: list[int],
        side: int,
        *,
        repeated: bool = False,
        weights: list[Entry] | None = None,
    ) -> list[int]:
        """A segment. ``repeated``: its forward has been computed again already, and its parameters are there.

        ``weights``: of a backward whose weight gradients may be computed where a collective can hide behind them; what
        is left of them is in the list at the end.
        """
        parts = runs(entries, by_block=self.by_block, joined=self.joined)
        if which == "I" and not repeated:
            after = self.repeat_regions(entries, after, side)
        for part in parts if which == "F" else reversed(parts):
            moving = collective_of(part)
            if weights is not None:
                weights.extend(entry for entry in part if entry is not moving)
            if moving is not None and len(part) > 1:
                after = self.joint(part, which, after, side, repeated=repeated)
            elif moving is not None and weights and self.hides_backward(moving):
                after = self.region(moving, after, side, backward=True, blocks=False)
                self.weigh(weights, None, reduces=False)
                weights.clear()
            elif moving is not None:
                after = self.region(moving, after, side, backward=which == "I")
            elif has_work(part):
                again = tuple(entry.item for entry in part if entry.repeat) if which == "I" and not repeated else ()
                cls = Compute(which, tuple(entry.item for entry in part), again, None, self.reserved)
                needed = () if repeated else part
                after = [self.compute(cls, after, side, f"{which} dense", needed, block=part[0].block)]
        return after

    def dense_backward(
        self, entries: Sequence[Entry], after: list[int], inputs: bool, weights: bool, *, repeated: bool = False
    ) -> list[int]:
        """I and W of a segment; block by block where gradients leave as they are complete."""
        parts = [
            [entry for entry in entries if entry.block == block] for block in dict.fromkeys(e.block for e in entries)
        ]
        for part in reversed(parts) if self.reduces and inputs and weights else [list(entries)]:
            rest: list[Entry] = [] if inputs else part
            if inputs:
                after = self.dense(part, "I", after, 1, repeated=repeated, weights=rest if weights else None)
            if weights:
                self.weigh(rest, None, reduces=False)
                self.reduce(part)
        return after

    def hides_backward(self, moving: Entry) -> bool:
        """Whether a collective may run beside the weight gradients behind it."""
        op = moving.item.op
        assert isinstance(op, Collective)
        return "tensor_backward" in self.layout.overlap and op.group == "tensor" and op.kind == "enter"

    def last_backward(
        self, entries: Sequence[Entry], after: list[int], inputs: bool, weights: bool, *, repeated: bool = False
    ) -> Iterator[None]:
        """The segment at which a backward chain ends.

        The gradient leaves when the whole backward is done, as autograd returns it. A pair that delays its weight
        gradients sends before the last W, which waits until the forward has ended and runs while both messages travel.
        """
        delayed = self.delays and weights and not self.reduces
        after = self.dense_backward(entries, after, inputs, weights and not delayed, repeated=repeated)
        if inputs:
            self.close(1, after if delayed else self.done(after))
        if delayed:
            yield
            self.weigh(entries, None)

    def weigh(
        self,
        entries: Sequence[Entry],
        layer: int | None,
        parts: int = 1,
        beside: tuple[Beside, ...] = (),
        *,
        reduces: bool = True,
    ) -> None:
        """Gradients of the weights of a stretch, and their reduction where it is due and ``reduces``."""
        items = tuple(entry.item for entry in entries if isinstance(entry.item.op, Gemm | GroupedGemm))
        if items:
            cls = Compute("W", items, (), layer, self.reserved, parts, beside)
            label = "W experts" if layer is not None else "W dense"
            self.template.weights[1] = self.compute(cls, [], 1, label, (), block=entries[0].block)
        if parts == 1 and reduces:
            self.reduce(entries)

    def reduce(self, entries: Sequence[Entry]) -> None:
        """The reduction of a stretch's gradients, where they leave as soon as they are complete."""
        if not self.reduces or self.last_compute is None:
            return
        number = self.last_compute
        for group, bulk in sharding.reductions(self.scenario, self.layout, entries):
            done = self.add(GRADIENT, bulk, [number], 1, f"reduce {group}")
            if "gradient_reduce" not in self.layout.overlap:
                self.blocks_next.append(done)

    def repeat_regions(
        self, entries: Sequence[Entry], after: list[int], side: int, layer: int | None = None, parts: int = 1
    ) -> list[int]:
        """Forward collectives of a stretch that recomputation needs again, with the neighbours they run beside."""
        for part in runs(entries, joined=self.joined):
            moving = collective_of(part)
            if moving is None or not moving.repeat:
                continue
            if len(part) > 1 and all(entry.repeat for entry in part):
                after = self.joint(part, "F", after, side, repeated=True, again=True)
            else:
                after = self.region(moving, after, side, backward=False, layer=layer, parts=parts)
        return after

    def repeated_alone(self, entries: Sequence[Entry]) -> list[Entry]:
        """Ops of a stretch that are computed again and that :meth:`repeat_regions` has not computed."""
        return [
            entry
            for part in runs(entries, joined=self.joined)
            if len(part) == 1 or collective_of(part) is None or not all(entry.repeat for entry in part)
            for entry in part
            if entry.repeat and not isinstance(entry.item.op, Collective)
        ]

    # --- a collective beside its neighbour ----------------------------------------------------------------------------

    def joint(
        self, part: Sequence[Entry], which: Pass, after: list[int], side: int, *, repeated: bool, again: bool = False
    ) -> list[int]:
        """A collective and its neighbour in equal parts; ``again``: both belong to a repeated forward."""
        moving = collective_of(part)
        assert moving is not None
        op = moving.item.op
        assert isinstance(op, Collective)
        beside = next(entry for entry in part if entry is not moving)
        backward = which == "I"
        feeds = (op.kind != "exit") != backward
        # Recomputed here with the gradient, where the collective did not have it recomputed already.
        due = backward and not repeated and beside.repeat and not moving.repeat
        count = self.layout.spans["context"].size if op.kind == "ring" else TENSOR_PARTS
        if op.kind != "ring" and feeds and not self.scenario.parallelism.sequence_parallel:
            count = 1  # nothing moves: every rank has the whole input
        items, repeats = (beside.item,), (beside.item,) if due else ()
        cls = Compute(which, () if again else items, items if again else repeats, None, self.reserved, count)
        label = "recompute dense" if again else f"{which} dense"
        needed = () if not again and (repeated or (moving.repeat and beside.repeat and backward)) else (beside,)

        def work(needs: list[int], index: int) -> list[int]:
            return [self.compute(cls, needs, side, label, needed if index == 0 else (), block=beside.block)]

        def move(needs: list[int], *, returning: bool = backward) -> list[int]:
            return self.region(moving, needs, side, backward=returning, parts=count, blocks=False)

        ready = after
        if op.kind == "ring":
            there = after
            for index in range(count):
                before, ready = ready, work(there, index)
                if index < count - 1:  # the next block comes, and backward the last one's gradients leave
                    there = move(before)
            return move(ready, returning=False) if backward else ready
        for index in range(count):
            ready = work(move(after), index) if feeds else move(work(after, index))
        return ready
