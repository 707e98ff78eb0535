"""Times the cases of a suite on this machine and appends each to a file as soon as it is finished.

    python -m validation.measure --suite quick --out measured.jsonl --passes 2

A CPU is timed on one thread, by the clock, without garbage collection; a GPU by events. Every case is warmed up, then
repeated. The reference kernel, a fixed product, runs right before and after it; on a GPU before each repeat, which also
gives the processor a lead, so that launching is timed only where the GPU waits for it.

A pass measures every case once, and the passes follow each other, so that two measurements of a case lie minutes apart.
Cases that the file already has are left out: an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from time import monotonic, perf_counter

import torch

from simulator.errors import InvalidInput, NotSimulated, invalid
from validation import distributed, records, steadiness
from validation.cases import Case
from validation.records import Environment, Record
from validation.suites import ALLOCATOR, Effort, Suite, suite
from validation.torch_cold import Work
from validation.torch_pieces import reference, work

Timing = tuple[str, list[float], float]
"""Key of a case, seconds of its repeats, seconds of the reference kernel beside it."""
PROGRESS_S = 5.0
GPU_MEMORY_SHARE = 0.9


class LimitReached(Exception):  # noqa: N818
    """The time that a run was given is over."""


@dataclass
class Run:
    """One run over a suite: where the records go, and until when."""

    suite: Suite
    out: Path
    passes: int
    limit_s: float | None = None

    def __post_init__(self) -> None:
        self.device = torch.device(self.suite.device)
        self.end_s = None if self.limit_s is None else monotonic() + self.limit_s
        self.skipped: dict[str, str] = {}

    def __call__(self) -> None:
        """Measure what is missing.

        Raises:
            InvalidInput: the file cannot be continued.
            LimitReached: in the middle; all that was finished is in the file.
        """
        torch.set_num_threads(1 if self.device.type == "cpu" else torch.get_num_threads())
        if self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(GPU_MEMORY_SHARE)
        found = records.resume(self.out, environment(self.device))
        for number in range(1, self.passes + 1):
            finished = records.finished_keys(found.records, number)
            cases = [case for case in self.suite.cases() if case.key not in finished]
            self._pass(number, cases, found.environment.id)
        for kind, noise in steadiness.noise(records.read(self.out).records).items():
            say(
                f"{kind}: {noise.cases} cases, second pass off by {noise.mape:.1%} on average, "
                f"{noise.median:.1%} in the median, {noise.maximum:.1%} at most"
            )

    def _pass(self, number: int, cases: Sequence[Case], environment_id: str) -> None:
        by_key = {case.key: case for case in cases}
        shown_s, name = monotonic(), f"pass {number} of {self.passes}"
        with closing(self._timings(by_key)) as timings:
            for done, (key, seconds, reference_s) in enumerate(timings, 1):
                records.append(self.out, record(by_key[key], number, environment_id, seconds, reference_s))
                if monotonic() - shown_s > PROGRESS_S or done == len(cases):
                    shown_s = monotonic()
                    say(f"{name}: {done} of {len(cases)} cases, {key.split('/')[0]} {min(seconds) * 1e3:.3f} ms")

    def _timings(self, cases: dict[str, Case]) -> Generator[Timing]:
        beside = reference(self.device)
        for case in self.suite.alone():
            if case.key in cases:
                self._check_time()
                yield from self._alone(case, beside)
        for ranks, every in self.suite.distributed.items():
            if wanted := [case for case in every if case.key in cases]:
                self._check_time()
                with closing(distributed.timings(wanted, ranks, self.suite.effort_together)) as timings:
                    for timing in timings:
                        yield timing
                        self._check_time()

    def _alone(self, case: Case, beside: Work) -> Generator[Timing]:
        """The timing of one case; none where this device cannot run it."""
        try:
            yield (case.key, *timed(work(case, self.device), beside, self.suite.effort, self.device))
        except (NotSimulated, torch.OutOfMemoryError) as error:
            self._skip(case, error)
        except RuntimeError as error:
            if self.device.type == "cpu":
                raise
            self._skip(case, error)  # a kernel that this GPU or this PyTorch does not have
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _skip(self, case: Case, error: Exception) -> None:
        self.skipped[case.key] = str(error).splitlines()[0]
        say(f"left out {case.key}: {self.skipped[case.key]}")

    def _check_time(self) -> None:
        if self.end_s is not None and monotonic() > self.end_s:
            raise LimitReached


def timed(run: Work, beside: Work, effort: Effort, device: torch.device) -> tuple[list[float], float]:
    """Seconds of the repeats, and of the reference kernel around them."""
    return _timed_cuda(run, beside, effort) if device.type == "cuda" else _timed_cpu(run, beside, effort)


def _timed_cpu(run: Work, beside: Work, effort: Effort) -> tuple[list[float], float]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        if _clocked(run) < effort.patience_s:
            run()
        before = min(_clocked(beside) for _ in range(2))
        samples: list[float] = []
        while not effort.enough(samples):
            samples.append(_clocked(run))
        after = min(_clocked(beside) for _ in range(2))
    finally:
        if enabled:
            gc.enable()
    return samples, (before + after) / 2


def _clocked(run: Work) -> float:
    before = perf_counter()
    run()
    return perf_counter() - before


def _timed_cuda(run: Work, beside: Work, effort: Effort) -> tuple[list[float], float]:
    for _ in range(2):
        run()
    samples: list[float] = []
    around: list[float] = []
    while not effort.enough(samples):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        events[0].record()
        beside()
        events[1].record()
        run()
        events[2].record()
        events[2].synchronize()
        around.append(events[0].elapsed_time(events[1]) * 1e-3)
        samples.append(events[1].elapsed_time(events[2]) * 1e-3)
    return samples, median(around)


def record(case: Case, number: int, environment_id: str, seconds: Sequence[float], reference_s: float) -> Record:
    """What is kept of the repeats of a case."""
    lower, middle, upper = quantiles(seconds, method="inclusive")
    return Record(
        key=case.key,
        kind=case.kind,
        number=number,
        environment=environment_id,
        case=dict(case.fields),
        seconds=min(seconds),
        median_s=middle,
        spread=(upper - lower) / middle,
        repeats=len(seconds),
        reference_s=reference_s,
    )


def environment(device: torch.device) -> Environment:
    """This machine, and how steady its reference kernel is over half a second."""
    beside = reference(device)
    samples, _ = timed(beside, beside, Effort(0.5, 20, 5.0), device)
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else _processor()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    threads, memory_bytes = torch.get_num_threads(), torch.cuda.mem_get_info(device)[1] if cuda else pages
    cores = os.cpu_count() or 1
    fingerprint = "/".join(
        map(str, (name, device.type, threads, torch.__version__, platform.python_version(), cores, memory_bytes))
    )
    return Environment(
        id=hashlib.sha256(fingerprint.encode()).hexdigest()[:12],
        device=name,
        kind=device.type,
        threads=threads,
        torch=torch.__version__,
        python=platform.python_version(),
        date=datetime.now(UTC).date().isoformat(),
        cores=cores,
        memory_bytes=memory_bytes,
        driver=_driver() if cuda else None,
        noise_floor=median(samples) / min(samples) - 1.0,
    )


def _processor() -> str:
    """Name of the processor as Linux states it, or what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str:
    """Versions of the driver, where it can be asked, and of CUDA."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        answer = []
    return ", ".join([*(f"driver {version}" for version in answer[:1]), f"CUDA {torch.version.cuda}"])


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 0 when done or when the time is over, 2 for an input that cannot be used, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m validation.measure", description="Time a suite on this machine.")
    parser.add_argument("--suite", choices=("quick", "full", "recorded", "gpu"), default="quick")
    parser.add_argument("--out", type=Path, required=True, help="file of records, continued if it exists")
    parser.add_argument("--passes", type=int, default=2, help="separated passes over the suite")
    parser.add_argument("--limit-s", type=float, help="stop after so many seconds")
    given = parser.parse_args(arguments)
    try:
        if given.passes < 1 or (given.limit_s is not None and given.limit_s <= 0):
            raise invalid("--passes must be 1 or more, and --limit-s above 0")
        if given.suite == "gpu" and not torch.cuda.is_available():
            raise invalid("the gpu suite needs a CUDA device, and PyTorch finds none; use quick or full")
        run = Run(suite(given.suite, devices=torch.cuda.device_count()), given.out, given.passes, given.limit_s)
        run()
    except InvalidInput as error:
        say(str(error))
        return 2
    except LimitReached:
        say(f"the {given.limit_s:g} s are over; the same command measures the rest")
    except KeyboardInterrupt:
        say("interrupted; the same command measures the rest")
        return 130
    return 0


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):  # glibc reads them at the start only
        os.execve(sys.executable, [sys.executable, "-m", "validation.measure", *sys.argv[1:]], os.environ | ALLOCATOR)
    sys.exit(main())
