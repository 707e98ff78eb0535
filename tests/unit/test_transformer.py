"""The small reference transformer: the simulator's parameter ledger, strides, causality, and a loss that falls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from simulator import load_scenario
from simulator.errors import NotSimulated
from simulator.spec.model import Model
from simulator.spec.routing import Routing
from simulator.workload import parameters
from validation.transformer import Attention, Transformer, rotated

torch.set_num_threads(1)  # tensors are small, and other tests run beside

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SMALL: dict[str, Any] = {
    "name": "small",
    "layers": 4,
    "hidden_size": 32,
    "vocabulary_size": 61,
    "context": 32,
    "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 8},
    "ffn": {"size": "match_active"},
    "moe": {"experts": 4, "top_k": 2, "expert_ffn_size": 24, "router": {"weights": "after_top_k"}},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "every layer": {},
    "stride 2": {"moe": {"stride": 2}},
    "stride 4": {"moe": {"stride": 4}},
    "first dense": {"moe": {"first_dense_layers": 2}},
    "pattern": {"pattern": [{"ffn": "dense"}, {"ffn": "moe"}, {"ffn": "moe"}]},
    "dense": {"moe": None, "ffn": {"size": 48}},
    "dense residual": {"moe": {"dense_residual": True}},
    "shared": {"moe": {"shared_experts": 2, "shared_expert_ffn_size": 16, "shared_expert_gate": True}},
    "two matrices": {"moe": {"gated": False, "activation": "gelu"}, "ffn": {"size": 40, "gated": False}},
    "bias": {"moe": {"router": {"kind": "sigmoid", "selection_bias": True}}},
    "noisy": {"moe": {"router": {"kind": "noisy_top_k"}}},
    "two levels": {"moe": {"router": {"branching": 2}, "top_k": 1}},
    "noisy two levels": {"moe": {"router": {"kind": "noisy_top_k", "branching": 2}, "top_k": 1}},
    "hash": {"moe": {"router": {"kind": "hash"}}},
    "tied": {"tied_embeddings": True},
    "learned positions": {"position": "learned"},
    "layer norm": {"norm": "layernorm"},
    "layer norm with bias": {"norm": "layernorm_bias"},
    "attention biases": {"biases": ["qkv", "attention_output"]},
    "mha": {"mixer": {"kind": "mha", "heads": 4, "head_dim": 16}},
    "mqa": {"mixer": {"kind": "mqa", "heads": 4, "head_dim": 8}},
}


def small(changes: dict[str, Any] | None = None) -> Model:
    """The small model; a mapping among the changes is laid over the model's."""
    merged = dict(SMALL)
    for key, value in (changes or {}).items():
        both = key == "moe" and value is not None
        merged[key] = {**SMALL[key], **value} if both else value
    return Model.model_validate(merged)


def build(changes: dict[str, Any] | None = None, **options: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(small(changes), **options)


def batch(length: int = 17, seed: int = 1) -> Tensor:
    return torch.randint(61, (4, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_it_has_the_parameters_of_the_simulators_ledger_and_trains(changes: dict[str, Any]) -> None:
    model = build(changes)
    counts = parameters.count(small(changes))
    loss = model.train_step(batch())

    assert sum(weight.numel() for weight in model.parameters()) == counts.total.total
    assert 2.0 < float(loss) < 8.0  # log 61 = 4.1
    unused = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert unused == []


def test_the_ledgers_families_are_the_modules() -> None:
    changes = VARIANTS["shared"]
    model, counts = build(changes), dict(parameters.count(small(changes)).total)
    parts = dict.fromkeys(counts, 0)
    names = {"embedding": "embedding", "norm": "norm", "head": "lm_head", "attention": "attention", "router": "router"}
    for name, weight in model.named_parameters():
        last = name.split(".")
        family = names.get(last[0]) if last[0] != "blocks" else None
        if family is None:
            family = "norm" if "norm" in last[2] else "attention" if last[2] == "attention" else "router"
            family = "expert" if "experts" in last else "shared_expert" if "shared" in last[3] else family
        parts[family] += weight.numel()

    assert parts == counts


@pytest.mark.parametrize("position", ["rope", "learned", "none"])
def test_a_token_sees_its_past_only(position: str) -> None:
    """A changed last token changes the last logits and no others; dropless, so that tokens do not compete."""
    model, ids = build({"position": position}), batch(16)
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % 61
    before, after = model(ids), model(changed)

    assert torch.allclose(before[:, :-1], after[:, :-1], atol=1e-6)
    assert not torch.allclose(before[:, -1], after[:, -1], atol=1e-3)


def test_attention_is_softmax_of_scores_by_hand() -> None:
    """Grouped queries without positions: every query head against the key head of its group."""
    torch.manual_seed(0)
    attention, x = Attention(small({"position": "none"})), torch.randn(1, 6, 32)
    query, key, value = attention.qkv(x)[0].split([32, 16, 16], dim=-1)
    heads = []
    for head in range(4):
        own, group = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
        scores = query[:, own] @ key[:, group].t() / 8**0.5
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ value[:, group])

    assert torch.allclose(attention(x)[0], attention.output(torch.cat(heads, dim=-1)), atol=1e-6)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(8, generator=generator).expand(12, 8) for _ in range(2))
    scores = rotated(query) @ rotated(key).t()

    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5)
    assert not torch.allclose(scores[0, 0], scores[0, 5], atol=1e-3)
    assert torch.allclose(rotated(query).norm(dim=-1), query.norm(dim=-1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"form": "grouped"}], ids=str)
