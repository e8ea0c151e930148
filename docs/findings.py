"""Fills the tables of docs/findings.md and docs/protocol.md from results/.

    .venv/bin/python docs/findings.py [--write]

A table stands between the lines `<!-- KIND: PRESET -->` and `<!-- end -->`. Without `--write`, the exit status says
whether the pages hold what results/ says. KIND is one of:

    comparisons   a row per condition: EA against DPA, by accuracy
    restarts      of several presets, a row per condition on which one of EA and DPA is ahead: one seed, and the best of
                  three by validation
    thresholds    of several presets, a row per candidate for an exclusive range: how many fresh seeds reach what
    bits          as comparisons, by the cross-entropy in bits
    bits_by_seed  of several presets, the same with the lowest and the highest seed in the place of an interval
    bits_by_mechanism
                  likewise, a row per mechanism, a column per condition
    repeated      of several presets, the conditions (task and model) that more than one of them has, in each and in all
    examples      the same where all seeds share their data: on the test and on the validation examples
    pairs         a row per pair of weight functions of one shape, a column per condition
    gains         a row per mechanism, a column per gain at the start: validation accuracy of the tuning seeds, at the
                  best rate of each condition, on average over conditions
    gains_bits    the same by the cross-entropy in bits
    choices       of several presets, a row each: validation accuracy with the chosen settings, on average over
                  conditions, of the tuning seeds and of the final seeds
    limits        of several presets, a row per task and position: EA with z^2 in the place of z^2 / (1 + z^2), by
                  accuracy on validation sequences
    limit_bits    a row per condition of one preset, by the cross-entropy in bits
    trends        the trend of EA's lead with complexity over parts of a preset, and without each of EA's leads
    verdicts      a row per claim
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy import stats

from expressive_attention.study.analysis.claims.two_sidedness import SHAPES
from expressive_attention.study.analysis.estimators import (
    Interval,
    best_of,
    mean_interval,
    percentiles,
    widened_level,
)
from expressive_attention.study.analysis.significance import sign_flip_p
from expressive_attention.study.analysis.trend import trend
from expressive_attention.study.analysis.wording import divided, mechanism_name
from expressive_attention.study.config.condition import Condition
from expressive_attention.study.runs.exported import load_results

ROOT = Path(__file__).parents[1]
PAGES = tuple(ROOT / "docs" / name for name in ("findings.md", "protocol.md"))
_TABLE = re.compile(r"<!-- (\w+): ([\w ]+) -->\n.*?<!-- end -->", re.DOTALL)

Row = dict[str, Any]


def filled(page: str) -> str:
    """The page with all tables as results/ has them."""
    return _TABLE.sub(lambda found: f"<!-- {found[1]}: {found[2]} -->\n{_filled(found[1], found[2])}<!-- end -->", page)


@cache
def _filled(kind: str, presets: str) -> str:
    return _KINDS[kind](presets)


def share(value: float) -> str:
    """``.998``, ``1.000``."""
    return re.sub("^0", "", f"{value:.3f}")


def signed(value: float) -> str:
    """``+.300``."""
    return f"{value:+.3f}".replace("0.", ".", 1)


def between(row: Row, name: str) -> str:
    """A difference with its interval, ``+.300 (+.168 to +.402)``."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    ends = "seeds do not differ" if low is None else f"{signed(low)} to {signed(high)}"
    return f"{signed(row[name])} ({ends})"


def with_ends(value: float, interval: Interval | None) -> str:
    """The same of a value and its interval."""
    return between({"": value, "_low": interval and interval.low, "_high": interval and interval.high}, "")


def probability(p: float) -> str:
    """``.020``, ``< .001``, ``1``."""
    return "< .001" if p < 0.0005 else "1" if p > 0.9995 else share(p)


def solved(row: Row) -> str:
    """``15/16, .998``."""
    return f"{row['solved']}/{row['n']}, {share(row['accuracy'])}"


def bits(row: Row) -> str:
    """The mean cross-entropy, ``2.066``."""
    return f"{row['cross_entropy'] / math.log(2):.3f}"


def leads(ea: Row) -> bool:
    """Whether one of EA and DPA is ahead, as a report has it."""
    low, high = ea.get("examples_low"), ea.get("examples_high")  # protocol 2 had none
    open_by_examples = low is not None and high is not None and low <= 0 <= high
    return ea["p"] is not None and ea["p"] < 0.05 and abs(ea["difference"]) >= 0.01 and not open_by_examples


