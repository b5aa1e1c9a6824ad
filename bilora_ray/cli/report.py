"""`bilora-ray report`: a page of what a study found."""

from __future__ import annotations

from pathlib import Path

import click

from bilora_ray.cli.options import absolute, complete_study, storage_option, study_argument, study_database_option
from bilora_ray.errors import MachineError, UserError, first_line

EPILOG = """\b
Examples:
  bilora-ray report quickstart
  bilora-ray report quickstart --output quickstart.html
  bilora-ray report quickstart --compare wider --output both.html
"""


@click.command(epilog=EPILOG)
@study_argument
@click.option("--compare", metavar="STUDY2", shell_complete=complete_study, help="Put another study beside it.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The page.  [default: report.html in the study's folder; of two studies STUDY-STUDY2.html here]",
)
@storage_option
@study_database_option
def command(
    study: str, compare: str | None, output: Path | None, storage_path: Path, study_database: str | None
) -> None:
    """Write a page of what STUDY found: one HTML file, to open from disk or to send.

    A search writes it at its end. Of one that runs it shows what there is.
    """
    from bilora_ray.search.study.layout import Layout
    from bilora_ray.search.study.storage import naming_the_database
    from bilora_ray.search.study.studies import load_study

    layout = Layout(absolute(storage_path), study_database)
    if compare == study:
        raise UserError(f"--compare {compare}: is the study itself; name another one")
    names = [study] if compare is None else [study, compare]
    own = layout.report(study) if compare is None else Path(f"{study}-{compare}.html")
    file = output or own
    with naming_the_database(layout, then=""):
        found = [load_study(layout, name) for name in names]
        from bilora_ray.report.page import is_page, write_report

        try:
            if file.exists() and not is_page(file):
                raise UserError(f"{file}: exists, and is no page of a study; name another file with --output")
            write_report(found, absolute(file))
        except OSError as error:
            how = "" if output is not None else "; name another file with --output"
            raise MachineError(f"{file}: cannot be written ({error.strerror or first_line(error)}){how}") from None
    click.echo(f"Report   {file}")
