"""A plot with two logarithmic axes as SVG text, without a plotting library."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, LEGEND = 860, 420, 70, 50, 230
COLOURS = ("#0b6e99", "#c2410c", "#15803d", "#7e22ce")


def log_plot(lines: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> str:
    """Draw lines; every second one is dashed and has the colour of the one before it.

    Args:
        lines: name -> points; x and y above 0.
        x_label, y_label: what the axes show.

    Raises:
        ValueError: there are no points.
    """
    points = [point for line in lines.values() for point in line]
    if not points:
        raise ValueError("nothing to plot")
    (x_low, x_high), (y_low, y_high) = (
        (math.floor(math.log10(min(values))), math.ceil(math.log10(max(values) * 1.001)))
        for values in zip(*points, strict=True)
    )
    right, top = WIDTH - LEGEND, 20

    def x_at(value: float) -> float:
        return LEFT + (math.log10(value) - x_low) / (x_high - x_low) * (right - LEFT)

    def y_at(value: float) -> float:
        share = (math.log10(value) - y_low) / (y_high - y_low)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - top)

    def text(x: float, y: float, content: str, anchor: str = "middle") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text((LEFT + right) / 2, HEIGHT - 10, x_label),
        text(LEFT, 14, y_label, "start"),
    ]
    grid = '<path d="M{:.1f} {:.1f}L{:.1f} {:.1f}" stroke="#ddd"/>'
    for power in range(x_low, x_high + 1):
        x = x_at(10.0**power)
        parts += [grid.format(x, top, x, HEIGHT - BOTTOM), text(x, HEIGHT - 32, f"{10**power:g}")]
    for power in range(y_low, y_high + 1):
        y = y_at(10.0**power)
        parts += [grid.format(LEFT, y, right, y), text(LEFT - 6, y + 4, f"{10.0**power:g}", "end")]
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number // 2 % len(COLOURS)]
        style = f'stroke="{colour}" stroke-width="2"' + ' stroke-dasharray="5 4"' * (number % 2)
        path = "L".join(f"{x_at(x):.1f} {y_at(y):.1f}" for x, y in line)
        y = top + 18 * (number + 1)
        parts += [
            f'<path d="M{path}" fill="none" {style}/>' if line else "",
            f'<path d="M{right + 14} {y - 4}h26" {style}/>',
            text(right + 46, y, name, "start"),
        ]
    return "\n".join([*parts, "</svg>\n"])