def rough(value: float) -> str:
    """Two digits, ``150``, ``.0019``."""
    return re.sub("^0", "", f"{float(f'{value:.2g}'):g}")


def by_condition(preset: str) -> list[tuple[str, dict[str, Row]]]:
    """The rows of the summary: conditions in the study's order, mechanisms of each by name."""
    found: dict[str, dict[str, Row]] = {}
    for row in pl.read_parquet(ROOT / "results" / preset / "summary.parquet").iter_rows(named=True):
        found.setdefault(row["condition"], {})[row["mechanism"]] = row
    return list(found.items())


def _comparisons(preset: str) -> str:
    head = ["condition", "EA solved, accuracy", "DPA solved, accuracy", "EA - DPA (95% interval)", "p, Holm"]
    head += ["steps before solving, EA and DPA (log-rank p, Holm)"]
    rows = []
    for condition, found in by_condition(preset):
        ea, dpa = found["expressive"], found["dot_product"]
        p = "not counted" if ea["untested"] else probability(ea["p"])
        difference = between(ea, "difference")
        if leads(ea):
            difference = f"**{difference}**"
        steps = f"{ea['steps']:.0f}, {dpa['steps']:.0f} ({probability(ea['steps_p'])})"
        if ea["steps_p"] < 0.05:
            steps = f"**{steps}**"
        rows.append([condition, solved(ea), solved(dpa), difference, p, steps])
    return _table(head, rows)


def _repeated(presets: str) -> str:
    head = ["condition", "preset", "EA solved, accuracy", "DPA solved, accuracy", "EA - DPA (95% interval)", "p, alone"]
    head += _RESTARTS
    found: dict[str, dict[str, Condition]] = {}
    for preset in presets.split():
        for condition in load_results(ROOT / "results" / preset).conditions:
            found.setdefault(repr((condition.task, condition.model)), {})[preset] = condition
    rows = []
    for conditions in found.values():
        if len(conditions) < 2:
            continue
        pairs = {preset: _pairs_of_seeds(preset, each.label, "expressive") for preset, each in conditions.items()}
        facts = next(iter(conditions.values()))
        values = {**facts.task, **facts.model}
        shared = ", ".join(f"{name} {values[name]}" for name in ("basis", "delay", "embed_dim", "heads"))
        for preset, table in (pairs | {"all": pl.concat(pairs.values())}).items():
            mine, baseline = (
                f"{table[f'solved{end}'].sum()}/{len(table)}, {share(float(table[f'accuracy{end}'].to_numpy().mean()))}"
                for end in ("", "_baseline")
            )
            differences = (table["accuracy"] - table["accuracy_baseline"]).to_list()
            told = with_ends(float(np.mean(differences)), mean_interval(differences))
            own = [(each["accuracy"] - each["accuracy_baseline"]).to_numpy().mean() for each in pairs.values()]
            if preset == "all" and len(own) > 2:  # seeds of a preset share their setting
                reach = stats.t.ppf(0.975, len(own) - 1) * np.std(own, ddof=1) / math.sqrt(len(own))
                told += f"; presets as units: {signed(np.mean(own) - reach)} to {signed(np.mean(own) + reach)}"
            restarts = _restarted(list(pairs.values()) if preset == "all" else [table])
            rows.append([shared, preset, mine, baseline, told, probability(sign_flip_p(differences)), *restarts])
    return _table(head, rows)


_RESTARTS = ["best of three seeds: EA, DPA", "seeds below .9: EA, DPA"]


def _restarted(runs: list[pl.DataFrame]) -> list[str]:
    """The cells of `_RESTARTS`; seeds of one run, which share their setting, are the choice of three."""
    names = ("", "_baseline")
    best = [share(float(np.mean([_best(run, name) for run in runs]))) for name in names]
    low = [str(sum(run.filter(pl.col(f"accuracy{name}") < 0.9).height for run in runs)) for name in names]
    return [", ".join(best), ", ".join(low)]


def _best(pairs: pl.DataFrame, name: str) -> float:
    return best_of(pairs[f"validation{name}"].to_numpy(), pairs[f"accuracy{name}"].to_numpy())


def _restarts(presets: str) -> str:
    head = ["preset", "condition", "EA - DPA (95% interval)", *_RESTARTS, "best of three: EA - DPA (95% interval)"]
    rows = []
    for preset in presets.split():
        for condition, found in by_condition(preset):
            if not leads(found["expressive"]):
                continue
            pairs = _pairs_of_seeds(preset, condition, "expressive")
            rng, n = np.random.default_rng(0), len(pairs)
            drawn = [pairs[rng.integers(n, size=n)] for _ in range(1999)]
            again = np.array([_best(each, "") - _best(each, "_baseline") for each in drawn])
            interval = percentiles(again, widened_level(n, n - 1))
            difference = _best(pairs, "") - _best(pairs, "_baseline")
            told = [between(found["expressive"], "difference"), *_restarted([pairs]), with_ends(difference, interval)]
            rows.append([preset, condition, *told])
    return _table(head, rows)


