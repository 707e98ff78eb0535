"""What can be wrong with an input, and the one message that says so.

A row makes its files in a temporary folder and returns what a user would name on the command line. The expected text is
a part of the message, with ``{file}`` for that name. The table is shared by the tests of the loader and of the command
line through the fixtures of ``conftest.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SCENARIO = """\
name: small
model: mixtral-8x7b
cluster:
  profile: h100-sxm
  accelerators: 8
training:
  tokens: 1B
  sequence_length: 4096
  global_batch_sequences: 64
"""


class BadInput(NamedTuple):
    """One thing that is wrong: its name, how to make it, and a part of the message."""

    name: str
    make: Callable[[Path], str]
    message: str

    def expected(self, argument: str) -> str:
        """Give the part of the message, with the name under which the scenario was asked for."""
        return self.message.replace("{file}", argument)


def _named(name: str) -> Callable[[Path], str]:
    return lambda folder: name


def _in_folder(name: str) -> Callable[[Path], str]:
    return lambda folder: str(folder / name)


def _file(content: str | bytes) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        path = folder / "scenario.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return make


def _changed(old: str, new: str) -> Callable[[Path], str]:
    assert SCENARIO.count(old) == 1
    return _file(SCENARIO.replace(old, new))


def _override(text: str) -> Callable[[Path], str]:
    return _changed("  accelerators: 8\n", f"  accelerators: 8\n  overrides: {{{text}}}\n")


def _routing(text: str) -> Callable[[Path], str]:
    return _file(f"{SCENARIO}routing:\n{text}")


def _sparse(folder: Path) -> str:
    path = folder / "scenario.yaml"
    with path.open("wb") as file:
        file.truncate(50_000_000)
    return str(path)


_LAUGHS = "a: &a [ha, ha, ha, ha, ha, ha, ha, ha, ha]\n" + "".join(
    f"{new}: &{new} [{', '.join(f'*{old}' for _ in range(9))}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)

BAD_INPUTS = [
    # What is named.
    BadInput("missing-file", _in_folder("quux.yaml"), "{file}: no such file"),
    BadInput("missing-path-object-like-name", _named("no/such/quux"), "no/such/quux: no such file"),
    BadInput(
        "misspelled-file", _in_folder("deepseek-v4.yaml"), "{file}: no such file; did you mean the shipped scenario"
    ),
    BadInput("unknown-scenario", _named("deepseek-v9"), "unknown scenario 'deepseek-v9'; did you mean 'deepseek-v"),
    BadInput("empty-name", _named(""), "no scenario is named; give a file or a shipped name, for example deepseek-v3"),
    BadInput("directory", str, "{file}: is a directory; give a YAML file"),
    BadInput("very-long-name", _in_folder("x" * 5000 + ".yaml"), "xxx.yaml: no such file"),
    # Not a text.
    BadInput("binary", _file(bytes(range(256))), "{file}: is not UTF-8 text; give a YAML file"),
    BadInput("null-bytes", _file(b"name: a\0b\n"), "{file}: is a binary file; give a YAML file"),
    BadInput("latin-1", _file("name: café\n".encode("latin-1")), "{file}: is not UTF-8 text; give a YAML file"),
    BadInput("50-MB", _sparse, "{file}: has 50.0 MB; at most 1 MB are read"),
    BadInput(
        "control-character",
        _changed("small", '"\x07"'),
        "{file}:1:8: not YAML: the control character U+0007 is not allowed",
    ),
    # Not YAML, or not the YAML that is read.
    BadInput(
        "tab",
        _changed("  profile", "\tprofile"),
        r"{file}:4:1: not YAML: found character '\t' that cannot start any token; indent with spaces",
    ),
    BadInput(
        "unclosed",
        _changed("8\n", "[8\n"),
        "{file}:6:9: not YAML: expected ',' or ']', but got ':' (while parsing a flow sequence that starts in line 5)",
    ),
    BadInput("list", _file("- a\n- b\n"), "{file}:1:1: the file must hold a mapping of keys to values, not a list"),
    BadInput(
        "text", _file("hello\n"), "{file}:1:1: the file must hold a mapping of keys to values, not a single value"
    ),
    BadInput("empty", _file(""), "{file}: the file is empty; it must hold a mapping of keys to values"),
    BadInput(
        "two-documents",
        _file(f"{SCENARIO}---\n{SCENARIO}"),
        "{file}:10:1: not YAML: expected a single document in the stream but found another document",
    ),
    BadInput(
        "duplicate-key", _changed("  tokens", "  tokens: 2B\n  tokens"), "{file}:8:3: training.tokens: duplicate key; "
    ),
    BadInput(
        "python-tag",
        _changed("small", "!!python/object/apply:os.system [ls]"),
        "{file}:1:7: name: tags such as !!python/object/apply:os.system are not allowed",
    ),
    BadInput("own-tag", _changed("small", "!small {}"), "{file}:1:7: name: tags such as !small are not allowed"),
    BadInput(
        "directive",
        _file(f"%YAML 1.1\n---\n{SCENARIO}"),
        "{file}:1:1: directives (a line that starts with %) are not allowed",
    ),
    BadInput(
        "merge-key",
        _changed("  profile", "  <<: {stack: megatron-core}\n  profile"),
        "{file}:4:3: cluster.<<: merge keys (<<) are not allowed; write the keys out",
    ),
    BadInput("unknown-alias", _changed("small", "*small"), "{file}:1:7: not YAML: found undefined alias 'small'"),
    BadInput("alias-bomb", _file(_LAUGHS), "more than 20000 values after aliases are expanded"),
    BadInput("endless-alias", _file("a: &a [*a]\n"), "{file}:1:4: nested more than 40 levels deep"),
    BadInput("10000-deep", _file("a: " + "[" * 10_000 + "]" * 10_000), "{file}:1:44: nested more than 40 levels deep"),
    BadInput("too-many-values", _file("a: [" + "1," * 30_000 + "1]"), "{file}:1:39999: more than 20000 values"),
    BadInput("long-text", _changed("small", "x" * 30_000), "{file}:1:7: name: a text of more than 20000 characters"),
    BadInput("lone-surrogate", _changed("small", '"\\ud800"'), "{file}:1:7: name: is not valid Unicode text"),
    # Names.
    BadInput(
        "unknown-key",
        _changed("  tokens", "  token"),
        "{file}:7:10: training.token: unknown key 'token'; did you mean 'tokens'? Allowed: fused_attention, ",
    ),
    BadInput(
        "unknown-section", _changed("training:", "trainin:"), "{file}:6:1: trainin: unknown key 'trainin'; did you mean"
    ),
    BadInput(
        "missing-key", _changed("  accelerators: 8\n", ""), "{file}:3:1: cluster.accelerators: is required, for example"
    ),
    BadInput(
        "unknown-model",
        _changed("mixtral-8x7b", "mixtral-8x8b"),
        "{file}:2:8: model: unknown model 'mixtral-8x8b'; did you mean",
    ),
    BadInput(
        "missing-model-file", _changed("mixtral-8x7b", "a/b.yaml"), "{file}:2:8: model: no such model file: a/b.yaml"
    ),
    BadInput(
        "long-model-path", _changed("mixtral-8x7b", "a/" + "b" * 5000), "{file}:2:8: model: no such model file: a/bbb"
    ),
    BadInput(
        "model-is-a-number",
        _changed("mixtral-8x7b", "3"),
        "{file}:2:8: model: must be a preset name, a path, a mapping, ",
    ),
    BadInput(
        "unknown-profile",
        _changed("h100-sxm", "h101-sxm"),
        "{file}:4:12: cluster.profile: unknown hardware profile 'h101-sxm'; did you mean 'h100-sxm'? Allowed: ",
    ),
    BadInput(
        "unknown-tier",
        _override("tiers.infinband.bandwidth: 100 GB/s"),
        "{file}:6:42: cluster.profile.tiers.infinband.bandwidth: unknown item 'infinband'; did you mean 'infiniband'?",
    ),
    # Numbers and units.
    BadInput(
        "ambiguous-unit",
        _override("tiers.infiniband.bandwidth: 400 Gb/s"),
        "{file}:6:43: cluster.profile.tiers.infiniband.bandwidth.value: '400 Gb/s': the unit 'Gb/s' is ambiguous; "
        "write 400 Gbit/s (= 50 GB/s) or 400 GB/s",
    ),
    BadInput(
        "size-for-a-rate",
        _override("tiers.infiniband.bandwidth: 50 GB"),
        "'50 GB' is a size, not a byte rate; write 50 GB/s",
    ),
    BadInput(
        "no-unit",
        _override("tiers.infiniband.bandwidth: 50"),
        ".bandwidth.value: 50 has no unit; write for example 50 GB/s",
    ),
    BadInput(
        "wrong-unit",
        _changed("1B", "1 GB"),
        "{file}:7:11: training.tokens: '1 GB' is not a count; write for example 14.8T",
    ),
    BadInput("nan", _changed("1B", ".nan"), "{file}:7:11: training.tokens: nan is not a finite number"),
    BadInput("infinite", _changed("1B", "1e400"), "{file}:7:11: training.tokens: inf is not a finite number"),
    BadInput(
        "infinite-text", _changed("1B", "1e400 T"), "{file}:7:11: training.tokens: '1e400 T' is not a finite number"
    ),
    BadInput(
        "401-digits", _changed("1B", "1" + "0" * 400), "{file}:7:11: training.tokens: a number of more than 400 digits"
    ),
    BadInput("negative", _changed("1B", "-1B"), "{file}:7:11: training.tokens: must be greater than zero (got '-1B')"),
    BadInput(
        "negative-count", _changed("64", "-64"), "{file}:9:27: training.global_batch_sequences: must be at least 1 "
    ),
    BadInput("zero", _changed(": 8", ": 0"), "{file}:5:17: cluster.accelerators: must be at least 1 (got 0)"),
    BadInput(
        "boolean", _changed(": 8", ": true"), "{file}:5:17: cluster.accelerators: must be a whole number (got true)"
    ),
    BadInput("quoted", _changed(": 8", ': "8"'), "{file}:5:17: cluster.accelerators: must be a whole number (got '8')"),
    BadInput(
        "fraction", _changed(": 8", ": 8.5"), "{file}:5:17: cluster.accelerators: must be a whole number (got 8.5)"
    ),
    BadInput(
        "wrong-type",
        _changed("4096", "[4096]"),
        "{file}:8:20: training.sequence_length: must be a whole number or a mapping",
    ),
    # Schedules.
    BadInput(
        "unknown-schedule",
        _changed("training:", "parallelism: {schedule: zbh3}\ntraining:"),
        "{file}:6:25: parallelism.schedule: must be one of gpipe, 1f1b, interleaved, zb1p, zbh2, zbv, dualpipe, ",
    ),
    BadInput(
        "schedule-without-file",
        _changed("training:", "parallelism: {schedule: {}}\ntraining:"),
        "{file}:6:25: parallelism.schedule.file: is required, for example actions.csv",
    ),
    BadInput(
        "unknown-key-of-a-schedule",
        _changed("training:", "parallelism: {schedule: {fil: actions.csv}}\ntraining:"),
        "parallelism.schedule.fil: unknown key 'fil'; did you mean 'file'?",
    ),
    BadInput(
        "schedule-file-is-a-number",
        _changed("training:", "parallelism: {schedule: {file: 3}}\ntraining:"),
        "{file}:6:32: parallelism.schedule.file: ",
    ),
    BadInput(
        "schedule-file-of-a-growing-batch",
        _file(
            SCENARIO.replace(": 64", ": {from: 8, to: 64, until_tokens: 1M}")
            + "parallelism: {schedule: {file: actions.csv}}\n"
        ),
        "parallelism.schedule.file: a schedule file holds one number of microbatches, but the batch grows; use a named",
    ),
    # Routing.
    BadInput(
        "unknown-load",
        _routing("  load: {kind: logit, population: 1.0}\n"),
        "{file}:11:16: routing.load.kind: unknown kind 'logit'; did you mean 'logits'?",
    ),
    BadInput(
        "unknown-remedy",
        _routing("  balance: [{kind: bais}]\n"),
        "{file}:11:20: routing.balance.0.kind: ",
    ),
    BadInput(
        "remedy-without-kind",
        _routing("  balance: [{weight: 0.01}]\n"),
        "{file}:11:13: routing.balance.0.kind: is required",
    ),
    BadInput(
        "recording-without-file",
        _routing("  load: {kind: replay}\n"),
        "{file}:11:9: routing.load.file: is required, for example loads.npz",
    ),
    BadInput(
        "certain-repetition",
        _routing("  load: {kind: logits, sticky: 1.0}\n"),
        "{file}:11:32: routing.load.sticky: must be less than 1 (got 1.0)",
    ),
    BadInput(
        "full-correlation",
        _routing("  load: {kind: logits, context_correlation: -1.0}\n"),
        "{file}:11:45: routing.load.context_correlation: must be greater than -1 (got -1.0)",
    ),
    BadInput(
        "hotter-than-all-tokens",
        _routing("  load: {kind: logits, hot_experts: {count: 1, load: 5.0}}\n"),
        "{file}:11:54: routing.load.hot_experts.load: 5 times the mean; 1 experts can have 4",
    ),
    BadInput(
        "weight-of-a-bias",
        _routing("  balance: [{kind: bias, weight: 0.01}]\n"),
        "{file}:11:34: routing.balance.0.weight: the bias has no weight; its step is gamma",
    ),
    BadInput(
        "step-of-a-loss",
        _routing("  balance: [{kind: z}, {kind: sequence, gamma: 0.01}]\n"),
        "{file}:11:48: routing.balance.1.gamma: a loss has no step; sequence has a weight",
    ),
    BadInput(
        "copies-in-order",
        _routing("  placement: {redundant_experts: 8}\n"),
        "{file}:11:34: routing.placement.redundant_experts: copies of experts need placement kind balanced",
    ),
    BadInput(
        "copies-that-do-not-divide",
        _changed(
            "training:",
            "parallelism: {expert: 8}\nrouting: {placement: {kind: balanced, redundant_experts: 3}}\ntraining:",
        ),
        "routing.placement.redundant_experts: 8 experts and 3 copies make 11 slots, which do not divide over 8 expert "
        "ranks; nearest: 8",
    ),
    BadInput("step-before-the-start", _routing("  at_step: -1\n"), "{file}:11:12: routing.at_step: must be at least 0"),
]


def _schedule(*rows: str | bytes, file: str = "actions.csv") -> Callable[[Path], str]:
    """Two pipeline ranks, two microbatches, and a schedule file of these rows."""

    def make(folder: Path) -> str:
        texts = [row if isinstance(row, bytes) else row.replace(" ", ",").encode() for row in rows]
        (folder / "actions.csv").write_bytes(b"\n".join(texts))
        (folder / "folder").mkdir()
        path = folder / "scenario.yaml"
        text = SCENARIO.replace("batch_sequences: 64", "batch_sequences: 8")
        path.write_text(f"{text}parallelism: {{pipeline: 2, schedule: {{file: {file}}}}}\n", encoding="utf-8")
        return str(path)

    return make


def _line(number: int, message: str) -> str:
    return f"{{folder}}/actions.csv:{number}: parallelism.schedule.file: {message}"


_FIRST, _SECOND = "0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"

BAD_SCHEDULES = [
    BadInput("no-schedule-file", _schedule(file="quux.csv"), "parallelism.schedule.file: no such file: 'quux.csv'"),
    BadInput("long-schedule-file", _schedule(file="x" * 5000), "parallelism.schedule.file: 'xxxx"),
    BadInput(
        "schedule-folder",
        _schedule(file="folder"),
        "{folder}/folder: parallelism.schedule.file: is not a file; give a CSV file with one row per pipeline rank",
    ),
    BadInput("empty-schedule", _schedule(""), "holds 0 rows with actions, one per rank, but parallelism.pipeline is 2"),
    BadInput(
        "binary-schedule", _schedule(bytes(range(128, 256))), "actions.csv: parallelism.schedule.file: is not UTF-8"
    ),
    BadInput("null-in-schedule", _schedule(b"0F0,\0,0B0"), _line(1, "cell '\\x00' is no action")),
    BadInput("unclosed-quote", _schedule(_FIRST, '"1F0 1B0'), _line(2, "not CSV: unexpected end of data")),
    BadInput(
        "no-action",
        _schedule(_FIRST, "1F0 1X0 1F1 1B1"),
        _line(2, "cell '1X0' is no action; write stage, F, I, W or B, and microbatch, such as 0F3, or a pair such as "),
    ),
    BadInput("no-microbatch", _schedule("0F 0B", _SECOND), _line(1, "cell '0F' is no action")),
    BadInput("negative-stage", _schedule("-1F0", _SECOND), _line(1, "cell '-1F0' is no action")),
    BadInput("other-digits", _schedule("0F\u0663", _SECOND), _line(1, "cell '0F\u0663' is no action")),
    BadInput("huge-stage", _schedule("9" * 30 + "F0", _SECOND), _line(1, "cell '99999999")),
    BadInput(
        "broken-pair", _schedule("0F0 (0F1;0B0)OVERLAP 0B1", _SECOND), _line(1, "cell '(0F1;0B0)OVERLAP' is no action")
    ),
    BadInput(
        "pair-with-a-weight-pass",
        _schedule("0F0 0I0 (0F1;0W0)OVERLAP_F_B 0B1", _SECOND),
        _line(1, "rank 0, (0F1;0W0)OVERLAP_F_B: an overlapped pair is a forward (F) with a backward (I or B)"),
    ),
    BadInput(
        "rows-for-three-ranks",
        _schedule(_FIRST, _SECOND, "2F0 2B0 2F1 2B1"),
        "parallelism.schedule.file: holds 3 rows with actions, one per rank, but parallelism.pipeline is 2",
    ),
    BadInput(
        "too-many-stages",
        _schedule(_FIRST, "1F0 2F0 2B0 1B0 1F1 2F1 2B1 1B1"),
        _line(2, "2F0: stages 0 to 2, but pipeline 2 x virtual_stages 1 makes 2 stages"),
    ),
    BadInput(
        "too-many-microbatches",
        _schedule("0F0 0F1 0F2 0B0 0B1 0B2", "1F0 1B0 1F1 1B1 1F2 1B2"),
        _line(1, "0F2: microbatches 0 to 2, but the batch makes 2 microbatches per pipeline"),
    ),
    BadInput(
        "too-few-microbatches",
        _schedule("0F0 0B0", "1F0 1B0"),
        _line(1, "0F0: microbatches 0 to 0, but the batch makes 2 microbatches per pipeline"),
    ),
    BadInput("rank-without-a-stage", _schedule("1F0 1F1", "1B0 1B1"), "no rank works on stage 0"),
    BadInput(
        "stage-on-two-ranks",
        _schedule(_FIRST, "1F0 1B0 1F1 1B1 0B1"),
        _line(2, "stage 0 is on the ranks 0, 1; a stage is on one rank, or every stage is on two, rank r holding"),
    ),
    BadInput(
        "microbatch-on-the-wrong-rank",
        _schedule("0F0 1F0 1B0 0B0", "1F1 0F1 0B1 1B1"),
        _line(1, "rank 0, 1F0: stage 1 of microbatch 0 belongs to rank 1"),
    ),
    BadInput("missing-action", _schedule(_FIRST, "1F0 1B0 1F1"), _line(2, "rank 1, 1B1: missing")),
    BadInput("repeated-action", _schedule("0F0 0F0 0F1 0B0 0B1", _SECOND), _line(1, "rank 0, 0F0: appears twice")),
    BadInput("backward-first", _schedule("0B0 0F0 0F1 0B1", _SECOND), _line(1, "rank 0, 0B0: comes before 0F0")),
    BadInput(
        "deadlock",
        _schedule("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"),
        _line(1, "deadlock: rank 0 waits at 0B0 for 1B0; rank 1 waits at 1F1 for 0F1"),
    ),
]
"""Schedule files that are refused when they are read; ``{folder}`` is the folder of the scenario."""


def table() -> str:
    """Every bad input with the message that it gets, as Markdown."""
    import tempfile

    from simulator.errors import MoesimError
    from simulator.layout import resolve
    from simulator.spec import load_scenario

    lines = ["| input | message |", "|---|---|"]
    for bad in (*BAD_INPUTS, *BAD_SCHEDULES):
        with tempfile.TemporaryDirectory() as folder:
            target = bad.make(Path(folder))
            try:
                resolve(load_scenario(target))
                message = "accepted"
            except MoesimError as error:
                message = str(error).replace(target, "FILE") if len(target) > 2 else str(error)
                message = message.replace(f"{folder}/", "")
        lines.append(f"| {bad.name} | `{message[:240].replace('|', '/')}` |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table())
