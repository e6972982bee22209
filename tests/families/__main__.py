"""Check every family, or those that are named, and write docs/models.md: `python -m tests.families`."""

from __future__ import annotations

import sys

from tests.families.checks import check_family, quiet
from tests.families.page import PAGE, position_row, render, table_row
from tests.families.positions import KINDS, check_positions
from tests.families.tiny_configs import families


def main() -> None:
    """Check the families named on the command line and print their rows; without names check all and write the page."""
    named = sys.argv[1:]
    rows = []
    for family in named or families():
        with quiet():
            rows.append(check_family(family))
        print(rows[-1].verdict, table_row(rows[-1]), flush=True)
    if not named:
        with quiet():
            positions = [check_positions(kind) for kind in KINDS]
        print(*map(position_row, positions), sep="\n")
        PAGE.write_text(render(rows, positions), encoding="utf-8")


main()
