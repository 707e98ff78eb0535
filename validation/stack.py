"""The stack term: what whole runs take beyond their kernels, for each profile and software stack.

Kernel curves are measured on a chip that does nothing else. Training adds launch gaps, synchronisation, copies that no
op list has, and the lower clock of a hot chip: a share of compute time, the stack's ``gap_fraction``. And where Python
issues the kernels one by one, small kernels wait for it: ``issue`` seconds for each op. These two are the only numbers
that are ever estimated from whole runs.

They minimise the mean absolute log error over the layouts that share a stack, and a layout is always judged with the
numbers of the *others*, so that nothing is judged on what it was fitted on. How a step answers to them is told by the
max-plus reader at a few values (:class:`Response`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simulator.campaign import Step
from simulator.events import evaluate
from simulator.timing import Pricer
from validation.long_steps import Played, shortened

FloatArray = npt.NDArray[np.float64]
LEAST_LAYOUTS = 2
"""Other layouts that a fit needs; with fewer, the numbers of the profile stand."""

USUAL_ISSUE_S, WORTH = 100e-6, 0.15
"""Issue of one op of the op list where kernels are too long to tell; what another time has to gain.

It is the time of Megatron-DeepSpeed's 98 layouts (vTrain), most of them short enough to tell: 9 % off at 100 us, 12 %
at 80, 14 % at 120, 31 % at 20. It belongs to the host and its Python, not to the chip.
"""
MIDDLE = (0.25, 0.75)
"""Shares of the other layouts' own gaps between which a stack's spread lies."""

GAPS = (0.0, 0.4)
ISSUES_S = (0.0, 40e-6, 100e-6, 200e-6)
"""Values at which the response of a step is told; between them it is linear, beyond the gaps too."""

_TRIED_GAPS = np.linspace(-0.05, 1.2, 126)
_TRIED_ISSUES_S = np.linspace(0.0, 200e-6, 21)


@dataclass(frozen=True)
class StackTerm:
    """The two numbers of a stack; ``issue_s`` None where nothing is issued op by op."""

    gap: float
    issue_s: float | None


Spread = tuple[StackTerm, StackTerm]
"""Lower and upper numbers of a stack."""


@dataclass(frozen=True)
class Response:
    """Step time over that of the prediction, by gap and issue [gaps, issues]; one column where issue has no effect."""

    table: FloatArray

    def factor(self, term: StackTerm) -> float:
        """The factor at one pair of numbers."""
        return float(self.factors(np.array([term.gap]), np.array([term.issue_s or 0.0]))[0, 0])

    def factors(self, gaps: FloatArray, issues_s: FloatArray) -> FloatArray:
        """Factors on a grid [gaps, issues]."""
        rows = [
            np.interp(issues_s, ISSUES_S, row) if len(row) > 1 else np.full(len(issues_s), row[0]) for row in self.table
        ]
        slope = (rows[1] - rows[0]) / (GAPS[1] - GAPS[0])
        found: FloatArray = np.maximum(rows[0] + slope * (gaps[:, None] - GAPS[0]), 1e-3)
        return found


def response(step: Played) -> Response:
    """How a step answers to the numbers of its stack, by the max-plus reader of the same Program.

    A factor hardly depends on the loads that were drawn: it is told by short steps also where loads differ.
    """
    step = (shortened(step.scenario, "max-plus") if len(step.parts) == 1 else None) or step
    pricers = {id(part): Pricer(part.scenario, part.layout, part.load) for _, part in step.parts}
    stack = step.scenario.cluster.profile.stacks[step.scenario.cluster.stack_name]
    of_profile = stack.gap_fraction.value, 0.0 if stack.issue is None else stack.issue.value

    def seconds(gap: float, issue_s: float) -> float:
        def of_part(part: Step) -> float:
            pricer = pricers[id(part)]
            pricer.gap, pricer.issue = gap, issue_s
            return evaluate(part.program, pricer.price(part.program.classes).slowest()).step_s

        return step.total(of_part)

    base = seconds(*of_profile)
    first = [seconds(GAPS[0], 0.0)]
    if stack.issue is not None and (most := seconds(GAPS[0], ISSUES_S[-1])) > 1.005 * first[0]:
        first += [seconds(GAPS[0], issue_s) for issue_s in ISSUES_S[1:-1]] + [most]
    # Idle time between kernels and the wait for the host do not add up: the longer of the two counts.
    longer = seconds(GAPS[1], 0.0)
    return Response(np.array([first, [max(longer, each) for each in first]]) / base)


@dataclass(frozen=True)
class Observation:
    """One run: log of its predicted over its measured step time under the profile's numbers, and its response."""

    stack: str
    layout: str
    log_error: float
    response: Response


