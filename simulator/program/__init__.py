"""Ops, streams, links and dependencies of one training step."""

from simulator.program.build import build, schedule_of
from simulator.program.structure import (
    COMPUTE,
    CONTEXT,
    EXPERT,
    EXPOSED,
    GRADIENT,
    PARAMETER,
    PIPELINE,
    REPLICAS,
    STREAMS,
    TENSOR,
    Draft,
    Program,
)

__all__ = [
    "COMPUTE",
    "CONTEXT",
    "EXPERT",
    "EXPOSED",
    "GRADIENT",
    "PARAMETER",
    "PIPELINE",
    "REPLICAS",
    "STREAMS",
    "TENSOR",
    "Draft",
    "Program",
    "build",
    "schedule_of",
]
