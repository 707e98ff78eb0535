"""Many scenarios: variants, sweeps, comparisons."""

from simulator.study.balancing import LoadRow, load_over_steps
from simulator.study.studies import compare, sweep, variants
from simulator.study.variants import BASE, Point, Row, brief, difference, points

__all__ = [
    "BASE", "LoadRow", "Point", "Row", "brief", "compare", "difference", "load_over_steps", "points", "sweep",
    "variants",
]  # fmt: skip
