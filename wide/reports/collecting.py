"""Making all that is shown of results/: see collect_results.py."""

from pathlib import Path

from wide import UserError
from wide.reports import claims
from wide.reports.results import (
    ROOT,
    Kept,
    commands,
    copy_finished,
    page,
    read,
    require_small,
    write_page,
    write_reports,
)
from wide.runs.files import replace, writing

START, END = "<!-- made by collect_results.py: start -->", "<!-- made by collect_results.py: end -->"


def collect(outputs: Path | None, root: Path = ROOT) -> str:
    """Copy finished runs from `outputs` into root/results, and make what is made of them.

    Returns:
        What was done, in a line.

    Raises:
        UserError: a file is damaged or cannot be written, runs cannot be compared, or they are too large.
    """
    results = root / "results"
    copied = copy_finished(outputs, results) if outputs else 0
    kept = read(results)
    if not kept:
        raise UserError(f"{results} has no runs; name the folder of finished ones with --from")
    write_reports(results, kept)
    for path, text in texts(root, kept).items():
        write_page(path, text)
    with writing(root / "docs"):
        replace(root / "docs" / "accuracy.png", lambda file: claims.draw_headline(file, kept))
    require_small(results)
    return f"{copied} runs copied; {len(kept)} runs in {results}"


def texts(root: Path, kept: list[Kept]) -> dict[Path, str]:
    """The texts that follow from results/, by file."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    if not after:
        raise UserError(f"{root / 'README.md'} lacks the lines between which the table of results goes: {START}, {END}")
    table = claims.headline_table(kept)
    return {
        root / "results" / "README.md": page(root / "results", kept),
        root / "results" / "studies.sh": commands(),
        root / "docs" / "claims.md": claims.page(kept),
        root / "README.md": f"{before}{START}\n{table}\n{END}{after}",
    }
