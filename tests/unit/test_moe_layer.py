"""The reference MoE layer: it equals plain loops, has right gradients, and does not care how its parts are numbered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from simulator.errors import NotSimulated
from simulator.spec.model import MixtureOfExperts, Router
from simulator.spec.routing import Remedy
from validation import expert_ffn
from validation.dispatch import combine, permute
from validation.expert_ffn import E4M3, fp8_product, scaled
from validation.moe_layer import LayerShape, Logits, MoELayer, Output

torch.set_num_threads(1)  # tensors are small, and other tests run beside

WIDTH, TOKENS, VOCABULARY = 8, 24, 50
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {"weights": "after_top_k"},
    "noisy top-k": {"kind": "noisy_top_k"},
    "switch": {"kind": "switch"},
    "sigmoid, bias, groups": {
        "kind": "sigmoid",
        "weights": "renormalized",
        "groups": 4,
        "group_limit": 2,
        "group_score": "top2_sum",
        "selection_bias": True,
        "scaling": 2.5,
    },
    "expert choice": {"kind": "expert_choice"},
    "hash": {"kind": "hash"},
    "second at random": {"second_choice": "random"},
    "two levels": {"branching": 4},
    "noisy two levels": {"kind": "noisy_top_k", "branching": 4},
}


def moe(router: dict[str, Any] | None = None, **options: Any) -> MixtureOfExperts:
    router = router or {}
    top_k = 1 if router.get("kind") == "switch" else 4 if router.get("branching") else 2
    fields = {"experts": 8, "top_k": top_k, "expert_ffn_size": 12, "router": Router.model_validate(router)}
    return MixtureOfExperts.model_validate({**fields, **options})


def layer(
    mixture: MixtureOfExperts, dtype: torch.dtype = torch.float64, device: str = "cpu", **options: Any
) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(LayerShape(WIDTH, mixture, vocabulary_size=VOCABULARY, **options), dtype=dtype, device=device)


def tokens(count: int = TOKENS, seed: int = 1) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids(count: int = TOKENS) -> Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(2))


def run(module: MoELayer, x: Tensor, **inputs: Any) -> Output:
    """One call with the same random numbers each time."""
    torch.manual_seed(3)
    output: Output = module(x, token_ids=ids(len(x)), **inputs)
    return output


def dense_loop(module: MoELayer, x: Tensor, output: Output) -> Tensor:
    """Every expert computes every token; what its choice and capacity allow is added, in plain loops."""
    mixture, y = module.shape.moe, torch.zeros_like(x)
    for expert in range(mixture.experts):
        inner = x @ module.experts.up_weight[expert]
        size = mixture.expert_ffn_size
        hidden = inner[:, :size].sigmoid() * inner[:, :size]
        hidden = hidden * inner[:, size:] if mixture.gated else hidden
        everything = hidden @ module.experts.down_weight[expert]
        for token in range(len(x)):
            for place, chosen in enumerate(output.choices.experts[token].tolist()):
                if chosen == expert and output.plan.accepted[token, place]:
                    y[token] = y[token] + output.choices.weights[token, place] * everything[token]
    if module.shared is not None:
        gate, up = (x @ module.shared.up.weight.t()).chunk(2, dim=-1)
        shared = (gate.sigmoid() * gate * up) @ module.shared.down.weight.t()
        factor = 1.0 if module.shared_gate is None else (x @ module.shared_gate.weight.t()).sigmoid()
        y = y + shared * factor
    return y


# What it computes


@pytest.mark.parametrize("factor", [None, 0.75], ids=["dropless", "drops"])
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_it_equals_a_dense_loop_over_the_experts(router: dict[str, Any], factor: float | None) -> None:
    module = layer(moe(router), capacity_factor=factor, form="loop" if factor is None else "padded")
    x = tokens()
    output = run(module, x)

    assert torch.allclose(output.y, dense_loop(module, x, output))
    assert (int(output.dropped.sum()) > 0) == (factor is not None)
    assert output.plan.assigned.tolist() == output.choices.counts.tolist()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shared", [{}, {"shared_experts": 2}, {"shared_experts": 1, "shared_expert_gate": True}])
def test_gates_and_shared_experts(gated: bool, shared: dict[str, Any]) -> None:
    if shared and not gated:
        shared = {}
    module = layer(moe(gated=gated, **shared))
    x = tokens()
    output = run(module, x)

    assert torch.allclose(output.y, dense_loop(module, x, output))


def test_all_forms_compute_the_same_outputs_and_gradients() -> None:
    """Padded, grouped and loop, on tokens with drops; fp32, as the grouped product asks."""
    found: dict[str, list[Tensor]] = {}
    for form in ("padded", "grouped", "loop"):
        module = layer(moe(), torch.float32, capacity_factor=1.0, form=form)
        x = tokens().float().requires_grad_()
        y = run(module, x).y
        y.square().sum().backward()
        assert x.grad is not None
        found[form] = [y.detach(), x.grad, *(weight.grad for weight in module.parameters())]

    for form in ("padded", "grouped"):
        pairs = zip(found[form], found["loop"], strict=True)
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in pairs)


def test_pieces_one_after_the_other_are_the_layer() -> None:
    """Each piece has the shape that a cost model counts."""
    module = layer(moe(shared_experts=1), capacity_factor=1.25, form="padded")
    x = tokens()
    logits = module.router_logits(x)
    choices = module.route(logits)
    planned = module.plan(choices)
    rows = permute(x, planned)
    inner = module.experts.up(rows, planned.processed)
    hidden = module.experts.activation(inner)
    outputs = module.experts.down(hidden, planned.processed)
    y = combine(outputs, choices.weights, planned) + module.shared_ffn(x)
    capacity = 8  # ceil(1.25 x 24 tokens x 2 / 8 experts)

    assert [tuple(piece.shape) for piece in (logits.experts, choices.experts, choices.weights)] == [
        (TOKENS, 8),
        (TOKENS, 2),
        (TOKENS, 2),
    ]
    assert [tuple(piece.shape) for piece in (rows, inner, hidden, outputs)] == [
        (8 * capacity, WIDTH),
        (8 * capacity, 24),
        (8 * capacity, 12),
        (8 * capacity, WIDTH),
    ]
    assert torch.equal(y, module(x).y)


def test_a_token_that_all_its_experts_drop_has_no_output_and_leaves_by_the_residual() -> None:
    """All 24 tokens want experts 0 and 1, which have one slot each in every group of four tokens."""
    module = layer(moe(), capacity_factor=1.0, capacity_group_tokens=4)
    wanted = torch.zeros(TOKENS, 8, dtype=torch.float64)
    wanted[:, :2] = torch.tensor([2.0, 1.0])
    output = run(module, tokens(), logits=Logits(wanted))
    first = torch.arange(TOKENS) % 4 == 0

    assert output.plan.assigned.tolist() == [24, 24, 0, 0, 0, 0, 0, 0]
    assert output.plan.processed.tolist() == [6, 6, 0, 0, 0, 0, 0, 0]
    assert output.dropped.tolist() == [18, 18, 0, 0, 0, 0, 0, 0]
    assert output.lost.tolist() == (~first).tolist()
    assert (output.y[~first] == 0.0).all()
    assert (output.y[first] != 0.0).all()


def test_random_drops_are_as_many_and_at_other_places() -> None:
    x, arrival = tokens(200), layer(moe(), capacity_factor=0.5)
    chance = layer(moe(), capacity_factor=0.5, drop_order="random")
    late, any_ = run(arrival, x), run(chance, x)

    assert late.dropped.tolist() == any_.dropped.tolist()
    assert late.plan.accepted[:20].all()
    assert not any_.plan.accepted[:20].all()


# Gradients


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_gradients_equal_finite_differences(router: dict[str, Any]) -> None:
    """Input and weights along random directions, with the balancing losses, in float64; the choices stay the same."""
    kinds = ["importance", "load_balance", "z", "device", "communication", "sequence"]
    kinds += ["load"] * (router.get("kind") == "noisy_top_k")
    remedies = tuple(Remedy.model_validate({"kind": kind, "weight": 0.1}) for kind in kinds)
    module = layer(moe(router, shared_experts=1, expert_ffn_size=3), capacity_factor=1.0, remedies=remedies)
    x = tokens(6).requires_grad_()
    weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}

    def call(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        inputs = {"token_ids": ids(6)}
        output = torch.func.functional_call(module, dict(zip(weights, values, strict=True)), (x,), inputs)
        return (output.y, *output.losses.values())

    assert torch.autograd.gradcheck(call, (x, *weights.values()), fast_mode=True)


def test_every_weight_learns() -> None:
    """Also the two matrices of noisy gating and both levels of it; the selection bias has no gradient."""
    for router in (ROUTERS["noisy two levels"], ROUTERS["sigmoid, bias, groups"]):
        module = layer(moe(router, shared_experts=1, shared_expert_gate=True))
        run(module, tokens(200)).y.square().sum().backward()
        still = [name for name, weight in module.named_parameters() if weight.grad is None or not weight.grad.any()]

        assert still == (["bias"] if router.get("selection_bias") else [])


# Symmetries


@pytest.mark.parametrize("name", ["softmax", "switch", "sigmoid, bias, groups", "two levels", "expert choice"])
def test_shuffled_tokens_have_shuffled_outputs(name: str) -> None:
    module, x = layer(moe(ROUTERS[name])), tokens(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(4))

    assert torch.allclose(module(x[order]).y, module(x).y[order])


@pytest.mark.parametrize("name", ["softmax", "switch", "noisy top-k", "expert choice"])
def test_experts_under_other_numbers_compute_the_same(name: str) -> None:
    module, x = layer(moe(ROUTERS[name]), capacity_factor=1.0), tokens(40)
    module.eval()
    before = module(x)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(4))
    assert module.router is not None
    with torch.no_grad():
        for weight in (module.router.weight, module.experts.up_weight, module.experts.down_weight):
            weight.copy_(weight[order].clone())
    after = module(x)

    assert torch.allclose(after.y, before.y)
    assert after.dropped.tolist() == before.dropped[order].tolist()
    assert (int(after.dropped.sum()) > 0) == (name != "expert choice")  # which loads all experts alike


def test_the_leading_dimensions_are_only_a_shape() -> None:
    module, x = layer(moe()), tokens()

    assert torch.equal(module(x.view(2, 3, 4, WIDTH)).y.view(TOKENS, WIDTH), module(x).y)


# Training aids


def test_noise_is_for_training_only_and_may_be_given() -> None:
    module, x = layer(moe(ROUTERS["noisy top-k"])), tokens(100)
    first, second = module(x).choices.experts, module(x).choices.experts
    module.eval()
    still = module(x).choices.experts

    assert not torch.equal(first, second)
    assert torch.equal(still, module(x).choices.experts)
    assert torch.equal(still, module.route(module.router_logits(x)).experts)


def test_the_bias_evens_out_the_loads_without_a_gradient() -> None:
    """Loss-free balancing (arXiv 2408.15664): the largest load falls to a few percent over the mean."""
    router = {"kind": "sigmoid", "selection_bias": True}
    module = layer(moe(router), remedies=(Remedy(kind="bias", gamma=0.002),))
    x = tokens(2000) + 1.0
    before = module(x)
    for _ in range(500):
        module.update_bias(module.route(module.router_logits(x)).counts)
    after = module(x)
    first, last = (float(output.plan.assigned.max() / 500.0) for output in (before, after))

    assert after.losses == {}
    assert first > 1.5
    assert last < 1.1


# Formats


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["padded", "grouped", "loop"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_other_formats_agree_with_float64_to_their_precision(
    form: Any, dtype: torch.dtype, tolerance: float, device: str
) -> None:
    """The router computes in fp32 at least, so that choices are the same where the input is."""
    options: dict[str, Any] = {"capacity_factor": 1.0}
    mixture = moe(shared_experts=1, expert_ffn_size=16)
    module, exact = layer(mixture, dtype, device, form=form, **options), layer(mixture, **options)
    exact.load_state_dict(module.state_dict())
    x = tokens(64).to(dtype)
    expected, output = exact(x.double()), module(x.to(device))

    assert output.y.dtype == dtype
    assert output.choices.weights.dtype == torch.float32
    assert output.choices.experts.tolist() == expected.choices.experts.tolist()
    assert (output.y.cpu() - expected.y).abs().max() < tolerance * expected.y.abs().max()


def test_fp8_is_refused_where_the_device_has_none_or_the_widths_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = moe(expert_ffn_size=32)
    wide = LayerShape(16, mixture, fp8=True)
    with pytest.raises(NotSimulated, match=r"compute capability 8\.9"):
        MoELayer(wide, dtype=torch.bfloat16)
    for shape, dtype in (
        (wide, torch.float32),
        (LayerShape(16, mixture, fp8=True, form="grouped"), torch.bfloat16),
        (LayerShape(12, mixture, fp8=True), torch.bfloat16),
    ):
        with pytest.raises(ValueError, match="multiples of 16"):
            MoELayer(shape, dtype=dtype)

    for capability, has in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert expert_ffn.has_fp8(torch.device("cuda")) is has


def test_fp8_products_are_right_to_the_three_bits_of_e4m3() -> None:
    """PyTorch also computes them on a CPU, slowly: right for a test, useless for a timing."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*size, generator=generator, dtype=torch.bfloat16) for size in ((24, 64), (64, 32)))
    left.requires_grad_()
    product = fp8_product(left, right)
    exact = left.double() @ right.double()
    product.sum().backward()
    values, scale = scaled(left.detach())

    assert (product.double() - exact).norm() < 0.05 * exact.norm()
    assert values.dtype == E4M3
    assert float(values.float().abs().max()) == 448.0
    assert float(scale) == pytest.approx(float(left.detach().abs().max()) / 448.0)
    assert torch.allclose(left.grad, (torch.ones_like(product) @ right.t()))
    assert fp8_product(left[:0], right).shape == (0, 32)


