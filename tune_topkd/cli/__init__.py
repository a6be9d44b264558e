"""The command line: it parses, draws and prints; what it does is in `tune_topkd.sweep`."""

import sys

from tune_topkd.interruption import listening

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with its code. A signal ends it cleanly, also while it is still being imported."""
    with listening() as interruption:
        try:
            from tune_topkd.cli.app import main as run

            interruption.check()
            run()
        except KeyboardInterrupt:
            sys.exit(interruption.exit_code)
        except SystemExit as ended:
            if interruption.is_asked and ended.code == 130:  # typer's, for whichever signal it was
                sys.exit(interruption.exit_code)
            raise
