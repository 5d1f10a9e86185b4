"""Two models on the same text: the measures that both have, beside each other."""

from collections.abc import Sequence

from moekit.inspect.result import Analysis, Cell, Table, cell


def beside(names: tuple[str, str], first: Sequence[Analysis], second: Sequence[Analysis]) -> Analysis:
    """Returns, of each measure of every analysis that both models have, the median over layers and the spread."""
    others = {analysis.name: analysis for analysis in second}
    rows: list[tuple[Cell, ...]] = []
    for analysis in first:
        other = others.get(analysis.name)
        if other is None or "percentiles" not in analysis.tables or "percentiles" not in other.tables:
            continue
        known = {row[0]: row[1:] for row in other.tables["percentiles"].rows}
        for measure, *ours in analysis.tables["percentiles"].rows:
            theirs = known.get(measure, (None, None, None))
            middle, of_other = ours[1], theirs[1]
            both = isinstance(middle, int | float) and isinstance(of_other, int | float)
            gap = cell(float(middle) - float(of_other)) if both else None  # type: ignore[arg-type]
            rows.append((analysis.name, measure, middle, of_other, gap, ours[0], theirs[0], ours[2], theirs[2]))
    columns = (
        "analysis",
        "measure",
        *names,
        "difference",
        *(f"{name} {at}" for at in ("p10", "p90") for name in names),
    )
    reading = (
        "Medians over the layers of both models on the same text, then their 10th and 90th percentiles. Expert numbers "
        "of two models have nothing to do with each other, so no expert is compared with another. Measures per token "
        "mean the same in both models only where their tokenizers are the same."
    )
    tables = {"measures": Table(columns, rows)}
    return Analysis("beside", f"{names[0]} beside {names[1]}", reading, tables, {})
