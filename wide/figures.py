"""Figures from tables."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from wide.report import RULE_NAMES, Measured, Table, axis_text

# A rule looks the same in every figure; lightness, marker and dashes tell the rules apart without colour.
STYLES = {
    "backprop": {"color": "#111111", "marker": "o", "linestyle": "-"},
    "align_ada": {"color": "#0b5fa5", "marker": "s", "linestyle": "-"},
    "align_zero": {"color": "#4fa3e0", "marker": "D", "linestyle": "--"},
    "align_prop": {"color": "#7a4fb5", "marker": "P", "linestyle": "-."},
    "fa": {"color": "#c2410c", "marker": "^", "linestyle": "--"},
    "dfa": {"color": "#e0a030", "marker": "v", "linestyle": ":"},
    "last_layer": {"color": "#8a8a8a", "marker": "x", "linestyle": "-."},
}
AXIS_LABELS = {
    "width": "width (channels or units)",
    "learning_rate": "learning rate",
    "data_limit": "training images",
}


def draw_figure(
    path: Path, title: str, table: Table, measured: Measured, references: Mapping[str, Mapping[str, float]]
) -> None:
    """The last of the shown metrics against the table's axis: a panel per section, a line per rule."""
    count = len(table.sections)
    figure, panels = plt.subplots(1, count, figsize=(1.4 + 4.4 * count, 4.2), sharey=True, squeeze=False, dpi=150)
    metric = measured.shown[-1]
    for panel, (section, rows) in zip(panels[0], table.sections.items(), strict=True):
        for rule, cells in rows.items():
            draw_line(panel, rule, table.columns, cells, metric, measured)
        for name, metrics in references.items():
            panel.axhline(_scaled(metrics[metric], measured), color="#8a8a8a", linewidth=1, label=name)
        _dress(panel, table)
        if table.section_axis:
            panel.set_title(axis_text(table.section_axis, section), fontsize=10)
    panels[0][0].set_ylabel(measured.label(metric))
    panels[0][-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def draw_line(panel, rule: str, columns: tuple, cells: list, metric: str, measured: Measured) -> None:
    through = [(x, cell) for x, cell in zip(columns, cells, strict=True) if cell.values]
    if not through:
        return
    panel.errorbar(
        [x for x, _ in through],
        [_scaled(cell.mean(metric), measured) for _, cell in through],
        [_scaled(cell.deviation(metric), measured) for _, cell in through],
        label=RULE_NAMES[rule],
        capsize=3,
        markersize=5,
        **STYLES[rule],
    )


def _dress(panel, table: Table) -> None:
    panel.set_xlabel(AXIS_LABELS[table.against])
    panel.set_xscale("log")
    panel.set_xticks(table.columns, [f"{x:g}" for x in table.columns])
    panel.minorticks_off()
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _scaled(value: float, measured: Measured) -> float:
    return 100 * value if measured.percent else value
