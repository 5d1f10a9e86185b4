"""The paper's probes: what the loss becomes without the experts that a token would use (DeepSeekMoE, section 4.5).

Disable the top routed experts (Figure 4), take the shared ones away, activate fewer (Figure 5): of one model, or of two
side by side on the same text. Each is an analysis; docs/probes.md says exactly what is masked, rounded, renormalised.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib

from moekit import pictures
from moekit.config import MoEConfig
from moekit.errors import ConfigError, MoekitError
from moekit.inspect.losses import MEAN, Batches, Score, Scores, measure
from moekit.inspect.result import Analysis, Cell, Table
from moekit.nn.model import Model
from moekit.nn.router import Probe

FRACTIONS = (0, 1 / 16, 2 / 16, 3 / 16, 4 / 16)
"""Of the routed experts, as in Figure 4."""
NAMES = ("model", "other")
UNALTERED = Probe()
ALL, REST = "over all", "over the rest"
COLOURS = (pictures.THEME["first"], pictures.THEME["second"])
SHOWN = (*Score._fields, "note")


class Point(NamedTuple):
    """One way to alter a model: a point of a curve, and a row of the tables."""

    probe: Probe
    x: float
    told: tuple[Cell, ...]
    curve: str = ""


class Question(NamedTuple):
    """A probe as an analysis: what to measure of a model, and how it is told and drawn."""

    name: str
    title: str
    reading: str
    axis: str
    columns: tuple[str, ...]
    """Names of what `Point.told` says."""
    points: Callable[[MoEConfig], list[Point]]
    paper: dict[str, dict[float, float]]
    """The paper's own curves: x -> loss, first unaltered. 2B parameters, read from its figures."""
    unaltered: float = 0
    """x of the model as it is."""
    ticks: tuple[str, ...] = ()
    """Names of x 0, 1, ..., where these are cases rather than numbers."""


def disable_top(
    model: Model,
    batches: Batches,
    fractions: Sequence[float] = FRACTIONS,
    other: Model | None = None,
    *,
    names: tuple[str, str] = NAMES,
    **how: Any,
) -> Analysis:
    """Returns the loss with a fraction of the routed experts taken from each token, those that it would choose first.

    The fraction becomes experts by `whole`. `how` is of `inspect.losses.measure`.
    """
    return _ask([_disable_top(fractions)], model, batches, other, names, how)[0]


def without_shared(
    model: Model, batches: Batches, other: Model | None = None, *, names: tuple[str, str] = NAMES, **how: Any
) -> Analysis:
    """Returns the loss without the shared experts: with one more routed expert for each (section 4.5), and plainly."""
    return _ask([_WITHOUT_SHARED], model, batches, other, names, how)[0]


def fewer_active(
    model: Model,
    batches: Batches,
    ks: Sequence[int] | None = None,
    other: Model | None = None,
    *,
    names: tuple[str, str] = NAMES,
    **how: Any,
) -> Analysis:
    """Returns the loss with other numbers of routed experts per token; None: from half of the own."""
    return _ask([_fewer_active(ks)], model, batches, other, names, how)[0]


def probes(
    model: Model, batches: Batches, other: Model | None = None, *, names: tuple[str, str] = NAMES, **how: Any
) -> list[Analysis]:
    """Returns all three in one pass over the text. One that does not fit any of the models is left out."""
    return _ask([_disable_top(FRACTIONS), _WITHOUT_SHARED, _fewer_active(None)], model, batches, other, names, how)


def whole(fraction: float, experts: int) -> int:
    """Returns the experts that a fraction stands for: the nearest whole number, a half up; 1/16 of 63 is 4.

    The paper does not say: how it rounds; its fractions of 63 are 3.94, 7.88, 11.81 and 15.75.
    """
    return math.floor(fraction * experts + 0.5)


def _disable_top(fractions: Sequence[float]) -> Question:
    def points(config: MoEConfig) -> list[Point]:
        experts = config.n_routed_experts
        number = {fraction: whole(fraction, experts) for fraction in sorted({0, *fractions})}
        found = [Point(Probe(n), n / experts, (fraction, n, ALL), ALL) for fraction, n in number.items()]
        if config.scoring_func == "softmax" and not config.norm_topk_prob and config.topk_method != "hash":
            found.append(Point(UNALTERED, 0, (0, 0, ALL), REST))
            found += [Point(Probe(n, True), n / experts, (f, n, REST), REST) for f, n in number.items() if n]
        return found

    return Question(
        "disable_top",
        "Without the experts that a token would choose first",
        "Each token loses the routed experts of highest score, and the next ones take their places. The steeper the "
        "loss (nats per token) climbs, the less an expert can be replaced by others. The weights of those left are as "
        "they were, or of a softmax over the rest. Bars: two standard errors of the difference from unaltered.",
        "fraction of the routed experts masked",
        ("fraction", "masked", "softmax"),
        points,
        {
            "DeepSeekMoE": dict(zip(FRACTIONS, (1.808, 7.468, 8.196, 8.706, 9.071), strict=True)),
            "GShard x1.5": dict(zip(FRACTIONS, (1.808, 5.586, 7.518, 7.627, 7.721), strict=True)),
        },
    )


