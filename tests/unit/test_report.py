"""Reports say what the estimate says: the same sums, nothing lost, nothing fetched, nothing unescaped."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from simulator import InvalidInput, estimate, load_scenario
from simulator.campaign import TrainingEstimate
from simulator.events import critical_path
from simulator.program import COMPUTE, EXPERT
from simulator.report import figures, protobuf
from simulator.report.balancing import over_steps_figure
from simulator.report.explanation import explained
from simulator.report.families import families, row_labels, shared_axes, shown
from simulator.report.gantt import COMBINE, DISPATCH, KINDS, occupancy, steady_window
from simulator.report.html import page, write_html
from simulator.report.over_time import memory_over_time_figure
from simulator.report.page import save
from simulator.report.study_pages import write_over_steps, write_sweep
from simulator.report.style import GIB, short
from simulator.report.trace import chrome_trace, op_names, write_trace
from simulator.study import LoadRow, Row, load_over_steps

NAME = "<script>alert(1)</script> & friends @sections@"
MIXTRAL: dict[str, Any] = {
    "name": NAME,
    "model": "mixtral-8x7b",
    "cluster": {"profile": "h100-sxm", "accelerators": 16},
    "parallelism": {"pipeline": 2, "schedule": "1f1b", "expert": 4},
    "training": {"tokens": "1B", "sequence_length": 1024, "global_batch_sequences": 64},
    "routing": {"capacity_factor": 1.0, "load": {"kind": "dirichlet", "concentration": 20}, "balance": []},
}
PUBLISHED = [
    {"quantity": "a<b", "predicted": 2e6, "published": 1e6, "unit": "h", "error_percent": 100.0, "source": "<i>x</i>"}
]


@pytest.fixture(scope="module")
def mixtral() -> TrainingEstimate:
    return estimate(load_scenario(MIXTRAL))


@pytest.fixture(scope="module")
def deepseek() -> TrainingEstimate:
    return estimate(load_scenario("deepseek-v3"))


@pytest.fixture(params=["mixtral", "deepseek"])
def result(request: pytest.FixtureRequest) -> TrainingEstimate:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, TrainingEstimate)
    return found


def _tracks(trace: dict[str, Any]) -> dict[tuple[int, int], list[tuple[float, float]]]:
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    return tracks


# --- trace ------------------------------------------------------------------------------------------------------------


def test_the_trace_holds_every_op_of_a_lane_in_order_and_ends_with_it(result: TrainingEstimate) -> None:
    timeline = result.step.timeline
    before = time.process_time()
    trace = chrome_trace(timeline)
    assert time.process_time() - before < 3.0
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    lengths = np.round(timeline.end[:, 0] * 1e9) - np.round(timeline.start[:, 0] * 1e9)
    assert (lengths > 1).sum() <= len(slices) <= (lengths > 0).sum()
    assert all(event["dur"] > 0 and event["ts"] >= 0 for event in slices)
    assert all(round(event[key], 3) == event[key] for event in slices for key in ("ts", "dur"))
    for spans in _tracks(trace).values():
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    last = max(event["ts"] + event["dur"] for event in slices)
    takes_time = timeline.end[:, 0] > timeline.start[:, 0]
    assert last == pytest.approx(1e6 * timeline.end[takes_time, 0].max(), abs=0.01)
    assert last <= 1e6 * timeline.step_s + 5e-4  # rounded to nanoseconds
    busy = sum(event["dur"] for event in slices if event["cat"] == "compute") / 1e6
    ops = timeline.program.stream == COMPUTE
    assert busy == pytest.approx(float((timeline.end - timeline.start)[ops, 0].sum()), rel=1e-6)


def test_processes_are_ranks_and_threads_are_streams(mixtral: TrainingEstimate) -> None:
    events = chrome_trace(mixtral.step.timeline)["traceEvents"]
    named = {(e["name"], e["pid"], e["tid"]): e["args"] for e in events if e["ph"] == "M"}
    assert named["process_name", 1, 0] == {"name": "pipeline rank 1"}
    assert named["thread_name", 1, EXPERT] == {"name": "expert"}
    used = {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"}
    assert used <= {(pid, tid) for name, pid, tid in named if name == "thread_name"}


def test_ops_are_named_as_torch_names_actions(mixtral: TrainingEstimate) -> None:
    program = mixtral.step.program
    names = op_names(program)
    forms = {re.sub(r"\d+", "0", name) for name in names}
    assert {"0F0 dense", "0F0 dispatch", "0I0 experts", "0W0 dense", "0B0 combine", "optimizer"} <= forms
    assert {"0SEND_F0", "0SEND_B0"} <= forms
    assert "reduce expert, stage 0" in forms
    assert op_names(program, np.array([5, 7])) == [names[5], names[7]]
    slices = [event for event in chrome_trace(mixtral.step.timeline)["traceEvents"] if event["ph"] == "X"]
    dispatch = next(event for event in slices if event["name"] == "1F5 dispatch")
    assert (dispatch["pid"], dispatch["tid"], dispatch["cat"]) == (1, EXPERT, "expert")
    about = dispatch["args"]
    assert {key: about[key] for key in ("microbatch", "stage", "class")} == {
        "microbatch": 5,
        "stage": 1,
        "class": "dispatch all-to-all, MoE layer 16",
    }
    assert about["critical"] == (about["slack_us"] < 1e-3)


def _whole(result: TrainingEstimate) -> dict[str, Any]:
    return {"schedule": result.step.schedule, "memory": result.step.memory_curves}


def test_the_written_trace_parses_and_no_two_slices_of_a_track_overlap(
    result: TrainingEstimate, tmp_path: Path
) -> None:
    timeline, shown = result.step.timeline, _whole(result)
    write_trace(timeline, tmp_path / "step.json", **shown)
    write_trace(timeline, tmp_path / "step.json.gz", **shown)
    plain = (tmp_path / "step.json").read_bytes()
    assert gzip.decompress((tmp_path / "step.json.gz").read_bytes()) == plain
    trace = json.loads(plain)
    assert trace == chrome_trace(timeline, **shown)
    tracks = _tracks(trace)
    assert len({pid for pid, _ in tracks}) == timeline.program.ranks
    for spans in tracks.values():
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(sorted(spans)))


def test_the_steps_of_the_schedule_have_a_thread_in_torchs_notation(deepseek: TrainingEstimate) -> None:
    trace = chrome_trace(deepseek.step.timeline, **_whole(deepseek))
    steps = [event for event in trace["traceEvents"] if event["ph"] == "X" and event["cat"] == "schedule"]
    first = [event["name"] for event in steps if event["pid"] == 0]
    assert first == [str(each) for each in deepseek.step.schedule.steps[0]]
    assert first[0] == "0F0"
    assert any(re.fullmatch(r"\(\d+F\d+;\d+B\d+\)OVERLAP_F_B", name) for name in first)


def test_critical_ops_are_marked(result: TrainingEstimate) -> None:
    timeline = result.step.timeline
    path = critical_path(timeline)
    events = [event for event in chrome_trace(timeline)["traceEvents"] if event["ph"] == "X"]
    assert all(event["args"]["slack_us"] >= 0.0 for event in events)
    marked = {(event["name"], event["pid"]) for event in events if event["args"]["critical"]}
    names = op_names(timeline.program)
    shown = {(event["name"], event["pid"]) for event in events}
    same_lane = path.ops[path.lanes == 0]
    assert {(names[op], int(timeline.program.rank[op])) for op in same_lane.tolist()} & shown <= marked
    assert len(marked) < len(shown) or timeline.program.ranks == 1


def test_the_trace_counts_the_memory_of_every_rank(result: TrainingEstimate) -> None:
    events = chrome_trace(result.step.timeline, **_whole(result))["traceEvents"]
    for curve in result.step.memory_curves:
        points = [event for event in events if event["ph"] == "C" and event["pid"] == curve.rank]
        assert max(point["args"]["bytes"] for point in points) == pytest.approx(curve.peak_bytes)
        times = [point["ts"] for point in points]
        assert times == sorted(set(times))
        begun = np.flatnonzero(curve.time == curve.time[0])[-1]  # a step may begin with its first forward
        assert points[0]["args"]["bytes"] == curve.bytes[begun]
        assert points[-1]["args"]["bytes"] == curve.bytes[0]


def test_the_protobuf_trace_says_the_same(mixtral: TrainingEstimate, tmp_path: Path) -> None:
    pytest.importorskip("perfetto")
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackEvent

    shown = _whole(mixtral)
    write_trace(mixtral.step.timeline, tmp_path / "step.pftrace", **shown)
    found = Trace()
    found.ParseFromString((tmp_path / "step.pftrace").read_bytes())
    tracks = {p.track_descriptor.uuid: p.track_descriptor for p in found.packet if p.HasField("track_descriptor")}
    (texts,) = (packet.interned_data for packet in found.packet if packet.HasField("interned_data"))
    names = {entry.iid: entry.name for entry in texts.event_names}
    open_: dict[int, tuple[int, str]] = {}
    slices, counted = [], []
    for packet in found.packet:
        if not packet.HasField("track_event"):
            continue
        event = packet.track_event
        assert event.track_uuid in tracks
        if event.type == TrackEvent.TYPE_SLICE_BEGIN:
            assert event.track_uuid not in open_  # one at a time on every track
            open_[event.track_uuid] = (packet.timestamp, names[event.name_iid])
        elif event.type == TrackEvent.TYPE_SLICE_END:
            begin, name = open_.pop(event.track_uuid)
            slices.append((name, begin, packet.timestamp))
        else:
            counted.append(event.counter_value)
    assert not open_
    events = chrome_trace(mixtral.step.timeline, **shown)["traceEvents"]
    expected = [(e["name"], round(1e3 * e["ts"]), round(1e3 * (e["ts"] + e["dur"]))) for e in events if e["ph"] == "X"]
    assert sorted(slices) == sorted(expected)
    assert max(counted) == round(mixtral.step.memory.peak_bytes)
    described = {track.name for track in tracks.values()}
    assert {"pipeline rank 0", "compute", "expert", "schedule", "memory"} <= described


def test_a_protobuf_trace_without_the_package_says_what_to_install(
    mixtral: TrainingEstimate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protobuf, "find_spec", lambda name: None)
    with pytest.raises(InvalidInput) as caught:
        write_trace(mixtral.step.timeline, tmp_path / "step.pftrace")
    assert "pip install 'moesim[trace]'" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_several_lanes_are_several_processes(mixtral: TrainingEstimate) -> None:
    trace = chrome_trace(mixtral.step.timeline, lanes=(0, 3))
    names = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    expected = [f"pipeline rank {rank}, expert rank {lane}" for rank in (0, 1) for lane in (0, 3)]
    assert names == dict(enumerate(expected))
    for spans in _tracks(trace).values():
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


# --- figures ----------------------------------------------------------------------------------------------------------


def _bars(figure: go.Figure, axis: str) -> dict[str, float]:
    """Lengths of the horizontal bars on one y axis, by bar."""
    bars = [trace for trace in figure.data if trace.type == "bar" and (trace.yaxis or "y") == axis]
    pairs = [pair for trace in bars for pair in zip(trace.y, trace.x, strict=True)]
    return {name: sum(value for other, value in pairs if other == name) for name, _ in pairs}


def test_the_breakdown_figure_shows_every_term_and_their_sum(result: TrainingEstimate) -> None:
    figure = figures.breakdown_figure(result)
    terms = _bars(figure, "y2")
    assert sorted(terms.values()) == sorted(result.breakdown.values())
    assert sum(terms.values()) == pytest.approx(result.step_time_s)
    assert _bars(figure, "y") == {"total": pytest.approx(result.step_time_s)}
    groups = {trace.name: trace.marker.color for trace in figure.data}
    assert len(set(groups.values())) == len(groups) >= 4


def test_the_memory_figure_shows_every_term_and_the_limit(result: TrainingEstimate) -> None:
    figure = figures.memory_figure(result)
    peak = result.step.memory.peak_bytes / GIB
    assert sum(_bars(figure, "y2").values()) == pytest.approx(peak)
    assert _bars(figure, "y") == {"total": pytest.approx(peak)}
    assert figure.layout.shapes[0].x0 == pytest.approx(result.memory_limit_bytes / GIB)


def test_the_memory_over_time_is_drawn_up_to_its_peak(result: TrainingEstimate) -> None:
    figure = memory_over_time_figure(result)
    layers = {trace.name: np.asarray(trace.y) for trace in figure.data}
    assert set(layers) == {"states", "buffers", "saved activations"}
    peak = result.step.memory.peak_bytes / GIB
    assert sum(layers.values()).max() == pytest.approx(peak)  # type: ignore[union-attr]
    assert figure.data[0].x[-1] == pytest.approx(result.step_time_s)
    assert figure.layout.shapes[0].y0 == pytest.approx(result.memory_limit_bytes / GIB)
    assert "figure-memory-over-time" in page(result)


def test_the_cost_figure_shows_every_phase() -> None:
    phase = {"name": "<b>long", "tokens": "1M", "set": {"training.sequence_length": 2048}}
    training = {**MIXTRAL["training"], "phases": [phase]}
    result = estimate(load_scenario({**MIXTRAL, "training": training}))
    assert _bars(figures.cost_figure(result), "y") == {
        name.replace("<b>", "&lt;b&gt;"): pytest.approx(hours) for name, hours in result.phase_gpu_hours.items()
    }


def test_the_timeline_figure_shows_dispatch_and_combine_under_compute(deepseek: TrainingEstimate) -> None:
    timeline = deepseek.step.timeline
    window = steady_window(timeline)
    length = window[1] - window[0]
    assert 0.2 < window[0] / deepseek.step_time_s < window[1] / deepseek.step_time_s < 0.8
    figure = figures.timeline_figure(timeline, window)
    kinds = {trace.name: trace for trace in figure.data}
    assert set(kinds) <= set(KINDS)
    assert {DISPATCH, COMBINE, *list(KINDS)[:4]} <= set(kinds)
    assert all(
        base >= 0 and base + x <= 1e3 * length * (1 + 1e-9)
        for t in figure.data
        for base, x in zip(t.base, t.x, strict=True)
    )
    assert len({y for trace in figure.data for y in trace.y}) <= 3 * 12
    program = timeline.program
    ops = np.flatnonzero((program.rank == 0) & (program.stream == EXPERT))
    clipped = np.clip(timeline.end[ops, 0], *window) - np.clip(timeline.start[ops, 0], *window)
    place = min(kinds[DISPATCH].y)
    shown = sum(
        x for kind in (DISPATCH, COMBINE) for x, y in zip(kinds[kind].x, kinds[kind].y, strict=True) if y == place
    )
    assert shown == pytest.approx(1e3 * clipped.sum(), abs=1e-3)


def test_the_step_figure_integrates_to_the_busy_time(result: TrainingEstimate) -> None:
    timeline = result.step.timeline
    program = timeline.program
    busy = occupancy(timeline, 64).mean(axis=1) * result.step_time_s
    for rank in range(program.ranks):
        ops = (program.rank == rank) & (program.stream == COMPUTE)
        assert busy[rank] == pytest.approx((timeline.end - timeline.start)[ops, 0].sum())
    assert figures.step_figure(timeline).data[0].z.shape[0] == program.ranks


def test_the_load_figure_averages_to_one(result: TrainingEstimate) -> None:
    load = result.step.load
    assert load is not None
    figure = figures.load_figure(load)
    (heat,) = (trace for trace in figure.data if trace.type == "heatmap")
    assert np.asarray(heat.z).shape == load.assigned.shape[1:]
    assert np.asarray(heat.z).mean() == pytest.approx(1.0)
    names = [trace.name for trace in figure.data if trace.type == "scatter"]
    assert ("after capacity, median" in names) == (load.dropped_fraction > 0)


def test_the_position_figure_shows_the_drops_by_tenths(mixtral: TrainingEstimate, deepseek: TrainingEstimate) -> None:
    load = mixtral.step.load
    assert load is not None
    (bars,) = figures.position_figure(load).data
    assert len(bars.y) == 10
    assert np.mean(bars.y) == pytest.approx(100.0 * load.dropped_fraction, rel=0.05)
    assert bars.y[-1] == max(bars.y) > bars.y[0]  # in order of arrival the last ones are dropped
    assert "figure-position" in page(mixtral)
    assert "figure-position" not in page(deepseek)


def _row(changes: dict[str, Any], hours: float, **more: Any) -> dict[str, Any]:
    keys = {"step_time_s": 1.0, "memory_peak_bytes": GIB, "dropped_token_fraction": 0.1, "padding_fraction": 0.2}
    keys["memory_limit_bytes"] = 2 * GIB
    return {"changes": changes, "gpu_hours": hours, **keys, "parameters_total": 2e9, "parameters_active": 1e9, **more}


def test_a_sweep_is_curves_against_its_first_axis() -> None:
    rows = [_row({}, 5.0)] + [_row({"a.b": b, "c": c}, b + 10.0 * c) for b in (2.0, 1.0) for c in (0, 1)]
    assert families(rows) == [rows]
    assert shared_axes(rows[1:]) == ["a.b", "c"]
    figure = figures.sweep_figure(rows)
    hours = {trace.name: (trace.x, trace.y) for trace in _panel(figure, "Accelerator-hours")}
    assert hours == {"c = 0": ((1.0, 2.0), (1.0, 2.0)), "c = 1": ((1.0, 2.0), (11.0, 12.0))}
    dropped = [trace.y for trace in _panel(figure, "Dropped tokens (%)")]
    assert dropped == [(10.0, 10.0)] * 2
    looks = {trace.name: (trace.line.dash, trace.marker.symbol) for trace in _panel(figure, "Step time (s)")}
    assert looks == {"c = 0": ("solid", "circle"), "c = 1": ("solid", "circle")}


def test_curves_that_coincide_are_both_seen() -> None:
    """Padding changes no drops: the curves that differ in the last axis alone also differ in dashes and markers."""
    changes = [{"r.f": f, "r.load": load, "r.pad": pad} for f in (1.0, 2.0) for load in (0, 1) for pad in (False, True)]
    curves = _panel(figures.sweep_figure([_row(each, 1.0) for each in changes]), "Dropped tokens (%)")
    assert {trace.name: (trace.line.dash, trace.marker.symbol) for trace in curves} == {
        f"load = {load}, pad = {pad}": look
        for load in (0, 1)
        for pad, look in (("false", ("solid", "circle")), ("true", ("dash", "circle-open")))
    }


def test_what_is_nought_in_every_row_has_no_panel() -> None:
    rows = [_row({"a": a}, 1.0, dropped_token_fraction=0.0, padding_fraction=0.1 * a) for a in (0, 1)]
    titles = [each.text for each in figures.sweep_figure(rows).layout.annotations if each.xref == "paper"]
    assert titles == ["Step time (s)", "Padding (%)", "Peak memory (GiB)", "Accelerator-hours"]


def _panel(figure: go.Figure, title: str) -> list[Any]:
    """Traces of the panel with a title."""
    titles = [each.text for each in figure.layout.annotations if each.xref == "paper"]
    number = titles.index(title) + 1
    axis = "x" if number == 1 else f"x{number}"
    return [trace for trace in figure.data if trace.xaxis == axis]


def test_a_sweep_shows_waiting_and_the_usable_memory_and_parameters_that_vary() -> None:
    rows = [_row({"a": a}, 1.0, step_breakdown_s={"waiting": 0.25} if a else {}) for a in (0, 1)]
    figure = figures.sweep_figure(rows)
    assert [trace.y for trace in _panel(figure, "Waiting for other ranks (s)")] == [(0.0, 0.25)]
    (limit,) = figure.layout.shapes
    assert (limit.y0, limit.line.dash, limit.yref) == (2.0, "dash", "y5")
    assert not any("Parameters" in each.text for each in figure.layout.annotations)
    rows[1]["parameters_total"] = 3e9
    assert len(_panel(figures.sweep_figure(rows), "Parameters (B), dotted: active")) == 2


def test_a_mixed_axis_is_categorical_and_missing_numbers_are_gaps() -> None:
    rows = [_row({"x": None}, 1.0), _row({"x": 1.25}, 2.0), _row({"x": "<b>"}, 3.0) | {"gpu_hours": None}]
    figure = figures.sweep_figure(rows)
    (hours,) = _panel(figure, "Accelerator-hours")
    assert hours.x == ("null", "1.25", "&lt;b&gt;")
    assert hours.y == (1.0, 2.0, None)
    assert figure.layout.xaxis.type == "category"


def test_values_of_an_axis_read_well() -> None:
    factor = "routing.capacity_factor"
    rows = [_row({factor: value}, 1.0) for value in (None, 2.0, 1.25)]
    figure = figures.sweep_figure(rows)
    assert figure.data[0].x == ("1.25", "2.0", "dropless")  # numbers rise, null comes last
    assert figure.layout.xaxis.categoryarray == ("1.25", "2.0", "dropless")
    loads = [{"kind": "balanced"}, {"kind": "logits", "population": 0.5}, {"kind": "logits", "population": 1.0}]
    figure = figures.sweep_figure([_row({"routing.load": load}, 1.0) for load in loads])
    assert figure.data[0].x == ("balanced", "logits population 0.5", "logits population 1.0")
    assert figure.layout.xaxis4.ticktext[1] == "logits<br>population 0.5"
    assert [shown([], "routing.balance"), shown([{"kind": "bias"}], "routing.balance")] == ["none", "bias"]


def test_a_sweep_over_models_has_a_figure_for_each() -> None:
    base = _row({}, 1.0)
    rows = [base] + [_row({"f": f, "model": model}, 1.0) for model in ("one", "<two>") for f in (1.0, 2.0)]
    assert families(rows) == [rows[1:3], rows[3:]]
    titles = [figures.sweep_figure(family).layout.title.text for family in families(rows)]
    assert titles == ["one: sweep of f", "&lt;two&gt;: sweep of f"]
    alone = [base] + [_row({"model": model}, 1.0) for model in ("one", "two")]
    assert families(alone) == [alone]


def test_variants_are_bars_apart_from_the_sweep() -> None:
    base, one = _row({}, 1.0, name="base"), _row({"x": 1}, 2.0, name="<one>")
    sweep = [_row({"y": value}, 3.0, name=f"y {value}") for value in (1, 2)]
    assert families([base, one, *sweep]) == [[base, *sweep], [base, one]]
    figure = figures.sweep_figure([base, one])
    assert figure.data[0].type == "bar"
    assert figure.data[0].x == ("base", "&lt;one&gt;")
    assert row_labels([_row({}, 1.0, name="same"), _row({"x": True}, 1.0, name="same")]) == ["base", "x = true"]


# --- page -------------------------------------------------------------------------------------------------------------


def test_the_page_is_self_contained_and_holds_the_headline_numbers(mixtral: TrainingEstimate, tmp_path: Path) -> None:
    rows = [_row({}, 5.0), _row({"a<b": 1.0}, 6.0), _row({"a<b": 2.0}, 7.0)]
    write_html(mixtral, tmp_path / "report.html", rows=rows, published=PUBLISHED)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    library = get_plotlyjs()
    assert text.count(library) == 1
    own = text.replace(library, "")
    assert not re.search(
        r"""(src|href|action|data)\s*=\s*["']?\s*(https?:)?//|@import|url\(|<link|<iframe|fetch\(""", own
    )
    assert "default-src 'none'" in own
    numbers = (
        f"{short(mixtral.gpu_hours)}</b>",
        f"{short(mixtral.cost_usd)} USD",
        f"{mixtral.mfu:.1%}",
        f"{mixtral.mfu_noncausal:.1%} non-causal",
        f"{mixtral.step.memory.peak_bytes / GIB:.1f} GiB",
        "does not fit" if not mixtral.fits else "fits",
        "+100.0 %",
        "Variants and sweeps",
    )
    for number in numbers:
        assert number in own
    for warning in mixtral.warnings:
        assert warning in own


