"""Pipeline schedules: what each rank does, how much it holds, and what the lists are worth when they are played.

The check values are from the DeepSeek-V3 report (Table 2), the zero-bubble paper (Table 2), and from replays of the
orders of PyTorch 2.13.0 and DeepSeek's DualPipe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from simulator import errors, schedules
from simulator.schedules import Action, Overlapped, Schedule


def text(schedule: Schedule) -> list[str]:
    return [" ".join(map(str, steps)) for steps in schedule.steps]


def lone_and_paired(schedule: Schedule, rank: int) -> Counter[str]:
    return Counter("pair" if isinstance(step, Overlapped) else step.kind for step in schedule.steps[rank])


def replay(
    schedule: Schedule, f: float = 10, i: float = 10, w: float = 10, pair: float = 30, latency: float = 0
) -> list[float]:
    """Play the lists, one step at a time per rank; return the ends of the ranks. A message takes ``latency``."""
    duration = {"F": f, "I": i, "W": w, "B": i + w}
    outputs: dict[tuple[str, int, int], tuple[float, int]] = {}  # (direction, stage, microbatch) -> (end, rank)
    clock, position = [0.0] * schedule.ranks, [0] * schedule.ranks

    def inputs(step: Action | Overlapped) -> list[tuple[str, int, int]]:
        before = {"F": ("forward", -1), "I": ("backward", 1), "B": ("backward", 1)}
        wanted = [(*before[kind], stage, m) for stage, kind, m in schedules.parts(step) if kind != "W"]
        return [(way, stage + hop, m) for way, hop, stage, m in wanted if 0 <= stage + hop < schedule.stages]

    while any(position[rank] < len(steps) for rank, steps in enumerate(schedule.steps)):
        for rank, steps in enumerate(schedule.steps):
            while position[rank] < len(steps) and all(need in outputs for need in inputs(steps[position[rank]])):
                step = steps[position[rank]]
                arrivals = [
                    end + latency * (sender != rank) for end, sender in (outputs[need] for need in inputs(step))
                ]
                start = max([clock[rank], *arrivals])
                clock[rank] = start + (pair if isinstance(step, Overlapped) else duration[step.kind])
                for stage, kind, microbatch in schedules.parts(step):
                    if kind != "W":
                        outputs["forward" if kind == "F" else "backward", stage, microbatch] = (clock[rank], rank)
                position[rank] += 1
    return clock


# The lists


def test_actions_are_written_as_pytorch_writes_them() -> None:
    assert [str(Action(0, "F", 3)), str(Action(4, "I", 0)), str(Action(4, "W", 0)), str(Action(7, "B", 4))] == [
        "0F3",
        "4I0",
        "4W0",
        "7B4",
    ]
    assert str(Overlapped(Action(4, "F", 4), Action(3, "B", 0))) == "(4F4;3B0)OVERLAP_F_B"


def test_1f1b_warms_up_alternates_and_cools_down() -> None:
    assert text(schedules.build("1f1b", 3, 4)) == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]


def test_1f1b_with_fewer_microbatches_than_ranks_is_gpipe_on_the_first_ranks() -> None:
    assert text(schedules.build("1f1b", 4, 2)) == [
        "0F0 0F1 0B0 0B1",
        "1F0 1F1 1B0 1B1",
        "2F0 2F1 2B0 2B1",
        "3F0 3B0 3F1 3B1",
    ]


def test_zbh2_fills_the_first_wait_with_forwards_and_the_last_with_weights() -> None:
    """Near the end rank 2 puts off four W, rank 1 two: a gradient then leaves for rank 0 every two passes."""
    assert text(schedules.build("zbh2", 3, 6)) == [
        "0F0 0F1 0F2 0F3 0F4 0I0 0W0 0F5 0I1 0W1 0I2 0W2 0I3 0W3 0I4 0W4 0I5 0W5",
        "1F0 1F1 1F2 1I0 1W0 1F3 1I1 1F4 1I2 1F5 1I3 1W1 1I4 1W2 1I5 1W3 1W4 1W5",
        "2F0 2I0 2W0 2F1 2I1 2F2 2I2 2F3 2I3 2F4 2I4 2F5 2I5 2W1 2W2 2W3 2W4 2W5",
    ]


def test_which_schedules_pair_and_which_run_both_ways() -> None:
    built = {name: schedules.build(name, 4, 8) for name in schedules.SCHEDULES}

    assert {name for name, each in built.items() if each.pairs} == {"dualpipe", "dualpipev"}
    assert {name for name, each in built.items() if each.bidirectional} == {"dualpipe"}


def test_dualpipe_of_two_ranks_runs_both_directions() -> None:
    """Both ranks are in the middle: the first forward and backward of step 4 stay apart."""
    schedule = schedules.build("dualpipe", 2, 4)

    assert text(schedule) == [
        "0F0 1F2 0F1 1B2 (1F3;0B0)OVERLAP_F_B 1B3 0I1 0W1",
        "0F2 1F0 0F3 1B0 (1F1;0B2)OVERLAP_F_B 1B1 0I3 0W3",
    ]
    assert schedule.placement == ((0, 1), (1, 0))


def test_actions_unpack_overlapped_pairs() -> None:
    actions = list(schedules.build("dualpipev", 1, 2).actions(0))

    assert " ".join(map(str, actions)) == "0F0 1F0 0F1 1B0 1F1 0B0 1B1 0I1 0W1"


def test_dualpipe_step_counts_of_deepseek_v3() -> None:
    """P=16, M=120: what a rank does alone and what it overlaps, outermost and middle ranks."""
    schedule = schedules.build("dualpipe", 16, 120)
    counts = [lone_and_paired(schedule, rank) for rank in range(16)]
    total = sum(counts, Counter())

    assert counts[0] == counts[15] == {"F": 23, "B": 8, "I": 15, "W": 15, "pair": 97}
    assert counts[7] == counts[8] == {"F": 17, "B": 9, "I": 8, "W": 8, "pair": 103}
    assert [count["pair"] for count in counts[6:10]] == [103] * 4
    assert total == {"F": 314, "B": 130, "I": 184, "W": 184, "pair": 1606}


@pytest.mark.parametrize(
    ("name", "virtual_stages", "per_rank"),
    [
        ("1f1b", 1, [16] * 4),
        ("zb1p", 1, [24] * 4),
        ("interleaved", 2, [32] * 4),
        ("zbv", 1, [48] * 4),
        ("dualpipev", 1, [34, 32, 30, 29]),
    ],
)
def test_number_of_steps_at_4_ranks_and_8_microbatches(name: str, virtual_stages: int, per_rank: list[int]) -> None:
    assert [len(steps) for steps in schedules.build(name, 4, 8, virtual_stages).steps] == per_rank


def test_dualpipev_pairs() -> None:
    schedule = schedules.build("dualpipev", 4, 8)

    assert [lone_and_paired(schedule, rank)["pair"] for rank in range(4)] == [5, 6, 7, 7]


def test_stages_in_a_loop_in_a_v_and_in_both_directions() -> None:
    loop, vee, both = (schedules.build(name, 4, 8, v) for name, v in (("interleaved", 2), ("zbv", 1), ("dualpipe", 1)))

    assert loop.placement == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert vee.placement == ((0, 7), (1, 6), (2, 5), (3, 4))
    assert both.placement == ((0, 3), (1, 2), (2, 1), (3, 0))
    assert [loop.rank_of(5, 0), vee.rank_of(5, 0), loop.stages, vee.stages, both.stages] == [1, 2, 8, 8, 4]
    assert [both.rank_of(1, microbatch) for microbatch in range(8)] == [1, 1, 1, 1, 2, 2, 2, 2]


def test_which_schedules_split_the_backward() -> None:
    split = {name: schedules.build(name, 4, 8).splits_backward for name in schedules.SCHEDULES}

    assert split == {
        "gpipe": False,
        "1f1b": False,
        "interleaved": False,
        "zb1p": True,
        "zbh2": True,
        "zbv": True,
        "dualpipe": True,
        "dualpipev": True,
    }


# What a rank holds


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "virtual_stages", "peaks"),
    [
        ("gpipe", 4, 8, 1, (8, 8, 8, 8)),
        ("1f1b", 4, 8, 1, (4, 3, 2, 1)),
        ("1f1b", 4, 2, 1, (2, 2, 2, 1)),
        ("interleaved", 4, 8, 2, (11, 9, 7, 5)),
        ("interleaved", 8, 16, 2, (23, 21, 19, 17, 15, 13, 11, 9)),
        ("interleaved", 4, 4, 2, (8, 8, 7, 5)),
        ("zb1p", 4, 8, 1, (4, 4, 4, 4)),
        ("zb1p", 8, 24, 1, (8,) * 8),
        ("zbh2", 4, 8, 1, (7,) * 4),
        ("zbh2", 4, 5, 1, (5,) * 4),
        ("zbh2", 8, 24, 1, (15,) * 8),
        ("zbv", 4, 8, 1, (8, 8, 8, 8)),
        ("dualpipe", 4, 8, 1, (5,) * 4),
        ("dualpipe", 8, 20, 1, (9,) * 8),
        ("dualpipe", 16, 120, 1, (17,) * 16),
        ("dualpipev", 4, 8, 1, (9,) * 4),
    ],
)
def test_peak_activations(
    name: str, ranks: int, microbatches: int, virtual_stages: int, peaks: tuple[int, ...]
) -> None:
    assert schedules.in_flight(schedules.build(name, ranks, microbatches, virtual_stages)) == peaks


def test_activations_by_stage_while_each_step_runs() -> None:
    """0F0 1F2 0F1 1B2 (1F3;0B0) 1B3 0I1 0W1: a forward counts before its step, a release after it."""
    held = schedules.in_flight_by_stage(schedules.build("dualpipe", 2, 4), rank=0)

    assert held.T.tolist() == [
        [1, 1, 2, 2, 2, 1, 1, 1],  # stage 0
        [0, 1, 1, 1, 1, 1, 0, 0],  # stage 1
    ]
    assert held.dtype == np.int64


def test_split_backward_holds_its_activation_until_the_weight_pass() -> None:
    """On rank 1 of 2: 1F0 1I0 1F1 1I1 1W0 1W1."""
    assert schedules.in_flight_by_stage(schedules.build("zb1p", 2, 2), rank=1).T.tolist() == [[1, 1, 2, 2, 2, 1]]


# What the lists are worth when they are played


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "virtual_stages", "makespan"),
    [
        ("gpipe", 4, 8, 1, 330),
        ("1f1b", 4, 8, 1, 330),
        ("interleaved", 4, 8, 2, 570),
        ("interleaved", 8, 16, 2, 1170),
        ("interleaved", 8, 16, 4, 2130),
        ("zb1p", 4, 8, 1, 270),
        ("zbh2", 4, 8, 1, 270),
        ("zbv", 4, 8, 1, 510),
    ],
)
def test_makespan_of_equal_passes(
    name: str, ranks: int, microbatches: int, virtual_stages: int, makespan: float
) -> None:
    assert max(replay(schedules.build(name, ranks, microbatches, virtual_stages))) == makespan


def test_zb1p_bubble_is_p_minus_1_times_f_plus_i_minus_w() -> None:
    assert max(replay(schedules.build("zb1p", 4, 8), f=10, i=13, w=8)) == 8 * 31 + 3 * (10 + 13 - 8)
    assert max(replay(schedules.build("zb1p", 8, 24), f=10, i=13, w=8)) == 24 * 31 + 105


def test_zbv_bubble_of_unequal_passes() -> None:
    assert max(replay(schedules.build("zbv", 8, 24), f=10, i=13, w=8)) == 2 * 24 * 31 + 91


@pytest.mark.parametrize(
    ("ranks", "microbatches", "f", "i", "w", "pair", "bubble", "formula"),
    [
        (8, 20, 10, 10, 10, 30, 60, 60),
        (8, 32, 10, 10, 10, 30, 60, 60),
        (8, 32, 10, 10, 10, 24, 42, 42),
        (8, 32, 10, 13, 8, 28, 66, 75),
        (8, 32, 12, 16, 9, 30, 72, 84),
        (16, 120, 10, 10, 10, 24, 98, 98),
        (16, 120, 10, 15, 10, 35, 200, 210),
    ],
)
def test_dualpipe_bubble(
    ranks: int, microbatches: int, f: float, i: float, w: float, pair: float, bubble: float, formula: float
) -> None:
    """(P/2-1)(F&B + B - 3W) is exact for F = I = W and an upper bound otherwise."""
    schedule = schedules.build("dualpipe", ranks, microbatches)
    lasts = {"F": f, "I": i, "W": w, "B": i + w, "pair": pair}
    makespan = max(replay(schedule, f, i, w, pair))
    busy = [sum(lasts[kind] * n for kind, n in lone_and_paired(schedule, rank).items()) for rank in range(ranks)]

    assert makespan - min(busy) == bubble
    assert (ranks // 2 - 1) * (pair + (i + w) - 3 * w) == formula


def test_dualpipe_bubble_is_smaller_at_the_ends() -> None:
    schedule = schedules.build("dualpipe", 8, 32)
    makespan = max(replay(schedule, pair=24))
    lasts = {"F": 10, "I": 10, "W": 10, "B": 20, "pair": 24}

    assert [
        makespan - sum(lasts[kind] * n for kind, n in lone_and_paired(schedule, rank).items()) for rank in range(8)
    ] == [30, 36, 42, 42, 42, 42, 36, 30]


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "virtual_stages", "extra"),
    [
        ("1f1b", 4, 4, 1, 10),
        ("1f1b", 4, 32, 1, 52),
        ("1f1b", 16, 64, 1, 148),
        ("interleaved", 4, 8, 2, 14),
        ("interleaved", 8, 16, 2, 30),
        ("zb1p", 4, 8, 1, 12),
        ("zb1p", 8, 16, 1, 28),
        ("zbv", 4, 8, 1, 13),
        ("dualpipev", 4, 8, 1, 16),
        ("dualpipev", 4, 16, 1, 28),
        ("dualpipev", 4, 32, 1, 52),
    ],
)
def test_extra_makespan_per_unit_of_message_latency(
    name: str, ranks: int, microbatches: int, virtual_stages: int, extra: int
) -> None:
    schedule = schedules.build(name, ranks, microbatches, virtual_stages)

    assert max(replay(schedule, latency=1)) - max(replay(schedule)) == extra


# check


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "virtual_stages"),
    [
        *(("gpipe", p, m, 1) for p, m in ((1, 1), (1, 5), (4, 3), (8, 16))),
        *(("1f1b", p, m, 1) for p, m in ((1, 1), (1, 5), (4, 3), (8, 16), (16, 120))),
        *(("interleaved", p, m, v) for p, m, v in ((1, 3, 1), (1, 3, 4), (4, 4, 2), (4, 12, 3), (16, 32, 2))),
        *(("zb1p", p, m, 1) for p, m in ((1, 1), (1, 5), (4, 2), (8, 16), (16, 120))),
        *(("zbh2", p, m, 1) for p, m in ((1, 1), (1, 5), (4, 2), (4, 6), (4, 7), (8, 16), (16, 120))),
        *(("zbv", p, m, 2) for p, m in ((1, 1), (1, 5), (4, 2), (4, 9), (16, 120))),
        *(("dualpipe", p, m, 1) for p, m in ((2, 4), (4, 8), (6, 14), (8, 20), (16, 120))),
        *(("dualpipev", p, m, 2) for p, m in ((1, 2), (3, 6), (4, 11), (8, 16), (16, 120))),
    ],
)
def test_every_schedule_passes_its_check(name: str, ranks: int, microbatches: int, virtual_stages: int) -> None:
    schedules.check(schedules.build(name, ranks, microbatches, virtual_stages))


def with_rank(schedule: Schedule, rank: int, steps: Sequence[Action | Overlapped]) -> Schedule:
    """Return the schedule with one rank's list exchanged."""
    return replace(schedule, steps=(*schedule.steps[:rank], tuple(steps), *schedule.steps[rank + 1 :]))


