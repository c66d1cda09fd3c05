"""Scripts that once showed a fault, run against the lab as it is: `make cases CASES=DIR`, a line for each.

The scripts are somebody else's notes and stay where they are (DIR: folders of `.py` and `.sh` files); what they import
is what the rooms were called before. A script is *clean* where `JUDGES` is content with its output, *shows its fault*
where not, and *not run* where it asks for what DIR has not (its fault then has a test here, which is named).
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

HOUSE = Path(__file__).resolve().parents[1]
SECONDS = 600
OLD_ROOMS = {
    "adapters": ("methods.inject",),
    "checkpoints": ("formats.live",),
    "doctor": ("runs.doctor",),
    "evaluate": ("evaluation.evaluate",),
    "files": ("io.files",),
    "load": ("tasks.sources",),
    "measure": ("probing.saved_models",),
    "pretrained": ("models.open",),
    "probe": ("probing.callback",),
    "provenance": ("runs.provenance",),
    "run": ("launch.run", "launch.runtime", "runs.record"),
    "selection": ("launch.select", "launch.experiments"),
    "store": ("runs.directory", "runs.record", "runs.streams", "runs.errors"),
    "verify": ("paper.compare",),
}
# lm-eval's loader of items, which knew the labels of a task by itself; they are in the task's definition now
OLD_LOADER = """
from dora_lab import tasks
from dora_lab.tasks.commonsense.lm_eval import items

score = items.score


def load(name, data_dir):
    return items.load(name, list(tasks.load_task(name).labels), data_dir)
"""
Judge = Callable[[str], "str | None"]  # what is wrong in an output, None where nothing is


def says(*patterns: str) -> Judge:
    """Each of these is in the output."""

    def judge(output: str) -> str | None:
        lost = [pattern for pattern in patterns if not re.search(pattern, output, re.M)]
        return f"it does not say {lost[0]!r}" if lost else None

    return judge


def never(*patterns: str) -> Judge:
    """None of these is in the output, and it is not empty."""

    def judge(output: str) -> str | None:
        found = [match.group() for pattern in patterns if (match := re.search(pattern, output, re.M))]
        return f"it says {found[0]!r}" if found else (None if output.strip() else "it says nothing")

    return judge


def below(limit: float, pattern: str, count: int) -> Judge:
    """The numbers that the pattern's groups find, so many at least, are no larger in size."""

    def judge(output: str) -> str | None:
        found = re.findall(pattern, output, re.M)
        numbers = [abs(float(one)) for match in found for one in (match if isinstance(match, tuple) else (match,))]
        if len(numbers) < count:
            return f"{len(numbers)} numbers of {pattern!r}, expected {count}"
        return None if max(numbers) <= limit else f"{max(numbers):g} is more than {limit:g}"

    return judge


def alike(pattern: str, count: int, within: float = 1e-3) -> Judge:
    """The pattern's two groups, numbers separated by commas, agree in so many lines at least."""

    def judge(output: str) -> str | None:
        pairs = [[[float(x) for x in side.split(",")] for side in pair] for pair in re.findall(pattern, output, re.M)]
        if len(pairs) < count:
            return f"{len(pairs)} pairs of {pattern!r}, expected {count}"
        apart = [(x, y) for one, other in pairs for x, y in zip(one, other, strict=True)
                 if abs(x - y) > within * abs(y) + 1e-6]  # fmt: skip
        return f"{apart[0][0]:g} where {apart[0][1]:g} is right" if apart else None

    return judge


def no_worse(pattern: str, factor: float) -> Judge:
    """Of the pattern's groups, two by two, the first is at most that many times the second."""

    def judge(output: str) -> str | None:
        rows = [[float(x) for x in row] for row in re.findall(pattern, output, re.M)]
        worse = [(a, b) for row in rows for a, b in zip(row[::2], row[1::2], strict=True) if a > factor * b]
        if not rows:
            return f"it does not say {pattern!r}"
        return f"{worse[0][0]:g} beside {worse[0][1]:g}" if worse else None

    return judge


