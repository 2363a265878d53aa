"""Lines over an axis, as SVG, for the pages of docs/."""

from collections.abc import Mapping, Sequence

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
WIDTH, HEIGHT, LEFT, BOTTOM, NAMES = 640, 320, 44, 36, 150


def lines(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    span: tuple[float, float],
    low: float,
    ends: tuple[str, str],
    ticks: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 1.0),
) -> str:
    """Points (x, y) by name, y from `low` to 1.

    Args:
        span: least and greatest x; `ends` is what stands there.
    """
    right = WIDTH - NAMES

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - span[0]) / (span[1] - span[0])
        return LEFT + (right - LEFT) * across, HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 12) * (y - low) / (1 - low)

    shape = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {shape}>']
    parts.append(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>')
    for tick in ticks:
        _, y = place(span[0], tick)
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ccc"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{tick:g}</text>')
    for i, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in curve)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts.append(f'<text x="{right + 10}" y="{24 + 18 * i}" fill="{colour}">{name}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 10}" fill="#555">{ends[0]}</text>')
    parts.append(f'<text x="{right}" y="{HEIGHT - 10}" text-anchor="end" fill="#555">{ends[1]}</text>')
    return "\n".join([*parts, "</svg>\n"])
