"""The scenario contract: everything one estimate needs, as the user writes it."""

from __future__ import annotations

import copy
from typing import Any, Literal

from pydantic import PrivateAttr

from simulator.spec.faults import Fault
from simulator.spec.fields import Contract, UsdPerHour, Whole, described
from simulator.spec.hardware import HardwareProfile
from simulator.spec.library import available
from simulator.spec.model import Model
from simulator.spec.parallelism import Parallelism
from simulator.spec.routing import Routing
from simulator.spec.training import Training


class Cluster(Contract):
    """The machine."""

    profile: HardwareProfile = described("Hardware profile: a name, a path, or an inline mapping.", example="h800-sxm")
    accelerators: Whole = described("Chips.", example=2048)
    stack: str | None = described(
        "One of the profile's stacks; default: its first.", example="deepseek-hai-llm", default=None
    )
    overrides: dict[str, Any] = described(
        "Changes to the profile by dotted path.", example={"tiers.infiniband.bandwidth": "100 GB/s"}, default=dict
    )
    faults: tuple[Fault, ...] = described("Slow ranks and links.", example=[{"rank": 17, "compute": 0.8}], default=())

    @property
    def ranks(self) -> int:
        """Ranks of the job: chips times ranks per chip."""
        return self.accelerators * self.profile.accelerator.ranks_per_accelerator

    @property
    def stack_name(self) -> str:
        """The chosen software stack."""
        return self.stack or next(iter(self.profile.stacks))


class Cost(Contract):
    """What an accelerator-hour costs."""

    price_per_accelerator_hour: UsdPerHour | None = described(
        "Price; default: the profile's.", unit="USD/h", example="2 USD", default=None
    )


class Reliability(Contract):
    """Failures and checkpoints: a later room. Must be empty."""


class Scenario(Contract):
    """One training run on one machine, with the variants to compare."""

    name: str = described("Title of the scenario.", example="DeepSeek-V3 pre-training")
    model: Model = described(
        "Model: a preset name, a path, an inline mapping, or {preset, set}.", example="deepseek-v3"
    )
    cluster: Cluster = described(
        "Chips, network and software stack.", example={"profile": "h800-sxm", "accelerators": 2048}
    )
    parallelism: Parallelism = described("How the work is split.", example={"expert": 8}, default=Parallelism)
    training: Training = described(
        "Tokens, batches, precision, recomputation and optimizer.",
        example={"tokens": "14.8T", "sequence_length": 4096, "global_batch_sequences": 15360},
    )
    routing: Routing = described("How tokens meet experts.", example={"capacity_factor": 1.25}, default=Routing)
    cost: Cost = described("Price.", example={"price_per_accelerator_hour": "2 USD"}, default=Cost)
    reliability: Reliability = described("Failures and checkpoints: a later room.", example={}, default=Reliability)
    variants: dict[str, dict[str, Any]] = described(
        "Named sets of overrides to compare with the base.",
        example={"cf-1.25": {"routing.capacity_factor": 1.25}},
        default=dict,
    )
    sweep: dict[str, list[Any]] = described(
        "Axes of a sweep: dotted path to values.", example={"model.moe.stride": [1, 2, 4]}, default=dict
    )

    _names: dict[str, str] = PrivateAttr(default_factory=dict)
    _tree: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def profile_name(self) -> str:
        """Name or path under which the profile was asked for."""
        return self._names.get("profile", self.cluster.profile.name)

    def __eq__(self, other: object) -> bool:
        """Two scenarios are equal when their fields are, wherever they were written."""
        return isinstance(other, Scenario) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]  # holds mappings

    def as_dict(self) -> dict[str, Any]:
        """Give the resolved scenario as plain data that :func:`simulator.load_scenario` reads back.

        A shipped profile is given by name, any other in full, in both cases before `cluster.overrides`.
        """
        tree = self.model_dump(mode="json", by_alias=True)
        name = self._names.get("profile")
        if name in available("profiles"):
            tree["cluster"]["profile"] = name
        elif self._tree:
            tree["cluster"]["profile"] = copy.deepcopy(self._tree["document"].tree["cluster"]["profile"])
        return tree


EngineName = Literal["events", "max-plus"]
