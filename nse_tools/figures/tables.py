"""Make the tables that the paper's figures draw, from the stored results of a run."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files

import pandas as pd

from nse_tools.comparison.result import UNEDITED, Comparison
from nse_tools.errors import SettingError
from nse_tools.metrics.scores import SCORED, harmonic_mean

Parts = Mapping[str, Comparison]
"""The comparisons of a run, by name."""
RECIPE = "recipe"
"""The name, in the runs, of NSE with what the search for a better recipe found: the preset ``<preset>-recipe``, where there is one."""
ANSWERING = ("nse", "memit")
"""The methods whose answers are shown, as in the paper's first figure."""
_OF_QUESTIONS = {
    "score": "score_token_accuracy",
    "efficacy": "efficacy_token_accuracy",
    "generalization": "generalization_token_accuracy",
    "specificity": "locality_token_accuracy",
}
"""What stands for a measure where facts are questions without a true target (zsRE)."""
_GRID = ("score", *SCORED), ("score_accuracy", *(f"{measure}_accuracy" for measure in SCORED))
"""Success, and accuracy."""
NEIGHBORS = ("neighbours left alone", "the same, unedited model", "neighbours edited too")
_MOVED = ("nse", "memit", "alphaedit", RECIPE)
_PANELS = {"p": "neuron_threshold", "α": "alpha", "λ": "mom2_update_weight", "layers": "layers"}


def taken(parts: Parts, measure: str) -> str:
    """Return the measure, or what stands for it if these facts do not have it."""
    has = next(iter(parts.values())).has(measure)
    return measure if has else _OF_QUESTIONS.get(measure, measure)


def edits_of(comparison: Comparison) -> dict[int, int]:
    """Return round → facts edited up to then."""
    made = comparison.rounds.drop_duplicates("round").sort_values("round")
    return {int(t): int(n) for t, n in zip(made["round"], made.edits, strict=True)}


def measures_table(parts: Parts) -> pd.DataFrame:
    """Return the measures of :data:`_GRID` that were taken, by method, seed and edits."""
    made = parts["sequence"]
    chosen = [measure for row in grid_rows(parts) for measure in row]
    curves = pd.concat([made.curve(measure).assign(measure=measure) for measure in chosen], ignore_index=True)
    return curves[curves["round"] > 0].reset_index(drop=True)


def sizes_table(parts: Parts) -> pd.DataFrame:
    """Return the measures of :data:`_GRID` at the end, by method, seed and ``rounds_of``."""
    chosen = [measure for row in grid_rows(parts) for measure in row]
    return size_table(parts).melt(["method", "seed", "rounds_of"], chosen, "measure")


def grid_rows(parts: Parts) -> list[list[str]]:
    """Return the measures of :data:`_GRID`, or what stands for them; of each row those that were taken."""
    has = next(iter(parts.values())).has
    rows = [[taken(parts, measure) for measure in row] for row in _GRID]
    return [here for row in rows if (here := [measure for measure in row if has(measure)])]


def _quoting(parts: Parts, table: str) -> pd.DataFrame:
    """Return a table of the sequence that quotes facts.

    Raises
    ------
    SettingError
        If the run keeps no such tables.
    """
    found = parts["sequence"].also.get(table)
    if found is None:
        raise SettingError(f"This run keeps no table {table!r}, which quotes facts: it was made with texts=False (--no-texts).")
    return found


def _first_seed(table: pd.DataFrame) -> pd.DataFrame:
    return table[table.seed == table.seed.min()]


def answers_table(parts: Parts) -> pd.DataFrame:
    """Return what :data:`ANSWERING` answered to the first facts, first seed."""
    table = _first_seed(_quoting(parts, "answers"))
    return _of_methods(table, ANSWERING, "answers")


def moved_table(parts: Parts) -> pd.DataFrame:
    """Return where neighbours' prompts stood before and after all edits, first seed."""
    table = _first_seed(_quoting(parts, "shift"))
    last = table["round"] == table.groupby("method")["round"].transform("max")
    own = _of_methods(table[last], _MOVED, "shift").reset_index(drop=True)
    return own.astype({"edited": bool}) if len(own) else own  # next to a method that made no round it is read as an object


def _of_methods(table: pd.DataFrame, methods: tuple[str, ...], figure: str) -> pd.DataFrame:
    """Return the rows of some methods.

    Raises
    ------
    SettingError
        If there are none.
    """
    own = table[table.method.isin(methods)]
    if len(table) and own.empty:
        raise SettingError(f"{figure}: it shows {', '.join(methods)}, and the run has none of them yet (nse-tools figures run sequence).")
    return own


def neighbors_table(parts: Parts) -> pd.DataFrame:
    """Return specificity at the end, one row per method and seed: on neighbours left alone, before and after, and on those edited as well.

    Raises
    ------
    SettingError
        If no fact has a neighbourhood prompt.
    """
    table = parts["sequence"].also["neighbors"]
    if "edited" not in table:
        raise SettingError("neighbors: none of the facts has a neighbourhood prompt; draw sequence_specificity, which also knows locality.")
    last = table[table["round"] == table.groupby(["method", "seed"])["round"].transform("max")]
    apart = last.pivot_table(index=["method", "seed"], columns="edited", values=["success", "success_before"], sort=False)
    names = dict(zip((("success", False), ("success_before", False), ("success", True)), NEIGHBORS, strict=True))
    return pd.DataFrame({name: apart.get(column) for column, name in names.items()}, index=apart.index).reset_index()


