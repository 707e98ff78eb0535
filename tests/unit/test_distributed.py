"""Several processes: a divided layer is the whole layer, exchanges are timed, and a failure leaves nothing behind."""

from __future__ import annotations

import multiprocessing

import pytest

from validation import distributed
from validation.cases import Case, Implementation, Layer, all_to_all, expert_parallel_layer, spread
from validation.suites import Effort, splits

TINY = Effort(seconds=0.0, repeats=3, patience_s=0.1)


def case(
    implementation: Implementation, factor: float | None, *, experts: int = 4, which: str = "FB", ranks: int = 2
) -> Case:
    pad, counts = implementation == "batched", spread(24, 2, range(1, experts + 1))
    layer = Layer("fp32", 24, 16, 12, experts, 2, True, 1, factor, pad, implementation, counts)
    return expert_parallel_layer(layer, ranks, "F" if which == "F" else "FB", "gloo")


def test_a_layer_on_two_ranks_has_the_outputs_and_gradients_of_one() -> None:
    tried = {"padded, dropping": case("batched", 0.75), "dropless": case("loop", None), "dropping": case("loop", 0.5)}
    found = dict(zip(tried, distributed.agreement(list(tried.values())), strict=True))

    weights = ("router.weight", "experts.up_weight", "experts.down_weight", "shared.up.weight", "shared.down.weight")
    for differences in found.values():
        assert set(differences) == {"output", "input gradient", *(f"{name} gradient" for name in weights)}
        assert max(differences.values()) < 1e-12
    assert multiprocessing.active_children() == []


def test_exchanges_and_layers_are_timed_in_one_group_that_can_be_left_at_any_time() -> None:
    exchanges = [all_to_all(sent, split, "gloo") for split, sent in splits(2, 4096).items()]
    nothing = all_to_all([[0, 4], [0, 0]], "one way", "gloo")
    tried = [*exchanges, nothing, case("batched", 1.0, which="F"), case("loop", 0.5)]
    large = [all_to_all(sent, split, "gloo") for split, sent in splits(2, 2**24).items()]
    timings = distributed.timings([*tried, *large], 2, TINY)
    found = [next(timings) for _ in tried]

    assert [key for key, _, _ in found] == [each.key for each in tried]
    for _, seconds, reference_s in found:
        assert len(seconds) >= 3
        assert min(*seconds, reference_s) > 0.0
    timings.close()
    assert multiprocessing.active_children() == []


def test_a_rank_that_fails_is_named_and_no_process_stays() -> None:
    with pytest.raises(RuntimeError, match=r"^rank [01] of 2: ValueError: 3 experts do not divide over 2 ranks$"):
        distributed.agreement([case("loop", None, experts=3)])
    assert multiprocessing.active_children() == []