def every(*judges: Judge) -> Judge:
    """All of them are content."""
    return lambda output: next((wrong for judge in judges if (wrong := judge(output))), None)


OFF = r"off by ([\d.e+-]+)"
TUPLES = r"\(([^()]+)\)"
JUDGES: dict[str, Judge] = {
    "adapters/case_1": says(r"lora_A' is no part of the base .* so its weights alone are not what the model computes"),
    "adapters/case_2": every(
        below(0, r"load_adapter off by ([\d.]+), export off by ([\d.]+)", 6),
        says(r"probe \[\('model.embed_tokens', None, 1\.8002834.*\n", r"\('lm_head', None, 1\.1152575"),
    ),
    "adapters/case_3": every(below(1e-5, r"^\w.* off by ([\d.e-]+)", 2), says(r"^changed after detach: \[\]$")),
    "adapters/case_5": below(1e-5, OFF, 4),
    "adapters/case_6": alike(rf"{TUPLES} truth {TUPLES}", 4),
    "adapters/case_8": alike(r"probe ([\d.]+) per output ([\d.]+)", 5),
    "adapters/case_10": every(
        alike(rf"step 0 {TUPLES} truth .*\) {TUPLES}", 1),
        says(r"ValueError: probe: the factors of .* have been trained already"),
    ),
    "adapters/case_12": says(r"^reward exit 0 \| lost 0 ", r"No such file .*vlm/out"),
    "adapters/case_13": every(
        says(r"^4 bits, command: exit 2 error: the base is quantised.*traceback: False$"),
        says(r"CheckpointError: the base is quantised"),
    ),
    "adapters/case_14": every(says(r"^640 loaded$", r"^15392 loaded$"), never("a pickle", "a web page")),
    "adapters/case_15": every(never("refused"), says(r"^\['model.layers.0.self_attn.q_proj'")),
    "adapters/case_17": every(below(1e-5, OFF, 1), says(r"^base_model.model.model.layers.0"), never("^lab:")),
    "adapters/case_18": every(says(r"^BloomForCausalLM \[\]$", r"^OpenAIGPTLMHeadModel \[\]$"), never(r"\[[^\]]")),
    "adapters/case_20": says(r"CheckpointError: .*has no dora_scale, but the file's metadata says dora_wd"),
    "integrity/case_14": every(
        never("Traceback", r"estimate, not a measurement: -"),
        says(
            r"error: .*'q_prj' is no linear layer", r"error: .*optim.epochs = 1e\+308: must be", r"error: /nonexistent/"
        ),
        says(r"error: .*passwd is no results folder"),
    ),
    "integrity/case_15a": says(r"^B refused: .* now belongs to process \d+ .* this process stops writing to it$"),
    "layers/a": every(
        says(r"train-mode == merged True .* eval == merged True", r"^3 wn dora ValueError fc: .*computed anew"),
        never("^3 .*adapted-base"),
    ),
    "layers/b": says(r"dt_proj: is never called: MambaMixer reads its weight"),
    "layers/c": below(1e-6, r"ours: ([\d.e-]+) ", 1),
    "layers/e": every(says(r"^ours train True grad True pass 1 \(0, 9\)$"), never(r"^ours .*Error")),
    "layers/g": below(1e-5, r"ours: merge, save_pretrained, from_pretrained: off by ([\d.e-]+)", 2),
    "layers/header": every(says("^640 ok$", "^1152 ok$", "^15392 ok$"), never("a pickle", "a web page")),
    "layers/k": no_worse(
        r"output error ours ([\d.e-]+) peft ([\d.e-]+); gradient ours ([\d.e-]+) peft ([\d.e-]+)", 1.5
    ),
    "layers/l": says(r"^exit 0 ", r"exported \{'(encoder|decoder)', '(encoder|decoder)'\} \['WhisperForConditional"),
    "layers/o": below(1e-5, r"(?:True|False) ([\d.e-]+)$", 4),
    "runs/case_1_loglikelihood_prompt": below(
        1e-3, r"choices that differ (\d+) largest difference of a log-likelihood ([\d.e-]+) ", 4
    ),
    "runs/case_2_untrained": says(r"EXC SpecError: .*learning rate 0"),
    "runs/case_4_assertion": every(says(r"^llama_nopre "), never("AssertionError")),
    "runs/case_9_mixed": every(says(r"validation_items=120"), never("Traceback")),
    "runs/case_10_options": says(r"^\[\('answer1', 'answer2', 'answer3'\), \('answer1', 'answer2', 'answer3'\)\]$"),
    "runs/case_11_lm_eval_items": every(
        says(r"ValueError: .*test.json, item 0, field 'answer': 'True' is not one of the answers"),
        never("^'.*' taken;"),
    ),
    "runs/case_13_embedding": says("^embed_tokens loaded$", "^lm_head loaded$"),
}
# what asks for files that are not in the folder, or for a machine of its own: where its fault is a test
HELD = {
    "integrity/case_1": "needs a mount: tests/test_disk.py; tests/test_faults.py, fault 5",
    "integrity/case_2": "patches a function that is gone: tests/test_faults.py, fault 'memory'",
    "integrity/case_4": "needs base_results: tests/test_compare.py",
    "integrity/case_5": "tests/test_survey.py (a run of three steps)",
    "integrity/case_6": "needs hostile2.py: tests/test_layout.py",
    "integrity/case_8": "needs base_results: tests/test_packs.py, tests/test_kept.py",
    "integrity/case_9": "needs other host names: tests/test_lock.py",
    "integrity/case_10": "needs finished runs: tests/test_kept.py",
    "integrity/case_12": "needs hostile2.py: tests/test_reading.py",
    "integrity/case_13": "needs hostile2.py: tests/test_reading.py, tests/test_survey.py, tests/test_disk.py",
    "integrity/case_16": "needs base_results: tests/test_disk.py",
    "layers/hit": "arithmetic on headers: see layers/header",
    "layers/f": "needs matrix3.py: tests/test_saved.py, tests/test_adapters_places.py",
    "layers/j": "needs matrix3.py: tests/test_adapters_saved.py",
    "layers/n": "needs matrix3.py: tests/test_layout.py",
    "layers/p": "needs matrix3.py: tests/test_adapters_peft.py",
    "runs/case_1_real_tokenizers": "needs tokenizers of a wheel: tests/test_evaluate.py",
    "runs/case_1_tokens": "prints lm-eval's text interface, which no protocol uses: tests/test_evaluate.py",
    "runs/case_5_hang": "tests/test_workers.py",
    "runs/case_6_cwd": "tests/test_workers.py",
    "runs/case_7_pad": "makes a folder alone: tests/test_train.py",
    "runs/case_14_oserror": "needs a finished run: tests/test_commands.py, integrity/case_14",
    "runs/case_15_provenance": "needs another user: tests/test_survey.py",
    "runs/case_16_submit": "needs a finished pretraining: tests/test_cluster.py",
    "layers/time": "needs matrix3.py: tests/test_adapters_passes.py, experiments/speed.py",
}