def fitted(observations: Sequence[Observation], *, issues: bool) -> StackTerm | None:
    """The numbers that fit some runs best, layouts weighing equally; None if there are too few layouts."""
    by_layout: dict[str, list[FloatArray]] = defaultdict(list)
    tried = _TRIED_ISSUES_S if issues else np.zeros(1)
    for each in observations:
        by_layout[each.layout].append(_misses(each, tried))
    if len(by_layout) < LEAST_LAYOUTS:
        return None
    return _best(np.array([np.mean(rows, axis=0) for rows in by_layout.values()]).mean(axis=0), tried, issues=issues)


def of_the_others(observations: Sequence[Observation], *, issues: bool) -> Mapping[str, StackTerm | None]:
    """For every layout of one stack, the numbers that all other layouts give."""
    tried = _TRIED_ISSUES_S if issues else np.zeros(1)
    by_layout: dict[str, list[FloatArray]] = defaultdict(list)
    for each in observations:
        by_layout[each.layout].append(_misses(each, tried))
    means = {layout: np.mean(rows, axis=0) for layout, rows in by_layout.items()}
    if len(means) <= LEAST_LAYOUTS:
        return dict.fromkeys(means)
    total = np.sum(list(means.values()), axis=0)
    return {layout: _best(total - mean, tried, issues=issues) for layout, mean in means.items()}


def spread_of_the_others(observations: Sequence[Observation], *, issues: bool) -> Mapping[str, Spread | None]:
    """For every layout of one stack, how far the gaps lie apart that the other layouts would have each on its own.

    What an incomplete source leaves out of its software (release, options, tuning) is within this spread: the middle
    half of the other layouts' own gaps, at the issue time that fits all of them.
    """
    terms = of_the_others(observations, issues=issues)
    by_layout: dict[str, list[Observation]] = defaultdict(list)
    for each in observations:
        by_layout[each.layout].append(each)
    found: dict[str, Spread | None] = {}
    for layout, term in terms.items():
        if term is None:
            found[layout] = None
            continue
        own = [own_gap(some, term.issue_s) for other, some in by_layout.items() if other != layout]
        low, high = np.quantile(own, MIDDLE)
        found[layout] = StackTerm(min(low, term.gap), term.issue_s), StackTerm(max(high, term.gap), term.issue_s)
    return found


def own_gap(observations: Sequence[Observation], issue_s: float | None) -> float:
    """The gap at which the mean log error of some runs is nearest to zero."""
    at = np.array([issue_s or 0.0])
    signed = [each.log_error + np.log(each.response.factors(_TRIED_GAPS, at)[:, 0]) for each in observations]
    return float(_TRIED_GAPS[int(np.abs(np.mean(signed, axis=0)).argmin())])


def _misses(each: Observation, issues_s: FloatArray) -> FloatArray:
    """Absolute log error on the grid of what is tried [gaps, issues]."""
    return np.abs(each.log_error + np.log(each.response.factors(_TRIED_GAPS, issues_s)))


def _best(misses: FloatArray, issues_s: FloatArray, *, issues: bool) -> StackTerm:
    """The pair of least misses; the usual issue time unless another is better by more than WORTH."""
    gap, issue = np.unravel_index(int(misses.argmin()), misses.shape)
    usual = int(np.abs(issues_s - USUAL_ISSUE_S).argmin())
    if misses[gap, issue] > (1.0 - WORTH) * misses[:, usual].min():
        gap, issue = misses[:, usual].argmin(), np.intp(usual)
    return StackTerm(float(_TRIED_GAPS[gap]), float(issues_s[issue]) if issues else None)


__all__ = [
    "GAPS",
    "ISSUES_S",
    "LEAST_LAYOUTS",
    "Observation",
    "Response",
    "Spread",
    "StackTerm",
    "fitted",
    "of_the_others",
    "own_gap",
    "response",
    "spread_of_the_others",
]