def refusal(schedule: Schedule) -> str:
    with pytest.raises(ValueError) as caught:
        schedules.check(schedule)
    return str(caught.value)


def test_check_finds_a_missing_action() -> None:
    schedule = schedules.build("zb1p", 2, 2)

    assert refusal(with_rank(schedule, 1, list(schedule.steps[1][:-1]))) == "zb1p: rank 1, 1W1: missing"
    assert refusal(with_rank(schedule, 0, [])) == "zb1p: rank 0, 0F0: missing"
    assert refusal(with_rank(schedules.build("1f1b", 1, 1), 0, [Action(0, "F", 0)])) == "1f1b: rank 0, 0B0: missing"


def test_check_finds_a_repeated_action() -> None:
    schedule = schedules.build("gpipe", 2, 2)

    assert refusal(with_rank(schedule, 1, [*schedule.steps[1], Action(1, "B", 0)])) == (
        "gpipe: rank 1, 1B0: appears twice"
    )


def test_check_finds_a_backward_that_is_both_whole_and_split() -> None:
    schedule = schedules.build("gpipe", 1, 1)

    assert refusal(with_rank(schedule, 0, [*schedule.steps[0], Action(0, "I", 0), Action(0, "W", 0)])) == (
        "gpipe: rank 0, 0B0: the backward is there twice, 0I0 is part of it"
    )


