"""Bars of what was measured."""

import pathlib

import numpy as np

from benchmarks.decode import peers


def title(work: dict) -> str:
    """What was timed, in words."""
    if work["work"] == "prefill":
        return f"prefill of {work['length']}"
    return f"{work['streams']} stream{'s' * (work['streams'] > 1)}"


def plot(results: list[dict], path: pathlib.Path) -> None:
    """Bars of tokens per second, one panel a work of each result."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [(result, work) for result in results for work in result["works"]]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.5 * len(panels), 3.4), layout="constrained"
    )
    families = list(peers.PACKAGES)
    for axis, (result, work) in zip(np.atleast_1d(axes), panels, strict=True):
        rates = work["tokens_per_second"]
        names = [name for name in peers.NAMES if name in rates]
        low, middle, high = zip(*(rates[name] for name in names), strict=True)
        middle = np.array(middle)
        colours = [f"C{families.index(peers.family(name))}" for name in names]
        axis.barh(names, middle, color=colours, xerr=[middle - low, high - middle])
        axis.invert_yaxis()
        axis.set_xlabel("tokens per second")
        axis.set_title(f"{result['size']}, {title(work)}", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
