"""The latency plot of benchmarks/plots.py, from the newest results, with letters that can be read on a phone."""

import io
import re
from xml.sax.saxutils import escape

import facts
import matplotlib
import matplotlib.pyplot as plt
from svg import SIZE

from benchmarks import plots

WIDTH, HEIGHT = 640, 530
LETTERS = dict.fromkeys(("font.size", "axes.titlesize"), SIZE)
PAGE = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")


def draw(theme: str) -> str:
    plt.switch_backend("Agg")
    environment, rows = facts.latency_run()
    out = io.StringIO()
    with plots._style(theme) as colours, matplotlib.rc_context(LETTERS | dict.fromkeys(PAGE, "none")):
        figure = plots.latency(rows, colours)
        figure.set_size_inches(WIDTH / 72, HEIGHT / 72)  # a point of matplotlib's SVG becomes a pixel
        title = figure.get_suptitle().replace(": ", ",\n")
        figure.suptitle(f"{title}\n", x=0.012, ha="left", fontsize=21, weight="bold")
        caption = f"{environment['gpu']}, torch {environment['torch'].split('+')[0]}, {environment['date']}"
        figure.text(0.012, 1 - 62 / HEIGHT, caption, va="top", alpha=0.75)
        for axis in figure.axes:
            axis.set_xlabel(axis.get_xlabel().partition(" (")[0])
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legends[0].remove()
        figure.legend(handles, labels, loc="outside lower left", ncols=2)
        figure.savefig(out, format="svg", metadata={"Date": None, "Title": "One decode step"})
    plt.close(figure)
    return _described(out.getvalue(), _description(environment, rows))


def _description(environment: dict, rows: list[dict]) -> str:
    """Every number in the plot."""
    points = [row for row in rows if row["model"] == facts.MODEL and row["impl"] in plots.LINES]
    times = (f"{plots.LINES[row['impl']]}, {row['shape']}: {row['us'] / 1e3:.3g} ms" for row in points)
    return f"A decode step of {facts.MODEL} on {environment['gpu']}, {environment['date']}. {'; '.join(times)}."


def _described(svg: str, description: str) -> str:
    svg = re.sub(r'(width|height)="([0-9.]+)pt"', r'\1="\2"', svg, count=2)
    return svg.replace("</title>", f"</title>\n <desc>{escape(description)}</desc>", 1)
