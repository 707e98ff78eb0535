"""Suites of measurements: every whole has its pieces, pieces add up to the simulator's counts, and time is limited."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.spec.load import load_model
from simulator.spec.model import Model
from simulator.spec.training import Training
from simulator.workload import parameters
from simulator.workload.blocks import model_blocks
from simulator.workload.ops import Embedding, MemoryOp
from validation import shapes, suites
from validation.cases import Case, Layer, gemm, spread

NAMES: tuple[suites.Name, ...] = ("quick", "full", "gpu")


def flop(case: Case) -> float:
    """FLOPs of one call."""
    fields = case.fields
    if case.kind == "gemm":
        return 2.0 * float(fields["m"] * fields["n"] * fields["k"])
    if case.kind == "grouped_gemm":
        return 2.0 * float(sum(fields["counts"]) * fields["n"] * fields["k"])
    if case.kind == "attention":
        width = fields["heads"] * (fields["head_dim"] + fields.get("value_dim", fields["head_dim"]))
        return float(fields["batch"] * fields["tokens"] ** 2 * width) * (2.5 if fields["which"] == "I" else 1.0)
    return 0.0


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_unique_survive_a_file_and_every_whole_has_its_pieces_in_the_suite(name: suites.Name) -> None:
    cases = suites.suite(name, devices=2).cases()
    keys = [case.key for case in cases]
    pieces = {key for case in cases if case.fields.get("form") != "fp8" for key, _ in case.fields.get("pieces", [])}

    assert len(set(keys)) == len(keys)
    assert [Case(case.kind, json.loads(json.dumps(case.fields))).key for case in cases] == keys
    assert pieces
    assert pieces <= set(keys)
    assert suites.suite(name, devices=2).cases() == cases


def test_a_cpu_suite_has_every_kind_and_stays_small() -> None:
    quick, full = (suites.suite(name) for name in ("quick", "full"))
    kinds = Counter(case.kind for case in quick.cases())
    layers = [case.fields for case in full.cases() if case.kind == "layer" and case.fields["which"] == "F"]

    assert set(kinds) == {
        "gemm", "grouped_gemm", "attention", "memory", "layer", "step", "all_to_all", "expert_parallel_layer",
    }  # fmt: skip
    assert {case.key for case in quick.alone() if case.kind == "step"} <= {case.key for case in full.alone()}
    assert set(quick.distributed) == {2}
    assert set(full.distributed) == {2, 3, 4}
    assert {fields["implementation"] for fields in layers} == {"batched", "grouped", "loop"}
    assert {fields["form"] for fields in layers} == {"fp32", "bf16"}
    for fields in layers:
        names = set(Layer.__dataclass_fields__)
        layer = Layer(**{key: value for key, value in fields.items() if key in names})
        assert shapes.layer_flop(layer) <= 10e9


def test_the_gpu_suite_covers_the_published_shapes_and_fits_into_eight_minutes() -> None:
    every = suites.suite("gpu").alone()
    grouped = [case.fields for case in every if case.kind == "grouped_gemm"]
    layers = [case.fields for case in every if case.kind == "layer"]
    even = {max(fields["counts"]) for fields in grouped if len(set(fields["counts"])) == 1}
    attention = [case.fields for case in every if case.kind == "attention"]
    # 400 TFLOP/s in two warm-ups and five repeats, or 20 ms; 50 ms to prepare; layers and steps by their pieces.
    alone_s = {case.key: flop(case) / 400e12 for case in every}
    whole_s = {
        case.key: sum(count * alone_s.get(key, 0.0) for key, count in case.fields.get("pieces", [])) for case in every
    }
    seconds = sum(0.05 + max(7 * (alone_s[case.key] + whole_s[case.key]), 0.02) for case in every)

    for name in shapes.GPU_MODELS:
        model = load_model(name)
        assert model.moe is not None
        widths = {(fields["n"], fields["k"]) for fields in grouped}
        assert (2 * model.moe.expert_ffn_size, model.hidden_size) in widths
        assert (model.hidden_size, model.moe.expert_ffn_size) in widths
    assert {16, 64, 256, 1024, 4096, 16384} <= even
    assert {fields["form"] for fields in grouped} == {fields["form"] for fields in layers} == {"bf16", "fp8"}
    assert {fields["capacity_factor"] for fields in layers} == {None, 1.0, 1.25, 1.5, 2.0}
    assert {fields["which"] for fields in attention if "value_dim" in fields} == {"F", "I"}
    assert 2 * seconds < 480


def layer(**changes: Any) -> Layer:
    fields: dict[str, Any] = {
        "form": "fp32",
        "tokens": 64,
        "hidden_size": 32,
        "expert_ffn_size": 48,
        "experts": 4,
        "top_k": 2,
        "gated": True,
        "shared_experts": 1,
        "capacity_factor": 1.0,
        "pad": True,
        "implementation": "batched",
        "counts": spread(64, 2, [1.0, 2.0, 3.0, 4.0]),
    }
    return Layer(**{**fields, **changes})


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize(
    "capped",
    [
        {},
        {"capacity_factor": None, "pad": False, "implementation": "grouped"},
        {"capacity_factor": 0.5, "pad": False, "implementation": "loop"},
    ],
    ids=["padded", "dropless", "dropping"],
)
def test_the_products_among_a_layers_pieces_are_its_flops_and_three_times_them_with_the_backward(
    gated: bool, shared: int, capped: dict[str, Any]
) -> None:
    whole = layer(gated=gated, shared_experts=shared, **capped)
    forward, both = (sum(count * flop(case) for case, count in whole.pieces(which)) for which in ("F", "FB"))
    rows = {None: 128, 1.0: 128, 0.5: 13 + 16 + 16 + 16}[whole.capacity_factor]

    assert forward == shapes.layer_flop(whole)
    assert both == 3 * forward
    assert sum(whole.rows) == rows


def test_a_layer_that_cannot_be_is_refused() -> None:
    for changes in (
        {"counts": (128, 0, 0, 0)},
        {"counts": (64, 32)},
        {"counts": (64, 64, 0, 1)},
        {"experts": 64, "counts": (2,) * 64},
        {"pad": False},
        {"capacity_factor": None},
    ):
        with pytest.raises(ValueError):
            layer(**changes)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_a_steps_pieces_hold_all_parameters_and_the_bytes_of_the_op_list(stride: int) -> None:
    step = shapes.small_step("c", stride, 1.0)
    model, tokens = Model.model_validate(step.model), step.sequences * step.sequence_length
    pieces = step.pieces()
    moe = step.moe_layer()
    inside = [
        (case, count * times) for whole, times in pieces if whole.kind == "layer" for case, count in moe.pieces("FB")
    ]
    flat = [*((case, count) for case, count in pieces if case.kind != "layer"), *inside]

    def weights(case: Case) -> int:
        held = len(case.fields["counts"]) if case.kind == "grouped_gemm" else 1
        return held * case.fields["n"] * case.fields["k"] if "n" in case.fields and case.fields["which"] == "F" else 0

    norms, embedding = 9 * model.hidden_size, model.hidden_size * model.vocabulary_size
    total = int(parameters.count(model).total.total)
    assert sum(count * weights(case) for case, count in flat) + norms + embedding == total
    assert [case.fields["rows"] for case, _ in pieces if case.fields.get("op") == "adam"] == [total]

    training = Training.model_validate({**TRAINING, "sequence_length": step.sequence_length})
    expected = sum(
        (2.0 * op.width if isinstance(op, Embedding) else op.elements * (moe.top_k if op.rows == "received" else 1))
        for block in model_blocks(model, training)
        for op in block.ops
        if isinstance(op, Embedding | MemoryOp)
    )
    counted = sum(
        count * case.fields["bytes"]
        for case, count in flat
        if case.kind == "memory" and case.fields["which"] == "F" and case.fields["op"] not in ("adam", "plan")
    )
    # The op list adds the residual of a MoE layer in the unpermute, the transformer apart from it.
    expected += 3.0 * model.hidden_size * 4 / stride
    assert counted == pytest.approx(4.0 * tokens * expected)


TRAINING = {"tokens": "1M", "global_batch_sequences": 4}


@given(
    tokens=st.integers(1, 400),
    weights=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=12),
    data=st.data(),
)
def test_an_uneven_load_serves_every_choice_and_no_token_twice(
    tokens: int, weights: list[float], data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, len(weights)))
    counts = spread(tokens, top_k, weights)

    assert sum(counts) == tokens * top_k
    assert all(0 <= count <= tokens for count in counts)
    free = [(count, weight) for count, weight in zip(counts, weights, strict=True) if count < tokens - 1]
    rates = [weight / sum(each for _, each in free) for _, weight in free]
    placed = sum(count for count, _ in free)
    assert all(abs(count - rate * placed) < 2 + len(counts) for (count, _), rate in zip(free, rates, strict=True))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_rank_sends_the_same_and_the_hot_one_gets_six_tenths(ranks: int) -> None:
    size = 2**20
    found = suites.splits(ranks, size)

    assert list(found) == ["equal", "hot", "random"]
    for sent in found.values():
        assert [sum(row) for row in sent] == [size] * ranks
        assert all(part % 4 == 0 and part >= 0 for row in sent for part in row)
    assert all(abs(part - size / ranks) <= 4 for row in found["equal"] for part in row)
    assert all(abs(row[0] - 0.6 * size) <= 4 for row in found["hot"])
    assert len({part for row in found["random"] for part in row}) == ranks * ranks


def test_a_case_is_the_same_whatever_else_it_carries() -> None:
    case = gemm("I", "bf16", 16, 32, 64)

    assert case.key == "gemm/I/bf16/m=16,n=32,k=64"
    assert Case("gemm", {**case.fields, "pieces": [["a", 1]], "bytes": 7.0}).key == case.key
    assert layer().case("F").key != layer(counts=spread(64, 2, [1.0] * 4)).case("F").key


def test_five_repeats_and_twenty_milliseconds_are_enough_or_three_of_something_slow() -> None:
    effort = suites.Effort(seconds=0.02, repeats=5, patience_s=0.2)

    assert not effort.enough([0.001] * 19)
    assert effort.enough([0.001] * 20 + [0.001])
    assert not effort.enough([0.03] * 4)
    assert effort.enough([0.03] * 5)
    assert not effort.enough([9.0] * 2)
    assert effort.enough([9.0] * 3)