def test_check_finds_a_weight_pass_without_its_input_pass() -> None:
    schedule = schedules.build("gpipe", 1, 1)

    assert refusal(with_rank(schedule, 0, [*schedule.steps[0], Action(0, "W", 0)])) == (
        "gpipe: rank 0, 0W0: comes before 0I0"
    )


def test_check_finds_a_wrong_order() -> None:
    f, i, w, b = (Action(0, kind, 0) for kind in ("F", "I", "W", "B"))
    whole, split = schedules.build("1f1b", 1, 1), schedules.build("zb1p", 1, 1)

    assert refusal(with_rank(whole, 0, [b, f])) == "1f1b: rank 0, 0B0: comes before 0F0"
    assert refusal(with_rank(split, 0, [f, w, i])) == "zb1p: rank 0, 0W0: comes before 0I0"


def test_check_finds_a_stranger() -> None:
    schedule = schedules.build("1f1b", 2, 2)
    dual = schedules.build("dualpipe", 2, 4)

    assert refusal(with_rank(schedule, 1, [Action(0, "F", 0)])) == (
        "1f1b: rank 1, 0F0: stage 0 of microbatch 0 belongs to rank 0"
    )
    assert refusal(with_rank(schedule, 1, [Action(1, "F", 2)])) == (
        "1f1b: rank 1, 1F2: there are 2 stages and 2 microbatches"
    )
    assert refusal(with_rank(dual, 0, [Action(0, "F", 3)])) == (
        "dualpipe: rank 0, 0F3: stage 0 of microbatch 3 belongs to rank 1"
    )