class Old(types.ModuleType):
    """A module under its old name: what it had is in these rooms now."""

    def __init__(self, name: str, rooms: tuple[str, ...]) -> None:
        super().__init__(f"dora_lab.{name}")
        self.rooms = rooms

    def __getattr__(self, name: str) -> object:
        for room in () if name.startswith("__") else self.__dict__["rooms"]:
            module = importlib.import_module(f"dora_lab.{room}")
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(f"{self.__name__} had no {name}, or it is gone")


def inside(script: str) -> None:
    """Run one script in this process, with the old names."""
    import dora_lab

    for name, rooms in OLD_ROOMS.items():
        sys.modules[f"dora_lab.{name}"] = old = Old(name, rooms)
        setattr(dora_lab, name, old)
    chosen = dora_lab.selection.chosen  # type: ignore[attr-defined]
    dora_lab.selection.chosen = lambda module, tier=None, only=(), with_=(), *more: chosen(  # type: ignore[attr-defined]
        module,
        tier,
        only,
        [*with_, "evaluation.text=none"],
        *more,  # a field that came later
    )
    sys.argv = [script]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def scratch(cases: Path) -> Path:
    """A folder that looks to the scripts like the project's root did: the environment, the tests, tiny models, data."""
    above = Path(tempfile.mkdtemp(prefix="dora-lab-cases-"))
    (above / "shared").symlink_to(cases.parent)
    folder = above / "project"
    (folder / ".venv").mkdir(parents=True)
    (folder / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    (folder / "tests").symlink_to(HOUSE / "tests")
    (folder / "dora_lab" / "tasks").mkdir(parents=True)
    (folder / "dora_lab" / "tasks" / "lm_eval").mkdir()
    (folder / "dora_lab" / "tasks" / "lm_eval" / "items.py").write_text(OLD_LOADER)
    for name in ("integrity", "layers/rep", "runs"):
        (folder / "out-cases" / name).mkdir(parents=True)
    runs = folder / "out-cases" / "runs"
    if (cases / "runs").is_dir():
        for file in (cases / "runs").glob("*.json"):
            shutil.copy(file, runs)
        make = (
            "import mk, tiny; from pathlib import Path; tiny.save_data(Path('data0')); mk.save('llama', 'm/llama')\n"
            "mk.save('llama', 'm/llama_nopre', tokenizer=mk.tok(pre=False))\n"
            "mk.save('llama', 'm/llama_l3', tokenizer=tiny.joining_tokenizer())"
        )
        given = environment(cases / "runs", HOUSE / "tests")
        subprocess.run([sys.executable, "-c", make], check=True, capture_output=True, cwd=runs, env=given)
    return folder


def environment(*paths: Path) -> dict[str, str]:
    """What a script is given: this house first, one thread, no network."""
    found = os.pathsep.join(map(str, (HOUSE, *paths)))
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "400"}
    return {**os.environ, **quiet, "PYTHONPATH": found}


