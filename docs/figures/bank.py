"""Draws docs/bank.png, how a step meets the memory bank: `python docs/figures/bank.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

LIVE, STORED, INK, SOFT = "#d95f02", "#7aa6c2", "#222222", "#eef3f7"
COLUMNS, ROWS = 8, 5
CHOSEN = {(1, 3), (4, 1), (6, 4)}  # live tiles, column and row
AGES = {(1, 3): 40, (4, 1): 37, (6, 4): 41}


def box(ax: plt.Axes, x: float, y: float, width: float, height: float, colour: str, edge: str = INK) -> None:
    style = "round,pad=0,rounding_size=0.12"
    ax.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor=edge, lw=1.2)
    )


def arrow(
    ax: plt.Axes, start: tuple[float, float], end: tuple[float, float], colour: str, bend: float = 0.0
) -> None:
    ax.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=14,
            color=colour,
            lw=1.8,
            connectionstyle=f"arc3,rad={bend}",
        )
    )


def tiles(ax: plt.Axes, x: float, y: float, side: float) -> None:
    for column in range(COLUMNS):
        for row in range(ROWS):
            colour = LIVE if (column, row) in CHOSEN else STORED
            corner = (x + column * side, y + row * side)
            ax.add_patch(Rectangle(corner, 0.88 * side, 0.88 * side, facecolor=colour, edgecolor="none"))


def table(ax: plt.Axes, x: float, y: float) -> None:
    """Rows of the bank: feature, codeword, age."""
    heads, widths = ("stored feature z", "codeword", "age"), (2.3, 1.15, 0.75)
    lines = [
        ("stored", "3", "12"),
        ("live", "1", "40"),
        ("stored", "1", "9"),
        ("stored", "3", "31"),
        ("live", "2", "37"),
    ]
    height, left = 0.42, x
    for head, width in zip(heads, widths):
        ax.text(left + width / 2, y + 0.12, head, ha="center", va="bottom", fontsize=9)
        for number, line in enumerate(lines):
            top = y - (number + 1) * height
            colour = "#fbe3cf" if line[0] == "live" else "#dfeaf2"
            ax.add_patch(Rectangle((left, top), width, height, facecolor=colour, edgecolor="white", lw=1.2))
            if head != heads[0]:
                ax.text(
                    left + width / 2,
                    top + height / 2,
                    line[1 if head == "codeword" else 2],
                    ha="center",
                    va="center",
                    fontsize=9,
                )
            else:
                for part in range(8):
                    tone = 0.25 + 0.6 * ((part * 7 + number * 5) % 8) / 8
                    ax.add_patch(
                        Rectangle(
                            (left + 0.12 + part * 0.26, top + 0.09),
                            0.22,
                            height - 0.18,
                            facecolor=str(tone),
                            edgecolor="none",
                        )
                    )
        left += width
    ax.text(
        x + sum(widths) / 2,
        y - 5 * height - 0.28,
        "one row for every tile, n of them",
        ha="center",
        fontsize=9,
        style="italic",
    )


def draw(path: Path) -> None:
    figure, ax = plt.subplots(figsize=(11, 4.9), dpi=150)
    ax.set_xlim(0, 14.6)
    ax.set_ylim(0.2, 6.7)
    ax.axis("off")

    tiles(ax, 0.3, 3.6, 0.46)
    ax.text(2.1, 6.25, "a slide of n tiles", ha="center", fontsize=11, weight="bold")
    ax.text(2.1, 3.2, "m live in this step", ha="center", fontsize=10, color=LIVE)
    ax.text(2.1, 2.83, "the others only in the bank", ha="center", fontsize=10, color="#3f7397")

    box(ax, 5.0, 5.3, 1.9, 0.95, "#fbe3cf", LIVE)
    ax.text(5.95, 5.77, "tile encoder", ha="center", va="center", fontsize=11)
    arrow(ax, (4.1, 5.3), (4.95, 5.7), LIVE)
    ax.text(7.55, 6.05, "f, new", ha="center", fontsize=10, color=LIVE)

    table(ax, 5.0, 4.15)
    arrow(ax, (6.2, 5.25), (6.2, 4.62), LIVE)
    ax.text(6.35, 4.88, "afterwards: write f", fontsize=9, color=LIVE, va="center")

    box(ax, 10.2, 2.05, 4.1, 2.0, SOFT)
    ax.text(12.25, 3.72, "kept for each slide and codeword", ha="center", fontsize=9.5)
    ax.text(12.25, 3.2, r"$S_k$ = sum of its stored rows", ha="center", fontsize=11)
    ax.text(12.25, 2.75, r"$n_k$ = how many they are", ha="center", fontsize=11)
    ax.text(12.25, 2.3, "64-bit integers: exact in any order", ha="center", fontsize=9, style="italic")
    arrow(ax, (9.3, 3.1), (10.1, 3.1), "#3f7397")
    ax.text(9.7, 3.3, "move\nlive\nrows", ha="center", fontsize=8.5, color="#3f7397", va="bottom")

    box(ax, 8.4, 5.0, 5.9, 1.5, "#ffffff")
    ax.text(11.35, 6.15, "residual sums of ALL n tiles", ha="center", fontsize=11, weight="bold")
    ax.text(
        11.35,
        5.5,
        r"$V_k \;=\; S_k \,-\, \sum z_{old} \,+\, \sum f_{new} \,-\, n'_k\, c_k$",
        ha="center",
        fontsize=14,
    )
    arrow(ax, (6.95, 5.77), (8.3, 5.77), LIVE)
    arrow(ax, (12.25, 4.1), (12.25, 4.95), "#3f7397")
    ax.text(12.4, 4.5, "one read of K rows", fontsize=9, color="#3f7397", va="center")

    ax.text(
        7.3,
        0.95,
        "Cost of a step: the m live tiles and K codewords, for a slide of a thousand tiles or a hundred thousand.",
        ha="center",
        fontsize=10.5,
    )
    ax.text(
        7.3,
        0.45,
        "The gradient goes back along the orange path alone; stored rows are constants.",
        ha="center",
        fontsize=10.5,
        color=LIVE,
    )
    figure.savefig(path, bbox_inches="tight", pad_inches=0.08)
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).parents[1] / "bank.png")
