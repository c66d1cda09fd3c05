"""Training stability: at which multiple of its best rate a method fails (runs of `stability` and `commonsense`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize

from analysis import frame, isnt, script
from dora_lab import report
from dora_lab.report import Block, number, statistics
from experiments import commonsense, stability

SEEDS = 10
DRAWS = 2000
NOTES = (
    "A run fails where its choice NLL on test items (mean over tasks) is above the untrained base's. Mean ± standard "
    "deviation over seeds.",
)
LR50 = (
    "LR50: the multiple of each method's best rate at which half of the runs fail, by a logistic curve over log2 of it "
    "(slope at most 8 a doubling); 95 % interval by resampling seeds, the same draw for both methods. Registered: "
    "experiments/registered/stability.md; k of 10: fewer seeds than that.",
)


def build(results: Path) -> list[Path]:
    """Write results/tables/stability.{md,csv,tex}; returns their paths, none before runs above the best rate exist."""
    evals = frame(results)
    runs = measured(evals)
    if not len(runs) or not (runs["times"] > 1).any():
        return []
    cells, half = by_times(runs), lr50(runs)
    title = "tier mini, data mini2"
    blocks = [
        Block(title=f"{title}: runs", cells=pd.DataFrame(map(_shown, cells)), notes=NOTES, isnt=isnt(["mini"])),
        Block(title=f"{title}: LR50", cells=pd.DataFrame(map(_half, half)), notes=LR50, isnt=isnt(["mini"])),
    ]
    source = report.provenance(evals[evals["spec_id"].isin(runs["spec_id"])], evals.attrs["statuses"])
    data = pd.DataFrame([*cells, *half])
    return report.save_table(results / "tables", "stability", "Rates above the best", blocks, data, source)


def measured(evals: pd.DataFrame) -> pd.DataFrame:
    """A row per run of LoRA and DoRA at rank 8: method, seed, times (multiple of the rate), loss, failed."""
    tested = evals[(evals["split"] == "test") & (evals["data"] == "mini2") & (evals["tier"] == "mini")]
    tested = tested[tested["choice_nll"].notna() & tested["experiment"].isin(("commonsense", "stability"))]
    base = tested[tested["method"] == "base"]["choice_nll"].mean()
    mine = tested[tested["method"].isin(stability.METHODS) & (tested["rank"] == 8) & (tested["seed"] < SEEDS)]
    if not len(mine):
        return mine
    by = ["method", "seed", "optim.learning_rate", "spec_id"]
    runs = mine.groupby(by)["choice_nll"].mean().reset_index(name="loss")
    best = runs["method"].map(lambda method: commonsense.RATES[method, 8])
    return runs.assign(times=(runs["optim.learning_rate"] / best).round(6), failed=~(runs["loss"] <= base))


def by_times(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """A row per method and multiple: seeds, mean loss, share of runs that failed."""
    rows = []
    for (method, times), part in runs.groupby(["method", "times"]):
        mean, sd = statistics.mean_sd(part["loss"].tolist())
        about = {"method": method, "times": times, "seeds": len(part), "failed": int(part["failed"].sum())}
        rows.append(about | {"loss": mean, "loss_sd": sd})
    return rows


def lr50(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """A row per method, and two of DoRA's over LoRA's, as multiples and as rates; of the seeds that every cell has."""
    wide = runs.pivot(index="seed", columns=["method", "times"], values="failed").dropna()
    methods, seeds = [name for name in stability.METHODS if name in wide.columns.get_level_values(0)], len(wide)
    if len(methods) < 2 or not seeds:
        return []
    rng = np.random.default_rng(0)
    draws = [np.arange(seeds), *rng.integers(0, seeds, (DRAWS, seeds))]
    times = {name: wide[name].columns.to_numpy(float) for name in methods}
    found = {
        name: np.array([_half_point(times[name], wide[name].to_numpy(float)[draw].mean(axis=0)) for draw in draws])
        for name in methods
    }
    rows = [{"what": name, "seeds": seeds, **_interval(found[name])} for name in methods]
    ratio = found["dora"] - found["lora"]
    shift = np.log2(commonsense.RATES["dora", 8] / commonsense.RATES["lora", 8])
    for what, values in (("dora / lora, multiples", ratio), ("dora / lora, rates", ratio + shift)):
        row = {"what": what, "seeds": seeds, **_interval(values)}
        sure = row["low"] > 1 or row["high"] < 1
        verdict = ("holds" if row["low"] > 1 else "does not hold") if sure else "undecided"
        rows.append(row | {"verdict": verdict if seeds >= SEEDS else f"{seeds} of {SEEDS}"})
    return rows


def _half_point(times_K: np.ndarray, share_K: np.ndarray) -> float:
    """log2 of the multiple at which the logistic curve through the shares of failures is 1/2, by maximum likelihood."""
    x_K = np.log2(times_K)

    def loss(parameters: np.ndarray) -> float:
        z_K = parameters[1] * (x_K - parameters[0])
        return float(np.sum(np.logaddexp(0, z_K) - share_K * z_K))

    start = np.array([x_K[np.argmax(share_K >= 0.5)] - 0.5 if (share_K >= 0.5).any() else x_K[-1], 2.0])
    bounds = [(x_K[0] - 1, x_K[-1] + 1), (0.1, 8.0)]
    return float(optimize.minimize(loss, start, bounds=bounds, method="L-BFGS-B").x[0])


def _interval(logs: np.ndarray) -> dict[str, float]:
    """The first value, and the 95 % interval of the others, back from log2."""
    low, high = np.quantile(logs[1:], [0.025, 0.975])
    return {"value": float(2 ** logs[0]), "low": float(2**low), "high": float(2**high)}


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "Method": report.METHODS[row["method"]].label,
        "Times the best rate": f"{row['times']:g}",
        "Seeds": str(row["seeds"]),
        "Choice NLL": number(row["loss"], row["loss_sd"], digits=3),
        "Failed": f"{row['failed']} of {row['seeds']}",
    }


def _half(row: dict[str, Any]) -> dict[str, Any]:
    named = {"lora": "LoRA", "dora": "DoRA"}
    return {
        "LR50": named.get(row["what"], row["what"].replace("dora", "DoRA").replace("lora", "LoRA")),
        "Value": number(row["value"], digits=2),
        "95 % interval": f"[{number(row['low'], digits=2)}, {number(row['high'], digits=2)}]",
        "Seeds": str(row["seeds"]),
        "DoRA's is higher": row.get("verdict"),
    }


if __name__ == "__main__":
    script(build, __doc__)
