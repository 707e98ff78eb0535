"""Recorded loads: CSV and npz files in place of a load model, and what is said when a file is no recording."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from simulator.campaign import estimate
from simulator.errors import InvalidInput
from simulator.layout import resolve
from simulator.routing import ExpertLoad, expert_load
from simulator.routing.replay import MAX_BYTES, recorded
from simulator.spec import load_scenario
from simulator.spec.routing import ReplayLoad

Counts = npt.NDArray[np.int64]

COUNTS: Counts = np.array(
    [
        [[4, 4, 4, 4], [8, 4, 2, 2], [1, 2, 5, 8]],
        [[6, 2, 4, 4], [4, 4, 4, 4], [0, 8, 0, 8]],
    ]
)
"""Two steps, three layers, four experts of which a token chooses two: no load above 8 of 16."""


def small(**routing: Any) -> dict[str, Any]:
    """Four microbatches of one rank; two MoE layers and that of an MTP module."""
    return {
        "name": "small",
        "model": {
            "name": "small",
            "layers": 2,
            "mtp_depth": 1,
            "hidden_size": 64,
            "vocabulary_size": 100,
            "context": 128,
            "mixer": {"kind": "mha", "heads": 4, "head_dim": 16},
            "moe": {"experts": 4, "top_k": 2, "expert_ffn_size": 64},
        },
        "cluster": {"profile": "h100-sxm", "accelerators": 4},
        "parallelism": {"expert": 2},
        "training": {"tokens": "1B", "sequence_length": 128, "global_batch_sequences": 16},
        "routing": routing,
    }


def replayed(file: Path | str, *, encoder: int = 0, **load: Any) -> ExpertLoad:
    written = small(load={"kind": "replay", "file": str(file), **load})
    if encoder:
        written["model"] = {**written["model"], "encoder": {"layers": encoder}}
    scenario = load_scenario(written)
    found = expert_load(scenario, resolve(scenario))
    assert found is not None
    return found


def as_csv(file: Path, counts: npt.NDArray[Any] = COUNTS, value: str = "count", offset: int = 0) -> Path:
    rows = [
        f"{step},{layer + offset},{expert + offset},{number}"
        for (step, layer, expert), number in np.ndenumerate(counts)
    ]
    file.write_text("\n".join([f"step,layer,expert,{value}", *rows]) + "\n")
    return file


def as_npz(file: Path, counts: npt.NDArray[Any] = COUNTS, name: str = "counts", **others: Any) -> Path:
    arrays: dict[str, Any] = {name: counts, **others}
    np.savez(file, **arrays)
    return file


# Files that are read


def test_recorded_counts_are_scaled_to_the_tokens_and_repeated_over_microbatches(tmp_path: Path) -> None:
    """256 tokens of an expert group make 512 assignments, 32 for each recorded one; steps 0, 1, 0, 1."""
    load = replayed(as_csv(tmp_path / "loads.csv"))

    assert load.assigned.shape == (4, 3, 4)
    assert load.assigned.tolist() == [(32 * COUNTS[step]).tolist() for step in (0, 1, 0, 1)]
    assert load.dropped_fraction == 0.0


def test_of_more_steps_than_microbatches_evenly_spaced_ones_are_taken(tmp_path: Path) -> None:
    """Ten steps, each with its own busiest expert in the first layer, for four microbatches: steps 0, 2, 5 and 7."""
    steps = np.repeat(COUNTS[:1], 10, axis=0)
    steps[:, 0] = [[8, 6, 1, 1] if step < 5 else [1, 1, 6, 8] for step in range(10)]
    steps[2, 0], steps[7, 0] = [2, 3, 5, 6], [6, 5, 3, 2]

    load = replayed(as_npz(tmp_path / "loads.npz", steps))

    assert load.assigned.tolist() == (32 * steps[[0, 2, 5, 7]]).tolist()


@pytest.mark.parametrize(
    ("steps", "placement", "said"),
    [
        (2, "contiguous", ["2 recorded steps", "repeated over 4"]),
        (4, "contiguous", ["4 recorded steps"]),
        (6, "contiguous", ["4 of 6 recorded steps, evenly spaced"]),
        (12, "balanced", ["4 of 6 recorded steps, evenly spaced", "placed after the 6 steps before"]),
        (1, "balanced", ["one recorded step stands for every microbatch", "placed after the very step that is run"]),
    ],
)
def test_an_estimate_says_which_recorded_steps_it_uses(
    steps: int, placement: str, said: list[str], tmp_path: Path
) -> None:
    file = as_npz(tmp_path / "loads.npz", np.resize(COUNTS, (steps, *COUNTS.shape[1:])))
    routing = {"load": {"kind": "replay", "file": str(file)}, "placement": {"kind": placement}}

    text = "; ".join(estimate(load_scenario(small(**routing))).assumptions)

    assert [words for words in said if words not in text] == []
    for words in ("evenly spaced", "repeated over", "placed after"):
        assert (words in text) == (words in " ".join(said))


def test_a_recording_of_an_encoder_and_a_decoder_holds_the_layers_of_both(tmp_path: Path) -> None:
    """Two encoder layers, then three of the decoder; a file of one stack alone, however deep, is refused."""
    both = np.concatenate([COUNTS, COUNTS[:, ::-1]], axis=1)[:, 1:]
    load = replayed(as_npz(tmp_path / "both.npz", both), encoder=2)

    assert load.assigned[:2].tolist() == (32 * both).tolist()
    with pytest.raises(InvalidInput) as caught:
        replayed(as_npz(tmp_path / "one.npz"), encoder=3)
    assert (
        "holds loads of 3 layers, but the model has 6 MoE layers, 3 of them of the encoder, which come first, "
        "1 of them of MTP modules"
    ) in str(caught.value)


def test_every_form_of_a_file_drives_the_same_path(tmp_path: Path) -> None:
    forms = [
        as_csv(tmp_path / "count.csv"),
        as_csv(tmp_path / "one-based.csv", offset=1),
        as_csv(tmp_path / "load.csv", COUNTS / 7, "load"),
        as_csv(tmp_path / "relative.csv", COUNTS / 4, "relative_load"),
        as_csv(tmp_path / "huge.csv", COUNTS * 1e307, "load"),
        as_npz(tmp_path / "counts.npz"),
        as_npz(tmp_path / "floats.npz", (COUNTS / 16).astype(np.float32), "shares"),
        as_npz(tmp_path / "several.npz", names=np.arange(3)),
    ]
    loads = [replayed(form).assigned.tobytes() for form in forms]

    assert len(set(loads)) == 1


def test_a_csv_may_be_shuffled_commented_and_spaced(tmp_path: Path) -> None:
    lines = as_csv(tmp_path / "plain.csv").read_text().splitlines()
    untidy = tmp_path / "untidy.csv"
    header, *rows = ["expert, " + line.replace(",", " , ") for line in ["step,layer,expert,count", *lines[1:]]]
    assert header.startswith("expert")
    rows = [" , ".join(reversed(line.split(","))) for line in lines[1:]]
    text = "# measured\n\n# by us\ncount, expert , layer,step\n" + "\n".join(reversed(rows)) + "\n\n"
    untidy.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())

    assert replayed(untidy).assigned.tolist() == replayed(tmp_path / "plain.csv").assigned.tolist()


def test_a_file_without_steps_is_one_step(tmp_path: Path) -> None:
    file = tmp_path / "loads.csv"
    rows = [f"{layer},{expert},{COUNTS[0, layer, expert]}" for layer in range(3) for expert in range(4)]
    file.write_text("layer,expert,load\n" + "\n".join(rows))

    assert replayed(file).assigned.tolist() == [(32 * COUNTS[0]).tolist()] * 4


def test_the_last_layer_stands_for_an_mtp_module_that_was_not_recorded(tmp_path: Path) -> None:
    load = replayed(as_npz(tmp_path / "loads.npz", COUNTS[:, :2]))

    assert load.assigned[1].tolist() == (32 * COUNTS[1, [0, 1, 1]]).tolist()


def test_rows_are_chosen_by_other_columns(tmp_path: Path) -> None:
    file = tmp_path / "loads.csv"
    rows = [
        f"{text},{run},{layer},{expert},{COUNTS[step, layer, expert]}"
        for step, (text, run) in enumerate((("github", 1), ("wiki", 2)))
        for layer in range(3)
        for expert in range(4)
    ]
    file.write_text("domain,run,layer,expert,load\n" + "\n".join(rows))

    assert replayed(file, where={"domain": "wiki"}).assigned[0].tolist() == (32 * COUNTS[1]).tolist()
    assert replayed(file, where={"run": 1, "domain": "github"}).assigned[0].tolist() == (32 * COUNTS[0]).tolist()


def test_one_step_can_be_chosen(tmp_path: Path) -> None:
    load = replayed(as_csv(tmp_path / "loads.csv"), where={"step": 1})

    assert load.assigned.tolist() == [(32 * COUNTS[1]).tolist()] * 4


def test_counts_can_be_sampled_with_the_recorded_shares(tmp_path: Path) -> None:
    """Every microbatch is another draw, and their mean is the record."""
    shares = COUNTS[:1].repeat(2, 0)
    scenario = load_scenario(
        small(load={"kind": "replay", "file": str(as_npz(tmp_path / "loads.npz", shares)), "sampled": True}),
        {"training.global_batch_sequences": 2000},
    )
    load = expert_load(scenario, resolve(scenario))
    assert load is not None

    assert len({draw.tobytes() for draw in load.assigned}) > 400
    assert load.assigned.mean(0) == pytest.approx(32 * COUNTS[0], abs=2.0)
    assert (load.assigned.sum(-1) == 512).all()
    assert load.assigned.max() <= 256


def test_a_file_beside_the_scenario_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to the scenario file, whatever the working folder; else relative to the working folder."""
    folder = tmp_path / "study"
    folder.mkdir()
    as_npz(folder / "loads.npz")
    text = (
        "name: small\nmodel: mixtral-8x7b\ncluster: {profile: h100-sxm, accelerators: 8}\n"
        "training: {tokens: 1B, sequence_length: 4096, global_batch_sequences: 64}\n"
        "routing: {load: {kind: replay, file: loads.npz}}\n"
    )
    (folder / "scenario.yaml").write_text(text)
    load = load_scenario(str(folder / "scenario.yaml")).routing.load
    monkeypatch.chdir(folder)

    assert isinstance(load, ReplayLoad)
    assert load.file == str((folder / "loads.npz").resolve())
    assert recorded(ReplayLoad(kind="replay", file="loads.npz"), 3, 4, 2).shape == (2, 3, 4)


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    file = as_npz(tmp_path / "loads.npz")
    first = replayed(file).assigned
    as_npz(file, COUNTS[::-1])
    os.utime(file, ns=(1, 1))

    assert replayed(file).assigned[0].tolist() == first[1].tolist()


