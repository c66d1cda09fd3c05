"""What somebody gives, a model's folder and a folder of data, as far as it decides how the one is trained on the other.

The model's weights are read once, one by one, to see that they are finite. Torch is imported when it is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_lab.io.errors import CheckpointError, LoadError
from dora_lab.launch.runtime import Paths
from dora_lab.models.base import hash_model, model_folder, outline_and_tokenizer
from dora_lab.models.open import refuse_not_finite
from dora_lab.spec import Data, Evaluation, Method, Model, Optim, Spec, did_you_mean
from dora_lab.tasks import sources

FEWEST = 5  # items to train on; one of so many is held out
NOT_TAKEN = "a train.json, but no test.json, or a name that is no task of the lab's (boolq, piqa, ...)"


@dataclass(frozen=True, kw_only=True)
class Given:
    """A model and data."""

    model: Model
    kind: str  # class of the model
    parameters: int
    blocks: int
    targets: tuple[str, ...]  # leaf names of the linear layers of its blocks
    left_out: tuple[str, ...]  # "name: why", of matrices there that cannot be adapted
    scope: str | None  # see `spec.Method`
    narrowest: int  # features that one of these layers takes or gives, the fewest
    positions: int | None  # None: no limit
    tasks: tuple[str, ...]  # that have test items
    data_sha256: str | None
    items: int  # that could be trained on, those for validation among them
    tokens: int  # of the longest of them


def look(model_dir: Path, data_dir: Path, template: str, only: Sequence[str] = ()) -> Given:
    """What the folders hold; `template`: that the items will be put in; `only`: these tasks alone, if any is named.

    Raises LoadError or ItemError for what cannot be used; weights are read last, one by one, and must be finite.
    """
    from dora_lab.forms.decoder import encode
    from dora_lab.models.blocks import blocks_of
    from dora_lab.tasks.limits import limits

    model, tokenizer = outline_and_tokenizer(model_dir)
    blocks, sha256 = blocks_of(model, model_dir), sources.hash_data(data_dir)
    if not (tested := sources.tasks_in(data_dir)):
        raise LoadError(f"{data_dir}: no <task>/test.json to evaluate on")
    if strange := [name for name in only if name not in tested]:
        raise LoadError(f"{data_dir} has no test items of '{strange[0]}'; {did_you_mean(strange[0], tested)}")
    tasks = [name for name in tested if name in only or not only]
    name = Model(name=Path(model_dir).resolve().name, revision=hash_model(model_dir)[:12])
    whole = Data(name="llm_adapters", tasks=tuple(tasks), sha256=sha256, template=template, cutoff=1 << 30)  # type: ignore[arg-type]
    if not any((Path(data_dir) / task / "train.json").is_file() for task in tasks):
        others = sorted({file.parent.name for file in Path(data_dir).glob("*/train.json")} - {*tested})
        there = f"; {', '.join(others)}: {NOT_TAKEN}" if others else ""
        raise LoadError(f"{data_dir}: no train.json to train on in {', '.join(tasks)}, which have a test.json{there}")
    train = sources.items(_asking(name, whole), data_dir).train
    if (count := sum(map(len, train.values()))) < FEWEST:
        raise LoadError(f"{data_dir}: {count} items to train on; at least {FEWEST} are needed, a fifth is held out")
    longest = max(len(example.ids) for example in encode(train, whole, tokenizer).examples)
    try:
        refuse_not_finite(Path(model_dir), model)
    except CheckpointError as error:
        raise LoadError(str(error)) from None
    return Given(
        model=name, kind=type(model).__name__, parameters=sum(weight.numel() for weight in model.parameters()),
        blocks=blocks.count, targets=blocks.leaves, left_out=blocks.left_out, scope=blocks.scope,
        narrowest=blocks.narrowest, positions=limits(model).positions, tasks=tuple(tasks), data_sha256=sha256,
        items=sum(map(len, train.values())), tokens=longest,
    )  # fmt: skip


def _asking(model: Model, data: Data) -> Spec:
    """A spec that takes all training items."""
    return Spec(
        experiment="own", tier="small", seed=0, model=model, data=data, method=Method(name="ft"), probe=None,
        optim=Optim(learning_rate=1.0, warmup_steps=0, batch_size=1, micro_batch_size=1, epochs=1.0),
        evaluation=Evaluation(protocols=("cloze",)),
    )  # fmt: skip


def refuse_unfit(specs: Sequence[Spec], paths: Paths) -> None:
    """Raises, before any weight is read, what the runs of `specs`, on one model and data, would end with at once.

    ValueError for an adapter that does not go on the model, ItemError for items that it cannot take or be asked,
    LoadError for weights whose change could not be measured.
    """
    from dora_lab.evaluation.evaluate import prepare
    from dora_lab.forms.decoder import encode
    from dora_lab.io.files import header, weight_files
    from dora_lab.methods.inject import inject
    from dora_lab.models.layout import Layout
    from dora_lab.probing.watched import watched
    from dora_lab.tasks.limits import limits

    folder = model_folder(specs[0].model, paths.model_dir)
    for spec in {spec.method.name: spec for spec in specs}.values():
        model, tokenizer = outline_and_tokenizer(folder)
        stored = Layout(model).whole(key for file in weight_files(folder) for key in header(file))
        inject(model, spec.method, spec.seed)
        for layer in watched(model, None) if spec.probe is not None else ():
            if layer.base is None and f"{layer.name}.weight" not in stored:
                raise LoadError(
                    f"{folder}: '{layer.name}.weight' is stored in parts or turned, so its change under "
                    f"{spec.method.name} cannot be measured; leave {spec.method.name} out"
                )
    for spec in {spec.evaluation.split: spec for spec in specs}.values():
        model, tokenizer = outline_and_tokenizer(folder)
        items = sources.items(spec, paths.data_dir)
        prepare(spec, model, tokenizer, items.split(spec.evaluation.split))
        for pool in (items.train, items.validation):
            encode(pool, spec.data, tokenizer, limits(model))