def _thresholds(presets: str) -> str:
    reached = (0.99, 0.98)
    head = ["preset", "condition", "solved: EA, DPA", *(f"{rough(level)} or more: EA, DPA" for level in reached)]
    rows = []
    for preset in presets.split():
        fresh = pl.read_parquet(ROOT / "results" / preset / "seeds.parquet").filter(role="confirmation")
        for condition in fresh["condition"].unique(maintain_order=True):
            arms = [fresh.filter(condition=condition, mechanism=name) for name in ("expressive", "dot_product")]
            cells = [", ".join(f"{arm['solved'].sum()}/{len(arm)}" for arm in arms)]
            cells += [", ".join(f"{(arm['accuracy'] >= level).sum()}/{len(arm)}" for arm in arms) for level in reached]
            rows.append([preset, condition, *cells])
    return _table(head, rows)


def _pairs_of_seeds(preset: str, condition: str, mechanism: str) -> pl.DataFrame:
    """A row per final seed, with the columns of DPA named ``..._baseline``."""
    final = pl.read_parquet(ROOT / "results" / preset / "seeds.parquet").filter(role="final", condition=condition)
    mine, baseline = (final.filter(mechanism=name) for name in (mechanism, "dot_product"))
    return mine.join(baseline, on="seed", suffix="_baseline", validate="1:1")


def _examples(preset: str) -> str:
    head = [
        "condition",
        "on the test examples",
        "the same, were other test examples drawn",
        "on the validation examples",
    ]
    rows = []
    for condition, found in by_condition(preset):
        ea = found["expressive"]
        drawn = f"{signed(ea['examples_low'])} to {signed(ea['examples_high'])}"
        rows.append([condition, between(ea, "difference"), drawn, between(ea, "validation_difference")])
    return _table(head, rows)


def _pairs(preset: str) -> str:
    conditions = by_condition(preset)
    _, names = divided([condition for condition, _ in conditions])
    plain = np.array(["embedding_shift 0.0" in condition for condition, _ in conditions])
    rows = []
    for two, one in SHAPES:
        differences = np.array([found[two]["accuracy"] - found[one]["accuracy"] for _, found in conditions])
        means = "; ".join(signed(float(differences[which].mean())) for which in (plain, ~plain))
        cells = [f"{solved(found[two])}; {solved(found[one])}" for _, found in conditions]
        rows.append([f"{mechanism_name(two)}; {mechanism_name(one)}", *cells, means])
    return _table(["two-sided; one-sided", *names, "mean difference: shift 0.0; shift 1.0"], rows)


def _gains(preset: str) -> str:
    return _gains_table(preset, pl.col("validation"), pl.Expr.max)


def _gains_bits(preset: str) -> str:
    return _gains_table(preset, pl.col("validation_cross_entropy") / math.log(2), pl.Expr.min)


def _gains_table(preset: str, measure: pl.Expr, best: Callable[[pl.Expr], pl.Expr]) -> str:
    seeds = pl.read_parquet(ROOT / "results" / preset / "seeds.parquet").filter(role="tuning")
    of = ["mechanism", "initial_gain"]
    rates = seeds.group_by(*of, "condition", "learning_rate").agg(measure.mean().alias("reached"))
    means = rates.group_by(*of, "condition").agg(best(pl.col("reached"))).group_by(of).agg(pl.col("reached").mean())
    gains = sorted(means["initial_gain"].unique())
    rows = []
    for mechanism in ("expressive", "dot_product"):
        reached = dict(means.filter(mechanism=mechanism).select("initial_gain", "reached").iter_rows())
        rows.append([mechanism_name(mechanism), *(share(reached[gain]) for gain in gains)])
    return _table(["gain at the start", *(f"{gain:g}".removeprefix("0") for gain in gains)], rows)


