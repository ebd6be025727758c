"""Draws the figures of the documentation: python docs/figures/draw.py [DIRECTORY]

Writes <name>-light.svg and <name>-dark.svg of each figure, by default beside this file. What a figure states comes from
the code and from benchmarks/results and tests/fixtures (facts.py): draw again when those change.
"""

import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(HERE), str(HERE.parents[1])) if path not in sys.path]

import fig_attention  # noqa: E402
import fig_benchmark  # noqa: E402
import fig_bottleneck  # noqa: E402
import fig_ffn  # noqa: E402
import fig_hero  # noqa: E402
import fig_int4_layout  # noqa: E402
import fig_registration  # noqa: E402
import fig_splits  # noqa: E402
import fig_tiling  # noqa: E402

THEMES = ("light", "dark")
FIGURES: dict[str, Callable[[str], str]] = {  # name: theme -> SVG
    "hero": fig_hero.draw,
    "bottleneck": fig_bottleneck.draw,
    "attention": fig_attention.draw,
    "tiling": fig_tiling.draw,
    "ffn": fig_ffn.draw,
    "int4-layout": fig_int4_layout.draw,
    "splits": fig_splits.draw,
    "benchmark": fig_benchmark.draw,
    "registration": fig_registration.draw,
}


def draw_all(directory: Path) -> list[Path]:
    """The files that were written."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in FIGURES.items():
        for theme in THEMES:
            path = directory / f"{name}-{theme}.svg"
            path.write_text(draw(theme), encoding="utf-8", newline="\n")
            written.append(path)
    return written


if __name__ == "__main__":
    for path in draw_all(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE):
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")
