"""From a case to something that can be called and timed: the tensors are made once, the call does one piece of work.

F runs without a graph. I and W of a linear are the two products of its backward pass; of everything else the graph of
one forward pass is kept, and its gradients are formed again and again. The functions are those of the reference layer
and transformer, so a piece is the same code alone as inside of the whole.

Inside a training step a product finds its weights out of the caches, and writes to memory that is not in them either;
:mod:`validation.torch_cold` sees to that.

The load of a layer is part of its case. It is put into the tokens: of x = z + (L - z W^T) (W^T)^+ with random z, the
router's matrix W makes the logits L, which choose the experts as the case says. So the layer is measured as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from simulator.errors import NotSimulated
from simulator.spec.model import MixtureOfExperts, Model, Router
from simulator.spec.routing import Routing
from validation.cases import Case
from validation.dispatch import Plan, combine, permute, plan
from validation.expert_ffn import E4M3, Experts, Form, activate, has_fp8, scaled
from validation.moe_layer import LayerShape, MoELayer
from validation.torch_cold import Work, cold_copies, cold_weights, in_turn, with_fresh_outputs
from validation.torch_routers import choose
from validation.transformer import Transformer, rotated

Fields = Mapping[str, Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
FORMS: dict[str, Form] = {"batched": "padded", "grouped": "grouped", "loop": "loop"}
ROUTER = {"weights": "after_top_k"}


def work(case: Case, device: torch.device) -> Work:
    """What the case asks for, ready to be called.

    Raises:
        NotSimulated: the device does not have this format.
    """
    fields = case.fields
    if fields["form"] == "fp8" and not has_fp8(device):
        raise NotSimulated(f"this {device.type} has no fp8 products")
    builders = {
        "gemm": _gemm,
        "grouped_gemm": _grouped_gemm,
        "attention": _attention,
        "memory": _memory,
        "layer": _layer,
        "step": _step,
    }
    torch.manual_seed(0)
    factory = {"device": device, "dtype": DTYPES[fields["form"]]}
    run = builders[case.kind](fields, factory)
    return run if case.kind == "step" else with_fresh_outputs(run, device)


def reference(device: torch.device) -> Work:
    """The fixed product beside every measurement: 2 to 5 ms on a CPU core, a fraction of 1 ms on a GPU."""
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: torch.mm(left, right)


# --- products ---------------------------------------------------------------------------------------------------------


def _gemm(case: Fields, factory: Any) -> Work:
    m, n, k = case["m"], case["n"], case["k"]
    if case["form"] == "fp8":
        rows, columns, inner = {"F": (m, n, k), "I": (m, k, n), "W": (n, k, m)}[case["which"]]
        return fp8_dense(rows, columns, inner, factory["device"])
    x, gradient = (torch.randn(size, **factory) for size in ((m, k), (m, n)))

    def product(weight: Tensor) -> Work:
        return {
            "F": lambda: functional.linear(x, weight),
            "I": lambda: torch.mm(gradient, weight),
            "W": lambda: torch.mm(gradient.t(), x),
        }[case["which"]]

    return in_turn([product(weight) for weight in cold_weights((n, k), factory)])


def fp8_dense(m: int, n: int, k: int, device: torch.device) -> Work:
    """A product of operands that are in e4m3 already, scaled per tensor."""
    left, right = (torch.randn(size, device=device).to(E4M3) for size in ((m, k), (n, k)))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def fp8_grouped(counts: Sequence[int], n: int, k: int, device: torch.device) -> Work:
    """A grouped product of operands in e4m3, scaled by rows."""
    rows, experts = torch.empty(sum(counts), k, device=device), torch.empty(len(counts), n, k, device=device)
    left, right = rows.normal_().to(E4M3), experts.normal_().to(E4M3).transpose(1, 2)
    scales = torch.ones(len(rows), device=device), torch.ones(len(counts), n, device=device)
    ends = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
    return lambda: torch._scaled_grouped_mm(left, right, *scales, offs=ends, out_dtype=torch.bfloat16)


def _grouped_gemm(case: Fields, factory: Any) -> Work:
    counts, n, k = case["counts"], case["n"], case["k"]
    if case["form"] == "fp8":
        return fp8_grouped(counts, n, k, factory["device"])
    moe = MixtureOfExperts(experts=len(counts), top_k=1, expert_ffn_size=n, gated=False)
    rows = torch.randn(sum(counts), k, **factory, requires_grad=case["which"] == "I")
    number = torch.tensor(counts, device=factory["device"])

    def product(weight: Tensor) -> Work:
        experts = Experts(k, moe, FORMS[case["implementation"]], dtype=factory["dtype"], device="meta")
        experts.up_weight = torch.nn.Parameter(weight, requires_grad=case["which"] == "W")
        return _differentiated(case, lambda: experts.up(rows, number), [rows, experts.up_weight])

    turns = cold_weights((len(counts), k, n), factory)
    # A weight gradient reads no weight: one graph serves all turns.
    return in_turn([product(weight) for weight in (turns[:1] if case["which"] == "W" else turns)])


# --- attention and memory-bound pieces --------------------------------------------------------------------------------


def _attention(case: Fields, factory: Any) -> Work:
    def heads(number: int, width: int) -> Tensor:
        return torch.randn(case["batch"], number, case["tokens"], width, **factory, requires_grad=True)

    width, shared = case["head_dim"], case["heads"] != case["kv_heads"]
    query, key = heads(case["heads"], width), heads(case["kv_heads"], width)
    value = heads(case["kv_heads"], case.get("value_dim", width))

    def core() -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=case["causal"], enable_gqa=shared)

    return _differentiated(case, core, [query, key, value])


def _memory(case: Fields, factory: Any) -> Work:
    rows, width, device = case["rows"], case["width"], factory["device"]

    def tensor(*size: int, **options: Any) -> Tensor:
        return torch.randn(*(size or (rows, width)), **{**factory, "requires_grad": True, **options})

    match case["op"]:
        case "residual":  # its backward is the sum of two gradients
            first, second = (tensor(requires_grad=False) for _ in range(2))
            return lambda: first + second
        case "norm":
            norm, x = torch.nn.RMSNorm(width, eps=1e-6, **factory), tensor()
            return _differentiated(case, lambda: norm(x), [x, norm.weight])
        case "activation":
            x = tensor(rows, width * (2 if case["gated"] else 1))
            return _differentiated(case, lambda: activate(x, "silu", gated=case["gated"]), [x])
        case "rope":
            x = tensor(width // case["head_dim"], rows, case["head_dim"])
            return _differentiated(case, lambda: rotated(x), [x])
        case "embedding":
            table = tensor(case["vocabulary"], width)
            ids = torch.randint(case["vocabulary"], (rows,), device=device)
            return _differentiated(case, lambda: functional.embedding(ids, table), [table])
        case "cross_entropy":
            x, ids = tensor(), torch.randint(width, (rows,), device=device)
            return _differentiated(case, lambda: functional.cross_entropy(x.float(), ids), [x])
        case "top_k":
            x, router = tensor(), Router.model_validate(ROUTER)
            return _differentiated(case, lambda: choose(router, x, case["top_k"]).weights, [x])
        case "plan":
            chosen = chosen_experts(case["counts"], rows, case["top_k"], device)
            return lambda: plan(chosen, case["experts"], case["slots"], padded=case["pad"])
        case "permute":
            planned, x = _planned(case, device), tensor()
            return _differentiated(case, lambda: permute(x, planned), [x])
        case "unpermute":
            planned = _planned(case, device)
            x, weights = tensor(planned.size, width), tensor(rows, case["top_k"], dtype=torch.float32)
            return _differentiated(case, lambda: combine(x, weights, planned), [x, weights])
        case "cast":
            x = tensor(requires_grad=False)
            return lambda: scaled(x)
        case "adam":
            return in_turn([_adam(weight) for weight in cold_weights((rows, width), factory)])
    raise ValueError(f"no memory-bound op {case['op']!r}")


def _adam(values: Tensor) -> Work:
    weight = torch.nn.Parameter(values.clone())
    weight.grad = torch.randn_like(weight)
    step: Work = torch.optim.Adam([weight], fused=True).step
    return step


def _planned(case: Fields, device: torch.device) -> Plan:
    chosen = chosen_experts(case["counts"], case["rows"], case["top_k"], device)
    return plan(chosen, case["experts"], case["slots"], padded=case["pad"])


def _differentiated(case: Fields, forward: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Work:
    """The forward without a graph, or the gradients of those inputs that need one, from a graph that is kept."""
    if case["which"] == "F":
        return without_graph(forward)
    output = forward()
    gradient, wanted = torch.randn_like(output), [each for each in inputs if each.requires_grad]
    return lambda: torch.autograd.grad(output, wanted, gradient, retain_graph=True)


# --- layers and steps -------------------------------------------------------------------------------------------------


def moe_layer(case: Fields, factory: Any) -> MoELayer:
    """The reference layer of a case."""
    names = ("experts", "top_k", "expert_ffn_size", "gated", "shared_experts")
    moe = MixtureOfExperts.model_validate({**{name: case[name] for name in names}, "router": ROUTER})
    shape = LayerShape(
        case["hidden_size"],
        moe,
        capacity_factor=case["capacity_factor"],
        capacity_group_tokens=case.get("capacity_group_tokens"),
        form=FORMS[case["implementation"]],
        fp8=case["form"] == "fp8",
    )
    return MoELayer(shape, **factory)


def loaded_tokens(layer: MoELayer, case: Fields, factory: Any) -> Tensor:
    """Tokens [T, h] that the layer's router sends to the experts as ``counts`` say."""
    device = factory["device"]
    chosen = chosen_experts(case["counts"], case["tokens"], case["top_k"], device)
    with torch.no_grad():
        assert layer.router is not None
        weight = layer.router.weight.double()
        logits = torch.rand(case["tokens"], case["experts"], device=device, dtype=torch.float64)
        logits.scatter_add_(1, chosen, torch.full_like(chosen, 2, dtype=torch.float64))
        z = torch.randn(case["tokens"], case["hidden_size"], device=device, dtype=torch.float64)
        x = (z + (logits - z @ weight.t()) @ torch.linalg.pinv(weight.t())).to(factory["dtype"])
        counts = layer.route(layer.router_logits(x)).counts.tolist()
    if counts != list(case["counts"]):
        raise RuntimeError("the tokens do not load the experts as the case says")
    return x.requires_grad_()


