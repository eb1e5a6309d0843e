"""Draw docs/images/concept_light.png and concept_dark.png: python docs/concept.py.

One memory layer in five columns: an input x, its chunks, the signs of each chunk as an address,
the row that each address picks from its table, and their weighted sum.
"""

import pathlib

import matplotlib
import numpy as np
from matplotlib import patches, pyplot

IMAGES = pathlib.Path(__file__).parent / "images"
INK = {"light": ("#1f2328", "#59636e"), "dark": ("#f0f6fc", "#9198a1")}
CHUNK_COLOURS = ("#2f81f7", "#e3742f", "#2da44e")
# Three chunks of three values: K = 3, tau = 3. The first sign is the high bit.
X = np.array([[0.8, -0.3, 0.5], [-0.6, 0.9, 0.2], [-0.4, -0.7, -1.1]])
CELL, NUM_BUCKETS, FEATURES = 0.36, 8, 5
MIDDLES = (5.6, 3.2, 0.8)  # of the three chunks


def draw(theme: str) -> None:
    """Draw the figure for a light or a dark page; its background is transparent."""
    ink, faint = INK[theme]
    figure = pyplot.figure(figsize=(11, 5.5))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 17), ylim=(-1.1, 7.4), aspect="equal")
    axes.axis("off")
    codes = [int("".join("1" if v >= 0 else "0" for v in z), 2) for z in X]

    def text(x, y, words, size=11, colour=ink, **options):
        options = {"ha": "center", "va": "center"} | options
        axes.text(x, y, words, fontsize=size, color=colour, **options)

    def arrow(start, end, colour=faint):
        style = {"arrowstyle": "-|>", "color": colour, "lw": 1.3, "mutation_scale": 11}
        axes.annotate("", end, start, arrowprops=style)

    def cell(x, y, colour, width=CELL, alpha=0.25):
        box = patches.Rectangle((x, y), width, CELL, fc=(*colour, alpha), ec=colour)
        axes.add_patch(box)

    for x, words in (
        (0.95, "input x"),
        (3.25, "chunks $z_k$"),
        (5.9, "signs: address $h(z_k)$"),
        (9.65, "one row of each table $T_k$"),
        (12.75, "score $s(z_k)$"),
        (15.65, "output y"),
    ):
        text(x, 7.05, words, 12, fontweight="bold")
    centre = MIDDLES[1]
    for k, (z, code, middle) in enumerate(zip(X, codes, MIDDLES, strict=True)):
        colour = matplotlib.colors.to_rgb(CHUNK_COLOURS[k])
        for i, value in enumerate(z):  # of x, one under the other
            y = middle + (1 - i) * 0.55
            cell(0.5, y - 0.18, colour, 0.9)
            text(0.95, y, f"{value:+.1f}", 9)
        arrow((1.5, middle), (2.45, middle))
        for i, value in enumerate(z):
            cell(2.55 + i * 0.5, middle - 0.18, colour, 0.5)
            text(2.8 + i * 0.5, middle, f"{value:+.1f}", 8)
        arrow((4.15, middle), (5.0, middle))
        bits = "".join("1" if v >= 0 else "0" for v in z)
        signs = "  ".join("+" if v >= 0 else "\N{MINUS SIGN}" for v in z)
        text(5.85, middle + 0.22, signs, 12)
        text(5.85, middle - 0.24, f"{bits} = {code}", 10, colour)
        height = 0.25
        bottom = middle - NUM_BUCKETS * height / 2
        for row in range(NUM_BUCKETS):
            y = bottom + (NUM_BUCKETS - 1 - row) * height
            chosen = row == code
            for column in range(FEATURES):
                box = patches.Rectangle(
                    (8.6 + column * 0.42, y),
                    0.42,
                    height,
                    fc=(*colour, 0.85 if chosen else 0.08),
                    ec=(*colour, 0.6),
                    lw=0.6,
                )
                axes.add_patch(box)
            text(8.42, y + height / 2, str(row), 6.5, ink if chosen else faint)
        y = bottom + (NUM_BUCKETS - 1 - code + 0.5) * height
        arrow((6.75, middle - 0.1), (8.28, y), colour)
        arrow((10.8, y), (12.0, middle), colour)
        p = np.prod(1 / (1 + np.exp(-2 * np.abs(z))))
        text(12.75, middle, f"$\\times$ {p:.2f}", 12, colour)
        arrow((13.45, middle), (14.5, centre + (1 - k) * 0.12), colour)
    for column in range(FEATURES):
        cell(14.6 + column * 0.42, centre - 0.18, (0.5, 0.5, 0.5), 0.42, 0.35)
    formula = r"$y=\sum_k\ s(z_k)\ T_k[\,h(z_k)\,]$"
    text(8.5, -0.75, formula, 15)
    path = IMAGES / f"concept_{theme}.png"
    figure.savefig(path, transparent=True, dpi=180, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    matplotlib.use("agg")
    for name in INK:
        draw(name)