def _of_shared(config: MoEConfig) -> list[Point]:
    shared, k = config.n_shared_experts, config.num_experts_per_tok
    return [
        Point(UNALTERED, 0, (shared, k)),
        Point(Probe(num_experts_per_tok=k + shared, shared=False), 1, (0, k + shared)),
        Point(Probe(shared=False), 2, (0, k)),
    ]


_WITHOUT_SHARED = Question(
    "without_shared",
    "Without the shared experts",
    "The shared experts are taken away, with one more routed expert per token for each of them, or without. Where the "
    "loss (nats per token) climbs far although as many experts are at work, the shared ones hold what no routed one "
    "does. Bars: two standard errors of the difference from unaltered.",
    "experts at work",
    ("shared", "routed"),
    _of_shared,
    {"DeepSeekMoE": {0: 1.808, 1: 2.414}},
    ticks=("all", "a routed one for\neach shared", "no shared"),
)


def _fewer_active(ks: Sequence[int] | None) -> Question:
    def points(config: MoEConfig) -> list[Point]:
        own = config.num_experts_per_tok
        wanted = sorted({*(range(max(1, own // 2), own) if ks is None else ks), own})
        return [Point(Probe(num_experts_per_tok=None if k == own else k), k / own, (k,)) for k in wanted]

    of_7 = {7: 1.808, 6: 1.814, 5: 1.831, 4: 1.868, 3: 1.956}
    return Question(
        "fewer_active",
        "With fewer routed experts per token",
        "Each token uses only its first few routed experts, with the weights that they have. A loss (nats per token) "
        "that stays near the unaltered one, dotted, says that the first experts know most of what is needed. Bars: two "
        "standard errors of the difference from unaltered.",
        "fraction of the model's own routed experts per token",
        ("routed",),
        points,
        {"DeepSeekMoE": {k / 7: loss for k, loss in of_7.items()}, "GShard, its two": {1: 1.867}},
        unaltered=1,
    )


def _ask(
    questions: list[Question],
    model: Model,
    batches: Batches,
    other: Model | None,
    names: tuple[str, str],
    how: Mapping[str, Any],
) -> list[Analysis]:
    """Returns the answers to the questions that some model can be asked; raises the reason if there are none."""
    if len(set(names)) < 2:
        raise ConfigError(f"the two models are both called {names[0]!r}; give them two names")
    models = dict(zip(names, (model,) if other is None else (model, other), strict=False))
    configs = {name: _experts(name, one) for name, one in models.items()}
    wanted = {name: [UNALTERED] for name in models}
    asked, reasons = [], []
    for question in questions:
        new = {name: {p.probe: p.probe.refusal(c) for p in question.points(c)} for name, c in configs.items()}
        reasons += [reason for found in new.values() for reason in found.values() if reason]
        if any(probe != UNALTERED and reason is None for found in new.values() for probe, reason in found.items()):
            asked.append(question)
            for name, found in new.items():
                wanted[name] += [p for p, reason in found.items() if reason is None and p not in wanted[name]]
    if not asked:
        raise _first(reasons)
    scores = measure(models, batches, wanted, **how)
    return [_answer(question, configs, scores) for question in asked]


def _first(reasons: Sequence[MoekitError]) -> MoekitError:
    return reasons[0] if reasons else ConfigError("nothing would be altered; give a larger fraction, or another k")


def _experts(name: str, model: Model) -> MoEConfig:
    if not isinstance(model.config.ffn, MoEConfig):
        raise ConfigError(f"{name} has no routed experts to probe: its ffn.kind is {model.config.ffn.kind}")
    return model.config.ffn


def _answer(question: Question, configs: Mapping[str, MoEConfig], scores: Scores) -> Analysis:
    means: list[tuple[Cell, ...]] = []
    by_domain: list[tuple[Cell, ...]] = []
    for name, config in configs.items():
        for probe, told in dict.fromkeys((point.probe, point.told) for point in question.points(config)):
            if (found := scores.get((name, probe))) is None:
                means.append((name, *told, *(None for _ in Score._fields), str(probe.refusal(config))))
                continue
            means.append((name, *told, *found[MEAN], None))
            by_domain += [(name, *told, domain, *one) for domain, one in found.items() if domain != MEAN]
    printed: list[tuple[Cell, ...]] = [
        (name, question.ticks[int(x)] if question.ticks else x, loss, loss / next(iter(curve.values())))
        for name, curve in question.paper.items()
        for x, loss in curve.items()
    ]
    tables = {
        "mean over domains": Table(("model", *question.columns, *SHOWN), means),
        "by domain": Table(("model", *question.columns, "domain", *Score._fields), by_domain),
        "in the paper": Table(("model", question.axis, "loss", "ratio"), printed),
    }
    findings = list[str]()
    for name in configs:
        measured = [row for row in means if row[0] == name and row[-1] is None]
        if len(measured) < 2:  # as it is, and no other way
            continue
        worst = max(measured, key=lambda row: float(row[-6] or 0))
        where = ", ".join(f"{column} {value}" for column, value in zip(question.columns, worst[1:], strict=False))
        findings.append(f"{name}: at most {float(worst[-6] or 0):.3f} times the unaltered loss ({where})")
    pictures = _draw(question, configs, scores)
    return Analysis(question.name, question.title, question.reading, tables, pictures, tuple(findings))


class Curve(NamedTuple):
    """What a picture shows of one model."""

    name: str
    colour: str
    dashed: bool
    x: list[float]
    y: list[float]
    bars: list[float]


@matplotlib.rc_context(pictures.STYLE)
def _draw(question: Question, configs: Mapping[str, MoEConfig], scores: Scores) -> dict[str, str]:
    """Returns pictures of the loss, of the loss relative to the model's own unaltered one, and of the paper's."""
    losses, ratios, papers = [], [], []
    for colour, (name, config) in zip(COLOURS, configs.items(), strict=False):
        unit = scores[name, UNALTERED][MEAN].loss
        for curve in dict.fromkeys(point.curve for point in question.points(config)):
            points = [p for p in question.points(config) if p.curve == curve and (name, p.probe) in scores]
            found = [scores[name, point.probe][MEAN] for point in points]
            y, bars = [one.loss for one in found], [2 * (one.standard_error or 0) for one in found]
            title = f"{name}, softmax {REST}" if curve == REST else name
            losses.append(Curve(title, colour, curve == REST, [point.x for point in points], y, bars))
            shares = [value / unit for value in y], [bar / unit for bar in bars]
            ratios.append(losses[-1]._replace(y=shares[0], bars=shares[1]))
    for colour, (name, told) in zip(COLOURS, question.paper.items(), strict=False):
        papers.append(Curve(name, colour, False, list(told), list(told.values()), [0] * len(told)))
    title = question.title
    return {
        f"{title}: loss": _picture(question, "loss, nats per token", losses),
        f"{title}: relative to unaltered": _picture(question, "loss / unaltered loss", ratios),
        f"{title}: in the paper (arXiv 2401.06066, 2B parameters)": _picture(question, "loss on the Pile", papers),
    }


def _picture(question: Question, label: str, curves: Sequence[Curve]) -> str:
    """Returns the curves, with a dotted line at each model's unaltered loss; points alone where x are cases."""
    axes = pictures.plot(x=question.axis, y=label)
    for curve in curves:
        line = "none" if question.ticks else "--" if curve.dashed else "-"
        style: Any = {"color": curve.colour, "linestyle": line, "marker": "o", "markersize": 3.5, "elinewidth": 0.9}
        axes.errorbar(curve.x, curve.y, curve.bars, label=curve.name, **style)
        if question.unaltered in curve.x:
            at = curve.y[curve.x.index(question.unaltered)]
            axes.axhline(at, color=curve.colour, linestyle=":", linewidth=0.8, alpha=0.6)
    pictures.grid_lines(axes)
    axes.ticklabel_format(axis="y", useOffset=False)
    if question.ticks:
        axes.set_xticks(range(len(question.ticks)), question.ticks)
        axes.set_xlim(-0.5, len(question.ticks) - 0.5)
    if len(curves) > 1:
        above: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0}
        small: Any = {"ncols": 2, "fontsize": 7.5, "handlelength": 1.4, "labelcolor": pictures.THEME["muted"]}
        axes.legend(**above, **small, frameon=False)
    return pictures.svg(axes, f"{question.title}: {label}")
