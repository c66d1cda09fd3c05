"""Faults of data, names and services: 15, 16, 17, 21, 23, 24."""

from __future__ import annotations

import http.server
import json
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch

from dora_lab import report
from dora_lab.formats.live import load_adapter
from dora_lab.formats.shards import Shards
from dora_lab.forms.decoder import encode
from dora_lab.io.errors import CheckpointError, LoadError
from dora_lab.models.base import model_and_tokenizer, model_folder
from dora_lab.runs.directory import RunDir
from dora_lab.runs.errors import StoreError
from dora_lab.runs.record import read_record
from dora_lab.runs.streams import read_rows, read_stream
from dora_lab.spec import SpecError, derive, from_dict, to_dict
from dora_lab.tasks import ItemError, load_task, read_items
from tests.faults import fault
from tests.faults._models import copy, llama, refused
from tests.tiny import boolq_items, make_spec


@fault(15, "a tokenizer without a padding token, or one that pads with the end of the text")
def no_padding(folder: Path, rng: random.Random) -> str:
    saved = copy("tiny", folder)
    file = saved / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    if rng.random() < 0.5:
        settings.pop("pad_token")
    else:
        settings["pad_token"] = settings["eos_token"]
    file.write_text(json.dumps(settings))
    model, tokenizer = model_and_tokenizer(make_spec(), saved)
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("</s>", "left")
    assert model.config.pad_token_id == tokenizer.pad_token_id
    texts = ["the red one", "is the blue one big or small?"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        both = model(batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions).logits[:, -1]
        alone = torch.cat([model(tokenizer(t, return_tensors="pt")["input_ids"]).logits[:, -1] for t in texts])
    assert torch.allclose(both, alone, atol=1e-4), "padding reached a result"
    ids = encode({"boolq": boolq_items(4)}, make_spec().data, tokenizer).examples
    assert all(e.ids[-1] == e.labels[-1] == tokenizer.eos_token_id for e in ids), "no loss on the end of the text"
    return "pads on the left with </s>, masked everywhere; the record says so (inputs.pad_token)"


@fault(16, "data or records cut off, empty, in another encoding, without a field, with a field twice")
def broken_text(folder: Path, rng: random.Random) -> str:
    if rng.random() < 0.5:
        file = folder / "test.json"
        content = json.dumps(boolq_items(6), ensure_ascii=False).encode()
        lost = boolq_items(6)
        field = rng.choice(["instruction", "output", "answer", "input"])
        lost[rng.randrange(6)].pop(field)
        at = rng.randrange(1, len(content) - 2)
        damage = {
            "cut": content[:at],
            "empty": b"",
            "not UTF-8": content[:at] + b"\xff\xfe" + content[at:],
            "no field": json.dumps(lost).encode(),
            "twice": content.replace(b'"answer": ', b'"answer": "x", "answer": ', 1),
        }
        for harmless in (
            b"\xef\xbb\xbf" + content,
            json.dumps(boolq_items(6), indent=1).replace("\n", "\r\n").encode(),
        ):
            file.write_bytes(harmless)
            assert read_items(file, load_task("boolq")) == boolq_items(6)
        kind = rng.choice(sorted(damage))
        file.write_bytes(damage[kind])
        return refused(ItemError, lambda: read_items(file, load_task("boolq")), str(file))
    spec = make_spec()
    with RunDir.open(folder, spec) as run:
        for step in range(1, 6):
            run.append("metrics", {"step": step, "loss": 1 / step})
    file = run.path / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    kind = rng.choice(["torn", "middle", "record", "record", "NaN"])
    if kind == "torn":
        file.write_bytes(b"".join(lines)[: -rng.randrange(1, len(lines[-1]))])
        with RunDir.open(folder, spec) as run:
            assert [row["step"] for row in read_rows(run.path, "metrics")][:4] == [1, 2, 3, 4]
            notes = read_record(run.path)["notes"]
            return notes[-1] if notes else "a last line without its newline is made whole"
    if kind in ("middle", "NaN"):
        at = rng.randrange(4)
        lines[at] = b'{"step": 1, "loss": NaN}\n' if kind == "NaN" else lines[at][: rng.randrange(1, 9)] + b"\n"
        file.write_bytes(b"".join(lines))
        return refused(StoreError, lambda: read_rows(run.path, "metrics"), f"metrics.jsonl, line {at + 1}")
    record = run.path / "record.json"
    content = record.read_bytes()
    record.write_bytes(rng.choice([b"", content[: rng.randrange(1, len(content) - 2)], b"\xff" + content, b"[]"]))
    return refused(StoreError, lambda: read_record(run.path), str(record))


@fault(17, "a prompt longer than the cutoff or than the model's positions")
def too_long(folder: Path, rng: random.Random) -> str:
    from dora_lab.evaluation.evaluate import evaluate

    model, tokenizer = model_and_tokenizer(make_spec(), copy("tiny", folder))
    items = boolq_items(4)
    victim = rng.randrange(4)
    items[victim]["instruction"] = "word " * rng.randrange(400, 900) + items[victim]["instruction"]
    encoded = encode({"boolq": items}, make_spec(data__cutoff=300).data, tokenizer)
    whole = encode({"boolq": boolq_items(4)}, make_spec(data__cutoff=300).data, tokenizer)
    assert (encoded.shortened, whole.shortened) == (1, 0)
    labels = [[token for token in e.labels if token != -100] for e in encoded.examples]
    assert labels == [[token for token in e.labels if token != -100] for e in whole.examples], "an answer was cut"
    refused(ItemError, lambda: encode({"boolq": items}, make_spec(data__cutoff=4).data, tokenizer), "would be cut")
    spec = make_spec(evaluation__protocols=rng.choice(["generate", "loglikelihood"]))
    with RunDir.open(folder / "results", spec) as run:
        text = refused(ItemError, lambda: evaluate(spec, model, tokenizer, {"boolq": items}, run), f"item {victim}")
        assert read_stream(run.path, "eval") == []
    return text


class _Hub(http.server.BaseHTTPRequestHandler):
    status = 404

    def do_GET(self) -> None:
        self.send_response(self.status)
        for name, value in {401: [("X-Error-Code", "GatedRepo")], 404: [("X-Error-Code", "RevisionNotFound")]}.get(
            self.status, []
        ):
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def _hub(status: int) -> Iterator[str]:
    handler = type("Hub", (_Hub,), {"status": status})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@fault(21, "the hub is offline, a model gated, a revision gone, too many requests")
def hub_away(folder: Path, rng: random.Random) -> str:
    from huggingface_hub import constants, hf_api

    commit = f"{rng.randrange(16**40):040x}"
    spec = make_spec(model__name="org/small", model__revision=commit)
    kind = rng.choice(["offline", "refused", 401, 404, 429, 503])
    begun = time.monotonic()
    with patch.object(constants, "HF_HUB_CACHE", str(folder)):
        if kind == "offline":
            with patch.object(constants, "HF_HUB_OFFLINE", True):
                text = refused(LoadError, lambda: model_folder(spec.model), "org/small", commit)
                there = folder / "models--org--small" / "snapshots" / commit
                there.parent.mkdir(parents=True)
                copy("tiny", folder).rename(there)
                assert model_folder(spec.model) == there, "what is in the cache needs no network"
        elif kind == "refused":
            with (
                patch.object(constants, "ENDPOINT", "http://127.0.0.1:9"),
                patch.object(hf_api.api, "endpoint", "http://127.0.0.1:9"),
            ):
                text = refused(LoadError, lambda: model_folder(spec.model), "org/small", commit)
        else:
            with (
                _hub(int(kind)) as url,
                patch.object(constants, "ENDPOINT", url),
                patch.object(hf_api.api, "endpoint", url),
            ):
                text = refused(LoadError, lambda: model_folder(spec.model), "org/small", commit)
    assert time.monotonic() - begun < 120, "it took too long to say so"
    return text


HOSTILE = ["../x", "../../etc/passwd", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "..\\x", "a\nb/c"]


@fault(23, "names that leave the folder: ../, absolute, NUL, links")
def hostile_names(folder: Path, rng: random.Random) -> str:
    name = rng.choice(HOSTILE)
    kind = rng.choice(["index", "manifest", "experiment", "link"])
    if kind == "experiment":
        values = json.loads(json.dumps(to_dict(make_spec())))
        values["experiment"] = name
        spec = from_dict(values)
        before = sorted(folder.rglob("*"))
        text = refused(SpecError, lambda: RunDir.open(folder / "results", spec), "experiment")
        refused(SpecError, lambda: derive(make_spec(), {"experiment": name}), "experiment")
        assert sorted(folder.rglob("*")) == before
        return text
    if kind == "index":
        saved = copy("base", folder)
        (saved / "model.safetensors").unlink()  # beside a single file no index is read
        table = {"weight_map": {"lm_head.weight": name}}
        (saved / "model.safetensors.index.json").write_text(json.dumps(table))
        return refused(CheckpointError, lambda: Shards(saved), "outside its folder")
    saved = copy("adapter", folder)
    if kind == "manifest":
        manifest = json.loads((saved / "dora_lab.json").read_text())
        (saved / "dora_lab.json").write_text(json.dumps(manifest | {"files": {name: "0" * 64}}))
        return refused(CheckpointError, lambda: load_adapter(llama(), saved), "outside its folder")
    file = saved / rng.choice(["adapter_model.safetensors", "adapter_config.json"])
    outside = folder / "outside"
    file.rename(outside)
    file.symlink_to(outside)
    return refused(CheckpointError, lambda: load_adapter(llama(), saved), "a link that leaves its folder")


PIECES = ["a_b%#&", "<script>alert(1)</script>", "|", "\\", "$x$", "{", "}", "~^", "\n", "\0", "[l](javascript:0)",
          "-->", "<!--", "漢", "&lt;", "`", "\\input{/etc/passwd}", "\\|", "%", "\u2028", "\\end{table}", "**",
          "€"]  # fmt: skip


@fault(23, "names of models that are LaTeX, HTML or Markdown, in tables and their headers")
def hostile_text(folder: Path, rng: random.Random) -> str:
    name = "".join(rng.sample(PIECES, rng.randrange(1, len(PIECES))))
    block = report.Block(title=name, cells=pd.DataFrame({name: [name], "n": [None]}), notes=(name,))
    source = report.Provenance((name,), (name,), (name,), (name,), False, {name: 1})
    md, tex, csv = report.save_table(folder, "t", name, [block], block.cells, source)
    assert_harmless(md.read_text(encoding="utf-8"), tex.read_text(encoding="utf-8"), columns=2)
    assert len(pd.read_csv(csv)) == 1
    figure, axes = report.new_figure(1, 1, 2, 2)
    axes[0, 0].set_title(name.replace("\0", "").replace("漢", "").replace("\u2028", ""))
    report.save_figure(figure, folder, "f", report.Provenance((), (), (), (), False, {}))
    spec = make_spec(model__name=name)
    with RunDir.open(folder, spec) as run:
        run.append("eval", {"task": "boolq", "protocol": "generate", "metric": "accuracy", "value": 1.0, "n": 1})
        run.finish("complete")
    ((suffix, _),) = report.groups(report.frame(folder))
    assert re.fullmatch(r"[\w.-]+", suffix) and not {"/", "\0"} & set(suffix), suffix
    shown = re.search(r"^\| .*", md.read_text(encoding="utf-8"), re.M)
    return f"the text itself, e.g. {shown[0] if shown else ''!r:.60}" if len(name) < 40 else "the text itself, escaped"


@fault(24, "two models evaluated one after the other (lm-eval's cache would give the second the answers of the first)")
def shared_cache(folder: Path, rng: random.Random) -> str:
    from dora_lab.evaluation.evaluate import evaluate

    saved = copy("tiny", folder)
    spec = make_spec(evaluation__protocols="loglikelihood", data__tasks="boolq")
    items = {"boolq": boolq_items(6, start=rng.randrange(1000))}
    models = []
    for seed in rng.sample(range(1000), 2):
        model, tokenizer = model_and_tokenizer(spec, saved)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        models.append(model)
    outputs: list[list[Any]] = []
    for number, model in enumerate([models[0], models[1], models[0]]):
        with RunDir.open(folder / str(number), spec) as run:
            evaluate(spec, model, tokenizer, items, run)
            lines = (run.samples / "boolq.loglikelihood.jsonl").read_text().splitlines()
            outputs.append([json.loads(line)["output"] for line in lines])
    assert outputs[0] == outputs[2] != outputs[1], "a model was given the answers of another"
    assert not list(Path.cwd().glob("*.db")), "a cache was left behind"
    return "each model's own answers; no cache is used"


def assert_harmless(markdown: str, latex: str, columns: int) -> None:
    """A page with one table of one row: no tag, no link, no comment, no command and no cell more than was written."""
    body = markdown.rpartition("<!-- runs: ")
    assert not re.search(r"<[A-Za-z/!?]", body[0]) and "\0" not in markdown and "](" not in markdown
    assert body[2].count("-->") == 1 and body[2].endswith(" -->\n") and "-->" not in body[0]
    parts = [part.split("\n") for part in markdown.split("\n\n")]
    (rows,) = [part for part in parts if len(part) > 1 and part[1].startswith("| ---")]
    bars = [len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows]
    assert bars == [columns + 1] * 3, bars
    assert latex.isascii() and "\0" not in latex
    head, _, rest = latex.partition("\n\n")
    assert head.startswith("% runs: ") and [line[:2] for line in head.split("\n")] == ["% "] * 3
    assert not [line for line in rest.splitlines() if line.startswith("%")]
    known = set(re.findall(r"\\([A-Za-z]+)", rest))
    assert known <= {
        "begin", "end", "centering", "footnotesize", "setlength", "tabcolsep", "caption", "toprule", "midrule",
        "bottomrule", "textbackslash", "textasciitilde", "textasciicircum", "dagger", "pm", "Delta", "dots", "le", "ge",
        "times", "to", "label", "scriptsize", "raggedright", "raggedleft", "arraybackslash", "allowbreak", "par",
        "smallskip", "parbox", "linewidth",
    }, known  # fmt: skip
    assert rest.count("\\begin{") == rest.count("\\end{") == 2
    plain = re.sub(r"\\[{}%#&$_]", "", rest)
    assert not {"%", "#", "_"} & set(plain) and plain.count("$") % 2 == 0 and plain.count("{") == plain.count("}")
