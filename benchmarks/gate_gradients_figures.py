"""Figures of the gate-gradients benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coar.report import figures

Rows = list[dict[str, Any]]
STYLES = {
    "gate gradients": ("o-", figures.COLOURS[0]),
    "gate gradients, pooled": ("s--", figures.COLOURS[3]),
    "ridge": ("^-", figures.COLOURS[1]),
}


def draw_curves(curves: dict[str, Rows], path: Path) -> None:
    """Correlation against cost in forwards, one panel per network."""
    figure, axes = figures.new_figure(columns=len(curves), width=3.2, height=3.2)
    for (name, rows), ax in zip(curves.items(), axes, strict=True):
        for method, (style, colour) in STYLES.items():
            own = [row for row in rows if row["method"] == method]
            x, y = ([row[key] for row in own] for key in ("forwards", "correlation"))
            ax.plot(x, y, style, color=colour, label=method, markersize=4)
        first = rows[0]
        ax.axhline(first["correlation"] / first["of the ceiling"], color="grey", linewidth=0.8, linestyle=":")
        ax.set_xscale("log")
        ax.set_title(name)
        ax.set_xlabel("forward passes over all examples")
    axes[0].set_ylabel("held-out correlation\n(dotted: linear ceiling)")
    axes[0].legend(frameon=False, fontsize=8)
    figures.save_figure(figure, path)


def draw_scaling(scaling: Rows, path: Path) -> None:
    """Forwards to 0.9 of the ceiling against components; ResNets of one family."""
    figure, (ax,) = figures.new_figure(columns=1, width=4.5, height=3.6)
    rows = sorted((row for row in scaling if row["network"].startswith("resnet")), key=lambda row: row["p"])
    for method in ("gate gradients", "ridge"):
        style, colour = STYLES[method]
        texts = [row[f"{method}, forwards"] for row in rows]
        values = [float(text.split()[-1]) for text in texts]
        ax.plot([row["p"] for row in rows], values, style, color=colour, label=method)
        for row, text, value in zip(rows, texts, values, strict=True):
            if text[0] in "<>":
                ax.annotate(text.split()[0], (row["p"], value), xytext=(4, 4), textcoords="offset points")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks([row["p"] for row in rows], [f"{row['p']:,}\nc² {row['c^2']:.2f}" for row in rows])
    ax.minorticks_off()
    ax.set_xlabel("components; c²: noise of a probe")
    ax.set_ylabel("forwards to 0.9 of the linear ceiling")
    ax.legend(frameon=False)
    figures.save_figure(figure, path)