def test_user_text_is_escaped(mixtral: TrainingEstimate) -> None:
    rows = [_row({}, 5.0, name="base"), _row({"x": 1}, 6.0, name="</script><img src=x>")]
    own = page(mixtral, rows, PUBLISHED).replace(get_plotlyjs(), "")
    assert own.count("&lt;script&gt;alert(1)&lt;/script&gt; &amp; friends @sections@") >= 3
    for raw in ("<script>alert", "<img", "<i>x", "a<b"):
        assert raw not in own


def test_the_same_estimate_gives_the_same_page(mixtral: TrainingEstimate) -> None:
    assert page(mixtral) == page(mixtral)


def test_a_dense_model_has_a_page_too() -> None:
    scenario = {
        **MIXTRAL,
        "model": "mistral-7b",
        "parallelism": {"pipeline": 2, "schedule": "1f1b"},
        "routing": {},
    }
    text = page(estimate(load_scenario(scenario)))
    assert "no token is routed" in text
    assert "Variants and sweeps" not in text


# --- pages of studies -------------------------------------------------------------------------------------------------


def _own(path: Path) -> str:
    """A page without the library, which it must hold once."""
    text, library = path.read_text(encoding="utf-8"), get_plotlyjs()
    assert text.count(library) == 1
    assert "default-src 'none'" in text
    return text.replace(library, "")


