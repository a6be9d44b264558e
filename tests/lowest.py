"""Prints constraints: of each requirement of pyproject.toml the oldest version that it allows."""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path


def lowest(requirements: list[str]) -> Iterator[str]:
    for requirement in requirements:
        found = re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\d.]+)", requirement)
        if found:
            name, version = found.groups()
            yield f"{name}=={version}" + (".*" if version.count(".") < 2 else "")


def main() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    sys.stdout.writelines(f"{line}\n" for line in lowest(project["dependencies"] + extras["sweep"] + extras["dev"]))


if __name__ == "__main__":
    main()
