"""An MLflow in memory, as strict as the strictest of its stores: for tests that ask it thousands of times."""

import itertools
from types import SimpleNamespace

from mlflow.entities import Metric
from mlflow.entities import Param
from mlflow.entities import Run
from mlflow.entities import RunData
from mlflow.entities import RunInfo
from mlflow.entities import RunInputs
from mlflow.entities import RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH
from mlflow.utils.validation import MAX_TAG_VAL_LENGTH
from mlflow.utils.validation import _validate_metric
from mlflow.utils.validation import _validate_param_name
from mlflow.utils.validation import _validate_tag_name


class MemoryMlflow:
    """The part of `mlflow.MlflowClient` that is used, over dictionaries. It refuses what PostgreSQL or a server would.

    `calls` names the requests; `fail` is called with the number of each, before it is done and after, and may raise.
    """

    def __init__(self):
        self.experiment = None
        self.runs = {}
        self.calls = []
        self.refused = set()
        """(metrics, params or tags; name) of what it does not take, for reasons of its own."""
        self.fail = lambda number, when: None
        self._ids = itertools.count()

    def __getattribute__(self, name):
        found = object.__getattribute__(self, name)
        if name.startswith("_") or not callable(found) or name == "fail":
            return found

        def call(*arguments, **named):
            self.calls.append(name)
            number = len(self.calls) - 1
            self.fail(number, "before")
            answer = found(*arguments, **named)
            self.fail(number, "after")
            return answer

        return call

    def get_experiment_by_name(self, name):
        return self.experiment

    def create_experiment(self, name, artifact_location=None, tags=None):
        self.experiment = SimpleNamespace(experiment_id="1", name=name, lifecycle_stage="active", tags=tags)
        return "1"

    def create_run(self, experiment_id, start_time, tags, run_name):
        _check_texts(run_name, *tags, *tags.values())
        self._check_refused("tags", tags)
        run_id = f"run{next(self._ids)}"
        self.runs[run_id] = {
            "name": run_name, "start": start_time, "end": None, "status": "RUNNING", "stage": "active",
            "tags": dict(tags), "params": {}, "rows": set(), "datasets": {}, "files": {},
        }  # fmt: skip
        return self._run(run_id)

    def get_run(self, run_id):
        return self._run(run_id)

    def delete_run(self, run_id):
        self.runs[run_id]["stage"] = "deleted"

    def search_runs(self, experiment_ids, filter_string, *, max_results, page_token):
        class Page(list):
            token = None

        return Page(self._run(run_id) for run_id, run in self.runs.items() if run["stage"] == "active")

    def log_batch(self, run_id, metrics=(), params=(), tags=()):
        run = self._active(run_id)
        for kind, sent in (("metrics", metrics), ("params", params), ("tags", tags)):
            self._check_refused(kind, [entity.key for entity in sent])
        for m in metrics:
            _validate_metric(m.key, m.value, m.timestamp, m.step)
            _refuse(not abs(m.step) < 2**63, "step")
        for p in params:
            _validate_param_name(p.key)
            _refuse(len(p.value) > MAX_PARAM_VAL_LENGTH or len(p.key) > 250, "too long")
            _refuse(run["params"].get(p.key, p.value) != p.value, "no change of a parameter")
        for t in tags:
            _validate_tag_name(t.key)
            _refuse(len(t.value) > MAX_TAG_VAL_LENGTH, "too long")
        _check_texts(*(text for e in (*params, *tags) for text in (e.key, e.value)), *(m.key for m in metrics))
        run["rows"] |= {(m.key, m.step, m.value, m.timestamp) for m in metrics}
        run["params"] |= {p.key: p.value for p in params}
        run["tags"] |= {t.key: t.value for t in tags}

    def update_run(self, run_id, status):
        self._active(run_id)["status"] = status

    def set_terminated(self, run_id, status, end_time=None):
        self._active(run_id).update(status=status, end=end_time)

    def get_metric_history(self, run_id, key):
        rows = sorted(row for row in self.runs[run_id]["rows"] if row[0] == key)
        return [Metric(name, value, at, step) for name, step, value, at in rows]

    def log_inputs(self, run_id, datasets=None):
        run = self._active(run_id)
        for each in datasets:
            _refuse(len(each.dataset.digest) > 36, "too long")
            run["datasets"][each.dataset.name, each.dataset.digest] = each

    def log_text(self, run_id, text, artifact_file):
        self._active(run_id)["files"][artifact_file] = text

    def list_artifacts(self, run_id):
        return [SimpleNamespace(path=name) for name in self.runs[run_id]["files"]]

    def _check_refused(self, kind, names):
        _refuse(any((kind, name) in self.refused for name in names), "not here")

    def _active(self, run_id):
        _refuse(self.runs[run_id]["stage"] != "active", "must be in the 'active' state")
        return self.runs[run_id]

    def _run(self, run_id):
        run = self.runs[run_id]
        latest = {}
        for name, step, value, at in run["rows"]:  # MLflow's rule of what it shows
            latest[name] = max(latest.get(name, ()), (step, at, value))
        metrics = [Metric(name, value, at, step) for name, (step, at, value) in latest.items()]
        data = RunData(metrics, [Param(*p) for p in run["params"].items()], [RunTag(*t) for t in run["tags"].items()])
        info = RunInfo(run_id, "1", "u", run["status"], run["start"], run["end"], run["stage"], "memory:///files")
        return Run(info, data, RunInputs(list(run["datasets"].values())))


def _refuse(if_so, why):
    if if_so:
        raise MlflowException.invalid_parameter_value(why)


def _check_texts(*texts):
    for text in texts:
        _refuse("\0" in text, "a NUL")
        try:
            text.encode()
        except UnicodeEncodeError:
            _refuse(True, "a surrogate")
