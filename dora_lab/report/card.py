"""Protocol cards and their differences, in words, from records alone: what people who cannot reproduce a number lack.

`card` puts everything that a run's score depends on on one page; `diff` says how two runs, or a run and the paper's
protocol, differ. The reading side: imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dora_lab.io.combinations import unread_by
from dora_lab.io.files import hash_bytes
from dora_lab.methods.catalog import catalog
from dora_lab.models import shapes
from dora_lab.runs.caveats import caveats
from dora_lab.runs.record import spec_of
from dora_lab.runs.streams import read_stream
from dora_lab.runs.survey import verified
from dora_lab.spec import Spec, leaves, to_dict, words
from dora_lab.tasks import TEMPLATES, load_task

# why a difference matters, where somebody has measured it
MATTERS = {
    "data.train_on_prompt": "one report has LoRA at 86.5 with the loss on the answer alone (hqsiswiliam/hira#7), "
    "table 1 at 74.7",
    "data.template": "the last token of the prompt differs",
    "optim.keep": "the published adapters are those of the lowest loss on 120 items",
    "optim.learning_rate": "variants come within 1-2 % once it is tuned (arXiv 2602.04998)",
    "evaluation.num_beams": "the released evaluation is a search with four beams; its temperature is never used",
    "evaluation.protocols": "the two measure different things and never share a column",
    "seed": "re-runs of one published setting spread over 24 points (NVlabs/DoRA#14, #26)",
}
# what the released code does that no field of a spec can say
RELEASED = (
    "Nothing is seeded where it matters: neither the start of A nor the order of data can be repeated.",
    "Every published number is one run (NVlabs/DoRA#2).",
    "Evaluation takes one prompt at a time and gives the model no attention mask; with larger batches it attends to "
    "padding (LLM-Adapters#64).",
    "Base weights and merged weights are float16; A, B and m are float32, m from the norms of the float16 weights.",
    "The LLaMA-7B and 13B baselines are quoted from LLM-Adapters, whose evaluation leaves LoRA's dropout on.",
)


def card(path: Path) -> str:
    """The page of one run directory, as Markdown; raises StoreError where `verified` refuses it."""
    record = verified(path)
    spec = spec_of(record)
    unread = unread_by(spec.model.family)
    flat = {field: value for field, value in leaves(to_dict(spec)).items() if field not in unread}
    evals = read_stream(path, "eval")
    known = [*caveats(record), *record.get("notes", [])]
    parts = [
        f"# Protocol card: {name(spec)}",
        f"Run {record['spec_id']}, {record['status']}" + (f": {record['error']}" if record["error"] else "") + ".",
        _list("Model and data", [*_inputs(record), *_said(flat, ("model.", "data."))]),
        _prompts(spec),
        _list("Method", [*_said(_of_method(flat), ("method.",)), *_counts(record)]),
        _list("Training", [*_said(flat, ("seed", "optim.")), *_trained(record)]) if spec.optim else None,
        _list("Evaluation", [*_said(flat, ("evaluation.",)), *_decoding(spec)]),
        _scores(evals),
        _list("To be known with the scores", known)
        if (known := [*caveats(record), *record.get("notes", [])])
        else None,
        _list("Code and machine", _machine(record)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _prompts(spec: Spec) -> str:
    """The texts around a question, byte for byte."""
    if spec.data.template not in TEMPLATES or spec.model.family != "decoder":
        words = ", ".join(f"{task}: {_word(spec, task)!r}" for task in spec.data.tasks)
        return f"## Prompt\n\nBefore the text of an item, by task: {words}."
    train, asked = TEMPLATES[spec.data.template]
    return (
        f"## Prompt\n\nTraining text, before the answer (sha256 {_hash(train)}):\n\n{_shown(train)}\n\n"
        f"Evaluation prompt (sha256 {_hash(asked)}):\n\n{_shown(asked)}\n\n"
        "Every space is a ·, every end of line a ⏎. The answer follows without a space of its own."
    )


def _word(spec: Spec, name: str) -> str:
    return load_task(name).word(spec.data.template)


def diff(path: Path, other: Path | Spec) -> str:
    """How two runs differ, or a run and a spec of the paper, in words; a line per difference, then both scores.

    Raises StoreError for a run that `verified` refuses.
    """
    record = verified(path)
    mine = spec_of(record)
    if isinstance(other, Spec):
        theirs_record, theirs, whose = None, other, "published"
    else:
        theirs_record = verified(other)
        theirs, whose = spec_of(theirs_record), f"run {theirs_record['spec_id']}"
    lines = [f"A: run {record['spec_id']}, {name(mine)}", f"B: {whose}, {name(theirs)}", ""]
    lines += differences(mine, theirs, published=other is theirs)
    if theirs_record is not None:
        lines += _record_differences(record, theirs_record)
    lines += ["The protocols are the same."] if len(lines) == 3 else []
    if theirs_record is None:
        lines += ["", "What the released code does beyond these fields:", *(f"- {text}" for text in RELEASED)]
    else:
        assert not isinstance(other, Spec)
        lines += _both_scores(read_stream(path, "eval"), read_stream(other, "eval"))
    return "\n".join(lines)


def differences(mine: Spec, theirs: Spec, *, published: bool) -> list[str]:
    """A line, in words, for each field in which spec A, `mine`, and spec B differ; `published`: B is the paper's."""
    first, second = leaves(to_dict(mine)), leaves(to_dict(theirs))
    aside = {"experiment", "tier"} | (
        {"seed", "data.sha256", "data.revision", "model.revision"} if published else set()
    )
    differing = [field for field in {**first, **second} if field not in aside and first.get(field) != second.get(field)]
    return [_difference(field, first, second) for field in differing]


