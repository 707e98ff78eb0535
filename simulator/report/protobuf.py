"""A trace as Perfetto's own protobuf: smaller than the JSON, and the format that Perfetto develops further.

Needs the optional extra ``trace`` (the package ``perfetto``). Texts that occur often are written once and referred to
by number.
Source: the synthetic track events of perfetto.dev (TrackDescriptor, TrackEvent, InternedData).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from simulator import errors

_SEQUENCE = 1
_COUNTER_THREAD = 10_000
"""Place of a rank's counter among the tracks of its process."""


def require() -> None:
    """Refuse to go on without the package.

    Raises:
        InvalidInput: it is not installed.
    """
    if find_spec("perfetto") is None:
        raise errors.invalid(
            "a .pftrace file needs the package perfetto: pip install 'moesim[trace]', or write .json or .json.gz",
            path="--trace",
        )


def packed(trace: Mapping[str, Any]) -> bytes:
    """A Chrome trace object (``M``, ``X`` and ``C`` events) as a Perfetto trace."""
    require()
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TracePacket, TrackEvent
    from perfetto.trace_builder.proto_builder import TraceProtoBuilder

    builder = TraceProtoBuilder()
    events = trace["traceEvents"]
    _describe(builder, events)
    number = _numbers(builder.add_packet(), [event for event in events if event["ph"] == "X"])
    points: list[tuple[int, int, int]] = []  # time, kind, event; what ends at a time comes first
    for index, event in enumerate(events):
        if event["ph"] == "X":
            begin, end = _nanoseconds(event["ts"]), _nanoseconds(event["ts"] + event["dur"])
            points += [(begin, 1, index), (end, 0, index)]
        elif event["ph"] == "C":
            points.append((_nanoseconds(event["ts"]), 2, index))
    for time, kind, index in sorted(points):
        event = events[index]
        packet = builder.add_packet()
        packet.timestamp, packet.trusted_packet_sequence_id = time, _SEQUENCE
        packet.sequence_flags = TracePacket.SEQ_NEEDS_INCREMENTAL_STATE
        written = packet.track_event
        if kind == 2:
            written.type, written.track_uuid = TrackEvent.TYPE_COUNTER, _uuid(event["pid"], _COUNTER_THREAD)
            written.counter_value = round(event["args"]["bytes"])
            continue
        written.track_uuid = _uuid(event["pid"], event["tid"])
        if kind == 0:
            written.type = TrackEvent.TYPE_SLICE_END
            continue
        written.type, written.name_iid = TrackEvent.TYPE_SLICE_BEGIN, number["event_names", event["name"]]
        written.category_iids.append(number["event_categories", event["cat"]])
        for key, value in event["args"].items():
            note = written.debug_annotations.add()
            note.name_iid = number["debug_annotation_names", key]
            if isinstance(value, bool):
                note.bool_value = value
            elif isinstance(value, int):
                note.int_value = value
            elif isinstance(value, float):
                note.double_value = value
            else:
                note.string_value_iid = number["debug_annotation_string_values", str(value)]
    return bytes(builder.serialize())


def _numbers(packet: Any, slices: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], int]:
    """Write every text of the slices once, and say which number stands for it."""
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TracePacket

    texts = {
        "event_names": {each["name"] for each in slices},
        "event_categories": {each["cat"] for each in slices},
        "debug_annotation_names": {key for each in slices for key in each["args"]},
        "debug_annotation_string_values": {
            value for each in slices for value in each["args"].values() if isinstance(value, str)
        },
    }
    packet.trusted_packet_sequence_id = _SEQUENCE
    packet.sequence_flags = TracePacket.SEQ_INCREMENTAL_STATE_CLEARED | TracePacket.SEQ_NEEDS_INCREMENTAL_STATE
    numbers = {}
    for kind, found in texts.items():
        for iid, text in enumerate(sorted(found), 1):
            entry = getattr(packet.interned_data, kind).add()
            entry.iid = numbers[kind, text] = iid
            if kind == "debug_annotation_string_values":
                entry.str = text.encode()
            else:
                entry.name = text
    return numbers


def _describe(builder: Any, events: Sequence[Mapping[str, Any]]) -> None:
    """One track per process, below it one per thread and one for the counter, in the order of their sort indices."""
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TrackDescriptor

    named: dict[tuple[str, int, int], Any] = {}
    for event in events:
        if event["ph"] == "M":
            named[event["name"], event["pid"], event["tid"]] = next(iter(event["args"].values()))
    counted = {event["pid"] for event in events if event["ph"] == "C"}
    for (kind, process, thread), name in named.items():
        if kind not in ("process_name", "thread_name"):
            continue
        track = builder.add_packet().track_descriptor
        track.name = name
        if kind == "process_name":
            track.uuid = _uuid(process, None)
            track.child_ordering = TrackDescriptor.EXPLICIT
            track.sibling_order_rank = named.get(("process_sort_index", process, 0), process)
            if process in counted:
                counter = builder.add_packet().track_descriptor
                counter.uuid, counter.parent_uuid = _uuid(process, _COUNTER_THREAD), _uuid(process, None)
                counter.name, counter.sibling_order_rank = "memory", _COUNTER_THREAD
                counter.counter.unit_name = "bytes"
        else:
            track.uuid, track.parent_uuid = _uuid(process, thread), _uuid(process, None)
            track.sibling_order_rank = named.get(("thread_sort_index", process, thread), thread)


def _uuid(process: int, thread: int | None) -> int:
    """A number of its own for each track."""
    return (process + 1) * 1_000_000 + (0 if thread is None else thread + 1)


def _nanoseconds(microseconds: float) -> int:
    return round(microseconds * 1e3)
