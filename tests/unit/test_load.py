"""Loading a scenario: presets, overrides, variants, round trips, and messages that point at the line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simulator.errors import InvalidInput
from simulator.spec import (
    Scenario,
    available,
    load_model,
    load_profile,
    load_scenario,
    parse_assignment,
    profile_sha256,
    vary,
)

SMALL = """\
name: small
model: mixtral-8x7b
cluster:
  profile: h100-sxm
  accelerators: 64
parallelism: {expert: 8}
training:
  tokens: 1B
  sequence_length: 4096
  global_batch_sequences: 64
"""
INFINIBAND = "cluster.profile.tiers.infiniband.bandwidth"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def refusal(source: Any, overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(InvalidInput) as caught:
        load_scenario(source, overrides)
    return str(caught.value)


def written(file: Path, old: str, new: str) -> Path:
    assert file.read_text().count(old) == 1
    file.write_text(file.read_text().replace(old, new))
    return file


# --- what a scenario becomes ------------------------------------------------------------------------------------------


def test_presets_are_expanded_and_defaults_filled_in(file: Path) -> None:
    scenario = load_scenario(file)

    assert scenario.model == load_model("mixtral-8x7b")
    assert scenario.cluster.profile == load_profile("h100-sxm")
    assert (scenario.cluster.ranks, scenario.cluster.stack_name) == (64, next(iter(load_profile("h100-sxm").stacks)))
    assert (scenario.training.tokens, scenario.training.precision.gemm) == (1e9, "bf16")
    assert (scenario.parallelism.schedule, scenario.routing.capacity_factor) == ("1f1b", None)
    assert scenario.profile_name == "h100-sxm"


def test_a_mapping_and_a_file_and_their_text_give_equal_scenarios(file: Path) -> None:
    mapping = {
        "name": "small",
        "model": load_model("mixtral-8x7b"),
        "cluster": {"profile": "h100-sxm", "accelerators": 64},
        "parallelism": {"expert": 8},
        "training": {"tokens": 10**9, "sequence_length": 4096, "global_batch_sequences": 64},
    }

    assert load_scenario(mapping) == load_scenario(file) == load_scenario(str(file))
    assert load_scenario(mapping) != load_scenario(file, {"routing.seed": 1})


@pytest.mark.parametrize("name", available("scenarios"))
def test_every_shipped_scenario_loads_and_reads_back_from_its_plain_data(name: str) -> None:
    scenario = load_scenario(name)

    again = load_scenario(scenario.as_dict())

    assert again == scenario
    assert again.as_dict() == scenario.as_dict()
    assert profile_sha256(again.cluster.profile) == profile_sha256(scenario.cluster.profile)


@pytest.mark.parametrize("kind", ["models", "profiles"])
def test_every_shipped_preset_loads(kind: str) -> None:
    for name in available("models" if kind == "models" else "profiles"):
        assert (load_model if kind == "models" else load_profile)(name).name


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_are_set_by_dotted_path(file: Path) -> None:
    scenario = load_scenario(
        file,
        {
            "routing.capacity_factor": 1.25,
            "model.moe.top_k": 1,
            "training.precision": "fp8",
            "training.precision.combine": "fp32",
            "training.optimizer": {"kind": "muon"},
        },
    )

    assert scenario.routing.capacity_factor == 1.25
    assert scenario.model.moe is not None
    assert scenario.model.moe.top_k == 1
    precision = scenario.training.precision
    assert (precision.gemm, precision.dispatch, precision.combine) == ("fp8", "fp8", "fp32")
    assert scenario.training.optimizer.kind == "muon"


@pytest.mark.parametrize(
    "overrides",
    [
        {INFINIBAND: "100 GB/s"},
        {f"{INFINIBAND}.value": "100 GB/s"},
        {"cluster.overrides.tiers.infiniband.bandwidth": "100 GB/s"},
        {"cluster.overrides": {"tiers.infiniband.bandwidth": "100 GB/s"}},
        {"cluster.overrides": {"tiers.1.bandwidth": "100 GB/s"}},
    ],
)
def test_a_number_of_the_profile_that_is_set_is_assumed_from_then_on(file: Path, overrides: dict[str, Any]) -> None:
    before = load_profile("h100-sxm").tiers[1].bandwidth

    scenario = load_scenario(file, overrides)

    after = scenario.cluster.profile.tiers[1].bandwidth
    assert (before.value, before.kind, after.value, after.kind) == (50e9, "datasheet", 100e9, "assumed")
    assert (after.source, after.error, after.note) == (before.source, None, "set by the scenario")
    assert load_scenario(scenario.as_dict()) == scenario


def test_a_change_of_the_profile_is_kept_in_the_plain_data_beside_its_name(file: Path) -> None:
    cluster = load_scenario(file, {INFINIBAND: "100 GB/s"}).as_dict()["cluster"]

    assert cluster["profile"] == "h100-sxm"
    assert cluster["overrides"] == {"tiers.infiniband.bandwidth": "100 GB/s"}


def test_keys_that_are_paths_can_be_set_one_by_one(file: Path) -> None:
    file.write_text(SMALL + "sweep: {routing.seed: [0, 1]}\n")

    scenario = load_scenario(file, {"sweep.model.moe.stride": [1, 2]})

    assert scenario.sweep == {"routing.seed": [0, 1], "model.moe.stride": [1, 2]}


def test_a_preset_with_changes(file: Path) -> None:
    scenario = load_scenario(
        written(file, "mixtral-8x7b", "{preset: mixtral-8x7b, set: {moe.stride: 2, ffn: {size: match_active}}}")
    )

    kinds = [layer.ffn for layer in scenario.model.decoder_layers()]
    assert kinds == ["dense", "moe"] * 16
    assert scenario.model.dense_ffn_size() == 2 * 14336


def test_an_override_can_replace_the_presets(file: Path) -> None:
    scenario = load_scenario(file, {"model": {"preset": "dbrx", "set": {"layers": 8}}, "cluster.profile": "h800-sxm"})

    assert (scenario.model.name, scenario.model.layers) == ("DBRX", 8)
    assert scenario.profile_name == "h800-sxm"


def test_preset_files_are_found_beside_the_scenario(file: Path) -> None:
    (file.parent / "models").mkdir()
    (file.parent / "models" / "mine.yaml").write_text(available("models")["mixtral-8x7b"].read_text())
    (file.parent / "chip.yaml").write_text(available("profiles")["h100-sxm"].read_text())
    expected = load_scenario(file)
    written(file, "mixtral-8x7b", "models/mine.yaml")
    written(file, "h100-sxm", "./chip.yaml")

    scenario = load_scenario(file, {INFINIBAND: "100 GB/s"})

    assert (scenario.model, scenario.profile_name) == (expected.model, "./chip.yaml")
    assert load_scenario(scenario.as_dict()) == scenario, "without the files beside it"


def test_a_profile_that_is_not_shipped_is_given_in_full(file: Path) -> None:
    profile = load_profile("h200-sxm")

    scenario = load_scenario(file, {"cluster.profile": profile, "cluster.overrides": {"power": "400 W"}})

    assert scenario.profile_name == profile.name
    assert scenario.as_dict()["cluster"]["profile"]["name"] == profile.name
    assert load_scenario(scenario.as_dict()) == scenario


def test_vary_adds_overrides_and_leaves_the_base_as_it_is(file: Path) -> None:
    base = load_scenario(file, {"routing.seed": 7, INFINIBAND: "100 GB/s"})

    varied = vary(base, {"routing.capacity_factor": 1.25}, "variant:")
    again = vary(varied, {"routing.capacity_factor": None}, "variant:")

    assert (base.routing.capacity_factor, varied.routing.capacity_factor) == (None, 1.25)
    assert varied.routing.seed == 7
    assert varied.cluster.profile == base.cluster.profile
    assert again == base
    with pytest.raises(InvalidInput) as caught:
        vary(base, {"routing.capacty_factor": 1}, "cf-1:")
    assert str(caught.value).startswith("cf-1: routing.capacty_factor: unknown key 'capacty_factor'; did you mean")


@pytest.mark.parametrize(
    ("text", "assignment"),
    [
        ("routing.capacity_factor=1.25", ("routing.capacity_factor", 1.25)),
        (" routing.seed = 3 ", ("routing.seed", 3)),
        ("training.tokens=1T", ("training.tokens", "1T")),
        ("routing.load={kind: logits, population: 0.4}", ("routing.load", {"kind": "logits", "population": 0.4})),
        ("parallelism.overlap=[pipeline]", ("parallelism.overlap", ["pipeline"])),
        ("routing.capacity_factor=", ("routing.capacity_factor", None)),
        ("name=a=b", ("name", "a=b")),
    ],
)
def test_assignments(text: str, assignment: tuple[str, Any]) -> None:
    assert parse_assignment(text) == assignment


@pytest.mark.parametrize("text", ["routing.seed", "=3", ""])
def test_what_is_no_assignment(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_assignment(text)

    assert str(caught.value) == (
        f"'{text}': write --set dotted.path=value, for example --set routing.capacity_factor=1.25"
    )


# --- messages ---------------------------------------------------------------------------------------------------------


def test_an_unknown_key_is_reported_once_with_its_place_and_the_nearest_name(file: Path) -> None:
    assert refusal(written(file, "  tokens", "  token")) == (
        f"{file}:8:10: training.token: unknown key 'token'; did you mean 'tokens'? Allowed: fused_attention, "
        "global_batch_sequences, micro_batch_sequences, offload, optimizer, phases, precision, recompute, "
        "sequence_length, tokens"
    )


def test_problems_in_different_places_are_all_reported(file: Path) -> None:
    written(file, "name: small\n", "")
    written(file, "1B", "1 GB")
    written(file, "expert: 8", "expert: 0")

    assert refusal(file).splitlines() == [
        f"{file}:1:1: name: is required, for example DeepSeek-V3 pre-training",
        f"{file}:5:23: parallelism.expert: must be at least 1 (got 0)",
        f"{file}:7:11: training.tokens: '1 GB' is not a count; write for example 14.8T",
    ]


def test_a_mistake_in_a_preset_file_points_into_that_file(file: Path) -> None:
    model = file.parent / "mine.yaml"
    model.write_text(available("models")["mixtral-8x7b"].read_text().replace("hidden_size:", "hiden_size:"))
    written(file, "mixtral-8x7b", "./mine.yaml")

    assert refusal(file).startswith(f"{model}:4:13: model.hiden_size: unknown key 'hiden_size'; did you mean")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("routing.capacity_factor", "abc", "must be a number or 'model' (got 'abc')"),
        ("routing.capacity_factor", float("nan"), "must be a finite number or 'model' (got nan)"),
        ("routing.capacity_factor", True, "must be a number or 'model' (got true)"),
        ("routing.capacity_factor", -1, "must be greater than 0 or 'model' (got -1)"),
        ("routing.pad_to_capacity", "yes", "must be true or false (got 'yes')"),
        ("routing.exempt_sequence_fraction", 2, "must be at most 1 (got 2)"),
        (
            "parallelism.schedule",
            "dualpip",
            "must be one of gpipe, 1f1b, interleaved, zb1p, zbh2, zbv, dualpipe, dualpipev or a mapping "
            "(got 'dualpip'); did you mean 'dualpipe'?",
        ),
        ("parallelism.zero_stage", 4, "must be one of 0, 1, 2, 3 (got 4)"),
        ("parallelism.layers_per_stage", "atuo", "must be a list or 'auto' (got 'atuo'); did you mean 'auto'?"),
        ("parallelism.layers_per_stage", 4, "must be a list or 'auto' (got 4)"),
        ("training.sequence_length", "long", "must be a whole number or a mapping (got 'long')"),
        ("training.precision", "fp9", "unknown precision 'fp9'; did you mean 'fp8'? Allowed: bf16, fp16, fp32, fp8"),
        ("training.precision", 8, "must be a name (bf16, fp16, fp32, fp8) or a mapping by role (got 8)"),
        ("training.recompute", [], None),
        ("training", [], "must be a mapping (got an empty list)"),
        ("cost.price_per_accelerator_hour", 2, "2 has no unit; write for example 2 USD/h"),
        ("routing.load", "balanced", "must be a mapping (got 'balanced')"),
        ("routing.load", {}, "kind is required; allowed: balanced, dirichlet, logits, replay"),
        ("routing", 3, "must be a mapping (got 3)"),
        ("model", 3, "must be a preset name, a path, a mapping, or {preset, set} (got 3)"),
        ("cluster.profile", None, "must be a profile name, a path, or a mapping (got null)"),
        ("reliability", [], "must be a mapping (got an empty list)"),
    ],
)
def test_a_value_of_the_wrong_kind(file: Path, path: str, value: Any, message: str | None) -> None:
    if message is None:
        assert load_scenario(file, {path: value})
    else:
        assert refusal(file, {path: value}) == f"override {path}: {message}"


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("routing.load", {"kind": "balancd"}, "routing.load.kind: unknown kind 'balancd'; did you mean 'balanced'? "),
        (
            "routing.load",
            {"kind": "logits", "populaton": 1},
            "routing.load.populaton: unknown key 'populaton'; did you mean 'population'? Allowed: context_correlation, "
            "documents, domain, drift, growth, hot_experts, kind, population, sticky, token",
        ),
        ("parallelism.overlap", ["pipelin"], "parallelism.overlap.0: must be one of expert_all_to_all, "),
        (
            "parallelism.overlap",
            [{"expert_chunk": 2}],
            "parallelism.overlap.0.expert_chunk: unknown key 'expert_chunk'; ",
        ),
        (
            "training.recompute",
            {"full_layer": 2},
            "training.recompute.full_layer: unknown key 'full_layer'; did you mean",
        ),
        ("training.recompute", ["nrm"], "training.recompute.0: must be one of norm, activation, "),
        (
            "training.global_batch_sequences",
            {"form": 1, "to": 2, "until_tokens": "1M"},
            "training.global_batch_sequences.form: unknown key 'form'; did you mean 'from'? Allowed: from, shape, to, "
            "until_tokens",
        ),
        (
            "training.optimizer.groups",
            {"experts": {}},
            "training.optimizer.groups.experts: must be one of dense, expert",
        ),
        ("reliability", {"mtbf": 3}, "reliability.mtbf: unknown key 'mtbf'; none is allowed here"),
        ("variants", {"a": 3}, "variants.a: must be a mapping (got 3)"),
        ("sweep", {"routing.seed": 3}, "sweep.routing.seed: must be a list (got 3)"),
        (
            "cluster.overrides",
            {"tiers.nvlink.bandwidth": "900 Gb/s"},
            "cluster.profile.tiers.nvlink.bandwidth.value: '900 Gb/s': the unit 'Gb/s' is ambiguous; write 900 Gbit/s "
            "(= 112.5 GB/s) or 900 GB/s",
        ),
    ],
)
def test_inside_a_union_only_the_member_that_was_meant_complains(
    file: Path, path: str, value: Any, problem: str
) -> None:
    message = refusal(file, {path: value})

    assert message.startswith(f"override {path}: {problem}")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{preset: mixtral-8x7b, sett: {}}", "2:37: model.sett: unknown key beside preset 'sett'; did you mean 'set'?"),
        ("{preset: 3}", "2:17: model.preset: must be a preset name or a path (got 3)"),
        ("{preset: mixtral, set: {}}", "2:17: model.preset: unknown model 'mixtral'; "),
        ("{preset: mixtral-8x7b, set: [1]}", "2:36: model.set: must map dotted paths to values (got [1])"),
        ("{preset: mixtral-8x7b, set: {layers: 0}}", "2:45: model.layers: must be at least 1 (got 0)"),
        (
            "{preset: mixtral-8x7b, set: {layers.x: 0}}",
            "2:47: model.layers.x: model.layers is a single value (32); it has no 'x'",
        ),
        (
            "models/mixtral-8x8b.yaml",
            "2:8: model: no such model file: models/mixtral-8x8b.yaml; did you mean the shipped",
        ),
    ],
)
def test_a_wrong_model(file: Path, model: str, message: str) -> None:
    assert refusal(written(file, "mixtral-8x7b", model)).startswith(f"{file}:{message}")


def test_unknown_names() -> None:
    for action, message in (
        (
            lambda: load_model("deepseek-v33"),
            "model: unknown model 'deepseek-v33'; did you mean 'deepseek-v3'? Allowed: ",
        ),
        (lambda: load_profile("h100"), "cluster.profile: unknown hardware profile 'h100'; "),
        (
            lambda: load_scenario("deepseek-v33"),
            "unknown scenario 'deepseek-v33'; did you mean 'deepseek-v3'? Allowed: ",
        ),
    ):
        with pytest.raises(InvalidInput) as caught:
            action()
        assert str(caught.value).startswith(message)


def test_a_message_is_one_line_whatever_the_names_hold(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a\nb\x1b[31m\udc80.yaml") == f"{tmp_path}/a\\nb\\x1b[31m\\udc80.yaml: no such file"


def test_problems_stop_at_twenty(file: Path) -> None:
    file.write_text(SMALL + "".join(f"unknown_{n}: 1\n" for n in range(1000)))

    assert len(refusal(file).splitlines()) == 20


def test_names_of_expanded_presets_are_no_key_of_a_file(file: Path) -> None:
    file.write_text(SMALL + "_names: {profile: mine}\n")

    assert refusal(file).startswith(f"{file}:11:9: _names: unknown key '_names'")


def test_a_scenario_is_frozen_and_has_no_hash(file: Path) -> None:
    scenario = load_scenario(file)

    with pytest.raises(ValueError):
        scenario.name = "another"  # type: ignore[misc]
    with pytest.raises(TypeError):
        hash(scenario)
    assert isinstance(scenario, Scenario)
