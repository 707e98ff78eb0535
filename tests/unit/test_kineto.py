"""Profiler traces by piece of a MoE layer: a made-up GPU trace counted by hand, and a real one of this CPU."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from validation.kineto import piece_of, pieces, read_trace

Run = Callable[..., tuple[int, str, str]]


def span(name: str, category: str, start: float, length: float, tid: object = 1, **arguments: object) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": start,
        "dur": length,
        "pid": 1,
        "tid": tid,
        "args": arguments,
    }


def launched(name: str, number: int, at: float, start: float, length: float, stream: int) -> list[dict[str, Any]]:
    """A kernel, and the runtime call that launched it."""
    return [
        span("cudaLaunchKernel", "cuda_runtime", at, 2.0, correlation=number),
        span(name, "kernel", start, length, stream, correlation=number, stream=stream),
    ]


TRACE = [
    span("ProfilerStep#3", "user_annotation", 0.0, 1000.0),
    span("layer 0", "user_annotation", 0.0, 500.0),
    span("moe.router", "user_annotation", 10.0, 30.0),
    *launched("void gemm_fp32_128x64", 1, 12.0, 100.0, 10.0, 7),  # in the router's range: the router's product
    *launched("void at::native::sbtopk::gatherTopK", 2, 50.0, 110.0, 5.0, 7),
    *launched("_permute_kernel", 3, 60.0, 115.0, 20.0, 7),
    *launched("ncclDevKernel_SendRecv(ncclDevComm*)", 4, 70.0, 120.0, 100.0, 20),  # beside compute
    *launched("sm90_fp8_grouped_gemm_nt", 5, 80.0, 140.0, 60.0, 7),
    *launched("flash_fwd_kernel", 6, 90.0, 200.0, 40.0, 7),
    *launched("triton_mystery_0", 7, 95.0, 240.0, 3.0, 7),
    *launched("triton_mystery_0", 8, 97.0, 250.0, 4.0, 7),
]


def test_kernels_go_to_their_pieces_and_streams_overlap() -> None:
    found = pieces(TRACE)
    assert found.device == "gpu"
    assert {name: (round(seconds * 1e6), count) for name, (seconds, count) in found.pieces.items()} == {
        "all_to_all": (100, 1),
        "grouped_gemm": (60, 1),
        "attention": (40, 1),
        "permute": (20, 1),
        "router": (15, 2),
        "other": (7, 2),
    }
    assert {name: round(seconds * 1e6) for name, seconds in found.streams.items()} == {
        "stream 20": 100,
        "stream 7": 142,
    }
    assert found.union_s == pytest.approx(147e-6)  # 100 to 243 and 250 to 254
    assert found.span_s == pytest.approx(154e-6)
    assert found.total_s == pytest.approx(242e-6)
    assert {name: round(seconds * 1e6) for name, seconds in found.unknown.items()} == {"triton_mystery_0": 7}


@pytest.mark.parametrize(
    ("name", "piece"),
    [
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NNT", "gemm"),
        ("void deep_ep::internode::dispatch<...>", "all_to_all"),
        ("ncclDevKernel_AllGather_RING_LL", "collective"),
        ("_per_block_cast_to_fp8", "cast"),
        ("void rms_norm_kernel", "norm"),
        ("void multi_tensor_apply_kernel<FusedAdam>", "optimizer"),
        ("triton_mystery_0", None),
    ],
)
def test_names_tell_pieces(name: str, piece: str | None) -> None:
    assert piece_of(name) == piece


def test_operators_count_without_their_children() -> None:
    found = pieces(
        [
            span("experts", "user_annotation", 0.0, 100.0),
            span("aten::linear", "cpu_op", 10.0, 50.0),
            span("aten::addmm", "cpu_op", 12.0, 45.0),  # inside the linear
            span("aten::topk", "cpu_op", 200.0, 30.0),
        ]
    )
    assert found.device == "cpu"
    seconds = {name: round(each * 1e6) for name, (each, _) in found.pieces.items()}
    assert seconds == {"grouped_gemm": 50, "router": 30}
    assert found.union_s == pytest.approx(80e-6)


def test_a_real_profile_of_the_reference_layer_is_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from simulator.spec.model import MixtureOfExperts
    from validation.moe_layer import LayerShape, MoELayer

    moe = MixtureOfExperts(experts=8, top_k=2, expert_ffn_size=64)
    layer, x = MoELayer(LayerShape(32, moe, 1.25, form="padded")), torch.randn(256, 32)
    layer(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with torch.profiler.record_function("moe.router"):
            layer.route(layer.router_logits(x))
        layer(x)
    path = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(path))

    found = read_trace(path)

    assert found.device == "cpu"
    assert {"router", "grouped_gemm", "permute"} <= set(found.pieces)
    assert found.total_s == pytest.approx(sum(found.streams.values()), rel=0.2)
    assert 0.0 < found.union_s <= found.span_s


def test_the_command_line_prints_the_table_and_json(moesim: Run, tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": TRACE}).encode()))
    code, output, _ = moesim("calibrate", "--import-trace", str(path), "--json")
    assert code == 0
    assert json.loads(output)["pieces"]["all_to_all"] == {"seconds": pytest.approx(1e-4), "kernels": 1}
    code, output, _ = moesim("calibrate", "--import-trace", str(path))
    assert code == 0
    assert "triton_mystery_0" in output
    assert "all-to-all" in output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "is not JSON"),
        ('{"events": []}', "has no traceEvents"),
        ('{"traceEvents": []}', "has neither kernels nor operators"),
    ],
)
def test_what_is_no_trace_is_refused(moesim: Run, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    code, output, errors = moesim("calibrate", "--import-trace", str(path))
    assert (code, output) == (2, "")
    assert errors.startswith(f"{path}: {message}")
