"""Kernel times of a PyTorch profiler trace by piece of a MoE layer.

``torch.profiler`` (Kineto) exports Chrome trace events. A GPU kernel has a stream and a correlation number; the runtime
call with the same number launched it, on a CPU thread, inside the ranges that ``record_function`` opened there. A
kernel belongs to the innermost such range whose name says what it is (router, permute, experts, ...), else to the piece
that its own name tells; the others are listed as unknown. A trace without GPU kernels is read as the operators of a
CPU, each with the time that is not its children's.

Streams run side by side: busy time is given for each stream, and as a union over all of them.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simulator import errors
from simulator.errors import Origin

KERNELS = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
LAUNCHES = frozenset({"cuda_runtime", "cuda_driver", "hip_runtime", "privateuse1_runtime"})
RANGES = frozenset({"user_annotation"})
UNKNOWN = "other"

PATTERNS: tuple[tuple[str, str], ...] = (
    # The first pattern that is found in the lower-case name of a kernel, operator or range decides.
    ("all_to_all", r"all_?to_?all|alltoall|sendrecv|(^|[^a-z])a2a|deep_?ep|internode|intranode"),
    ("collective", r"nccl|all_?gather|all_?reduce|reduce_?scatter|c10d::|broadcast_kernel|gloo:"),
    ("cast", r"quant|cast|fp8_transpose|convert_type|aten::_to_copy|_scaled_cast|direct_copy|copy_kernel"),
    ("attention", r"flash|fmha|attention|attn|sdpa|mha_|softmax_warp.*causal"),
    ("router", r"router|gate_proj_router|gating|top_?k|sbtopk|gathertopk|radixsort|bitonic|moe_?softmax"),
    ("grouped_gemm", r"group(ed)?_?(gemm|mm)|grouped|moe_gemm|expert|aten::bmm|m_grouped"),
    (
        "permute",
        r"permute|dispatch|combine|scatter|gather|index_(copy|add|select|put)|indexselect|indexfunc|argsort|sort",
    ),
    ("norm", r"norm"),
    ("gemm", r"gemm|cutlass|cublas|sm\d+_xmma|aten::(mm|addmm|linear|matmul)|nvjet|wgmma|mkl_|mkldnn"),
    ("optimizer", r"adam|multi_tensor|fused_?optimizer|foreach"),
    ("activation", r"silu|swiglu|gelu|relu|sigmoid|aten::mul|act_and_mul"),
    ("softmax", r"softmax|cross_entropy|nll_loss"),
    ("memory", r"memcpy|memset|aten::(add|copy_|zero_|fill_|clone|cat|empty)|elementwise|vectorized|catarray|fill"),
)


@dataclass(frozen=True)
class Kernel:
    """One kernel (or CPU operator): when it ran, on which stream, and what it is part of.

    ``seconds`` are its own: an operator has children between its start and its end.
    """

    name: str
    start_s: float
    end_s: float
    seconds: float
    stream: str
    piece: str
    annotation: str | None


@dataclass
class Pieces:
    """A trace by piece: seconds and number of kernels, busy seconds by stream and in union, kernels without a piece."""

    device: str
    pieces: dict[str, tuple[float, int]] = field(default_factory=dict)
    streams: dict[str, float] = field(default_factory=dict)
    union_s: float = 0.0
    span_s: float = 0.0
    unknown: dict[str, float] = field(default_factory=dict)

    @property
    def total_s(self) -> float:
        """Kernel seconds over all streams."""
        return sum(seconds for seconds, _ in self.pieces.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        rows = {name: {"seconds": seconds, "kernels": count} for name, (seconds, count) in self.pieces.items()}
        return {
            "device": self.device,
            "pieces": rows,
            "streams": self.streams,
            "busy_union_s": self.union_s,
            "span_s": self.span_s,
            "unknown": self.unknown,
        }


def read_trace(path: Path) -> Pieces:
    """Pieces of a trace file, plain or gzip.

    Raises:
        InvalidInput: it is not a Chrome trace, or has neither kernels nor operators.
    """
    try:
        packed = path.read_bytes()
        content = json.loads(gzip.decompress(packed) if path.suffix == ".gz" else packed)
    except OSError as error:
        reason = (error.strerror or "not a gzip file").lower()
        raise errors.invalid(f"cannot be read: {reason}", origin=Origin(str(path))) from None
    except (ValueError, EOFError):
        raise errors.invalid("is not JSON", origin=Origin(str(path))) from None
    events = content.get("traceEvents") if isinstance(content, dict) else content
    if not isinstance(events, list):
        raise errors.invalid(
            "has no traceEvents: export it with profiler.export_chrome_trace", origin=Origin(str(path))
        )
    found = pieces([event for event in events if _complete(event)])
    if not found.pieces:
        raise errors.invalid("has neither kernels nor operators", origin=Origin(str(path)))
    return found


def pieces(events: Sequence[Mapping[str, Any]]) -> Pieces:
    """Pieces of the complete events of a trace."""
    kernels = list(_gpu_kernels(events))
    device = "gpu" if kernels else "cpu"
    kernels = kernels or list(_operators(events))
    found = Pieces(device)
    streams: dict[str, list[tuple[float, float]]] = {}
    for kernel in kernels:
        seconds, count = found.pieces.get(kernel.piece, (0.0, 0))
        found.pieces[kernel.piece] = (seconds + kernel.seconds, count + 1)
        streams.setdefault(kernel.stream, []).append((kernel.start_s, kernel.end_s))
        if kernel.piece == UNKNOWN:
            found.unknown[kernel.name] = found.unknown.get(kernel.name, 0.0) + kernel.seconds
    found.pieces = dict(sorted(found.pieces.items(), key=lambda item: -item[1][0]))
    found.unknown = dict(sorted(found.unknown.items(), key=lambda item: -item[1]))
    found.streams = {name: _union(spans) for name, spans in sorted(streams.items())}
    every = [span for spans in streams.values() for span in spans]
    found.union_s = _union(every)
    found.span_s = max((end for _, end in every), default=0.0) - min((start for start, _ in every), default=0.0)
    return found


def piece_of(name: str) -> str | None:
    """The piece that a name tells.

    >>> piece_of("ncclDevKernel_SendRecv(ncclDevComm*)"), piece_of("void flash_fwd_kernel<...>"), piece_of("mystery")
    ('all_to_all', 'attention', None)
    """
    lowered = name.lower()
    return next((piece for piece, pattern in PATTERNS if re.search(pattern, lowered)), None)


def _gpu_kernels(events: Sequence[Mapping[str, Any]]) -> Iterator[Kernel]:
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    ranges = _ranges(events)
    for event in events:
        if event.get("cat") not in KERNELS:
            continue
        arguments = event.get("args", {})
        launch = launches.get(arguments.get("correlation"))
        around = () if launch is None else _around(ranges.get(_thread(launch), ()), launch["ts"])
        yield _kernel(event, event["dur"], f"stream {arguments.get('stream', event.get('tid'))}", around)


def _operators(events: Sequence[Mapping[str, Any]]) -> Iterator[Kernel]:
    """CPU operators with the time that is not their children's."""
    ranges = _ranges(events)
    threads: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "cpu_op":
            threads.setdefault(_thread(event), []).append(event)
    for thread, members in threads.items():
        members.sort(key=lambda event: (event["ts"], -event["dur"]))
        own = {id(event): float(event["dur"]) for event in members}
        open_: list[Mapping[str, Any]] = []
        for event in members:
            while open_ and open_[-1]["ts"] + open_[-1]["dur"] <= event["ts"]:
                open_.pop()
            if open_:
                own[id(open_[-1])] -= event["dur"]
            open_.append(event)
        for event in members:
            if own[id(event)] > 0.0:
                yield _kernel(
                    event, own[id(event)], f"thread {thread[1]}", _around(ranges.get(thread, ()), event["ts"])
                )


