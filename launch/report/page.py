"""One self-contained HTML page: style, script and data inside, nothing fetched."""

import html
import json
from pathlib import Path
from typing import Any

from coterie.core.errors import UserError
from coterie.launch.config import RunConfig
from coterie.launch.report.curves import charts
from coterie.launch.report.facts import head
from coterie.launch.report.loads import heat_maps
from coterie.launch.report.records import read_records

_HERE = Path(__file__).parent
_LARGEST = 2_800_000  # bytes of a page
_COLUMNS = 160  # of a heat map, at most


def write_report(run_dir: Path, config: RunConfig, out: Path) -> Path:
    """The page on the run in ``run_dir``, written to ``out``.

    Raises:
        UserError: nothing was recorded yet, a record is damaged, or ``out`` cannot be written.
    """
    text = page(run_dir, config)
    if out.is_dir():
        raise UserError(f"--out {out}: is a directory; give the name of an HTML file")
    if out.parent.exists() and not out.parent.is_dir():
        raise UserError(f"--out {out}: {out.parent} is a file; give a name in a directory")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = out.with_name(f"{out.name}.new")
        fresh.write_text(text)
        fresh.replace(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    return out


def page(run_dir: Path, config: RunConfig) -> str:
    """The page's text; heat maps have fewer columns where it would become too large."""
    records = read_records(run_dir)
    tree: dict[str, Any] = {**head(run_dir, config, records), "charts": charts(records)}
    columns = _COLUMNS
    while True:
        text = _filled({**tree, "load": heat_maps(records.loads, columns)}, config.name)
        if len(text) <= _LARGEST or columns == 1:
            return text
        columns = max(1, min(columns // 2, columns * _LARGEST // len(text)))


def _filled(tree: dict[str, Any], name: str) -> str:
    data = json.dumps(tree, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    parts = {
        "title": html.escape(name),
        "style": (_HERE / "page.css").read_text(),
        "script": "\n".join(
            (_HERE / f"{part}.js").read_text() for part in ("draw", "curves", "heat", "page")
        ),
        "data": data.replace("<", "\\u003c"),
    }
    text = (_HERE / "page.html").read_text()
    for part, value in parts.items():
        text = text.replace(f"{{{{{part}}}}}", value)
    return text
