"""The versions of what a result depends on."""

import contextlib
import subprocess
from importlib import metadata
from pathlib import Path

from tune_topkd import __version__

_PACKAGES = ("torch", "torchvision", "ray", "optuna", "mlflow", "pandas", "numpy", "scipy", "cmaes")


def versions() -> dict[str, str]:
    """The versions of this package and of those that a result depends on."""
    found = {"tune_topkd": __version__}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def git_commit() -> str | None:
    """The commit of the checkout this program is run from, with a + if files differ from it; none if it is installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "launch.py").exists():  # a repository around the environment is another project's
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()  # noqa: S603

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
