"""The table of planted errors in docs/conformance.md.

python -m tests.conformance.table
"""

from pathlib import Path

from tests.conformance.mutations import MUTATIONS

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
_START, _END = "<!-- written by tests/conformance/table.py -->\n", "<!-- end -->\n"


def page() -> str:
    """The page with the table as it should be."""
    before, _, rest = PAGE.read_text().partition(_START)
    _, _, after = rest.partition(_END)
    return before + _START + table() + _END + after


def table() -> str:
    """Planted error, layout and failing check, as Markdown."""
    lines = ["| planted error | processes, layout | what it makes wrong |", "|---|---|---|"]
    for name, mutation in MUTATIONS.items():
        job = mutation.job
        again = f" · recompute {job.recompute}" if job.recompute != "none" else ""
        layout = job.layout.replace("-", " · ") if job.parallel else f"{job.world} · replicas"
        lines.append(f"| {name} | {layout if job.world > 1 else 1}{again} | {mutation.check} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
