"""A Program played: with SimPy, or as a max-plus recursion without events; and what can be read from the result."""

from simulator.events.actions import ACTIONS, action_ledger, bubbles, by_action, spans
from simulator.events.batch import evaluate_batch
from simulator.events.critical_path import NO_SLACK, CriticalPath, critical_path, slack
from simulator.events.every_rank import play_every_rank
from simulator.events.faults import slowness, with_faults
from simulator.events.jitter import with_jitter
from simulator.events.machine import play
from simulator.events.max_plus import evaluate
from simulator.events.memory_over_time import MemoryCurve, memory_over_time
from simulator.events.timeline import BUBBLE, WAITING, Timeline

__all__ = [
    "ACTIONS",
    "BUBBLE",
    "NO_SLACK",
    "WAITING",
    "CriticalPath",
    "MemoryCurve",
    "Timeline",
    "action_ledger",
    "bubbles",
    "by_action",
    "critical_path",
    "evaluate",
    "evaluate_batch",
    "memory_over_time",
    "play",
    "play_every_rank",
    "slack",
    "slowness",
    "spans",
    "with_faults",
    "with_jitter",
]
