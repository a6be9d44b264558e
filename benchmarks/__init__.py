"""What proves the speed: ratios, each with its baseline in the same process, turn by turn. `make bench` runs them.

Every benchmark is a module with `run(quick) -> list[Ratio]`; `python -m benchmarks --help` says how to run some of them.
"""
