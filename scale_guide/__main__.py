"""`python -m scale_guide COMMAND ...` and the console script `scale-guide`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from scale_guide.bad_steps import BadNumbersError
from scale_guide.checkpoint import SaveError
from scale_guide.commands import UserError
from scale_guide.lookup import closest

COMMANDS = {
    "train": "train the target of a recipe (under `accelerate launch`, or as a single process)",
    "layers": "list the layers of both networks, their shapes, and the pairs; --measure: the rows each pair needs",
    "plan": "say what the guidance of a recipe costs on N processes, without allocating weights",
    "evaluate": "score the target of a finished or running run",
    "report": "compare runs and seeds: tables, pictures, and one page to send to a colleague",
    "similarity": "compare the layers of two networks, or of a run's target and guide: a map of CKA, and dimensions",
    "consistency": "compare the mistakes of networks: error consistency, intervals and bounds",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, or 2 after an error of the user's."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print("usage: scale-guide COMMAND ...\n\n" + "\n".join(f"  {n:11} {text}" for n, text in COMMANDS.items()))
        print("\n`scale-guide COMMAND --help` lists a command's options.")
        return 0
    try:
        if given[0] not in COMMANDS:
            raise UserError(
                f"command {given[0]!r} is not known{closest(given[0], COMMANDS)}. Known: {', '.join(COMMANDS)}."
            )
        command = importlib.import_module(f"{__package__}.commands.{given[0]}")
        return int(command.main(given[1:]))
    except (UserError, SaveError, BadNumbersError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"scale-guide: error: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UserError) else 1


if __name__ == "__main__":
    sys.exit(main())