def _choices(presets: str) -> str:
    head = ["preset", "settings tried", "EA: tuning seeds, final seeds", "DPA: tuning seeds, final seeds"]
    rows = []
    for preset in presets.split():
        seeds = pl.read_parquet(ROOT / "results" / preset / "seeds.parquet")
        chosen = pl.read_parquet(ROOT / "results" / preset / "summary.parquet")
        of = ["condition", "mechanism", "learning_rate", "initial_gain"]
        reached = seeds.join(chosen.select(of), on=of, how="semi").group_by("mechanism", "role", "condition")
        means = reached.agg(pl.col("validation").mean()).group_by("mechanism", "role").agg(pl.col("validation").mean())
        told = {row[:2]: share(row[2]) for row in means.iter_rows()}
        cells = [f"{told[name, 'tuning']}, {told[name, 'final']}" for name in ("expressive", "dot_product")]
        rows.append([preset, str(seeds.filter(role="tuning").select(of[2:]).unique().height), *cells])
    return _table(head, rows)


def _bits(preset: str) -> str:
    head = ["condition", "EA, bits", "DPA, bits", "EA - DPA (95% interval)", "on validation windows", "seeds"]
    rows = []
    for condition, found in by_condition(preset):
        ea, dpa = found["expressive"], found["dot_product"]
        told = [
            with_ends(float(differences.mean()), mean_interval(differences.tolist()))
            for differences in (_in_bits(preset, condition, "expressive", name) for name in _WINDOWS)
        ]
        rows.append([condition, bits(ea), bits(dpa), *told, str(ea["n"])])
    return _table(head, rows)


# Columns of the cross-entropy on test windows and on validation windows.
_WINDOWS = ("cross_entropy", "validation_cross_entropy")


def _in_bits(preset: str, condition: str, mechanism: str, name: str) -> np.ndarray[Any, Any]:
    """The differences of a mechanism from DPA, one for each seed."""
    pairs = _pairs_of_seeds(preset, condition, mechanism)
    return (pairs[name] - pairs[f"{name}_baseline"]).to_numpy() / math.log(2)


def _bits_by_seed(presets: str) -> str:
    head = ["condition", "EA, bits", "DPA, bits", "EA - DPA (lowest to highest seed)", "on validation windows", "seeds"]
    rows = []
    for preset in presets.split():
        for condition, found in by_condition(preset):
            ea, dpa = found["expressive"], found["dot_product"]
            told = [_of_seeds(preset, condition, "expressive", name) for name in _WINDOWS]
            rows.append([condition, bits(ea), bits(dpa), *told, str(ea["n"])])
    return _table(head, rows)


def _bits_by_mechanism(preset: str) -> str:
    conditions = by_condition(preset)
    rows = []
    for mechanism in conditions[0][1]:
        cells = [
            bits(found[mechanism])
            + ("" if mechanism == "dot_product" else f"; {_of_seeds(preset, condition, mechanism)}")
            for condition, found in conditions
        ]
        rows.append([mechanism_name(mechanism), *cells])
    _, names = divided([condition for condition, _ in conditions])
    return _table(["bits; minus DPA (lowest to highest seed)", *names], rows)


def _of_seeds(preset: str, condition: str, mechanism: str, name: str = "cross_entropy") -> str:
    """The mean difference from DPA in bits, and the lowest and highest of a seed, ``-.012 (-.030 to +.004)``."""
    differences = _in_bits(preset, condition, mechanism, name)
    return f"{signed(differences.mean())} ({signed(differences.min())} to {signed(differences.max())})"


_FUNCTIONS = {"expressive": "EA", "squared": "z² in its place", "squared_trained": "z², after the training"}
_FUNCTIONS |= {"expressive_trained": "EA, after the training", "squared_from_start": "z² from the start"}

_QUANTILES = "99% quantile of abs(z): median head, largest head"


def _limits(presets: str) -> str:
    names = [name for name in _FUNCTIONS if name != "squared_from_start"]
    head = ["preset", "task, positions", "conditions", *(_FUNCTIONS[name] for name in names)]
    head += ["largest loss on a condition: at once, after the training", _QUANTILES]
    rows = []
    for preset in presets.split():
        seeds, heads = _limit_tables(preset)
        alike: dict[tuple[str, str], list[str]] = {}
        for condition in load_results(ROOT / "results" / preset).conditions:
            alike.setdefault((condition.task["kind"], condition.model["position"]), []).append(condition.label)
        for labels in alike.values():
            among = pl.col("condition").is_in(labels)
            reached = seeds.filter(among).group_by("condition").agg(pl.col(f"{name}_accuracy").mean() for name in names)
            means = {name: reached[f"{name}_accuracy"].to_numpy() for name in names}
            lost = [(means["expressive"] - means[name]).max() for name in ("squared", "squared_trained")]
            z = heads.filter(among)["z_99"].to_numpy()
            cells = [share(means[name].mean()) for name in names]
            cells += [", ".join(share(max(loss, 0.0)) for loss in lost), _quantiles(z)]
            shared, rest = divided(labels)
            rows.append([preset, shared or rest[0], str(len(labels)), *cells])
    return _table(head, rows)


