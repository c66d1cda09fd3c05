"""The wheel in an empty virtual environment outside the repository: nothing of the clone is needed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dora_lab.house import HOUSE
from dora_lab.launch.experiments import experiment_names
from dora_lab.runs import provenance

pytest.importorskip("hatchling", reason="hatchling builds the wheel: `make setup`")
DECOY = "raise SystemExit('an experiments or analysis of somebody else')\n"


class Place:
    """A folder with nothing of the lab in it, and the environment beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.scripts = folder / "empty", folder / "env" / "bin"

    def __call__(self, *command: str) -> subprocess.CompletedProcess[str]:
        keep = {"PATH": f"{self.scripts}:/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(self.folder)}
        return subprocess.run(
            [str(self.scripts / command[0]), *command[1:]], cwd=self.folder, env=keep, capture_output=True, text=True
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The wheel, installed without what it depends on, which is taken from the environment of the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder), str(HOUSE)]
    done = subprocess.run(build, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in (done.stdout + done.stderr).lower(), done.stderr
    (wheel,) = folder.glob("*.whl")
    # the environment lies in somebody's repository, whose commit is none of the lab's
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    who = ["-c", "user.name=x", "-c", "user.email=x"]
    subprocess.run(["git", *who, "commit", "-q", "--allow-empty", "-m", "x"], cwd=folder, check=True)
    venv.create(folder / "env", with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "env" / "bin" / "python"), "install", "--no-deps"]
    subprocess.run([*pip, "--no-index", "--quiet", str(wheel)], check=True)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    information = f"{wheel.name.rpartition('-py3')[0]}.dist-info"
    assert {path.name for path in site.iterdir()} == {"dora_lab", information}  # no name that others may have
    shared = [path for path in sys.path if path.endswith("-packages")]
    (site / "shared.pth").write_text("\n".join(shared))
    found = Place(folder)
    (found.folder / "experiments").mkdir(parents=True)
    for name in ("experiments/__init__.py", "analysis.py"):
        (found.folder / name).write_text(DECOY)
    return found


def shipped(place: Place) -> Path:
    done = place("python", "-c", "from dora_lab.house import HOUSE; print(HOUSE)")
    return Path(done.stdout.strip())


def test_list_and_dry_run(place: Place) -> None:
    done = place("dora-lab", "list", "--format", "json")
    assert done.returncode == 0, done.stderr
    assert [row["experiment"] for row in json.loads(done.stdout)] == experiment_names()
    done = place("dora-lab", "run", "commonsense", "--dry-run", "--only", "method.name=dora", "--only", "seed=0")
    assert done.returncode == 0 and "steps" in done.stdout, done.stderr


def test_the_code_is_named_by_its_files_and_by_no_repository_around_it(place: Place) -> None:
    code = "import json; from dora_lab.runs.provenance import code; print(json.dumps(code()))"
    done = place("python", "-c", code)
    assert json.loads(done.stdout) == {"commit": None, "diff": None, "files": provenance._files()}, done.stderr


def test_verify_reads_the_records_that_come_with_it(place: Place) -> None:
    done = place("dora-lab", "verify", "commonsense", "--format", "json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert any(row["table"] == "claims" and row["seeds"] == "3/3" and row["verdict"] == "holds" for row in rows)
    assert any(row["table"] == "numbers" for row in rows)


def test_report_writes_beside_the_runs_and_never_into_the_package(place: Place) -> None:
    house = shipped(place)
    before = {path for path in house.rglob("*") if "__pycache__" not in path.parts}
    for given in ((), ("--results", str(house / "results"))):
        done = place("dora-lab", "report", *given)
        assert done.returncode == 2 and "cp -r" in done.stderr and "Traceback" not in done.stderr
    shutil.copytree(house / "results" / "runs" / "pilot", place.folder / "committed" / "runs" / "pilot")
    done = place("dora-lab", "report", "--results", "committed")
    assert done.returncode == 0, done.stderr
    assert (place.folder / "committed" / "tables" / "pilot.md").is_file()
    assert {path for path in house.rglob("*") if "__pycache__" not in path.parts} == before


def test_a_run_goes_to_results_of_the_folder_it_was_started_in(place: Place) -> None:
    small = ["--only", "method=base", "--with", "data.test_items=2", "--with", "data.tasks=boolq", "--jobs", "1"]
    done = place("dora-lab", "run", "commonsense", *small)
    assert done.returncode == 0, done.stderr
    (record,) = (place.folder / "results" / "runs" / "commonsense").glob("*/record.json")
    assert json.loads(record.read_text())["code"]["files"] == provenance._files()


def test_probe(place: Place) -> None:
    base = HOUSE / "dora_lab" / "mini" / "base"
    tuned = Path(shutil.copytree(base, place.folder / "tuned"))
    weights = load_file(tuned / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(weights | {name: 2 * weights[name]}, tuned / "model.safetensors", {"format": "pt"})
    done = place("dora-lab", "probe", str(base), str(tuned), "--kinds", "q_proj", "--out", "rows.jsonl")
    assert done.returncode == 0, done.stderr
    rows = {row["module"]: row for row in map(json.loads, (place.folder / "rows.jsonl").read_text().splitlines())}
    assert rows.pop(name.removesuffix(".weight"))["delta_m"] > 0
    assert rows and all(row["delta_m"] == 0 for row in rows.values())
