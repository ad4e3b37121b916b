"""The chart of a run, as SVG: processor time of a request by case, and memory. Ours are the dark bars."""
from __future__ import annotations

from html import escape
from typing import Any

SHOWN = ("new-16", "kept-16")  # and memory, of the first
WIDTH, ROW, LABEL, BAR = 760, 18, 190, 480


def chart(data: dict[str, Any], titles: dict[str, str]) -> str:
    parts, y = [], 8
    results = data["results"]
    panels = [(f"{titles[o]}: µs of processor time a request", results[o], "cpu_us") for o in SHOWN if o in results]
    if first := next((o for o in SHOWN if o in results), None):
        panels.append((f"{titles[first]}: MB of memory, all processes", results[first], "memory_mb"))
    for title, rows, key in panels:
        shown = sorted(((o[key], name) for name, o in rows.items() if o[key] and not o["errors"]))
        if not shown: continue
        top = shown[-1][0]
        parts.append(f'<text x="8" y="{y + 14}" class="t">{escape(title)}</text>')
        y += 24
        for value, name in shown:
            kind = "o" if name.startswith("ours") else "f" if name == "floor" else "p"
            wide = max(value / top * BAR, 1)
            at = y + 12
            parts.append(f'<text x="{LABEL}" y="{at}" text-anchor="end">{escape(name)}</text>'
                         f'<rect x="{LABEL + 8}" y="{y + 2}" width="{wide:.1f}" height="{ROW - 5}" class="{kind}"/>'
                         f'<text x="{LABEL + 14 + wide:.1f}" y="{at}">{value:,.{0 if value >= 100 else 1}f}</text>')
            y += ROW
        y += 14
    style = ("text{font:12px system-ui,sans-serif;fill:#57606a}.t{font-weight:600;font-size:13px}"
             ".o{fill:#0b6e99}.p{fill:#b9c4cd}.f{fill:#dde3e8}")
    size = f'width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}"'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
            f"<title>Cost of a FastCGI request</title><style>{style}</style>{''.join(parts)}</svg>\n")
