"""Takes the screenshots of the README of a finished sweep, in Chromium: the terminal while it ran, its report, MLflow.

python docs/building/screens.py RUNS_FOLDER SWEEP [FOLDER]

The terminal is a frame of the live display, drawn from the ledger as it was when half of the search's trials were over.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import Browser
from playwright.sync_api import Page
from playwright.sync_api import sync_playwright
from rich.console import Console

from tune_topkd.cli.picture import Picture
from tune_topkd.ledger import LEDGER_FILE
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import End
from tune_topkd.ledger import read_events
from tune_topkd.sweep import Sweep
from tune_topkd.sweep.page import page_of
from tune_topkd.tracking import catch_up
from tune_topkd.tracking import sqlite_uri

FOLDER = Path(__file__).parents[1]
WIDTH, HEIGHT = 110, 24
"""Of the terminal, in characters."""


def terminal(sweep: Sweep) -> str:
    """The live display in the middle of the search, as SVG."""
    picture = Picture(sweep.config)
    ended, now = 0, 0.0
    for event in read_events(sweep.folder / LEDGER_FILE)[0]:
        picture.take(event)
        now = event.time
        ended += isinstance(event.content, End) and event.content.key.arm == SEARCH
        if ended >= sweep.config.sweep.trials / 2 and len(picture.state.running()) > 1:
            break
    console = Console(width=WIDTH, height=HEIGHT, record=True, file=open(os.devnull, "w"), force_terminal=True)
    console.print(f"$ python launch.py run {sweep.config.data.name}", highlight=False)
    console.print(picture.frame(HEIGHT, now))
    return console.export_svg(title=f"sweep {sweep.name}")


def shoot(browser: Browser, address: str, path: Path, size: tuple[int, int], seconds: float) -> Page:
    """A picture of what a page shows at first, after so many seconds."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, device_scale_factor=1.5)
    page.goto(address)
    page.wait_for_timeout(1000 * seconds)
    page.screenshot(path=path)
    return page


def mlflow(browser: Browser, sweep: Sweep, scratch: Path, path: Path) -> None:
    """MLflow's own page of the sweep's run."""
    uri = sqlite_uri(scratch / "mlflow.db")
    catch_up(sweep.folder / LEDGER_FILE, uri)
    port = 8975
    command = [str(Path(sys.executable).parent / "mlflow"), "ui", "--backend-store-uri", uri, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=scratch) as process:
        try:
            until = time.monotonic() + 90
            while time.monotonic() < until:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                    break
                except OSError:
                    time.sleep(1)
            from mlflow import MlflowClient

            client = MlflowClient(tracking_uri=uri)
            experiment = client.get_experiment_by_name("tune_topkd")
            (run,) = client.search_runs([experiment.experiment_id], "tags.kind = 'sweep'")
            place = f"#/experiments/{experiment.experiment_id}/runs/{run.info.run_id}?workflowType=machine_learning"
            page = shoot(browser, f"http://127.0.0.1:{port}/{place}", path, (1400, 800), 12)
            for button in page.get_by_label("Close").all():  # its assistant
                button.click(timeout=2000)
            page.wait_for_timeout(2000)
            page.screenshot(path=path)
        finally:
            subprocess.run(["pkill", "-TERM", "-P", str(process.pid)], check=False)
            process.terminate()


def main() -> None:
    """Take all three."""
    runs, name = Path(sys.argv[1]).absolute(), sys.argv[2]
    folder = (Path(sys.argv[3]) if len(sys.argv) > 3 else FOLDER).absolute()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        scratch = Path(place)
        shutil.copytree(runs / name, scratch / "runs" / name, ignore=shutil.ignore_patterns("trials"))
        os.chdir(scratch)  # so that commands are told as they would be typed beside `runs`
        sweep = Sweep.open(name)
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        (scratch / "terminal.html").write_text(f"<div style='width: 1100px'>{terminal(sweep)}</div>")
        page = shoot(browser, f"file://{scratch / 'terminal.html'}", folder / "terminal.png", (1200, 700), 1)
        page.locator("svg").first.screenshot(path=folder / "terminal.png")
        (scratch / "report.html").write_text(page_of([sweep.findings()]))
        shoot(browser, f"file://{scratch / 'report.html'}", folder / "report.png", (1200, 900), 4)
        mlflow(browser, sweep, scratch, folder / "mlflow.png")
        browser.close()


if __name__ == "__main__":
    main()
