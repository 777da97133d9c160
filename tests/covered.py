"""Prints how much of the package the tests ran, and fails where that is too little.

python -m tests.covered build/merged.json 90
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def covered(summary: dict[str, int], what: str) -> float:
    """Percentage of the lines or branches that were run."""
    ran = summary[f"covered_{what}"]
    return 100 * ran / (ran + summary[f"missing_{what}"])


if __name__ == "__main__":
    file, least = sys.argv[1:]
    summary = json.loads(Path(file).read_text())["summary"]
    lines, branches = covered(summary, "lines"), covered(summary, "branches")
    print(f"{lines:.2f} % of lines and {branches:.2f} % of branches, of which {least} % are wanted")
    sys.exit(branches < float(least))
