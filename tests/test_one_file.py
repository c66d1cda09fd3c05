"""A method is one file: in a copy of the repository with one file more, everything there is works with it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from tiny import save_data, save_model

HOUSE = Path(__file__).resolve().parents[1]
GAIN = '''"""One gain per output feature: W' = g W0, with g = 1 to begin with. Shape suffixes: O = out features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dora_lab.methods.contract import AdaptedLinear
from dora_lab.methods.inject import wrap
from dora_lab.spec import Method

FIELDS = ("target_modules",)
PARAMETERS = "outputs"
LABEL = "Gain"
COLOUR = "#117733"


class GainLinear(AdaptedLinear):
    """Trains `gain` (out,)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.gain = nn.Parameter(self.base_weight().new_ones(self.out_features))

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """g W0, (out, in)."""
        return self.gain[:, None] * self.base_weight()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        base = self._base(x)
        again = base if self.offset is None else base - self.kind.across(self.offset)
        return torch.addcmul(base, again, self.kind.across(self.gain - 1)).to(base.dtype)


def prepare(model: nn.Module, method: Method, generator: torch.Generator) -> None:
    """Freeze the model and give its target modules gains."""
    wrap(model, method, lambda name, layer, settings: GainLinear(layer))
'''
# what a user says to run a method of their own in the place of full fine-tuning, on a small model and few items
CHANGES = {
    "method.name": "gain", "method.target_modules": "q_proj,k_proj,v_proj,up_proj,down_proj", "data.train_items": 40,
    "data.test_items": 12, "optim.batch_size": 8, "optim.micro_batch_size": 4, "optim.learning_rate": 0.002,
    "optim.epochs": 40, "evaluation.protocols": "generate,loglikelihood", "evaluation.max_new_tokens": 12,
    "evaluation.text": "none",
}  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as far as it runs, with one file more; a base model and data beside it."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("dora_lab", "experiments", "analysis", "tests"):
        shutil.copytree(HOUSE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "dora_lab" / "methods" / "gain.py").write_text(GAIN, encoding="utf-8")
    save_model(folder / "model")
    save_data(folder / "data")
    return folder


def python(copy: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    house = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, cwd=copy, env=house, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def done(process: subprocess.Popen[str], code: int = 0) -> str:
    text, _ = process.communicate(timeout=300)
    assert process.returncode == code, text
    return text


def run(copy: Path, results: str, *more: str, **changes: Any) -> subprocess.Popen[str]:
    chosen = ["--only", "method=ft", "--only", "seed=0", *more]
    given = [f"--with={field}={value}" for field, value in (CHANGES | changes).items()]
    folders = ["--results", results, "--data-dir", "data", "--model-dir", "model", "--jobs", "1"]
    return python(copy, "-m", "dora_lab", "run", "commonsense", *chosen, *given, *folders)


@pytest.fixture(scope="module")
def trained(copy: Path) -> Path:
    """The folder of a complete run of the method, in results `whole`."""
    assert "1 complete" in done(run(copy, "whole"))
    (record,) = (copy / "whole" / "runs" / "commonsense").glob("*/record.json")
    return record.parent


def rows(run: Path, stream: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{stream}.jsonl").read_text().splitlines()]


def test_the_contract_is_kept(copy: Path) -> None:
    asked = ("-q", "-p", "no:cacheprovider", "-k", "[gain", "tests/test_methods.py", "tests/test_adapters.py")
    text = done(python(copy, "-m", "pytest", *asked))
    assert " passed" in text and "skipped" not in text, text


def test_a_dry_run_counts_it(copy: Path) -> None:
    text = done(run(copy, "none", "--dry-run"))
    assert " gain  rank -   seed 0" in text and "200 steps" in text and "FLOP" in text, text
    assert not (copy / "none").exists()


def test_it_is_trained_saved_and_probed(copy: Path, trained: Path) -> None:
    record = json.loads((trained / "record.json").read_text())
    assert record["status"] == "complete" and record["params"]["trainable"] == 2 * (3 * 32 + 64 + 32)
    config = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "DORA_LAB" and config["method"]["name"] == "gain"
    last = {row["module"]: row for row in rows(trained, "probe") if row["fraction"] == 1.0}
    moved = {module for module, row in last.items() if row["delta_m"] > 0}
    assert len(moved) == 10 and all(last[module]["delta_d"] < 1e-9 for module in moved), "gains turn nothing"
    done(python(copy, "-m", "dora_lab", "probe", "model", trained, "--out", "probed.jsonl", "--dynamics"))
    probed = {row["module"]: row for row in map(json.loads, (copy / "probed.jsonl").read_text().splitlines())}
    assert probed.keys() == moved
    for module in moved:
        assert probed[module]["delta_m"] == pytest.approx(last[module]["delta_m"], rel=1e-5)
        assert probed[module]["intruders"] is not None and probed[module]["magnitude_still"] is None


def test_it_loads_and_exports(copy: Path, trained: Path) -> None:
    done(python(copy, "-m", "dora_lab", "export", "model", trained / "adapter", "merged"))
    code = (
        "import sys, torch; from dora_lab import load_adapter; from dora_lab.models.open import open_model\n"
        "base, merged = (open_model(folder, 'float32').eval() for folder in ('model', 'merged'))\n"
        "ids = torch.arange(3, 17)[None]; plain = base(ids).logits\n"
        "seen = load_adapter(base, sys.argv[1]).eval()(ids).logits\n"
        "assert not torch.allclose(seen, plain, atol=1e-2)\n"
        "torch.testing.assert_close(merged(ids).logits, seen, rtol=1e-4, atol=1e-4); print('the same')\n"
    )
    assert "the same" in done(python(copy, "-c", code, trained / "adapter"))


def test_killed_it_goes_on_to_the_same_bytes(copy: Path, trained: Path) -> None:
    process = run(copy, "killed")
    folder = copy / "killed" / "runs" / "commonsense" / trained.name
    deadline = time.monotonic() + 120
    while not any((folder / "checkpoints").glob("checkpoint-*/manifest.json")):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.02)
    os.kill(json.loads((folder / "lock").read_text())["pid"], signal.SIGKILL)
    done(process, 130)
    assert "1 complete" in done(run(copy, "killed"))
    assert json.loads((folder / "record.json").read_text())["training"]["resumed_from"] >= 50
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / "adapter" / file).read_bytes() == (trained / "adapter" / file).read_bytes()
    assert rows(folder, "eval") == rows(trained, "eval")


def test_it_has_a_row_in_the_table_and_a_line_in_the_figure(copy: Path, trained: Path) -> None:
    done(python(copy, "-m", "analysis.tables.commonsense", "--results", "whole"))
    done(python(copy, "-m", "analysis.figures.trajectories", "--results", "whole"))
    assert "| Gain |" in (copy / "whole" / "tables" / "commonsense.md").read_text(encoding="utf-8")
    (figure,) = (copy / "whole" / "figures").glob("trajectories*.png")
    pixels = np.round(matplotlib.image.imread(figure)[..., :3] * 255)
    assert (pixels == (0x11, 0x77, 0x33)).all(axis=-1).sum() > 100, "no line of its colour"
    card = done(python(copy, "-m", "dora_lab", "card", trained, "--results", "whole"))
    assert "Gain on model, seed 0" in card and "`method.rank`" not in card