def test_a_layer_computes_its_experts_in_fp8_where_the_device_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_ffn, "has_fp8", lambda _: True)
    torch.manual_seed(0)
    module = MoELayer(LayerShape(16, moe(expert_ffn_size=32), fp8=True), dtype=torch.bfloat16)
    x = torch.randn(40, 16, dtype=torch.bfloat16)
    y = module(x).y
    module.experts.fp8 = False
    exact = module(x).y

    assert 0.0 < (y - exact).float().norm() < 0.1 * exact.float().norm()


# What does not fit


@pytest.mark.parametrize(
    ("mixture", "options", "message"),
    [
        (moe(), {"form": "padded"}, "needs capacity_factor"),
        (moe(), {"form": "grouped"}, "multiples of 16 bytes"),
        (moe(), {"devices": 3}, "8 experts do not divide over 3 devices"),
        (moe(), {"remedies": (Remedy(kind="bias"),)}, "selection_bias"),
        (moe({"groups": 3, "group_limit": 1}), {}, "do not divide into 3"),
        (moe({"kind": "hash", "selection_bias": True}), {}, "no effect on hash"),
    ],
)
def test_shapes_that_do_not_fit_are_named(mixture: MixtureOfExperts, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(mixture, **options)


def test_inputs_that_are_missing_are_named() -> None:
    with pytest.raises(ValueError, match="vocabulary_size"):
        LayerShape(WIDTH, moe(ROUTERS["hash"]))
    with pytest.raises(ValueError, match="token_ids"):
        layer(moe(ROUTERS["hash"]))(tokens())
    with pytest.raises(ValueError, match="24 numbers"):
        layer(moe(ROUTERS["hash"]))(tokens(), token_ids=ids(5))
    with pytest.raises(ValueError, match="noise of a noisy_top_k"):
        layer(moe(), remedies=(Remedy(kind="load"),))(tokens())