@pytest.mark.parametrize("routing", [{}, {"capacity_factor": 1.0, "pad_to_capacity": True}], ids=["dropless", "padded"])
def test_the_loss_falls(routing: dict[str, Any], options: dict[str, Any], device: str) -> None:
    """Twenty steps on one batch, with every balancing loss."""
    remedies = [{"kind": kind} for kind in ("importance", "load_balance", "z", "sequence")]
    model = build(
        routing=Routing.model_validate({**routing, "balance": remedies}), learning_rate=3e-3, device=device, **options
    )
    losses = [float(model.train_step(batch().to(device))) for _ in range(20)]

    assert losses[-1] < 0.7 * losses[0]
    assert len(model.outputs) == 4
    assert all(set(output.losses) == {"importance", "load_balance", "z", "sequence"} for output in model.outputs)
    assert (sum(int(output.dropped.sum()) for output in model.outputs) > 0) == bool(routing)


def test_a_step_also_follows_the_balancing_losses() -> None:
    """What a loss adds to the router's gradient is in proportion to its weight."""

    def gradient(weight: float) -> Tensor:
        routing = Routing.model_validate({"balance": [{"kind": "load_balance", "weight": weight}]})
        model = build(routing=routing)
        model.train_step(batch())
        router = next(model.moe_layers()).router
        assert router is not None
        return router.weight.grad

    once, twice = gradient(1.0) - gradient(0.0), gradient(2.0) - gradient(0.0)

    assert once.norm() > 0.0
    assert torch.allclose(twice, 2.0 * once, atol=1e-6)


def test_a_step_moves_the_selection_bias_against_the_load() -> None:
    routing = Routing.model_validate({"balance": [{"kind": "bias", "gamma": 0.25}]})
    model = build(VARIANTS["bias"], routing=routing)
    model.train_step(batch())

    for layer, output in zip(model.moe_layers(), model.outputs, strict=True):
        error = output.plan.assigned.double().mean() - output.plan.assigned
        assert layer.bias is not None
        assert layer.bias.tolist() == (0.25 * error.sign()).tolist()


def test_a_scenario_is_estimated_and_run_from_one_text() -> None:
    """Stride and capacity of the scenario are those of the transformer."""
    scenario = load_scenario(
        {
            "name": "small",
            "model": {**SMALL, "moe": {**SMALL["moe"], "stride": 2, "capacity_factor": 1.25}},
            "cluster": {"profile": "h100-sxm", "accelerators": 1},
            "training": {"tokens": "1M", "sequence_length": 16, "global_batch_sequences": 4},
            "routing": {"capacity_factor": "model", "pad_to_capacity": True, "capacity_group_tokens": 16},
        }
    )
    torch.manual_seed(0)
    model = Transformer(scenario.model, scenario.routing)
    model.train_step(batch())
    shapes = [layer.shape for layer in model.moe_layers()]

    assert [block.moe is not None for block in model.blocks] == [False, True, False, True]
    assert [(shape.form, shape.capacity(64), shape.groups(64)) for shape in shapes] == [("padded", 10, 4)] * 2
    assert [output.plan.size for output in model.outputs] == [4 * 4 * 10] * 2


@pytest.mark.parametrize(
    ("changes", "routing", "message"),
    [
        ({"encoder": {"layers": 2}}, {}, "encoder"),
        ({"mtp_depth": 1}, {}, "mtp_depth"),
        ({"dropout": True}, {}, "dropout"),
        ({"norm": "none"}, {}, "norm: none"),
        ({"norms_per_layer": 4}, {}, "norms_per_layer"),
        ({"position": "alibi"}, {}, "position: alibi"),
        ({"biases": ["ffn"]}, {}, "biases: ffn"),
        ({"mixer": {"kind": "lstm"}}, {}, "mixer.kind: lstm"),
        ({"mixer": {**SMALL["mixer"], "window": 8}}, {}, "mixer.window"),
        ({"mixer": {**SMALL["mixer"], "qk_norm": "head"}}, {}, "mixer.qk_norm"),
        ({"mixer": {**SMALL["mixer"], "head_dim": 5}}, {}, "odd head_dim"),
        ({"pattern": [{"window": 8}, {}]}, {}, "mixers that differ"),
        ({"pattern": [{"ffn": "none"}, {}]}, {}, "layers without"),
        ({}, {"overflow": "reroute"}, "overflow: reroute"),
        ({}, {"exempt_sequence_fraction": 0.1}, "exempt_sequence_fraction"),
    ],
)
def test_what_it_does_not_have_is_refused(changes: dict[str, Any], routing: dict[str, Any], message: str) -> None:
    with pytest.raises(NotSimulated) as refusal:
        build(changes, routing=Routing.model_validate(routing))

    assert message in str(refusal.value)