def test_check_finds_a_pair_of_two_forwards() -> None:
    schedule = schedules.build("1f1b", 1, 2)

    assert refusal(with_rank(schedule, 0, [Overlapped(Action(0, "F", 0), Action(0, "F", 1))])) == (
        "1f1b: rank 0, (0F0;0F1)OVERLAP_F_B: an overlapped pair is a forward (F) with a backward (I or B)"
    )


def test_check_finds_a_deadlock_and_says_who_waits_for_what() -> None:
    """Each order is fine alone, but rank 0 wants a gradient that rank 1 gives only after its next forward."""
    schedule = schedules.build("1f1b", 2, 2)
    first = [Action(0, kind, microbatch) for microbatch in (0, 1) for kind in ("F", "B")]
    second = [Action(1, kind, microbatch) for kind in ("F", "B") for microbatch in (0, 1)]

    assert refusal(with_rank(with_rank(schedule, 0, first), 1, second)) == (
        "1f1b: deadlock: rank 0 waits at 0B0 for 1B0; rank 1 waits at 1F1 for 0F1"
    )


def test_check_knows_that_a_pair_starts_only_when_both_parts_can() -> None:
    """A pair cannot supply its own backward with its forward."""
    schedule = schedules.build("1f1b", 1, 1)

    assert refusal(with_rank(schedule, 0, [Overlapped(Action(0, "F", 0), Action(0, "B", 0))])) == (
        "1f1b: deadlock: rank 0 waits at (0F0;0B0)OVERLAP_F_B for 0F0"
    )


