"""The mode-collapse study's page: tables, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from analysis.collapse_figures import label
from analysis.collapse_table import MEASURES
from analysis.report import markdown_table, plural

if TYPE_CHECKING:
    import pandas as pd

    from analysis.effects import Effect
    from analysis.intensity import Prediction

EXPLAINED = ("zero_ratio", "blank_rate", "unreadable_rate", "tv_distance")
"""Measures whose effects are shown."""
FORMATS = {"zero_ratio": "{:.2f}", "tv_distance": "{:.3f}", "coverage": "{:.2f}"}
FORMATS |= {"fid_digits": "{:.2f}"}
INTERACTIONS = 10


def shown(measure: str, value: float) -> str:
    """A measure's value as text; rates in per cent."""
    return FORMATS.get(measure, "{:.1%}").format(value)


def comparison(sets: Mapping[str, pd.DataFrame], floors: Mapping[str, Mapping[str, float]]) -> str:
    """Sets by name, a row each: means over seeds; then what real digits score."""
    header = ["", "networks", "images each", *MEASURES.values()]
    rows = [
        [
            name,
            str(group["network"].nunique()),
            f"{int(group['samples'].min()):,}",
            *(shown(measure, float(group[measure].mean())) for measure in MEASURES),
        ]
        for name, group in sets.items()
    ]
    for name, values in floors.items():
        measured = [shown(m, values[m]) if m in values else "" for m in MEASURES]
        rows.append([name, "", f"{int(values['n']):,}", *measured])
    return markdown_table(header, rows)


def effect_table(effects: Mapping[str, Sequence[Effect]]) -> str:
    """Main effects; a row an effect, a column a measure; bold where the interval leaves out 0."""
    first = effects[EXPLAINED[0]]
    header = ["factor: level", "against", *(MEASURES[name] for name in effects)]
    rows = []
    for place, effect in enumerate(first):
        cells = [_interval(measure, found[place]) for measure, found in effects.items()]
        rows.append([label(effect), _reference(effect), *cells])
    return markdown_table(header, rows, words=2)


def interaction_table(effects: Mapping[str, Sequence[Effect]]) -> str:
    """The largest clear interactions of each measure, by the size of the effect."""
    rows = []
    for measure, found in effects.items():
        clear = sorted((e for e in found if e.is_clear), key=lambda e: -abs(e.size))
        rows += [
            [MEASURES[measure], label(effect), _interval(measure, effect)]
            for effect in clear[:INTERACTIONS]
        ]
    if not rows:
        return "No interaction is told from zero."
    return markdown_table(["measure", "interaction", "difference of differences"], rows, words=2)


def prediction_table(predictions: Sequence[Prediction], shares: Sequence[float]) -> str:
    """What the data alone say of a constant start; ``shares`` are of the data's classes."""
    header = ["start", "restorer", "zeros", "ones", "zeros (data: 1)", "blank"]
    rows = []
    for each in predictions:
        zeros, ones = each.counts[0] / each.n, each.counts[1] / each.n
        ratio = f"{zeros / shares[0]:.2f}"
        name = {"l1": "best in L1 (median)", "l2": "best in L2 (mean)"}[each.loss]
        rows.append(
            [each.start, name, f"{zeros:.1%}", f"{ones:.1%}", ratio, f"{each.blank_rate:.1%}"]
        )
    for each in predictions[::2]:
        zeros, ones = each.sampled[0], each.sampled[1]
        ratio = f"{zeros / shares[0]:.2f}"
        rows.append([each.start, "perfect sampler", f"{zeros:.1%}", f"{ones:.1%}", ratio, ""])
    return markdown_table(header, rows, words=2)


def curve_table(curves: Mapping[str, pd.DataFrame]) -> str:
    """Measures along training, means over networks."""
    header = ["", "step", *MEASURES.values()]
    rows = []
    for name, group in curves.items():
        for step, at in group.groupby("at"):
            cells = [shown(measure, float(at[measure].mean())) for measure in MEASURES]
            rows.append([name, str(step), *cells])
    return markdown_table(header, rows)


def method(table: pd.DataFrame) -> str:
    """What was fitted, in a sentence."""
    networks = plural(table["network"].nunique(), "network")
    return (
        f"{plural(len(table), 'set')} of samples of {networks}; effects are averages over all "
        "other factors, intervals of 95 %: of flip, discrete and loss from the differences between "
        "networks of one setting, of the rest from the residual within networks. Not corrected for "
        "their number."
    )


def incomplete(table: pd.DataFrame) -> str:
    """What is said instead of effects, of a study that is not whole."""
    networks = plural(table["network"].nunique(), "network")
    return (
        f"{plural(len(table), 'set')} of samples of {networks} cannot tell the effects apart: some "
        "of the design (results/mode_collapse/plan.toml) is missing."
    )


def _interval(measure: str, effect: Effect) -> str:
    if measure in FORMATS:
        digits = FORMATS[measure][2:-1]
        text = f"{effect.size:+{digits}} ({effect.low:+{digits}} to {effect.high:+{digits}})"
    else:
        text = f"{effect.size:+.1%} ({effect.low:+.1%} to {effect.high:+.1%})"
    return f"**{text}**" if effect.is_clear else text


def _reference(effect: Any) -> str:
    from analysis.collapse_design import SAMPLING, TRAINING

    factors: Mapping[str, Any] = {**TRAINING, **SAMPLING}
    return str(next(iter(factors[effect.factors[0]])))