def chosen_experts(counts: Sequence[int], tokens: int, top_k: int, device: torch.device) -> Tensor:
    """Choices [tokens, top_k] with these counts, no expert twice in a row, in random order of tokens."""
    experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return experts.view(top_k, tokens).t()[torch.randperm(tokens)].contiguous().to(device)


def run(case: Fields, forward: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Work:
    """The forward without a graph, or (FB) an output as large as the first input and the gradients of all inputs."""
    if case["which"] == "F":
        return without_graph(forward)
    gradient = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(forward(), inputs, gradient)


def without_graph(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same, with nothing kept for a backward pass."""

    def alone() -> Tensor:
        with torch.no_grad():
            return forward()

    return alone


def _layer(case: Fields, factory: Any) -> Work:
    layer = moe_layer(case, factory)
    x = loaded_tokens(layer, case, factory)

    def whole(each: MoELayer) -> Work:
        return run(case, lambda: each(x).y, [x, *each.parameters()])

    return in_turn([whole(each) for each in cold_copies(layer, layer.parameters())])


def _step(case: Fields, factory: Any) -> Work:
    model, form = Model.model_validate(case["model"]), FORMS[case["implementation"]]
    routing = Routing.model_validate({"capacity_factor": case["capacity_factor"], "pad_to_capacity": case["pad"]})
    transformer = Transformer(model, routing, form=form, **factory)
    size = case["sequences"], case["sequence_length"] + 1
    batch = torch.randint(model.vocabulary_size, size, device=factory["device"])
    return lambda: transformer.train_step(batch)


__all__ = [
    "DTYPES", "FORMS", "Work", "chosen_experts", "fp8_dense", "fp8_grouped", "loaded_tokens", "moe_layer", "reference",
    "run", "work",
]  # fmt: skip