def _limit_bits(preset: str) -> str:
    seeds, heads = _limit_tables(preset)
    models = {name: head for name, head in _FUNCTIONS.items() if seeds[f"{name}_cross_entropy"].null_count() == 0}
    rows = []
    for condition in seeds["condition"].unique(maintain_order=True):
        mine, z = seeds.filter(condition=condition), heads.filter(condition=condition)["z_99"].to_numpy()
        cells = [f"{mine[f'{name}_cross_entropy'].to_numpy().mean() / math.log(2):.3f}" for name in models]
        rows.append([condition, _quantiles(z), *cells])
    return _table(["condition", _QUANTILES, *models.values()], rows)


def _limit_tables(preset: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The findings of `ea study limit`, by seed and by head."""
    seeds, heads = (pl.read_parquet(ROOT / "results" / preset / f"{name}.parquet") for name in ("limit", "limit_heads"))
    if missing := {condition for condition, _ in by_condition(preset)} - set(seeds["condition"]):
        raise ValueError(f"results/{preset} has no limit of {sorted(missing)}: export the study again")
    return seeds, heads


def _quantiles(z: np.ndarray[Any, Any]) -> str:
    return f"{rough(float(np.median(z)))}, {rough(float(z.max()))}"


def _trends(preset: str) -> str:
    conditions = load_results(ROOT / "results" / preset).conditions
    pairs = [_pairs_of_seeds(preset, each.label, "expressive") for each in conditions]
    margins = np.array([(each["accuracy"] - each["accuracy_baseline"]).to_numpy() for each in pairs])
    bases = [each.task["basis"] if each.task["kind"] == "nt" else 0 for each in conditions]
    widths = [each.model["embed_dim"] for each in conditions]
    parts = {"all": [True] * len(conditions), "single rules": [basis > 0 for basis in bases]}
    parts |= {f"width {width}": [each == width for each in widths] for width in sorted(set(widths))}
    parts |= {"single rules of basis 2 and 4": [0 < basis < 8 for basis in bases]}
    parts |= {"single rules of basis 8 to 32": [basis >= 8 for basis in bases]}
    for label, found in by_condition(preset):
        if leads(found["expressive"]) and found["expressive"]["difference"] > 0:
            parts[f"without {label}"] = [each.label != label for each in conditions]
    rows = []
    for name, part in parts.items():
        which = np.flatnonzero(part)
        bits_of_state = [float(conditions[i].facts["complexity"]) for i in which]
        found = trend(bits_of_state, margins[which], [widths[i] for i in which])
        assert found is not None  # each part has several complexities
        interval = found.interval
        ends = "too few for an interval" if interval is None else f"{interval.low:+.4f} to {interval.high:+.4f}"
        slope = f"{found.slope:+.4f} ({ends})"
        rows.append([name, str(found.conditions), slope, f"{found.tau:+.2f} ({probability(found.tau_p)})"])
    return _table(["part", "conditions", "per bit (95% interval)", "rank correlation (p)"], rows)


def _verdicts(preset: str) -> str:
    found = pl.read_parquet(ROOT / "results" / preset / "verdicts.parquet").iter_rows(named=True)
    rows = [[row["question"], f"**{row['answer']}**", row["effect"] or row["where"], row["n"]] for row in found]
    return _table(["question", "answer", "effect", "n"], rows)


_KINDS: dict[str, Callable[[str], str]] = {
    "comparisons": _comparisons,
    "repeated": _repeated,
    "restarts": _restarts,
    "thresholds": _thresholds,
    "examples": _examples,
    "bits": _bits,
    "bits_by_seed": _bits_by_seed,
    "bits_by_mechanism": _bits_by_mechanism,
    "pairs": _pairs,
    "gains": _gains,
    "gains_bits": _gains_bits,
    "choices": _choices,
    "limits": _limits,
    "limit_bits": _limit_bits,
    "trends": _trends,
    "verdicts": _verdicts,
}


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def main() -> int:
    """The exit status."""
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            stale.append(page)
            if "--write" in sys.argv[1:]:
                page.write_text(new, encoding="utf-8")
    print("\n".join(f"{page.relative_to(ROOT)} differs from results/" for page in stale) or "all tables are up to date")
    return int(bool(stale) and "--write" not in sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
