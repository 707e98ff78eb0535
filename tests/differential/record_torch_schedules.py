"""Record the pipeline tables of PyTorch, and of DeepSeek's DualPipe, into ``validation/events/tables``.

Not a test and not needed by one: the recorded tables are committed, and ``test_torch_schedules.py`` compares with them.
Some are kept whole (``torch_schedules.json``); those of every number of ranks from 2 to 16 as digests, one line each
(``torch_digests.csv``). Run this again, in an environment that has torch, only to move to another release::

    python -m venv /tmp/torchenv && /tmp/torchenv/bin/pip install torch==2.13.0 numpy
    /tmp/torchenv/bin/python tests/differential/record_torch_schedules.py --dualpipe .../DualPipe/dualpipe/dualpipe.py

What is kept are the compute actions of every rank, in PyTorch's text form. What is dropped are the entries that are no
work: None (padding for pretty printing), REDUCE_GRAD, UNSHARD and RESHARD.

One table is repaired. ``Schedule1F1B._get_pipeline_order`` of torch 2.13.0 numbers the forwards of the last rank 1 .. M
instead of 0 .. M-1 (the counter starts one too high where a rank has no warm-up); the runtime does not use that table,
and PyTorch's own ``_validate_schedule`` refuses it. Subtracting 1 there gives the order that the runtime executes.

DualPipe is not part of PyTorch. Its table comes from running ``DualPipe.step`` itself, with the methods that compute or
communicate replaced by ones that write down what they were asked for. A zero-bubble backward is written I. The
committed tables come from a transcription of the ordering methods (``step``, ``_forward_chunk``, ``_backward_chunk``,
``_forward_backward_chunk``) of the commit below, made where GitHub could not be reached; the original serves as well.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import logging
import re
import sys
import types
from collections import defaultdict, deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TABLES = Path(__file__).parents[2] / "validation" / "events" / "tables"
FIXTURE, DIGESTS = TABLES / "torch_schedules.json", TABLES / "torch_digests.csv"
DUALPIPE_COMMIT = "bb214e82b5933d4cf4249eb76c27076428061c7c"

# name -> (ranks, microbatches, virtual stages)
CASES: dict[str, list[tuple[int, int, int]]] = {
    "gpipe": [(2, 3, 1), (4, 8, 1), (8, 8, 1), (16, 16, 1)],
    "1f1b": [(2, 2, 1), (4, 8, 1), (4, 11, 1), (8, 8, 1), (8, 20, 1), (16, 32, 1)],
    "interleaved": [
        *((2, 4, 2), (4, 4, 2), (4, 8, 2), (8, 16, 2), (16, 32, 2)),
        *((2, 4, 3), (4, 4, 3), (4, 8, 3), (8, 16, 3), (16, 16, 3)),
    ],
    "zb1p": [(2, 3, 1), (4, 3, 1), (4, 8, 1), (8, 16, 1), (16, 32, 1)],
    "zbv": [(2, 2, 2), (2, 4, 2), (4, 5, 2), (4, 8, 2), (4, 16, 2), (8, 16, 2), (16, 32, 2)],
    "dualpipev": [(2, 4, 2), (2, 7, 2), (4, 8, 2), (4, 13, 2), (8, 16, 2), (8, 20, 2), (16, 32, 2)],
}
DUALPIPE_CASES = [(2, 4), (2, 6), (4, 8), (4, 16), (8, 16), (8, 20), (16, 32), (16, 120)]


def wide_cases() -> dict[str, list[tuple[int, int, int]]]:
    """Every number of ranks from 2 to 16 with a few numbers of microbatches that the original accepts."""
    cases: dict[str, list[tuple[int, int, int]]] = {}
    for name in ("gpipe", "1f1b", "zb1p"):
        odd = 0 if name == "zb1p" else 1  # PyTorch wants M a multiple of M // P there
        cases[name] = [(p, m, 1) for p in range(2, 17) for m in (p, p + 1, 2 * p, 3 * p + odd, 4 * p)]
    cases["interleaved"] = [(p, k * p, v) for p in range(2, 17) for v in (2, 3, 4) for k in (1, 2, 3)]
    cases["zbv"] = [(p, m, 2) for p in range(2, 17) for m in (p, 2 * p - 1, 2 * p, 3 * p + 1, 4 * p)]
    cases["dualpipev"] = [(p, m, 2) for p in range(2, 17) for m in (2 * p, 2 * p + 1, 3 * p + 1, 4 * p)]
    cases["dualpipe"] = [(p, m, 1) for p in range(2, 17, 2) for m in (2 * p, 2 * p + 2, 3 * p, 4 * p)]
    return cases


def digest(table: list[list[str]]) -> str:
    """Return 16 hexadecimal digits for the actions of all ranks, one line per rank."""
    text = "\n".join(" ".join(actions) for actions in table)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def torch_table(name: str, ranks: int, microbatches: int, virtual_stages: int) -> list[list[str]]:
    """Return PyTorch's actions of every rank. No process group is needed: a stub stands in for each stage."""
    from torch.distributed.pipelining import schedules

    def stub(index: int) -> Any:
        count = ranks * virtual_stages
        return SimpleNamespace(
            stage_index=index, num_stages=count, group_size=ranks, group_rank=0, is_first=index == 0,
            is_last=index == count - 1, submod=None, device="cpu", has_backward=True,
        )  # fmt: skip

    def loss(*_: object) -> None: ...

    if name in ("gpipe", "1f1b"):
        single = {"gpipe": schedules.ScheduleGPipe, "1f1b": schedules.Schedule1F1B}[name]
        order = single(stub(0), microbatches, loss_fn=loss)._get_pipeline_order()
    else:
        multi = {
            "interleaved": schedules.ScheduleInterleaved1F1B,
            "zb1p": schedules.ScheduleInterleavedZeroBubble,
            "zbv": schedules.ScheduleZBVZeroBubble,
            "dualpipev": schedules.ScheduleDualPipeV,
        }[name]
        v_shape = name in ("zbv", "dualpipev")
        held = [0, 2 * ranks - 1] if v_shape else range(0, ranks * virtual_stages, ranks)
        order = multi([stub(index) for index in held], microbatches, loss_fn=loss).pipeline_order
    no_work = re.compile("REDUCE_GRAD|UNSHARD|RESHARD")
    table = [[str(a) for a in order[rank] if a is not None and not no_work.search(str(a))] for rank in range(ranks)]
    if name == "1f1b":
        table[-1] = [re.sub(r"F(\d+)", lambda found: f"F{int(found[1]) - 1}", action) for action in table[-1]]
    return table


