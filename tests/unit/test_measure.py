"""Measuring: every case of every suite runs, pieces are the products they claim to be, a run can be resumed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from simulator.errors import NotSimulated
from validation import cases, measure, records, shapes, suites, torch_cold, torch_pieces
from validation.cases import Case, Layer, gemm, grouped_gemm, memory, spread
from validation.suites import Effort, Suite

torch.set_num_threads(1)  # tensors are small, and other tests run beside
CPU = torch.device("cpu")
TINY = Effort(seconds=0.0, repeats=2, patience_s=1.0)


def sort_of(case: Case) -> tuple[str, ...]:
    """What decides which code a case runs."""
    names = ("op", "which", "form", "implementation", "gated", "value_dim", "pad", "shared_experts", "causal")
    shown = (case.fields.get(name) for name in names)
    return case.kind, *(
        str(value if name != "value_dim" else value is not None) for name, value in zip(names, shown, strict=True)
    )


def one_of_each() -> list[Case]:
    """One case of each sort, the GPU's at a 64th of their size."""
    every = [case for group in shapes.gpu_groups(64) for case in group]
    every += [case for group in shapes.layers(12, 5, 2e8) for case in group]
    every += [case for group in shapes.attentions(2, 2, 256) for case in group]
    every += [case for group in shapes.steps(("a",), (4,), (1.0,)) for case in group]
    return list({sort_of(case): case for case in every if case.fields["form"] != "fp8"}.values())


def test_every_sort_of_case_runs_and_runs_again() -> None:
    tried = one_of_each()

    assert {case.kind for case in tried} == {"gemm", "grouped_gemm", "attention", "memory", "layer", "step"}
    assert len(tried) > 60
    for case in tried:
        run = torch_pieces.work(case, CPU)
        for _ in range(2):
            run()


@pytest.mark.parametrize("form", ["fp32", "bf16"])
def test_a_linear_and_its_gradients_have_their_shapes(form: str) -> None:
    sizes = {"F": (5, 6), "I": (5, 7), "W": (6, 7)}

    for which, size in sizes.items():
        result = torch_pieces.work(gemm(which, form, 5, 6, 7), CPU)()
        assert isinstance(result, torch.Tensor)
        assert (tuple(result.shape), result.dtype) == (size, torch_pieces.DTYPES[form])


@pytest.mark.parametrize(("implementation", "counts"), [("batched", [8, 8]), ("grouped", [3, 13]), ("loop", [0, 16])])
def test_a_grouped_linear_has_one_gradient_at_a_time(implementation: str, counts: list[int]) -> None:
    def run(which: str) -> Any:
        return torch_pieces.work(grouped_gemm(which, "fp32", 24, 12, counts, implementation), CPU)()

    assert run("F").shape == (16, 24)
    assert [tuple(each.shape) for each in run("I")] == [(16, 12)]
    assert [tuple(each.shape) for each in run("W")] == [(2, 12, 24)]


