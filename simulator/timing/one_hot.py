"""Products with one-hot masks that bring tokens into the slots of their experts and back, group by group.

With S tokens of width M and X = E C slots in a capacity group (:mod:`simulator.workload.slots`) the products are

    dispatch   F  [X, S] x [S, M]    I  [S, X] x [X, M]                          (the mask has no gradient)
    combine    F  [S, X] x [X, M]    I  [X, S] x [S, M],  [S, M] x [M, X]        (slots, and the router's weights)

as read in tensorflow/mesh (mesh_tensorflow/transformer/moe.py), google/flaxformer (moe_layers.py), MaxText
(layers/moe.py) and microsoft/DeepSpeed (deepspeed/moe/sharded_moe.py): there the dispatch mask is the combine mask cast
to truth values. The groups of a rank are one batched product.
"""

from __future__ import annotations

from simulator.timing.kernels import Device, Numbers, Pass, gemm_seconds
from simulator.workload.ops import OneHotProduct


def one_hot_seconds(device: Device, op: OneHotProduct, form: str, which: Pass, tokens: float) -> Numbers:
    """Seconds of one pass over the ``tokens`` of a rank in a format.

    W takes none: the gradient of the mask is part of the way back to the router, and so of I.
    """
    group, slots, width = float(op.tokens), float(op.slots), float(op.width)
    into, out, mask = (slots, width, group), (group, width, slots), (group, slots, width)  # rows, columns, inner
    forward = {"dispatch": into, "combine": out}[op.direction]
    backward = {"dispatch": [out], "combine": [into, mask]}[op.direction]
    shapes = {"F": [forward], "I": backward, "W": []}[which]
    curves = device.profile.kernels.gemm
    launch = (curves.get(form) or curves["bf16"]).launch.value  # type: ignore[call-overload]
    groups = tokens / group
    alone = sum(gemm_seconds(device, form, "F", *shape) - launch for shape in shapes)
    return len(shapes) * launch + groups * alone


__all__ = ["one_hot_seconds"]