def nearest(spec: Spec, protocol: Iterable[Spec]) -> Spec:
    """The spec of the paper that a run is to be held against: of its family, then of its method, model and rank, as far
    as there are such.

    Raises ValueError if there is none at all.
    """
    known = shapes.printed_name(spec.model.name)

    def far(other: Spec) -> tuple[bool, ...]:
        return (
            other.model.family != spec.model.family,
            other.method.name != spec.method.name,
            shapes.printed_name(other.model.name) != known,
            other.method.rank != spec.method.rank,
            (other.method.detach_norm, other.method.magnitude_modules)
            != (spec.method.detach_norm, spec.method.magnitude_modules),
            other.seed != spec.seed,
        )

    found = min(protocol, key=far, default=None)
    if found is None:
        raise ValueError("no experiment has a tier 'paper', so there is no published protocol to compare with")
    return found


def name(spec: Spec) -> str:
    """A run in a few words: "commonsense, tier mini, DoRA rank 8 on mini, seed 0"."""
    known = catalog().get(spec.method.name)
    rank = f" rank {spec.method.rank}" if spec.method.rank is not None else ""
    words = spec.method.name if known is None else known.words
    return f"{spec.experiment}, tier {spec.tier}, {words}{rank} on {spec.model.name}, seed {spec.seed}"


