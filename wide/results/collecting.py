"""Making all that is shown of results/: see collect_results.py."""

from collections.abc import Sequence
from pathlib import Path

from wide import UserError
from wide.command_line import Parser, carry_out
from wide.results import baselines, claims_page, headline
from wide.results.keeping import Kept, copy_finished, read, require_small, write_page, write_reports
from wide.results.results_page import page, script
from wide.results.studies import ROOT
from wide.runs.files import replace, writing

START, END = "<!-- made by collect_results.py: start -->", "<!-- made by collect_results.py: end -->"


def main(description: str, argv: Sequence[str] | None = None) -> int:
    """Run the command line of collect_results.py, and return its exit status."""
    parser = Parser(description=description.strip())
    parser.add_argument("--from", dest="outputs", type=Path, metavar="OUTPUTS", help="folder of finished runs to keep")
    return carry_out(parser, argv, lambda arguments: print(collect(arguments.outputs)))


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
        for name, plot, beaten in (
            ("accuracy", headline.WIDTHS, baselines.read(baselines.PATH)),
            ("little_data", headline.IMAGES, {}),
        ):
            replace(root / "docs" / f"{name}.png", lambda file, p=plot, b=beaten: headline.draw(file, p, kept, b))
    require_small(results)
    return f"{copied} runs copied; {len(kept)} runs in {results}"


def texts(root: Path, kept: list[Kept]) -> dict[Path, str]:
    """The texts that follow from results/, by file."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    if not after:
        raise UserError(f"{root / 'README.md'} lacks the lines between which the table of results goes: {START}, {END}")
    table = headline.section(kept, baselines.read(baselines.PATH))
    overview, details = claims_page.pages(kept)
    return {
        root / "results" / "README.md": page(root / "results", kept),
        root / "results" / "studies.sh": script(kept),
        root / "docs" / "claims.md": overview,
        root / "docs" / "claims_in_detail.md": details,
        root / "README.md": f"{before}{START}\n{table}\n{END}{after}",
    }