def outcome(name: str, file: Path, folder: Path) -> tuple[str, str]:
    """("clean", "shows its fault" or "not run", why)."""
    if name not in JUDGES:
        return "not run", HELD.get(name, "nobody has said what its output should be: add a judge")
    one = f"from tests.cases import inside; inside({str(file)!r})"
    command = [sys.executable, "-c", one] if file.suffix == ".py" else ["bash", str(file)]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=SECONDS, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return "shows its fault", f"still running after {SECONDS} s"
    wrong = JUDGES[name](f"{done.stdout}\n{done.stderr}")
    return ("shows its fault", wrong) if wrong else ("clean", "")


def main(arguments: list[str] | None = None) -> int:
    """Run the cases of a folder; 0 where none shows its fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path, nargs="?", help="folder of the scripts")
    parser.add_argument("--only", default="", help="comma-separated beginnings of names, e.g. adapters,layers/a")
    options = parser.parse_args(arguments)
    if options.cases is None or not options.cases.is_dir():
        print(f"SKIPPED: no folder of cases at {options.cases}; give one: make cases CASES=DIR")
        return 0
    cases = options.cases.resolve()
    found = {file.relative_to(cases).with_suffix("").as_posix(): file for file in sorted(cases.rglob("*.*"))}
    wanted = tuple(options.only.split(","))
    folder, seen = scratch(cases), []
    for name in sorted({*JUDGES, *HELD, *(n for n, f in found.items() if is_case(f))}, key=_order):
        if name.startswith(wanted):
            how, why = outcome(name, found[name], folder) if name in found else ("not run", "is not in the folder")
            seen.append(how)
            print(f"{name:32} {how}{f': {why}' if why else ''}", flush=True)
    print(", ".join(f"{seen.count(how)} {how}" for how in dict.fromkeys(seen)))
    shutil.rmtree(folder.parent, ignore_errors=True)
    return int("shows its fault" in seen)


def is_case(file: Path) -> bool:
    """Whether a file of the folder is a script that shows a fault, and no helper of others."""
    return file.suffix in (".py", ".sh") and file.stem not in ("mk", "many", "env", "sitecustomize", "__init__")


def _order(name: str) -> list[object]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


if __name__ == "__main__":
    sys.exit(main())