def test_weights_take_turns_until_they_have_left_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 KB among 160 KB wait for 2 others; a layer of 40 KB has 3 copies; 200 KB do not fit anyway."""
    monkeypatch.setattr(torch_cold, "COLD_BYTES", {"cpu": 160e3})
    torch_cold._pool.cache_clear()
    factory = {"device": CPU, "dtype": torch.float32}

    turns = torch_cold.cold_weights((100, 100), factory)
    numbers = torch_cold.in_turn([partial(int, number) for number in range(3)])
    layer = torch.nn.Linear(100, 100, bias=False)
    copies = torch_cold.cold_copies(layer, layer.parameters())

    assert [tuple(each.shape) for each in turns] == [(100, 100)] * 3  # aligned, 4 do not fit
    assert len({each.data_ptr() for each in turns}) == 3
    assert len(torch_cold.cold_weights((100, 500), factory)) == 1
    assert [numbers() for _ in range(4)] == [0, 1, 2, 0]
    assert len({each.weight.data_ptr() for each in copies}) == 4
    assert all(bool((each.weight == layer.weight).all()) for each in copies)
    torch_cold._pool.cache_clear()


def test_outputs_go_to_other_memory_until_the_cache_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_cold, "COLD_BYTES", {"cpu": 160e3})
    run: Callable[[], Any] = torch_cold.with_fresh_outputs(lambda: [torch.zeros(10_000)], CPU)

    places = [run()[0].data_ptr() for _ in range(12)]

    assert all(len(set(places[at : at + 4])) == 4 for at in range(9))


def test_products_in_fp8_have_their_shapes_and_need_a_gpu() -> None:
    dense, meta = torch_pieces.fp8_dense(32, 48, 64, CPU)(), torch.device("meta")
    grouped = torch_pieces.fp8_grouped([16, 48], 32, 64, meta)()

    assert isinstance(dense, torch.Tensor)
    assert isinstance(grouped, torch.Tensor)
    assert (dense.shape, grouped.shape) == ((32, 48), (64, 32))
    with pytest.raises(NotSimulated):
        torch_pieces.work(gemm("F", "fp8", 32, 48, 64), CPU)


@pytest.mark.parametrize("form", ["fp32", "bf16"])
@pytest.mark.parametrize("weights", [[1.0] * 8, [9.0, 3.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.1], [1.0, 1.0, *[1e-9] * 6]])
def test_the_tokens_of_a_layer_load_its_experts_as_the_case_says(form: str, weights: list[float]) -> None:
    counts = spread(96, 2, weights)
    fields = Layer(form, 96, 40, 16, 8, 2, True, 0, None, False, "loop", counts).case("F").fields
    factory = {"dtype": torch_pieces.DTYPES[form], "device": CPU}
    layer = torch_pieces.moe_layer(fields, factory)
    output = layer(torch_pieces.loaded_tokens(layer, fields, factory))

    assert output.plan.assigned.tolist() == list(counts)
    assert output.y.isfinite().all()


def test_the_choices_of_a_case_name_no_expert_twice() -> None:
    counts = (12, 7, 5, 0, 12)
    chosen = torch_pieces.chosen_experts(counts, 12, 3, CPU)

    assert chosen.flatten().bincount(minlength=5).tolist() == list(counts)
    assert all(len(set(row)) == 3 for row in chosen.tolist())


# --- runs -------------------------------------------------------------------------------------------------------------


SMALL = [gemm(which, "fp32", 8, 8, 8) for which in "FIW"] + [memory("norm", "F", "fp32", 8, 16)]


def small_suite(*more: Case) -> Suite:
    return Suite("cpu", [SMALL[:2], [*SMALL[1:], *more]], {}, TINY, TINY)


def test_a_run_measures_every_case_once_in_each_pass_and_then_has_nothing_to_do(tmp_path: Path) -> None:
    out = tmp_path / "set.jsonl"
    measure.Run(small_suite(), out, passes=2)()
    before = out.read_bytes()
    measure.Run(small_suite(), out, passes=2)()
    found = records.read(out)

    assert out.read_bytes() == before
    assert [(each.key, each.number) for each in found.records] == [(case.key, n) for n in (1, 2) for case in SMALL]
    assert [dict(each.case) for each in found.records[:4]] == [dict(case.fields) for case in SMALL]
    assert (found.environment.kind, found.environment.threads) == ("cpu", 1)
    for each in found.records:
        assert 0.0 < each.seconds <= each.median_s
        assert each.reference_s > 0.0
        assert each.repeats == 2


def test_an_interruption_loses_nothing_that_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, made, build = tmp_path / "set.jsonl", list[str](), torch_pieces.work

    def work(case: Case, device: torch.device) -> Callable[[], object]:
        made.append(case.key)
        if len(made) == 3:
            raise KeyboardInterrupt
        return build(case, device)

    monkeypatch.setattr(measure, "work", work)
    monkeypatch.setattr(measure, "suite", lambda *_, **__: small_suite())
    codes = [measure.main(["--out", str(out), "--passes", "1"]) for _ in range(2)]

    assert codes == [130, 0]
    assert made == [SMALL[0].key, SMALL[1].key, SMALL[2].key, SMALL[2].key, SMALL[3].key]
    assert [each.key for each in records.read(out).records] == [case.key for case in SMALL]


def test_a_time_limit_stops_between_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, clock = tmp_path / "set.jsonl", iter(range(1000))
    monkeypatch.setattr(measure, "monotonic", lambda: float(next(clock)))
    run = measure.Run(small_suite(), out, passes=2, limit_s=4.5)

    with pytest.raises(measure.LimitReached):
        run()
    assert 1 <= len(records.read(out).records) < 8


def test_what_a_device_cannot_run_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, fp8 = tmp_path / "set.jsonl", gemm("F", "fp8", 16, 16, 16)
    run = measure.Run(small_suite(fp8), out, passes=1)
    run()

    assert run.skipped == {fp8.key: "this cpu has no fp8 products"}
    assert f"left out {fp8.key}" in capsys.readouterr().err
    assert len(records.read(out).records) == len(SMALL)


def test_a_mistake_in_the_command_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"a": 1}\n')
    wrong = [
        (["--suite", "quick", "--out", str(other)], "other.jsonl:1: the first line"),
        (["--passes", "0", "--out", str(other)], "--passes must be 1 or more"),
        (["--limit-s", "0", "--out", str(other)], "--limit-s above 0"),
    ]
    if not torch.cuda.is_available():
        wrong.append((["--suite", "gpu", "--out", str(tmp_path / "new")], "the gpu suite needs a CUDA device"))

    for arguments, message in wrong:
        assert measure.main(arguments) == 2
        told = capsys.readouterr().err
        assert message in told
        assert len(told.splitlines()) == 1


def test_repeats_are_warmed_up_and_stand_between_two_references() -> None:
    calls: list[str] = []
    seconds, reference_s = measure.timed(lambda: calls.append("case"), lambda: calls.append("fixed"), TINY, CPU)

    assert calls == ["case", "case", "fixed", "fixed", "case", "case", "fixed", "fixed"]
    assert len(seconds) == 2
    assert reference_s > 0.0


def test_of_the_repeats_the_minimum_the_median_and_the_quartiles_are_kept() -> None:
    case = cases.gemm("F", "fp32", 1, 1, 1)
    kept = measure.record(case, 2, "abc", [0.5, 0.125, 0.25, 0.375, 0.4375], 0.003)

    spread_of_quartiles = (0.4375 - 0.25) / 0.375
    assert kept == records.Record(
        case.key, "gemm", 2, "abc", dict(case.fields), 0.125, 0.375, spread_of_quartiles, 5, 0.003
    )


def test_a_process_of_its_own_gets_the_allocators_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, Any] = {}

    class Done:
        returncode = 7

    def run(command: list[str], env: dict[str, str], check: bool) -> Done:
        started.update(command=command[1:], env=env, check=check)
        return Done()

    monkeypatch.setattr("subprocess.run", run)

    assert suites.launch("full", tmp_path / "a.jsonl", passes=3, limit_s=9.0) == 7
    options = ["--suite", "full", "--out", str(tmp_path / "a.jsonl"), "--passes", "3", "--limit-s", "9.0"]
    assert started["command"] == ["-m", "validation.measure", *options]
    assert suites.ALLOCATOR.items() <= started["env"].items()