# ------------------------------------------------------------------------------------------------------------ fields
def _of_method(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Without the fields that the method does not read."""
    known = catalog().get(flat["method.name"])
    unread = set() if flat["method.dropout"] else {"method.dropout_form"}
    if known is not None:
        read = {f"method.{field}" for field in ("name", *known.fields)}
        unread |= {field for field in flat if field.startswith("method.") and field not in read}
    return {field: value for field, value in flat.items() if field not in unread}


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", value):
        return value[:12]  # of a hash, enough to tell two apart
    return "none" if value is None else str(value)


def _phrase(field: str, value: Any) -> str:
    said = words().get(field, field)
    if isinstance(said, dict):
        return said.get(value, f"{field} {_value(value)}")
    return f"{said}: {_value(value)}"


def _said(flat: Mapping[str, Any], prefixes: tuple[str, ...]) -> list[str]:
    """Every field under these prefixes, in words; an empty one that is none or the default of a list is left out."""
    return [
        f"{_phrase(field, value)} (`{field}`)"
        for field, value in flat.items()
        if field.startswith(prefixes) and value not in (None, [])
    ]


def _difference(field: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    said = words().get(field, field)
    if field not in first or field not in second:
        where, value = ("A", first[field]) if field in first else ("B", second[field])
        told = f"{_phrase(field, value)} in {where}, nothing of the kind in the other"
    elif isinstance(said, dict):
        told = f"{_phrase(field, first[field])} in A; {_phrase(field, second[field])} in B"
    else:
        told = f"{said}: {_value(first[field])} in A, {_value(second[field])} in B"
    return f"- {told} (`{field}`)" + (f". It matters: {MATTERS[field]}" if field in MATTERS else "")


# ------------------------------------------------------------------------------------------------------------- parts
def _list(title: str, lines: list[str]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines)


def _hash(text: str) -> str:
    return hash_bytes(text.encode())[:12]


def _shown(text: str) -> str:
    return "```\n" + text.replace(" ", "·").replace("\n", "⏎\n") + "\n```"


def _inputs(record: Mapping[str, Any]) -> list[str]:
    found = record.get("inputs") or {}
    lines = [
        f"{kind}: {given.get('name')}, revision {given.get('revision') or 'none'}, sha256 "
        f"{(given.get('sha256') or 'unknown')[:12]}"
        for kind, given in found.items()
        if isinstance(given, Mapping) and "sha256" in given
    ]
    for split, tasks in (found.get("items") or {}).items():
        if tasks:
            lines.append(f"{split} items: {sum(tasks.values())} ({', '.join(f'{t} {n}' for t, n in tasks.items())})")
    if found.get("pad_token") is not None:
        lines.append(f"padding: {found['pad_token']}, on the left, masked")
    return lines


def _counts(record: Mapping[str, Any]) -> list[str]:
    params = record.get("params") or {}
    if not params.get("total"):
        return []
    percent = 100 * params["trainable"] / params["total"]
    return [f"trainable parameters: {params['trainable']:,} of {params['total']:,} ({percent:.3f} %)"]


def _trained(record: Mapping[str, Any]) -> list[str]:
    done = record.get("training") or {}
    names = {"steps": "steps", "tokens": "tokens", "shortened": "items cut to fit", "kept_step": "weights of step"}
    return [f"{label}: {done[key]:,}" for key, label in names.items() if done.get(key) is not None]


def _decoding(spec: Spec) -> list[str]:
    if "generate" not in spec.evaluation.protocols:
        return []
    search = "greedy" if spec.evaluation.num_beams == 1 else f"{spec.evaluation.num_beams} beams"
    patterns = {task: load_task(task).pattern for task in spec.data.tasks}
    if spec.model.family != "decoder":
        rules = ", ".join(f"{task} {'/'.join(load_task(task).metrics)}" for task in spec.data.tasks)
        return [f"decoding: {search} unless a task has beams of its own, never sampled", f"scored by: {rules}"]
    return [
        f"decoding: {search}, never sampled; attention mask, end and padding given explicitly",
        "answer: first match, case-sensitive; without one it is unparsed, counted, and wrong: "
        + "; ".join(f"{task} `{pattern}`" for task, pattern in patterns.items()),
    ]


def _scores(evals: list[dict[str, Any]]) -> str | None:
    if not evals:
        return None
    lines = ["## Scores", "", "| Task | Protocol | Accuracy % | n | Unparsed | Prompts (sha256) |"]
    lines.append("| --- | --- | ---: | ---: | ---: | --- |")
    for row in evals:
        value = "–" if row["value"] is None else f"{100 * row['value']:.1f}"
        unparsed = "–" if row.get("n_unparsed") is None else row["n_unparsed"]
        prompts = (row.get("prompt_sha256") or "–")[:12]
        lines.append(f"| {row['task']} | {row['protocol']} | {value} | {row['n']} | {unparsed} | {prompts} |")
    sources = [
        f"- builtin {row['task']}: lm-eval's task {row['lm_eval_task']}, version {row['lm_eval_version']}, on "
        f"{row['dataset']} at {row['dataset_revision'] or 'an unknown commit'}"
        for row in evals
        if row["protocol"] == "builtin"
    ]
    sources += [
        f"- {row['task']}: {row['n_shortened']} of its {row['n']} texts were cut to fit, {row['n_questions_cut']} of "
        "them in their question or before it"
        for row in evals
        if row.get("n_shortened")
    ]
    lines += ["", *sources] if sources else []
    return "\n".join(lines)


def _machine(record: Mapping[str, Any]) -> list[str]:
    code, machine = record.get("code") or {}, record.get("machine") or {}
    changed = f", with uncommitted changes {code['diff']}" if code.get("diff") else ""
    files = f"files of sha256 {code['files']}" if code.get("files") else "unknown"
    lines = [f"code: {code.get('commit') or files}{changed}"]
    lines += [f"{key}: {value}" for key, value in machine.items()]
    lines += [f"device: {record['device']}"] if record.get("device") else []
    seconds = record.get("seconds") or {}
    lines += [f"seconds: {', '.join(f'{phase} {taken:g}' for phase, taken in seconds.items())}"] if seconds else []
    if record.get("peak_memory_bytes"):
        lines.append(f"peak memory: {record['peak_memory_bytes'] / 2**20:,.0f} MiB")
    versions = record.get("packages") or {}
    return [*lines, "versions: " + ", ".join(f"{package} {version}" for package, version in versions.items())]


# ------------------------------------------------------------------------------------------------------- differences
def _record_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What differs outside the spec: code, inputs, packages, machine."""
    kinds = {"code": "code", "inputs": "hash or revision of", "packages": "version of", "machine": "machine"}
    lines = []
    for part, kind in kinds.items():
        one, two = (leaves(_without_items(record.get(part) or {})) for record in (first, second))
        for field in {**one, **two}:
            if one.get(field) != two.get(field) and not field.endswith(".name"):
                lines.append(f"- {kind} {field}: {_value(one.get(field))} in A, {_value(two.get(field))} in B")
    for split in ("train", "validation", "test"):
        one, two = (((r.get("inputs") or {}).get("items") or {}).get(split) or {} for r in (first, second))
        if one != two:
            lines.append(
                f"- {split} items: {sum(one.values())} in A, {sum(two.values())} in B, by task {one} and {two}"
            )
    if first.get("device") != second.get("device"):
        lines.append(f"- device: {_value(first.get('device'))} in A, {_value(second.get('device'))} in B")
    return lines


def _without_items(part: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key != "items"}


def _both_scores(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[str]:
    one, two = ({(row["task"], row["protocol"]): row for row in rows} for rows in (first, second))
    shared = [key for key in one if key in two]
    if not shared:
        return ["", "They share no scored task."]
    lines = ["", f"{'task':<16}{'protocol':<16}{'A %':>7}{'B %':>7}{'A − B':>8}  unparsed A, B"]
    for key in shared:
        a, b = one[key], two[key]
        if a["value"] is None or b["value"] is None:
            continue
        unparsed = f"{_value(a.get('n_unparsed'))}, {_value(b.get('n_unparsed'))}"
        other = "" if a.get("prompt_sha256") == b.get("prompt_sha256") else "  (other prompts)"
        gap = f"{100 * (a['value'] - b['value']):+.1f}"
        lines.append(
            f"{key[0]:<16}{key[1]:<16}{100 * a['value']:>7.1f}{100 * b['value']:>7.1f}{gap:>8}  {unparsed}{other}"
        )
    return lines
