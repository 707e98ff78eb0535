"""From what the user wrote to a validated, frozen :class:`~simulator.spec.scenario.Scenario`.

Order: read the YAML, expand the model preset, the hardware profile and the named precision in place, apply overrides
by dotted path, validate, check the cross-field laws. Every problem is reported with the file, line and column that
caused it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from simulator import errors
from simulator.errors import InvalidInput, Origin, Problem
from simulator.spec import laws, library
from simulator.spec.document import Document, from_mapping, read_file, read_value
from simulator.spec.fields import Contract
from simulator.spec.hardware import HardwareProfile
from simulator.spec.library import available, data_folder
from simulator.spec.model import Model
from simulator.spec.problems import problems
from simulator.spec.scenario import Scenario
from simulator.spec.training import PRECISIONS
from simulator.units import shown

__all__ = [
    "available",
    "data_folder",
    "load_model",
    "load_profile",
    "load_scenario",
    "parse_assignment",
    "profile_sha256",
    "vary",
]

ContractT = TypeVar("ContractT", bound=Contract)
Overrides = Mapping[str, Any]

# Mappings whose keys are themselves dotted paths: what follows them in a path is one key.
_DOTTED_KEYS = re.compile(r"(cluster\.overrides|sweep|training\.phases\.[^.]+\.set)\.(.+)", re.DOTALL)


# --- public entry points ----------------------------------------------------------------------------------------------


def load_scenario(
    source: str | Path | Mapping[str, Any], overrides: Overrides | None = None, *, label: str = "override"
) -> Scenario:
    """Load a scenario from a file, a shipped name or a mapping, with overrides by dotted path.

    ``label`` names the overrides in error messages, where a value from a file has its line.

    Raises:
        InvalidInput: anything that is wrong, with file, line and column.
    """
    names: dict[str, str] = {}
    if isinstance(source, Mapping):
        document, base = from_mapping(source), None
        if isinstance(document.tree.get("_names"), dict):  # names of presets that are already expanded
            names = document.tree.pop("_names")
    else:
        file = _scenario_file(source)
        document, base = read_file(file), file.parent
    return _scenario(document, base, names, [(overrides or {}, label)])


def vary(scenario: Scenario, overrides: Overrides, label: str) -> Scenario:
    """Build the same scenario with further overrides, for variants, sweeps and phases.

    Raises:
        InvalidInput: as :func:`load_scenario`.
    """
    document, base = scenario._tree["document"], scenario._tree["base"]
    return _scenario(document.copy(), base, dict(scenario._names), [(overrides, label)])


def load_model(reference: str) -> Model:
    """Load one model preset by name or path.

    Raises:
        InvalidInput: no such preset, or anything that is wrong with it.
    """
    return _validated(Model, library.read(library.find(reference, "models", path="model")))


def load_profile(reference: str) -> HardwareProfile:
    """Load one hardware profile by name or path.

    Raises:
        InvalidInput: no such profile, or anything that is wrong with it.
    """
    return _validated(HardwareProfile, library.read(library.find(reference, "profiles", path="cluster.profile")))


def parse_assignment(text: str) -> tuple[str, Any]:
    """Read ``dotted.path=value`` as given to ``--set``; the value is YAML.

    Raises:
        InvalidInput: no path, or a value that is too deep, too long or tagged.
    """
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise errors.invalid(
            f"{shown(text)}: write --set dotted.path=value, for example --set routing.capacity_factor=1.25"
        )
    return path.strip(), read_value(value.strip(), Origin(f"--set {path.strip()}"))


def profile_sha256(profile: HardwareProfile) -> str:
    """Fingerprint of a profile's content, overrides included."""
    text = json.dumps(profile.model_dump(mode="json", by_alias=True), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# --- the steps --------------------------------------------------------------------------------------------------------


def _scenario_file(source: str | Path) -> Path:
    text, path = str(source), Path(source)
    if not text.strip():
        raise errors.invalid("no scenario is named; give a file or a shipped name, for example deepseek-v3")
    if library.exists(path):
        return path
    if isinstance(source, Path) or library.looks_like_path(text):
        raise errors.invalid(f"no such file{library.hint(text, 'scenarios')}", origin=Origin(_shortened(text)))
    return library.find(text, "scenarios")


def _shortened(name: str) -> str:
    return name if len(name) <= 120 else f"{name[:60]}...{name[-40:]}"


def _scenario(
    document: Document, base: Path | None, names: dict[str, str], overrides: Iterable[tuple[Overrides, str]]
) -> Scenario:
    _expand(document, base, names)
    for values, label in overrides:
        for dotted, value in values.items():
            _override(document, names, dotted, value, Origin(f"{label} {dotted}".strip()))
            _expand(document, base, names)
    kept = document.copy()
    _override_profile(document)
    scenario = _validated(Scenario, document)
    scenario._names.update(names)
    scenario._tree.update(document=kept, base=base)
    broken = [Problem(law.path, law.message, document.origin(document.key(law.path))) for law in laws.broken(scenario)]
    if broken:
        raise InvalidInput(broken)
    return scenario


def _override(document: Document, names: dict[str, str], dotted: str, value: Any, origin: Origin) -> None:
    """Set one value. A change inside the profile is kept as one of `cluster.overrides`, so that it can be told."""
    path: str | tuple[str, ...] = dotted
    if isinstance(dotted, str):
        inside = _DOTTED_KEYS.fullmatch(re.sub(r"^cluster\.profile\.", "cluster.overrides.", dotted))
        path = (*inside[1].split("."), inside[2]) if inside else dotted
    document.set(path, value, origin)
    if dotted == "model":
        names.pop("model", None)
    if dotted in ("cluster", "cluster.profile"):
        names.pop("profile", None)


def _expand(document: Document, base: Path | None, names: dict[str, str]) -> None:
    """Replace the names of presets and precisions by their content, in place. Idempotent."""
    model, cluster, training = (document.tree.get(key) for key in ("model", "cluster", "training"))
    if isinstance(model, str):
        document.graft(("model",), _preset(model, "models", base, "model", document))
        names["model"] = model
    elif isinstance(model, dict) and "preset" in model:
        _expand_model_preset(document, model, base)
        names["model"] = model["preset"]
    if isinstance(cluster, dict) and isinstance(cluster.get("profile"), str):
        names["profile"] = cluster["profile"]
        profile = _preset(cluster["profile"], "profiles", base, "cluster.profile", document)
        document.graft(("cluster", "profile"), profile)
    if isinstance(training, dict) and isinstance(training.get("precision"), str):
        name = training["precision"]
        training["precision"] = dict(PRECISIONS[name]) if name in PRECISIONS else name
    _find_files(document, base)


def _find_files(document: Document, base: Path | None) -> None:
    """Write the path of a recorded load or of a schedule in full where it lies beside the scenario that names it."""
    for section, key in (("routing", "load"), ("parallelism", "schedule")):
        inside = document.tree.get(section)
        named = inside.get(key) if isinstance(inside, dict) else None
        if base is not None and isinstance(named, dict) and isinstance(named.get("file"), str):
            beside = base / named["file"]
            if library.exists(beside):
                named["file"] = str(beside.resolve())


def _expand_model_preset(document: Document, model: dict[str, Any], base: Path | None) -> None:
    for key in model:
        if key not in ("preset", "set"):
            message = errors.one_of(key, ["preset", "set"], "key beside preset")
            raise errors.invalid(message, path=f"model.{key}", origin=document.origin(("model", key)))
    preset, changes = model["preset"], model.get("set") or {}
    if not isinstance(preset, str):
        message = f"must be a preset name or a path (got {shown(preset)})"
        raise errors.invalid(message, path="model.preset", origin=document.origin(("model", "preset")))
    if not isinstance(changes, dict):
        message = f"must map dotted paths to values (got {shown(changes)})"
        raise errors.invalid(message, path="model.set", origin=document.origin(("model", "set")))
    places = {dotted: document.origin(("model", "set", dotted)) for dotted in changes}
    document.graft(("model",), _preset(preset, "models", base, "model.preset", document))
    for dotted, value in changes.items():
        document.set(f"model.{dotted}", value, places[dotted] or Origin("model.set"))


def _preset(reference: str, kind: library.Kind, base: Path | None, path: str, document: Document) -> Document:
    return library.read(library.find(reference, kind, base, path=path, origin=document.origin(document.key(path))))


def _override_profile(document: Document) -> None:
    cluster = document.tree.get("cluster")
    changes = cluster.get("overrides") if isinstance(cluster, dict) else None
    if not isinstance(changes, dict):
        return
    for dotted, value in changes.items():
        origin = document.origin(("cluster", "overrides", dotted)) or Origin("cluster.overrides")
        document.set(f"cluster.profile.{dotted}", value, origin)


def _validated(contract: type[ContractT], document: Document) -> ContractT:
    try:
        return contract.model_validate(document.tree)
    except ValidationError as error:
        raise InvalidInput(problems(contract, document, error)) from None