def _kernel(event: Mapping[str, Any], micros: float, stream: str, around: Iterable[str]) -> Kernel:
    """A kernel with its piece: by the innermost range that tells one, else by its own name."""
    named = next((name for name in around if piece_of(name) is not None), None)
    piece = piece_of(named or "") or piece_of(event["name"]) or UNKNOWN
    start, end = event["ts"] * 1e-6, (event["ts"] + event["dur"]) * 1e-6
    return Kernel(event["name"], start, end, micros * 1e-6, stream, piece, named)


def _ranges(events: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, Any], list[Mapping[str, Any]]]:
    """Annotated ranges by CPU thread, but not those of the profiler's own steps."""
    found: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for event in events:
        if event.get("cat") in RANGES and not event["name"].startswith("ProfilerStep"):
            found.setdefault(_thread(event), []).append(event)
    return found


def _around(ranges: Iterable[Mapping[str, Any]], moment: float) -> list[str]:
    """Names of the ranges that are open at a moment, innermost first."""
    inside = [each for each in ranges if each["ts"] <= moment <= each["ts"] + each["dur"]]
    return [each["name"] for each in sorted(inside, key=lambda each: each["dur"])]


def _thread(event: Mapping[str, Any]) -> tuple[Any, Any]:
    return event.get("pid"), event.get("tid")


def _complete(event: Any) -> bool:
    """Whether an event is a span with a name, a beginning and a length."""
    return (
        isinstance(event, dict)
        and event.get("ph") == "X"
        and isinstance(event.get("name"), str)
        and all(isinstance(event.get(name), int | float) for name in ("ts", "dur"))
        and isinstance(event.get("args", {}), dict)
    )


def _union(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals.

    >>> _union([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)])
    4.0
    """
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


__all__ = ["Kernel", "Pieces", "piece_of", "pieces", "read_trace"]
