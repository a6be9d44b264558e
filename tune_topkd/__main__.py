"""`python -m tune_topkd`, and the command `tune-topkd` of an installed package."""

import importlib.util
import sys


def main() -> None:
    """Hand the arguments to the command line, if what it needs is installed."""
    if importlib.util.find_spec("typer") is None:
        sys.exit("error: the command line needs more than the losses do: pip install 'tune_topkd[sweep]'")
    from tune_topkd.cli import main as run

    run()


if __name__ == "__main__":
    main()