def disturbed_table(comparison: Comparison) -> pd.DataFrame:
    """Return, for each fact before the last round, what later rounds did at its key and whether it holds at the end."""
    effects, scores = comparison.also["effects"], comparison.scores
    key = ["method", "seed", "round", "fact"]
    last = effects.groupby(["method", "seed"])["round"].transform("max")
    holds = scores[[*key, "efficacy_accuracy"]].assign(holds=scores.efficacy_accuracy / 100)
    return effects[effects["round"] == last].merge(holds, on=key)


def times_table(parts: Parts) -> pd.DataFrame:
    """Return the seconds an edit takes by method and step, of the tested rounds; only facts searched for share a value search."""
    times = parts["sequence"].also["times"]
    searched = times.facts - times.cached
    own = times.assign(facts=times.facts.where(times.step != "values", searched)).query("facts > 0")
    per_round = own.groupby(["method", "step"], sort=False)[["seconds", "facts"]].sum()
    return (per_round.seconds / per_round.facts).rename("seconds_per_edit").reset_index()


def reported() -> pd.DataFrame:
    """Return the numbers reported for Llama-3-8B (CounterFact, rounds of 100; 2 000 edits where no other number is named), percent.

    Score is computed from them; fluency is in bits × 100.
    """
    file = files("nse_tools.figures") / "data" / "reported_llama3_8b.csv"
    with file.open(encoding="utf-8") as text:
        table = pd.read_csv(text)
    return table.assign(score=[harmonic_mean(row) for row in table[list(SCORED)].to_numpy().tolist()])


def main_table(parts: Parts) -> pd.DataFrame:
    """Return the summary; where it was measured what the models write, with fluency (bits) and consistency (cosine)."""
    made = parts["sequence"]
    written = made.also.get("written")
    return made.summary() if written is None or written.empty else made.summary().join(_texts_measured(written), on="method")


def _texts_measured(written: pd.DataFrame) -> pd.DataFrame:
    """Return means over facts, then seeds, after the last round, and their deviation over seeds; the unedited model's in a row."""
    kinds = [kind for kind in ("fluency", "consistency") if kind in written]
    last = written[written["round"] == written.groupby(["method", "seed"])["round"].transform("max")]
    own = last.groupby(["method", "seed"], sort=False)
    seeds = own[kinds].mean().groupby("method", sort=False)
    found = pd.concat([seeds.mean(), seeds.std().add_suffix("_sd")], axis=1)
    found.loc[UNEDITED, kinds] = own[[f"{kind}_before" for kind in kinds]].mean().mean().to_numpy()
    return found


def ends_by_part(parts: Parts) -> pd.DataFrame:
    """Return every part's measures at the end, ``part`` in front."""
    return pd.concat([made.ends().assign(part=part) for part, made in parts.items()], ignore_index=True)


def variants_table(parts: Parts) -> pd.DataFrame:
    """Return every part's measures at the end, the highest Score first."""
    return ends_by_part(parts).sort_values(taken(parts, "score"), ascending=False, ignore_index=True)


def orders_table(parts: Parts) -> pd.DataFrame:
    """Return every part's measures at the end, a ``variant`` a method and part."""
    table = ends_by_part(parts)
    return table.assign(variant=table.method + ", " + table.part)


def size_table(parts: Parts) -> pd.DataFrame:
    """Return the measures at the end with ``rounds_of``, in its order; methods stay in the run's."""
    table = ends_by_part(parts)
    sized = table.assign(rounds_of=table.part.str.removeprefix("of_").astype(int))
    return sized.sort_values("rounds_of", kind="stable", ignore_index=True)


def long_table(parts: Parts) -> pd.DataFrame:
    """Return what is left along the stream: accuracy on rewrites of the facts ``asked``, and perplexity, after each tested round."""
    made = parts["long"]
    scores = made.scores[made.scores["round"] > 0]
    newest, first = scores.edited_in_round == scores["round"], scores.edited_in_round == 1
    kinds = {"first round's facts": first, "some rounds' facts between": ~(newest | first), "newest round's facts": newest}
    key = ["method", "seed", "round"]
    accuracy = [scores[own].groupby(key, sort=False).efficacy_accuracy.mean().rename("value").reset_index() for own in kinds.values()]
    tables = [own.assign(asked=name).merge(made.rounds[[*key, "edits"]], on=key) for name, own in zip(kinds, accuracy, strict=True)]
    return pd.concat([*tables, made.curve("perplexity").assign(asked="perplexity")], ignore_index=True)


def sensitivity_tables(parts: Parts) -> dict[str, pd.DataFrame]:
    """Return the measures at the end, mean over seeds, by setting, with the setting's ``value``."""
    found = {}
    for name, part in _PANELS.items():
        if part in parts:
            ends = parts[part].ends()
            found[name] = _means(ends.assign(value=ends.method.str.partition("=")[2]))
    for name, prefix in (("contexts", "contexts_"), ("tokens for C, per neuron", "tokens_")):
        own = {int(part.removeprefix(prefix)): made.ends() for part, made in parts.items() if part.startswith(prefix)}
        if own:
            found[name] = _means(pd.concat([own[k].assign(value=str(k)) for k in sorted(own)]))
    return found


def _means(table: pd.DataFrame) -> pd.DataFrame:
    return table.groupby("value", sort=False, as_index=False).mean(numeric_only=True)


def sensitivity_table(parts: Parts) -> pd.DataFrame:
    """Return :func:`sensitivity_tables` one below the other, the name of each as ``setting``."""
    return pd.concat([own.assign(setting=name) for name, own in sensitivity_tables(parts).items()], ignore_index=True)


def one_round(parts: Parts, name: str) -> pd.DataFrame:
    """Return a table of the anatomy's last round, first seed."""
    table = _first_seed(parts["anatomy"].also[name])
    return table[table["round"] == table["round"].max()]