def test_check_finds_a_list_too_few_and_a_stage_without_a_rank() -> None:
    schedule = schedules.build("1f1b", 2, 2)

    assert refusal(replace(schedule, steps=schedule.steps[:1])) == "1f1b: 2 ranks, but 1 step lists and 2 placements"
    assert refusal(replace(schedule, placement=((0,), ()))) == (
        "1f1b: ranks per stage must be all 1 or all 2, the placement gives {0: 1, 1: 0}"
    )


# build


def test_build_gives_the_same_object_again() -> None:
    assert schedules.build("dualpipe", 8, 20) is schedules.build("dualpipe", 8, 20)


def test_one_rank_works_wherever_the_domain_allows_it() -> None:
    assert {
        name: text(schedules.build(name, 1, 2)) for name in schedules.SCHEDULES if not name.startswith("dualpipe")
    } == {
        "gpipe": ["0F0 0F1 0B0 0B1"],
        "1f1b": ["0F0 0B0 0F1 0B1"],
        "interleaved": ["0F0 0B0 0F1 0B1"],
        "zb1p": ["0F0 0I0 0W0 0F1 0I1 0W1"],
        "zbh2": ["0F0 0I0 0W0 0F1 0I1 0W1"],
        "zbv": ["0F0 1F0 1I0 1W0 0F1 0I0 0W0 1F1 1I1 1W1 0I1 0W1"],
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("dualpip", 4, 8),
            "unknown schedule 'dualpip'; did you mean 'dualpipe'? Allowed: 1f1b, dualpipe, dualpipev, ",
        ),
        (("1f1b", 0, 8), "1f1b needs at least 1 pipeline rank and 1 microbatch; got 0 ranks and 8 microbatches"),
        (("gpipe", 4, 0), "gpipe needs at least 1 pipeline rank and 1 microbatch; got 4 ranks and 0 microbatches"),
        (("1f1b", 4, 8, 2), "1f1b has no virtual stages; got virtual_stages 2"),
        (("zbv", 4, 8, 3), "zbv has 2 chunks per rank; got virtual_stages 3"),
        (("interleaved", 4, 8, 0), "interleaved needs at least 1 chunk per rank; got virtual_stages 0"),
        (
            ("interleaved", 4, 6, 2),
            "interleaved needs a number of microbatches that is a multiple of the pipeline ranks; "
            "got 6 microbatches on 4 ranks",
        ),
        *(
            (
                ("dualpipe", ranks, microbatches),
                "dualpipe needs an even number of pipeline ranks and an even number of microbatches, at least 2 per "
                f"rank; got {microbatches} microbatches on {ranks} ranks",
            )
            for ranks, microbatches in ((1, 4), (3, 8), (4, 9), (4, 6))
        ),
        (("dualpipev", 4, 7), "dualpipev needs at least 2 microbatches per rank; got 7 microbatches on 4 ranks"),
    ],
)
def test_build_refuses_what_lies_outside_the_domain(arguments: tuple[str, int, int], message: str) -> None:
    with pytest.raises(errors.InvalidInput) as caught:
        schedules.build(*arguments)

    assert str(caught.value).startswith(f"parallelism.schedule: {message}")
