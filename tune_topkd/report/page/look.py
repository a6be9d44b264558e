"""The look of a page's figures, light and dark: colours by name, and Vega's settings made of them."""

from collections.abc import Mapping
from typing import Any

from tune_topkd.ledger import TrialStatus
from tune_topkd.report import style
from tune_topkd.report.importance import BAR_COLOURS

VALUES = tuple(f"@value{place}" for place in range(5))
"""The ramp of top-1, from poor to good. A colour that begins with `@` is one of `PALETTES`, put in by the page."""
BARS = tuple(f"@bar{place}" for place in range(3))

PALETTES: Mapping[str, Mapping[str, str]] = {
    "light": {
        "ink": style.INK,
        "faint": style.FAINT_INK,
        "grid": style.GRID_COLOUR,
        "paper": "#FFFFFF",
        "completed": style.COMPLETED_COLOUR,
        "best": style.BEST_COLOUR,
        "failed": "#B8558F",
        "pruned": style.PRUNED_COLOUR,
        "running": style.RUNNING_COLOUR,
        **dict(zip((v[1:] for v in VALUES), ("#D7E3C8", "#7FC0A5", "#2F8FA3", "#26528C", "#1B1150"), strict=True)),
        **dict(zip((b[1:] for b in BARS), (BAR_COLOURS[0], BAR_COLOURS[1], BAR_COLOURS[2]), strict=True)),
    },
    "dark": {
        "ink": "#E6E8EB",
        "faint": "#A4AAB3",
        "grid": "#2C323A",
        "paper": "#171A1F",
        "completed": "#4BA3DC",
        "best": "#FF8A3C",
        "failed": "#E28FC0",
        "pruned": "#7E868F",
        "running": "#9AD7F7",
        **dict(zip((v[1:] for v in VALUES), ("#2E3A55", "#2C6690", "#2F9AA3", "#86CBA6", "#EEF5C9"), strict=True)),
        **dict(zip((b[1:] for b in BARS), ("#4BA3DC", "#E6AE3F", "#2FB890"), strict=True)),
    },
}
"""Each scheme's colours by name; those of the light one are the ones of the other figures."""

STATUS_COLOURS = {
    TrialStatus.COMPLETED.value: "@completed",
    TrialStatus.PRUNED.value: "@pruned",
    TrialStatus.FAILED.value: "@failed",
    TrialStatus.RUNNING.value: "@running",
}

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def settings() -> dict[str, Any]:
    """Vega-Lite's settings, with the names of colours."""
    return {
        "font": FONT,
        "background": None,
        "mark": {"aria": False},  # the figure says in words what it shows; nobody would listen to marks by the hundred
        "view": {"stroke": None},
        "axis": {
            "labelColor": "@ink",
            "titleColor": "@ink",
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "titlePadding": 8,
            "gridColor": "@grid",
            "domainColor": "@faint",
            "tickColor": "@faint",
            "tickSize": 4,
            "labelPadding": 4,
            "labelFlush": False,
        },
        "axisX": {"grid": False},
        "axisY": {"domain": False, "ticks": False},
        "legend": {
            "labelColor": "@ink",
            "titleColor": "@ink",
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "orient": "bottom",
            "symbolSize": 70,
            "columnPadding": 14,
            "labelLimit": 260,
        },
        "title": {"color": "@ink", "fontSize": 12, "fontWeight": "normal", "anchor": "start"},
        "text": {"color": "@ink", "font": FONT},
        "point": {"filled": True, "opacity": 1},
        "bar": {"color": "@completed"},
        "rule": {"color": "@faint"},
        "line": {"color": "@completed"},
    }
