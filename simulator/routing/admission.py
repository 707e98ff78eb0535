"""Which assignments an expert accepts, token by token: the reference behind the counts of :mod:`.capacity`.

An expert has ``capacity`` slots in each capacity group and serves the assignments that ask for them in an order:

- ``arrival``: token after token, all choices of one before those of the next (Switch, arXiv 2101.03961). Who comes
  late in the group is dropped more often;
- ``score``: the highest score first, so that the lowest affinity is dropped (DeepSeek-V2, arXiv 2405.04434, section
  2.2.4) or, with one score per token, the least important token (V-MoE, arXiv 2106.05974). Scores that fall from
  column to column serve all first choices before the second ones, as GShard does (arXiv 2006.16668);
- ``random``: any order, the same for all experts.

Where overflow is dropped, the order decides who is, not how many are: counts know the number, only tokens know who.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Admission:
    """What became of the choices of all tokens, arrays [tokens, k].

    ``chosen``: experts that the router chose, -1 for none; ``experts``: the same after rerouting; ``accepted``: is
    computed; ``total``: number of experts; ``groups``: capacity groups, consecutive in the tokens.
    """

    chosen: IntArray
    experts: IntArray
    accepted: BoolArray
    total: int
    groups: int = 1

    @property
    def dropped(self) -> BoolArray:
        """Assignments that no expert accepted [tokens, k]."""
        return np.asarray((self.chosen >= 0) & ~self.accepted)

    @property
    def assigned(self) -> IntArray:
        """Assignments that the router made to each expert [experts]."""
        return np.bincount(self.chosen[self.chosen >= 0], minlength=self.total)

    @property
    def processed(self) -> IntArray:
        """Assignments that each expert computes [experts]."""
        return np.bincount(self.experts[self.accepted], minlength=self.total)

    @property
    def dropped_fraction(self) -> float:
        """Dropped assignments over all assignments."""
        return float(self.dropped.sum() / max(1, (self.chosen >= 0).sum()))

    @property
    def lost_fraction(self) -> float:
        """Tokens that lose all their choices, over the tokens that have any."""
        routed = (self.chosen >= 0).any(-1)
        return float((routed & ~self.accepted.any(-1)).sum() / max(1, routed.sum()))

    def profile(self, bins: int = 10) -> FloatArray:
        """Dropped over all assignments by the token's position in its capacity group [bins]; 0 where there are none."""
        drops, total = self._by_position(bins)
        return np.asarray(drops / np.maximum(total, 1))

    def share_of_drops(self, bins: int = 10) -> FloatArray:
        """Share of all drops by the token's position in its capacity group [bins]; 0 if nothing is dropped."""
        drops, _ = self._by_position(bins)
        return np.asarray(drops / max(1, drops.sum()))

    def _by_position(self, bins: int) -> tuple[IntArray, IntArray]:
        """Dropped and all assignments by position."""
        sizes = group_sizes(len(self.chosen), self.groups)
        position = np.arange(len(self.chosen)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        part = position * bins // np.repeat(sizes, sizes)
        drops, total = (np.bincount(part, what.sum(-1), bins) for what in (self.dropped, self.chosen >= 0))
        return drops.astype(np.int64), total.astype(np.int64)


def group_sizes(tokens: int, groups: int) -> IntArray:
    """Tokens of each capacity group, as equal as they can be; the first ones take the rest.

    >>> group_sizes(10, 4).tolist()
    [3, 3, 2, 2]
    """
    sizes = np.full(groups, tokens // groups, dtype=np.int64)
    sizes[: tokens % groups] += 1
    return sizes


def admit(
    experts: IntArray,
    capacity: int | None,
    *,
    order: Literal["arrival", "score", "random"] = "arrival",
    scores: FloatArray | None = None,
    rng: np.random.Generator | None = None,
    overflow: Literal["drop", "reroute", "none"] = "drop",
    alternatives: FloatArray | None = None,
    exempt: BoolArray | None = None,
    groups: int = 1,
    total: int | None = None,
) -> Admission:
    """Serve the choices ``experts`` [tokens, k] of tokens in sequence; -1 is no choice, and no token repeats one.

    ``capacity`` is the number of slots of an expert in each of ``groups`` capacity groups, None for no limit; ``total``
    the number of experts, by default the columns of ``alternatives`` or the highest expert that is seen.

    ``scores`` [tokens, k] and ``rng`` go with their orders. ``overflow="reroute"`` moves what finds no slot: when all
    chosen experts have been served, each remaining assignment asks for the expert that its token likes best among
    those with room that the token does not use; experts fill up in the order of service, and who was refused asks
    again. ``alternatives`` [tokens, experts] is that liking, -inf for never; without it the first expert is the best.

    ``exempt`` [tokens] are never dropped: they queue and take slots as all others do, and are kept where they overflow.
    If they are a fraction f of all, a fraction f of the overflow is kept on average, as :func:`.capacity.apply` has it.

    >>> result = admit(np.array([[0, 1], [0, 2], [0, 1]]), 2)
    >>> result.accepted.tolist(), result.processed.tolist()
    ([[True, True], [True, True], [False, True]], [2, 2, 1])
    """
    (tokens, top_k), asked = experts.shape, experts >= 0
    if total is None:
        total = alternatives.shape[-1] if alternatives is not None else int(experts.max(initial=-1)) + 1
    if capacity is None or overflow == "none":
        return Admission(experts, experts, asked, total, groups)
    group, served = np.repeat(np.arange(groups), group_sizes(tokens, groups)), _service(asked, order, scores, rng)
    queue = (group[:, None] * total + experts).ravel()[served]
    inside = _ranks(queue) < capacity
    accepted = np.zeros(tokens * top_k, dtype=bool)
    accepted[served[inside]] = True
    final = experts.copy()
    if overflow == "reroute":
        room = (capacity - np.bincount(queue[inside], minlength=groups * total)).reshape(groups, total)
        _reroute(final, accepted, served[~inside], group, room, alternatives)
    accepted = accepted.reshape(tokens, top_k)
    if exempt is not None:
        accepted |= asked & exempt[:, None]
    return Admission(experts, final, accepted, total, groups)


def _service(asked: BoolArray, order: str, scores: FloatArray | None, rng: np.random.Generator | None) -> IntArray:
    """Flat indices of the assignments in the order in which they are served."""
    served = np.flatnonzero(asked)
    if order == "random":
        if rng is None:
            raise ValueError("order 'random' needs rng")
        return rng.permutation(served)
    if order == "score":
        if scores is None:
            raise ValueError("order 'score' needs scores")
        return np.asarray(served[np.argsort(-scores.ravel()[served], kind="stable")])
    return served


def _ranks(queue: IntArray) -> IntArray:
    """How many equal entries stand before each one."""
    counts = np.bincount(queue)
    narrow = queue.astype(np.uint16) if len(counts) <= 2**16 else queue  # numpy sorts 16 bits by radix, much faster
    ranks = np.empty_like(queue)
    ranks[np.argsort(narrow, kind="stable")] = np.arange(len(queue)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks


def _reroute(
    experts: IntArray, accepted: BoolArray, waiting: IntArray, group: IntArray, room: IntArray, liked: FloatArray | None
) -> None:
    """Place the ``waiting`` assignments where there is room; writes ``experts``, ``accepted`` (flat) and ``room``.

    In a round each assignment asks for one expert. Who is refused leaves that expert full, so the rounds end.
    """
    top_k, total = experts.shape[1], room.shape[1]
    tokens, row = np.unique(waiting // top_k, return_inverse=True)
    liking = np.zeros((len(tokens), total)) if liked is None else liked[tokens].astype(np.float64)
    for used in experts[tokens].T:
        liking[used >= 0, used[used >= 0]] = -np.inf
    full = np.zeros_like(room, dtype=bool)
    while len(waiting):
        for number in np.flatnonzero(((room == 0) & ~full).any(-1)):
            liking[np.ix_(group[tokens] == number, room[number] == 0)] = -np.inf
        full = room == 0
        turn, target = _ranks(row), np.full_like(waiting, -1)
        for n in range(turn.max() + 1):  # a token's second assignment asks for its second best expert
            mine = np.flatnonzero(turn == n)
            best = liking[row[mine]].argmax(-1)
            target[mine] = np.where(np.isneginf(liking[row[mine], best]), -1, best)
            liking[row[mine], best] = -np.inf  # in use from now on; if it refuses, full
        waiting, row, target = (array[target >= 0] for array in (waiting, row, target))
        queue = group[waiting // top_k] * total + target
        placed = _ranks(queue) < room.ravel()[queue]
        accepted[waiting[placed]] = True
        experts.ravel()[waiting[placed]] = target[placed]
        room -= np.bincount(queue[placed], minlength=room.size).reshape(room.shape)
        waiting, row = waiting[~placed], row[~placed]
