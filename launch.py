"""The door: hands the arguments to tune_topkd.cli."""

from tune_topkd.cli import main

if __name__ == "__main__":
    main()