def load_dualpipe(file: Path) -> Any:
    """Import DeepSeek's module alone; its two helper modules do communication only, so empty ones will do."""
    for name in ("dualpipe", "dualpipe.comm", "dualpipe.utils"):
        sys.modules[name] = types.ModuleType(name)
    comm: Any = sys.modules["dualpipe.comm"]
    utils: Any = sys.modules["dualpipe.utils"]
    comm.TENSOR_SHAPES = comm.TENSOR_DTYPE = ()
    sys.modules["dualpipe"].comm = comm  # type: ignore[attr-defined]
    utils.run_backward = utils.gather = None
    utils.scatter = lambda *_: []
    utils.WeightGradStore = SimpleNamespace(funcs_queue=SimpleNamespace(empty=lambda: True))
    spec = importlib.util.spec_from_file_location("dualpipe.dualpipe", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DualPipe


def dualpipe_table(dualpipe: Any, ranks: int, microbatches: int) -> list[list[str]]:
    """Return the actions of every rank that ``DualPipe.step`` asks for."""
    return [_dualpipe_rank(dualpipe, rank, ranks, microbatches) for rank in range(ranks)]


def _dualpipe_rank(dualpipe: Any, rank: int, ranks: int, microbatches: int) -> list[str]:
    import torch

    written: list[str] = []
    weights: deque[str] = deque()
    count: defaultdict[tuple[str, int], int] = defaultdict(int)

    def action(kind: str, phase: int) -> str:
        # Direction 0 enters at rank 0, direction 1 at the last rank; "phase" counts from the rank's own side.
        direction = phase ^ (rank >= ranks // 2)
        number = count["F" if kind == "F" else "B", direction]
        count["F" if kind == "F" else "B", direction] += 1
        return f"{ranks - 1 - rank if direction else rank}{kind}{number + direction * microbatches // 2}"

    class Recorder(dualpipe):  # type: ignore[misc]
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.rank, self.num_ranks = rank, ranks
            self.is_first_rank, self.is_last_rank = rank == 0, rank == ranks - 1
            self.is_in_second_half = rank >= ranks // 2
            self.is_middle_rank = rank in (ranks // 2 - 1, ranks // 2)
            self.batch_dim = 0

        def _reset_states(self) -> None:
            self.loss_chunks = [torch.zeros(())]

        def _nothing(self, *_: object) -> None: ...

        _recv_forward = _send_forward = _recv_backward = _send_backward = _commit_and_wait_comm = _nothing

        def _forward_compute_chunk(self, phase: int) -> None:
            written.append(action("F", phase))

        def _backward_compute_chunk(self, phase: int, enable_zb: bool = False) -> None:
            written.append(action("I" if enable_zb else "B", phase))
            if enable_zb:
                weights.append(written[-1].replace("I", "W"))

        def _forward_backward_compute_chunk(self, phase0: int, phase1: int) -> None:
            written.append(f"({action('F', phase0)};{action('B', phase1)})OVERLAP_F_B")

        def _weight_chunk(self) -> None:
            written.append(weights.popleft())

    Recorder().step(num_chunks=microbatches, criterion=lambda *_: None)
    assert not weights
    return written


def main() -> None:
    """Write the fixture."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dualpipe", type=Path, required=True, help="dualpipe.py of github.com/deepseek-ai/DualPipe")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)

    def case(name: str, ranks: int, microbatches: int, virtual_stages: int, table: list[list[str]]) -> dict[str, Any]:
        return {
            "name": name,
            "ranks": ranks,
            "microbatches": microbatches,
            "virtual_stages": virtual_stages,
            "steps": [" ".join(actions) for actions in table],
        }

    cases = [case(name, *sizes, torch_table(name, *sizes)) for name, all_sizes in CASES.items() for sizes in all_sizes]
    dualpipe = load_dualpipe(arguments.dualpipe)
    cases += [case("dualpipe", *sizes, 1, dualpipe_table(dualpipe, *sizes)) for sizes in DUALPIPE_CASES]
    fixture = {
        "about": "Compute actions per rank, recorded by record_torch_schedules.py; the forwards of the last rank of "
        "1f1b are renumbered from 1..M to 0..M-1 (off by one in torch).",
        "torch": str(torch.__version__),
        "dualpipe": f"github.com/deepseek-ai/DualPipe {DUALPIPE_COMMIT}: DualPipe.step (transcribed)",
        "cases": cases,
    }
    FIXTURE.write_text(json.dumps(fixture, indent=1) + "\n", encoding="utf-8")
    lines = ["name,ranks,microbatches,virtual_stages,digest"]
    for name, all_sizes in wide_cases().items():
        for sizes in all_sizes:
            table = dualpipe_table(dualpipe, *sizes[:2]) if name == "dualpipe" else torch_table(name, *sizes)
            lines.append(",".join(map(str, (name, *sizes, digest(table)))))
    DIGESTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{DIGESTS}: {len(lines) - 1} digests, {DIGESTS.stat().st_size} bytes")
    print(f"{FIXTURE}: {len(cases)} tables, {FIXTURE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
