"""What hides under what: pairs of neighbours, chunks of an expert phase, pipelined collectives, sends under a late W.

Chains are built by the simulator and played with prices chosen here, so that ends can be worked out by hand; whole
scenarios then show that an overlap is an outcome: what compute does not cover stays exposed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from simulator import NotSimulated, load_scenario, simulate_step
from simulator.campaign import Step
from simulator.events import evaluate, play
from simulator.layout import Layout, resolve
from simulator.memory import peak
from simulator.program import COMPUTE, CONTEXT, EXPERT, PIPELINE, TENSOR, Program, build, schedule_of
from simulator.program.pipeline import alone
from simulator.routing import expert_load
from simulator.schedules import Action, Overlapped, check, in_flight, interleaved, one_f_one_b
from simulator.schedules.pairing import pair_neighbours
from simulator.spec import Scenario
from simulator.timing import Compute, Exchange, Fixed, Pricer, Region
from validation.events import chunk_pair
from validation.events.replay import Times, replay

USUAL = ["gradient_reduce", "parameter_gather", "pipeline"]
ONE_LAYER: dict[str, Any] = {
    "name": "one layer",
    "model": {
        "name": "one layer",
        "layers": 1,
        "hidden_size": 512,
        "vocabulary_size": 1000,
        "context": 4096,
        "mixer": {"kind": "gqa", "heads": 8, "kv_heads": 4, "head_dim": 64},
        "moe": {"experts": 16, "top_k": 2, "expert_ffn_size": 512, "shared_experts": 1},
    },
    "cluster": {"profile": "h100-sxm", "accelerators": 8},
    "parallelism": {"expert": 4},
    "training": {"tokens": "1B", "sequence_length": 2048, "global_batch_sequences": 32},
}
INTERLEAVED = {"parallelism_pipeline": 2, "parallelism_schedule": "interleaved", "parallelism_virtual_stages": 2}
FOUR_LAYERS = {**ONE_LAYER, "model": {**ONE_LAYER["model"], "layers": 4}}


def loaded(tree: dict[str, Any] | str, overlap: Any, **changes: Any) -> tuple[Scenario, Layout]:
    named = {key.replace("_", ".", 1): value for key, value in changes.items()}
    scenario = load_scenario(tree, {**named, "parallelism.overlap": overlap})
    return scenario, resolve(scenario)


def priced(program: Program, seconds: dict[str, float]) -> Program:
    """The same ops with times by label; all others take none."""
    times = [seconds.get(program.labels[label], 0.0) for label in program.label]
    classes = tuple(Fixed(f"op {number}", value) for number, value in enumerate(times))
    return replace(program, classes=classes, cls=np.arange(len(program)))


def ends(program: Program, scenario: Scenario, layout: Layout) -> Any:
    prices = Pricer(scenario, layout, expert_load(scenario, layout)).price(program.classes)
    events, recursion = play(program, prices), evaluate(program, prices)
    assert events.end == pytest.approx(recursion.end, rel=1e-9)
    return recursion


def step(tree: dict[str, Any] | str, overlap: Any, engine: Any = "max-plus", **changes: Any) -> Step:
    return simulate_step(loaded(tree, overlap, **changes)[0], engine)


# The trace's pair


def test_the_traced_pair_is_met() -> None:
    rows = list(chunk_pair.checks())

    assert [row["name"] for row in rows if row["ok"] is False] == []
    assert sum(row["ok"] is True for row in rows) == 7
    assert sum(row["ok"] is None for row in rows) == len(chunk_pair.PIECES) + 1


def test_the_trace_alone_says_the_same_as_the_mean_of_its_layers() -> None:
    assert chunk_pair.pair_ms(mean=True) == pytest.approx(chunk_pair.pair_ms(), rel=0.01)
    assert chunk_pair.pair_ms(0.0) == pytest.approx(sum(map(sum, list(chunk_pair.PIECES.values())[:6])))


# Neighbouring microbatches


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_interleaved_pairs_are_complete_and_free_of_deadlock(ranks: int, rounds: int, chunks: int) -> None:
    plain = interleaved(ranks, ranks * rounds, chunks)
    paired = pair_neighbours(plain)

    check(paired)
    for rank in range(ranks):
        assert sorted(paired.actions(rank)) == sorted(plain.actions(rank))
    more = np.array(in_flight(paired)) - np.array(in_flight(plain))
    assert set(more.tolist()) <= {0, 1}
    assert rounds == 1 or chunks * rounds == 1 or more.max() == 1


def test_a_pair_is_the_backward_with_the_next_forward() -> None:
    steps = pair_neighbours(interleaved(2, 4, 2)).steps[1]

    assert " ".join(map(str, steps)) == (
        "1F0 1F1 3F0 (3F1;3B0)OVERLAP_F_B (1F2;3B1)OVERLAP_F_B (1F3;1B0)OVERLAP_F_B (3F2;1B1)OVERLAP_F_B "
        "(3F3;3B2)OVERLAP_F_B 3B3 1B2 1B3"
    )


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_pairs_of_plain_1f1b_take_turns_and_those_of_interleaved_do_not(ranks: int) -> None:
    """A pair of 30 as F and B one after the other gains nothing; taking turns costs almost as much again."""
    count, times = 8 * ranks, Times(10, 10, 10, pair=30)
    turns, together = (
        replay(pair_neighbours(each), times).makespan
        for each in (one_f_one_b(ranks, count), interleaved(ranks, count, 1))
    )

    assert turns > 1.7 * 30 * count
    assert together < 30 * (count + 2 * ranks)


def test_a_pair_holds_one_more_microbatch_in_memory() -> None:
    def held(overlap: list[str]) -> tuple[float, float]:
        scenario, layout = loaded(FOUR_LAYERS, overlap)
        use = peak(scenario, layout, schedule_of(scenario, layout), expert_load(scenario, layout))
        saved = sum(value for name, value in use.terms.items() if name.startswith("saved_"))
        return use.in_flight, saved

    (one, saved), (two, more) = held(USUAL), held([*USUAL, "expert_all_to_all"])
    assert (one, two) == (1, 2)
    assert more == pytest.approx(2 * saved, rel=0.01)  # the busiest rank of two microbatches is not that of one


@pytest.mark.parametrize("scenario", ["deepseek-v3", "mixtral-8x7b", "mixtral-8x22b", "quickstart"])
@pytest.mark.parametrize("engine", ["events", "max-plus"])
def test_hiding_the_exchange_is_never_slower(scenario: str, engine: str) -> None:
    off, on = (step(scenario, overlap, engine) for overlap in (USUAL, [*USUAL, "expert_all_to_all"]))

    assert on.seconds < off.seconds
    exposed = [each.timeline.breakdown["exposed_expert_all_to_all"] for each in (off, on)]
    assert exposed[1] < 0.25 * exposed[0]


def test_a_pair_with_everything_recomputed_is_simulated() -> None:
    off, on = (
        step(FOUR_LAYERS, overlap, training_recompute="full") for overlap in (USUAL, [*USUAL, "expert_all_to_all"])
    )

    assert on.seconds < off.seconds


def test_an_exchange_takes_multiprocessors_only_for_as_long_as_it_lasts() -> None:
    quick = {"stacks.megatron-core.issue": "0 us"}  # no kernel waits for the host, so all are slower
    scenario, layout = loaded("mixtral-8x7b", [*USUAL, "expert_all_to_all"], cluster_overrides=quick)
    pricer = Pricer(scenario, layout, expert_load(scenario, layout))
    program = build(scenario, layout, schedule_of(scenario, layout))
    slowed = [each for each in program.classes if isinstance(each, Compute) and each.beside]
    assert slowed
    for each in slowed:
        forms = (replace(each, beside=()), each, replace(each, beside=(), overlapped=True))
        free, now, held = (float(pricer.price([form]).seconds.mean()) for form in forms)
        lasts = sum(float(pricer.price([other.exchange]).seconds.mean()) for other in each.beside)
        assert free < now <= held
        assert now - free <= lasts


@pytest.mark.parametrize(
    ("parallelism", "why"),
    [
        ({"pipeline": 2, "schedule": "1f1b"}, "the pairs of two neighbours would take turns"),
        ({"pipeline": 2, "schedule": "gpipe"}, "no full backward is followed by a forward"),
        ({"pipeline": 2, "schedule": "zb1p"}, "no full backward is followed by a forward"),
    ],
)
def test_schedules_without_useful_pairs_are_refused(parallelism: dict[str, Any], why: str) -> None:
    changes = {f"parallelism.{key}": value for key, value in parallelism.items()}
    with pytest.raises(NotSimulated, match=why):
        resolve(load_scenario(FOUR_LAYERS, {**changes, "parallelism.overlap": ["expert_all_to_all"]}))


def test_a_single_microbatch_has_nothing_to_pair_with() -> None:
    with pytest.raises(NotSimulated, match="with 1 microbatches no full backward"):
        loaded(FOUR_LAYERS, ["expert_all_to_all"], training_global_batch_sequences=8)


# Chunks of an expert phase


CASES = [(1.0, 8.0, 2.0), (1.0, 3.0, 2.0), (2.0, 1.0, 3.0), (4.0, 4.0, 4.0), (3.0, 0.5, 1.0), (1.0, 2.0, 0.25)]


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize(("dispatch", "experts", "combine"), CASES)
def test_chunks_take_what_the_closed_form_says(parts: int, dispatch: float, experts: float, combine: float) -> None:
    """T = (disp + exp + comb)/d + (d-1)/d max(exp, disp + comb) on one link; no more, and equal where compute rules.

    Where the link rules, all dispatches leave before the first combine, so the experts of a part hide a little more:
    the link is then never idle, unless the last part's experts end after everything else has been sent.
    """
    scenario, layout = loaded(ONE_LAYER, [{"expert_chunks": parts}])
    program = alone(scenario, layout, Action(0, "F", 0))
    times = {"dispatch F": dispatch / parts, "F experts": experts / parts, "combine F": combine / parts}
    took = ends(priced(program, times), scenario, layout).step_s
    whole = dispatch + experts + combine
    closed = whole / parts + (parts - 1) / parts * max(experts, dispatch + combine)

    assert (program.stream == EXPERT).sum() == 2 * parts
    assert took <= closed + 1e-9
    if experts >= dispatch + combine:
        assert took == pytest.approx(closed)
    else:
        assert took >= max(dispatch + combine, (dispatch + combine) / parts + experts) - 1e-9
        assert took >= closed - experts / parts - 1e-9


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_chunks_of_the_backward_hide_the_exchange_under_the_weight_gradients_too(parts: int) -> None:
    """I 2 and W 4 against 1 and 1: the first dispatch stands out, and nothing of the combine."""
    scenario, layout = loaded(ONE_LAYER, [{"expert_chunks": parts}])
    program = alone(scenario, layout, Action(0, "B", 0))
    times = {"dispatch B": 1.0, "I experts": 2.0, "W experts": 4.0, "combine B": 1.0}
    took = ends(priced(program, {name: value / parts for name, value in times.items()}), scenario, layout).step_s

    assert took == pytest.approx(8.0 if parts == 1 else 6.0 + 1.0 / parts)


def test_more_chunks_cost_latency_and_smaller_products() -> None:
    prices = {}
    for parts in (1, 2, 4, 8):
        scenario, layout = loaded("quickstart", [{"expert_chunks": parts}])
        pricer = Pricer(scenario, layout, expert_load(scenario, layout))
        classes = alone(scenario, layout, Action(0, "F", 0)).classes
        found: list[Compute | Exchange] = [
            next(each for each in classes if isinstance(each, Compute) and each.layer == 3),
            next(each for each in classes if isinstance(each, Exchange) and each.layer == 3),
        ]
        assert all(each.parts == parts for each in found)
        prices[parts] = [parts * float(pricer.price([each]).seconds.mean()) for each in found]
    for index in range(2):
        sums = [prices[parts][index] for parts in (1, 2, 4, 8)]
        assert sums == sorted(sums)
        assert sums[-1] > 1.05 * sums[0]


@pytest.mark.parametrize("parallelism", [{}, {"expert_tensor": 2}, {"pipeline": 2}])
@pytest.mark.parametrize("recompute", ["none", "full", ["expert_ffn"]])
def test_chunks_are_played_alike_by_both_engines_unless_experts_share_their_links(
    parallelism: dict[str, Any], recompute: Any
) -> None:
    changes = {f"parallelism_{key}": value for key, value in parallelism.items()}
    seconds = [
        step(FOUR_LAYERS, [{"expert_chunks": 2}], engine, training_recompute=recompute, **changes).seconds
        for engine in ("events", "max-plus")
    ]

    if "expert_tensor" in parallelism:  # its collectives meet the other parts' exchanges on NVLink
        assert seconds[1] < seconds[0] < 1.05 * seconds[1]
    else:
        assert seconds[0] == pytest.approx(seconds[1], rel=1e-9)


def test_two_chunks_help_where_experts_and_exchange_are_of_a_size() -> None:
    off, on = (step("quickstart", overlap) for overlap in (USUAL, [*USUAL, {"expert_chunks": 2}]))

    assert on.seconds < 0.95 * off.seconds


def test_chunks_and_pairs_exclude_each_other() -> None:
    with pytest.raises(NotSimulated, match="choose one"):
        loaded(FOUR_LAYERS, ["expert_all_to_all", {"expert_chunks": 2}])


# Collectives of tensor- and context-parallel groups


def test_a_ring_hides_under_attention_block_by_block() -> None:
    """Four ranks: A + 3 max(A, T) forward; backward the gradients of the last block come home at the end."""
    scenario, layout = loaded(ONE_LAYER, ["context"], parallelism_context=4)
    for kind, side in (("F", "F dense"), ("I", "I dense")):
        program = alone(scenario, layout, Action(0, kind, 0))  # type: ignore[arg-type]
        cores = [
            op
            for op in range(len(program))
            if isinstance(cls := program.classes[program.cls[op]], Compute) and cls.parts == 4
        ]
        assert len(cores) == 4
        for block, travel in ((2.0, 1.0), (1.0, 3.0)):
            times = np.zeros(len(program))
            times[cores] = block
            times[program.stream == CONTEXT] = travel
            classes = tuple(Fixed(f"op {number}", float(value)) for number, value in enumerate(times))
            took = ends(replace(program, classes=classes, cls=np.arange(len(program))), scenario, layout).step_s
            assert took == block + 3 * max(block, travel) + (travel if side == "I dense" else 0.0)


@pytest.mark.parametrize("recompute", ["none", "full", ["attention_core"]])
def test_a_ring_passes_every_block_once_and_its_gradients_home(recompute: Any) -> None:
    scenario, layout = loaded(
        FOUR_LAYERS, ["context"], parallelism_context=4, training_recompute=recompute, training_sequence_length=4096
    )
    program = build(scenario, layout, schedule_of(scenario, layout))
    steps = {False: 0, True: 0}
    for op in np.flatnonzero(program.stream == CONTEXT):
        cls = program.classes[program.cls[op]]
        assert isinstance(cls, Region)
        assert cls.parts == 4
        steps[cls.backward] += 1
    passes = 4 * layout.microbatches
    forwards = 3 if recompute == "none" else 6
    assert steps == {False: (forwards + 1) * passes, True: 3 * passes}


@pytest.mark.parametrize(
    ("tree", "name", "changes"),
    [
        ("mixtral-8x22b", "tensor", {}),
        ("quickstart", "context", {"parallelism_context": 4}),
        (  # sequences enough that no piece waits for its issue
            "quickstart",
            "context",
            {"parallelism_context": 8, "training_micro_batch_sequences": 4, "training_recompute": "full"},
        ),
    ],
)
def test_hiding_a_collective_under_its_neighbour_helps(tree: str, name: str, changes: dict[str, Any]) -> None:
    off, on = (step(tree, overlap, **changes) for overlap in (USUAL, [*USUAL, name]))
    exposed = [each.timeline.breakdown[f"exposed_{name}"] for each in (off, on)]

    assert on.seconds < off.seconds
    assert 0 < exposed[1] < 0.5 * exposed[0]


def test_a_tensor_parallel_product_and_its_collective_go_in_four_parts() -> None:
    scenario, layout = loaded(
        ONE_LAYER, ["tensor"], parallelism_tensor=2, parallelism_sequence_parallel=True, parallelism_expert=2
    )
    program = alone(scenario, layout, Action(0, "F", 0))
    labels = np.array(program.labels)[program.label]
    for name in ("attention enter", "attention exit"):
        parts = np.flatnonzero(labels == name)
        assert len(parts) == 4
        assert set(program.stream[parts].tolist()) == {TENSOR}
        classes = {program.classes[program.cls[op]] for op in parts}
        assert [each.parts for each in classes if isinstance(each, Region)] == [4]
    products = [each for each in program.classes if isinstance(each, Compute) and each.parts == 4]
    assert {item.op.name for each in products for item in each.items} >= {"qkv", "attention output"}


@pytest.mark.parametrize("name", ["tensor", "context"])
def test_an_overlap_without_a_group_is_refused(name: str) -> None:
    with pytest.raises(NotSimulated, match=f"{name} has nothing to hide"):
        loaded(ONE_LAYER, [name])


# Shared experts


@pytest.mark.parametrize("tensor", [1, 2])
def test_shared_experts_run_under_the_exchange_with_and_without_tensor_parallelism(tensor: int) -> None:
    changes = {"parallelism_tensor": tensor, "parallelism_sequence_parallel": tensor > 1}
    off, on = (step(FOUR_LAYERS, overlap, **changes) for overlap in (USUAL, [*USUAL, "shared_experts"]))

    assert on.seconds < off.seconds
    assert on.timeline.breakdown["exposed_expert_all_to_all"] < off.timeline.breakdown["exposed_expert_all_to_all"]
    for each in (off, on):
        regions = [each.program.classes[c] for c in each.program.cls[each.program.stream == TENSOR]]
        shared = [r for r in regions if isinstance(r, Region) and r.op.name.startswith("shared_expert")]
        assert len(shared) == (16 * each.layout.microbatches if tensor > 1 else 0)


def test_the_layer_after_waits_for_the_shared_experts_result() -> None:
    scenario, layout = loaded(
        ONE_LAYER, ["shared_experts"], parallelism_tensor=2, parallelism_sequence_parallel=True, parallelism_expert=2
    )
    program = alone(scenario, layout, Action(0, "F", 0))
    played = ends(priced(program, {"shared_expert exit": 9.0}), scenario, layout)
    label = np.array(program.labels)[program.label]

    assert played.step_s == 9.0
    assert played.start[np.flatnonzero(label == "F dense")[-1], 0] == 9.0
    assert played.end[label == "combine F"].max() == 0.0


# Sends under the last weight gradient


SCHEDULES = {
    "1f1b": {},
    "interleaved": {"parallelism_virtual_stages": 2},
    "dualpipe": {},
    "dualpipev": {"parallelism_virtual_stages": 2},
}


def sends_and_weights(schedule: str, overlap: list[str], **more: Any) -> list[tuple[bool, float, float, float]]:
    """For each gradient sent: whether a forward ran beside its backward, its start, and its last W from to."""
    changes = {"parallelism_pipeline": 2, "parallelism_schedule": schedule, **SCHEDULES[schedule]}
    played = step(FOUR_LAYERS, overlap, "events", **changes, **more).timeline
    program = played.program
    label = np.array(program.labels)[program.label]
    found = []
    for send in np.flatnonzero((program.stream == PIPELINE) & (label == "send B")):
        rank = program.rank == program.rank[send]
        same = rank & (program.microbatch == program.microbatch[send]) & (program.stage == program.stage[send])
        weights = np.flatnonzero(same & (label == "W dense"))
        first, last = np.flatnonzero(same & (label == "I dense"))[0], weights[-1]
        between = label[first:last][program.rank[first:last] == program.rank[send]]
        paired = bool((between == "F experts").any())
        found.append((paired, played.start[send, 0], played.start[last, 0], played.end[last, 0]))
    return found


@pytest.mark.parametrize("schedule", ["interleaved", "dualpipe", "dualpipev"])
def test_a_pair_sends_before_its_last_weight_gradient_ends(schedule: str) -> None:
    paired = [each for each in sends_and_weights(schedule, ["pipeline", "expert_all_to_all"]) if each[0]]
    assert paired
    for _, sent, begun, ended in paired:
        assert sent <= begun + 1e-12 < ended


@pytest.mark.parametrize("schedule", ["interleaved", "dualpipe"])
def test_a_pair_may_compute_its_weight_gradients_before_it_sends(schedule: str) -> None:
    overlap, late = ["pipeline", "expert_all_to_all"], {"parallelism_delay_weight_gradients": False}
    paired = [each for each in sends_and_weights(schedule, overlap, **late) if each[0]]
    assert paired
    for _, sent, _, ended in paired:
        assert sent >= ended - 1e-12

    changes = {"parallelism_pipeline": 2, "parallelism_schedule": schedule, **SCHEDULES[schedule]}
    delayed, not_delayed = (step(FOUR_LAYERS, overlap, **changes, **more) for more in ({}, late))
    assert delayed.seconds < not_delayed.seconds


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_a_backward_alone_sends_when_all_of_it_is_done(schedule: str) -> None:
    alone = [each for each in sends_and_weights(schedule, ["pipeline"]) if not each[0]]
    assert alone
    for _, sent, _, ended in alone:
        assert sent >= ended - 1e-12


DENSE: dict[str, Any] = {
    "name": "dense",
    "model": "llama-2-70b",
    "cluster": {"profile": "h100-sxm", "accelerators": 32},
    "parallelism": {"pipeline": 4, "tensor": 8, "sequence_parallel": True},
    "training": {"tokens": "1B", "sequence_length": 4096, "global_batch_sequences": 16},
}


def test_a_pipeline_idles_for_whole_forwards_and_backwards() -> None:
    # 1F1B leaves every rank (p - 1) (F + B) of idle time, B with its weight gradient (arXiv 2104.04473, section 2.2).
    played = step(DENSE, ["pipeline"])
    program, terms = played.program, played.timeline.breakdown
    seconds = (played.timeline.end - played.timeline.start).mean(1)
    chunked = np.array([label.startswith(("F ", "I ", "W ")) for label in program.labels])[program.label]
    busy = np.bincount(program.rank[chunked], seconds[chunked]) / played.layout.microbatches
    exposed = terms["exposed_tensor"] / played.layout.microbatches

    # On its way the first microbatch is also sent six times.
    assert 3 * (busy.min() + exposed) <= terms["bubble"] <= 3 * (busy.max() + exposed) * 1.05


def test_backward_tensor_collectives_hide_behind_weight_gradients() -> None:
    off, on = (step(DENSE, overlap) for overlap in (USUAL, [*USUAL, "tensor_backward"]))
    terms = [each.timeline.breakdown for each in (off, on)]

    # Of ten collectives a layer four are at the input of its backward: two gather it again, two reduce. Those of the
    # attention outlast its weight gradient.
    assert 0.6 < terms[1]["exposed_tensor"] / terms[0]["exposed_tensor"] < 0.7
    hidden = terms[0]["exposed_tensor"] - terms[1]["exposed_tensor"]
    assert off.seconds - on.seconds == pytest.approx(hidden, rel=0.3)  # the bubble is shorter, too


def test_an_exchange_meets_all_compute_until_it_is_needed() -> None:
    changes = {"parallelism_tensor": 2, "parallelism_sequence_parallel": True}
    scenario, layout = loaded(FOUR_LAYERS, [*USUAL, "expert_all_to_all"], **changes)
    pricer = Pricer(scenario, layout, expert_load(scenario, layout))
    program = build(scenario, layout, schedule_of(scenario, layout))
    met = [beside for each in program.classes if isinstance(each, Compute) for beside in each.beside]
    assert max(len(beside.during) for beside in met) > 2

    for beside in set(met):
        lasts = float(pricer.price([beside.exchange]).seconds.mean())
        free = [float(pricer.price([each]).seconds.mean()) for each in beside.during]
        now = [float(pricer.price([replace(each, beside=(beside,))]).seconds.mean()) for each in beside.during]
        held = [float(pricer.price([replace(each, overlapped=True)]).seconds.mean()) for each in beside.during]
        # While it lasts, compute advances at the rate of the multiprocessors that it leaves free.
        lost = [min(h - f, lasts * f / sum(free) * (1 - f / h)) for f, h in zip(free, held, strict=True)]
        assert sum(now) - sum(free) == pytest.approx(sum(lost), rel=0.01, abs=1e-9)


@pytest.mark.parametrize("schedule", ["zb1p", "zbv"])
def test_a_split_backward_sends_before_its_weight_gradient_begins(schedule: str) -> None:
    changes = {"parallelism_virtual_stages": 2} if schedule == "zbv" else {}
    played = step(FOUR_LAYERS, ["pipeline"], "events", parallelism_pipeline=2, parallelism_schedule=schedule, **changes)
    program, label = played.program, np.array(played.program.labels)[played.program.label]
    waits = np.repeat(np.arange(len(program)), np.diff(program.start))
    of_sends = (program.stream[waits] == PIPELINE) & (program.stream[program.needs] == COMPUTE)
    assert not any(label[op].startswith("W ") for op in program.needs[of_sends])


def test_both_messages_of_a_pair_leave_before_the_last_weight_gradient() -> None:
    scenario, layout = chunk_pair._published()
    program = alone(scenario, layout, chunk_pair._pair(layout))
    order = [program.labels[label] for label in program.label[program.stream == COMPUTE]]

    assert order[-3:] == ["I dense", "F dense", "W dense"]


# Engines


@pytest.mark.parametrize(
    ("overlap", "changes"),
    [
        (["expert_all_to_all"], {}),
        (["expert_all_to_all"], INTERLEAVED),
        (["context"], {"parallelism_context": 2}),
        (["tensor"], {"parallelism_tensor": 2, "parallelism_sequence_parallel": True}),
    ],
)
def test_the_engines_agree_where_one_stream_communicates_at_a_time(overlap: list[str], changes: dict[str, Any]) -> None:
    steps = [step(FOUR_LAYERS, overlap, engine, **changes) for engine in ("events", "max-plus")]

    assert steps[0].seconds == pytest.approx(steps[1].seconds, rel=1e-9 if "context" not in overlap else 1e-6)


def test_a_pair_alone_is_played_alike_by_both_engines() -> None:
    scenario, layout = loaded(FOUR_LAYERS, ["expert_all_to_all"])
    program = alone(scenario, layout, Overlapped(Action(0, "F", 1), Action(0, "B", 0)))

    assert (ends(program, scenario, layout).end > 0.0).all()
