"""Pipeline schedules as data: what every rank does, in which order, without times.

``build`` makes a schedule by its scenario name, ``read`` takes one from a file, ``of`` does what a scenario asks for.
The lists are compared action for action with PyTorch's in ``tests/differential``; ``check`` proves that a list is
complete and free of deadlock; ``in_flight`` counts the activations that it holds.

==============  ======================  ==================  ===========================  ==========================
name            chunks per rank         domain              bubble (makespan)            peak activations (chunks)
==============  ======================  ==================  ===========================  ==========================
gpipe           1                       P, M >= 1           (P-1)(F+B)                   M
1f1b            1                       P, M >= 1           (P-1)(F+B)                   min(P-r, M)
interleaved     v                       M multiple of P     (P-1)(F+B) of a chunk        min(vM, 2(P-1-r)+(v-1)P+1)
zb1p            1                       P, M >= 1           (P-1)(F+I-W)                 min(P, M)
zbh2            1                       P, M >= 1           (P-1)F when F=I=W            min(2P-1, M)
zbv             2, in a V               P, M >= 1           (P-1)F when F=I=W            min(2P, 2M, M+1+r)
dualpipe        2, both directions      P, M even, M >= 2P  (P/2-1)(F&B+B-3W) when       P+1
                                                            F=I=W
dualpipev       2, in a V               M >= 2P             (P-1)(F&B+B-3W) when F=I=W   2P+1
==============  ======================  ==================  ===========================  ==========================
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MappingProxyType

from simulator import errors
from simulator.schedules.actions import (
    Action,
    Kind,
    Overlapped,
    Schedule,
    Step,
    in_flight,
    in_flight_by_stage,
    parts,
)
from simulator.schedules.dualpipe import dualpipe, dualpipev
from simulator.schedules.files import read
from simulator.schedules.gpipe_1f1b import gpipe, one_f_one_b
from simulator.schedules.interleaved import interleaved
from simulator.schedules.laws import check
from simulator.schedules.writing import require
from simulator.schedules.zero_bubble import zb1p, zbh2, zbv
from simulator.spec.parallelism import Parallelism, ScheduleFile

__all__ = [
    "SCHEDULES",
    "Action",
    "Kind",
    "Overlapped",
    "Schedule",
    "Step",
    "build",
    "check",
    "dualpipe",
    "dualpipev",
    "gpipe",
    "in_flight",
    "in_flight_by_stage",
    "interleaved",
    "of",
    "one_f_one_b",
    "parts",
    "read",
    "zb1p",
    "zbh2",
    "zbv",
]

_ONE_CHUNK: MappingProxyType[str, Callable[[int, int], Schedule]] = MappingProxyType(
    {"gpipe": gpipe, "1f1b": one_f_one_b, "zb1p": zb1p, "zbh2": zbh2, "dualpipe": dualpipe}
)
_TWO_CHUNKS: MappingProxyType[str, Callable[[int, int], Schedule]] = MappingProxyType(
    {"zbv": zbv, "dualpipev": dualpipev}
)

SCHEDULES: tuple[str, ...] = ("gpipe", "1f1b", "interleaved", "zb1p", "zbh2", "zbv", "dualpipe", "dualpipev")
"""Names that ``build`` knows."""


@functools.lru_cache(maxsize=128)
def build(name: str, ranks: int, microbatches: int, virtual_stages: int = 1) -> Schedule:
    """Return the schedule of that name for P ranks, M microbatches and v chunks per rank. Cached.

    ``virtual_stages`` is the v of ``interleaved``. ZB-V and DualPipeV have two chunks per rank by construction and take
    1 (the default) or 2; all others take 1 only.

    Raises:
        InvalidInput: the name is unknown, or P, M, v lie outside the schedule's domain.

    >>> " ".join(map(str, build("1f1b", ranks=4, microbatches=8).steps[3][:4]))
    '3F0 3B0 3F1 3B1'
    """
    if name == "interleaved":
        return interleaved(ranks, microbatches, virtual_stages)
    if name in _TWO_CHUNKS:
        require(virtual_stages in (1, 2), f"{name} has 2 chunks per rank; got virtual_stages {virtual_stages}")
        return _TWO_CHUNKS[name](ranks, microbatches)
    require(name in _ONE_CHUNK, errors.one_of(name, SCHEDULES, "schedule"))
    require(virtual_stages == 1, f"{name} has no virtual stages; got virtual_stages {virtual_stages}")
    return _ONE_CHUNK[name](ranks, microbatches)


def of(split: Parallelism, microbatches: int) -> Schedule:
    """Return the schedule that a scenario asks for, by name or by file.

    Raises:
        InvalidInput: as :func:`build` and :func:`read`.
    """
    if isinstance(split.schedule, ScheduleFile):
        return read(split.schedule.file, split.pipeline, microbatches, split.virtual_stages)
    return build(split.schedule, split.pipeline, microbatches, split.virtual_stages)