def test_a_sweep_is_a_page_of_its_own(mixtral: TrainingEstimate, tmp_path: Path) -> None:
    values = {key: value for key, value in mixtral.as_dict().items() if key != "scenario"}
    rows = [Row("base", {}, values, kind="base")]
    rows += [Row(f"x {x}", {"x": x}, values, kind="sweep") for x in (1, 2)]
    rows += [Row("x 3", {"x": 3}, {}, "three <is> too many", kind="sweep")]
    write_sweep(mixtral.scenario, rows, tmp_path / "sweep.html")
    own = _own(tmp_path / "sweep.html")
    assert own.count('class="plotly-graph-div"') == 1
    assert "x 3: three &lt;is&gt; too many" in own
    assert "<script>alert" not in own


def test_the_load_over_steps_is_a_page_of_its_own(tmp_path: Path) -> None:
    load = {"kind": "logits", "population": 1.0}
    scenario = load_scenario({**MIXTRAL, "routing": {"load": load, "balance": [{"kind": "bias"}]}})
    rows = load_over_steps(scenario, [0, 20])
    figure = over_steps_figure(rows)
    curves = {trace.name: trace for trace in figure.data if trace.xaxis == "x"}
    assert set(curves) == {"none", "importance loss", "load-balance loss", "bias"}
    assert curves["none"].y == tuple(row.max_violation for row in rows if row.strategy == "none")
    dropped = [trace.y for trace in figure.data if trace.xaxis == "x2" and trace.name == "bias"]
    shares = (100.0 * row.dropped_fraction_at_capacity_factor for row in rows if row.strategy == "bias")
    assert dropped == [tuple(shares)]
    write_over_steps(scenario, rows, tmp_path / "load.html")
    assert "figure-over-steps" in _own(tmp_path / "load.html")


def test_even_loads_and_odd_names_can_be_drawn() -> None:
    figure = over_steps_figure([LoadRow("<b>", step, 0.0, 0.0, 1.0, 1.25, 0.0) for step in (0, 1)])
    assert figure.data[0].name == "&lt;b&gt;"
    assert figure.layout.yaxis.type is None  # a logarithmic axis could not show 0


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    save(target, "one")
    with pytest.raises(UnicodeEncodeError):
        save(target, "two \ud800")
    assert target.read_text("utf-8") == "one"
    assert list(tmp_path.iterdir()) == [target]


def test_new_routing_numbers_are_explained(mixtral: TrainingEstimate) -> None:
    values = mixtral.as_dict()
    entry = explained("dropped_token_fraction_by_position", values)
    assert list(entry["terms"].values()) == values["dropped_token_fraction_by_position"]
    assert list(entry["terms"])[::9] == ["0 to 10 %", "90 to 100 %"]
    assert "2402.01739" in entry["source"]
    for name in ("lost_token_fraction", "expert_rank_load_max_over_mean"):
        assert explained(name, values)["value"] == values[name]