def test_recorded_loads_are_dropped_by_capacity(tmp_path: Path) -> None:
    """Capacity 1.0 of 128: of step 0 the second layer drops 128 + 0, the third 32 + 128 of 512."""
    scenario = load_scenario(
        small(load={"kind": "replay", "file": str(as_npz(tmp_path / "loads.npz"))}, capacity_factor=1.0)
    )
    load = expert_load(scenario, resolve(scenario))
    assert load is not None

    assert (load.assigned - load.processed).sum(-1)[0].tolist() == [0, 128, 160]


def test_a_load_slightly_over_the_ceiling_is_a_rounded_one(tmp_path: Path) -> None:
    """2.08 of at most 2 times the mean, as read off a figure: the expert then has every token."""
    counts = np.tile([2.08, 0.64, 0.64, 0.64], (1, 3, 1))

    assert (replayed(as_npz(tmp_path / "loads.npz", counts)).assigned[..., 0] == 256).all()


# Files that are not

HEADER = "layer,expert,load\n"
FULL = "".join(f"{layer},{expert},1\n" for layer in range(3) for expert in range(4))


def text(content: str | bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        file = folder / "loads.csv"
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    return make


def array(*arguments: Any, **named: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        np.savez(folder / "loads.npz", *arguments, **named)
        return folder / "loads.npz"

    return make


def raw(content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "loads.npz").write_bytes(content)
        return folder / "loads.npz"

    return make


def packed(**members: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "loads.npz", "w") as archive:
            for name, content in members.items():
                archive.writestr(f"{name}.npy", content)
        return folder / "loads.npz"

    return make


def _plain(values: npt.NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def broken(folder: Path) -> Path:
    """A compressed archive with a byte of its data changed."""
    file = folder / "loads.npz"
    np.savez_compressed(file, counts=np.random.default_rng(0).integers(0, 9, (5, 3, 4)))
    content = bytearray(file.read_bytes())
    content[120:130] = b"\xff" * 10
    file.write_bytes(content)
    return file


def changed(old: str, new: str) -> Callable[[Path], Path]:
    assert FULL.count(old) == 1
    return text(HEADER + FULL.replace(old, new))


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "loads.csv")
    return folder / "loads.csv"


def sparse(folder: Path) -> Path:
    with (folder / "loads.csv").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    return folder / "loads.csv"


def bomb(folder: Path) -> Path:
    """Little to read, much to unpack."""
    with (
        zipfile.ZipFile(folder / "loads.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.npy", "w") as file,
    ):
        for _ in range(MAX_BYTES // 10**7 + 1):
            file.write(bytes(10**7))
    return folder / "loads.npz"


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing file": (lambda folder: folder / "quux.csv", "routing.load.file: no such file: "),
    "directory": (lambda folder: folder, "{file}: routing.load.file: is a directory; give a CSV or npz file"),
    "pipe": (fifo, "{file}: routing.load.file: is not a file; give a CSV or npz file"),
    "too large": (sparse, "{file}: routing.load.file: has 500 MB; at most 500 MB are read"),
    "empty": (text(""), "{file}: routing.load.file: needs the columns layer, expert and one of count, load, "),
    "only a header": (text(HEADER), "{file}: routing.load.file: has no row"),
    "only comments": (text("# a\n# b\n"), "relative_load; found nothing"),
    "no load": (text("# a\nlayer,expert,tokens\n0,0,1\n"), "{file}:2: routing.load.file: needs the columns layer, "),
    "no layer": (text("expert,load\n0,1\n"), "{file}:1: routing.load.file: needs the columns layer, expert and one of"),
    "two columns": (text("layer,expert,load,load\n0,0,1,1\n"), "{file}:1: routing.load.file: has two columns 'load'"),
    "a word": (changed("1,2,1\n", "1,2,much\n"), "{file}:8: routing.load.file: step, layer and expert must be whole "),
    "half a layer": (changed("1,2,1\n", "1.5,2,1\n"), "{file}:8: routing.load.file: step, layer and expert must be "),
    "no number": (changed("1,2,1\n", "1,2,\n"), "{file}:8: routing.load.file: step, layer and expert must be whole "),
    "short row": (changed("1,2,1\n", "1,2\n"), "{file}:8: routing.load.file: a row must have the 3 columns of the "),
    "long row": (changed("1,2,1\n", "1,2,1,1\n"), "{file}:8: routing.load.file: a row must have the 3 columns of the "),
    "no step": (text("step,layer,expert,load\n,0,0,1\n"), "{file}:2: routing.load.file: step, layer and expert must"),
    "negative": (changed("1,2,1\n", "1,2,-1\n"), "{file}:8: routing.load.file: loads must be finite and not negative"),
    "nan": (
        changed("1,2,1\n", "1,2,nan\n"),
        "{file}:8: routing.load.file: loads must be finite and not negative (got ",
    ),
    "infinite": (changed("1,2,1\n", "1,2,1e999\n"), "{file}:8: routing.load.file: loads must be finite and not negat"),
    "a second load": (
        text(f"{HEADER}{FULL}2,3,5\n"),
        "{file}:14: routing.load.file: a second load of step 0, layer 2, expert 3",
    ),
    "two domains": (
        text("domain,layer,expert,load\nwiki,0,0,1\ngithub,0,0,1\n"),
        "a second load of step 0, layer 0, expert 0; choose with routing.load.where: {domain: ...}",
    ),
    "hole": (
        changed("1,2,1\n", ""),
        "{file}: routing.load.file: has 11 rows; 1 x 3 x 4 steps, layers and experts need 12; step 0, layer 1, expert "
        "2 is missing",
    ),
    "wrong experts": (
        text(HEADER + "".join(f"{layer},{expert},1\n" for layer in range(3) for expert in range(5))),
        "{file}: routing.load.file: holds loads of 5 experts, but the model has 4",
    ),
    "one layer": (
        text(HEADER + "".join(f"0,{expert},1\n" for expert in range(4))),
        "{file}: routing.load.file: holds loads of 1 layers, but the model has 3 MoE layers, 1 of them of MTP modules",
    ),
    "four layers": (array(np.ones((1, 4, 4))), "holds loads of 4 layers, but the model has 3 MoE layers"),
    "too hot": (
        array(np.tile([9.0, 1, 1, 1], (1, 3, 1))),
        "{file}: routing.load.file: step 0, layer 0, expert 0 has 3 times the mean load; a token uses an expert once, "
        "so that top-2 of 4 allows 2",
    ),
    "nothing loaded": (array(np.zeros((1, 3, 4))), "step 0, layer 0: no expert has any load"),
    "not text": (text(bytes(range(256))), "{file}: routing.load.file: cannot be read as CSV text"),
    "null bytes": (text("layer,expert,load\n0,\0,1\n"), "{file}"),
    "open quote": (text('layer,expert,load\n0,0,"1\n'), "{file}: routing.load.file: cannot be read as CSV text"),
    "long field": (text(HEADER + "1" * 200_000 + ",0,1\n"), "{file}: routing.load.file: cannot be read as CSV text"),
    "long number": (
        text(HEADER + "1" * 9000 + ",0,1\n"),
        "{file}:2: routing.load.file: step, layer and expert must be",
    ),
    "not an npz": (raw(b"layer,expert,load\n"), "{file}: routing.load.file: is not an npz file of plain numbers"),
    "empty npz": (raw(b""), "{file}: routing.load.file: is not an npz file of plain numbers"),
    "a bare array": (raw(_plain(np.ones((1, 3, 4)))), "{file}: routing.load.file: is not an npz file of plain numbers"),
    "objects": (
        array(np.array([{}, []], dtype=object)),
        "{file}: routing.load.file: is not an npz file of plain numbe",
    ),
    "broken archive": (broken, "{file}: routing.load.file: is not an npz file of plain numbers"),
    "huge shape": (
        packed(counts=_plain(np.ones((1, 3, 4))).replace(b"(1, 3, 4), }" + b" " * 12, b"(99999999999, 3, 400), }")),
        "{file}: routing.load.file: is not an npz file of plain numbers",
    ),
    "broken header": (
        packed(counts=_plain(np.ones((1, 3, 4))).replace(b"(1, 3, 4)", b"(1, 3, 4,")),
        "{file}: routing.load.file: is not an npz file of plain numbers",
    ),
    "not an array": (
        packed(counts=b"hello"),
        "{file}: routing.load.file: must hold numbers [step, layer, expert], not",
    ),
    "much to unpack": (bomb, "{file}: routing.load.file: has 510 MB; at most 500 MB are read"),
    "two arrays": (array(a=np.ones(1), b=np.ones(1)), "holds the arrays a, b; name one of them counts"),
    "no array": (packed(), "holds the arrays none; name one of them counts"),
    "flat": (array(np.ones((3, 4))), "must hold numbers [step, layer, expert], not float64 [3, 4]"),
    "no step in it": (array(np.ones((0, 3, 4))), "must hold numbers [step, layer, expert], not float64 [0, 3, 4]"),
    "complex": (array(np.ones((1, 3, 4)) * 1j), "must hold numbers [step, layer, expert], not complex128 [1, 3, 4]"),
    "words": (array(np.full((1, 3, 4), "a")), "must hold numbers [step, layer, expert], not <U1 [1, 3, 4]"),
    "negative npz": (array(-np.ones((1, 3, 4))), "{file}: routing.load.file: loads must be finite and not negative"),
    "nan npz": (array(np.full((1, 3, 4), np.nan)), "{file}: routing.load.file: loads must be finite and not negative"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_recording_gives_one_message(name: str, tmp_path: Path) -> None:
    make, expected = BAD[name]
    file = make(tmp_path)

    with pytest.raises(InvalidInput) as caught:
        replayed(file)

    message = str(caught.value)
    assert expected.replace("{file}", str(file)) in message
    assert message.isprintable(), "a message is one line of printable text"
    assert "None" not in message


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"domian": "wiki"}, "routing.load.where: unknown column 'domian'; did you mean 'domain'? Allowed: domain, "),
        ({"domain": "arxiv"}, "routing.load.file: has no row with domain arxiv"),
    ],
)
def test_rows_that_cannot_be_chosen(where: dict[str, str], expected: str, tmp_path: Path) -> None:
    (tmp_path / "loads.csv").write_text("domain,layer,expert,load\nwiki,0,0,1\n")

    with pytest.raises(InvalidInput) as caught:
        replayed(tmp_path / "loads.csv", where=where)

    assert expected in str(caught.value)


def test_an_npz_file_has_no_rows_to_choose(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        replayed(as_npz(tmp_path / "loads.npz"), where={"domain": "wiki"})

    assert str(caught.value) == "routing.load.where: chooses rows of a CSV; an npz file has none"


def test_a_model_without_mtp_needs_every_layer(tmp_path: Path) -> None:
    scenario = load_scenario(
        small(load={"kind": "replay", "file": str(as_npz(tmp_path / "loads.npz", COUNTS[:, :1]))}),
        {"model.mtp_depth": 0},
    )

    with pytest.raises(InvalidInput) as caught:
        expert_load(scenario, resolve(scenario))

    assert "holds loads of 1 layers, but the model has 2 MoE layers" in str(caught.value)
