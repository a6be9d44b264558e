"""What several test modules need."""

import pytest


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path_factory):
    """No test writes to the user's runs or MLflow, or depends on where it is run."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "TUNE_TOPKD_RUNS_DIR", "TUNE_TOPKD_SWEEP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TUNE_TOPKD_RUNS_DIR", str(tmp_path_factory.mktemp("runs")))
