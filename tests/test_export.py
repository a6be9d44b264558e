"""The answer of a sweep: what it holds, how it is written, and who can read it."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tune_topkd.config import METHODS
from tune_topkd.config import ConfigError
from tune_topkd.config import config_from
from tune_topkd.export import SCHEMA_VERSION
from tune_topkd.export import WRITERS
from tune_topkd.export import NoAnswerError
from tune_topkd.export import as_json
from tune_topkd.export import as_python
from tune_topkd.export import as_yaml
from tune_topkd.export import load_tuned_config
from tune_topkd.export import tuned_config
from tune_topkd.ledger import End
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import Suggest
from tune_topkd.ledger import TeacherFile
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import TrialStatus
from tune_topkd.space import Space
from tune_topkd.storage import write_text

CONFIG = config_from(
    {
        "data": {"name": "digits", "augment": {"pad": 1}},
        "teacher": {"name": "digits_cnn", "recipe": {"epochs": 4}},
        "student": {"name": "digits_tiny", "kwargs": {"width": 4}},
        "loss": {"shift": 0.2},
        "recipe": {"epochs": 8, "batch_size": 32},
        "space": {
            "k": {"low": 1, "high": 9},
            "normalize": [True, False],
            "ce_weight": {"low": 0.1, "high": 10.0, "log": True},
            "tdl_weight": {"low": 0.1, "high": 10.0, "log": True},
            "lr": {"low": 0.01, "high": 1.0, "log": True},
        },
        "relative": {"of": ["ce_weight", "tdl_weight"], "sum": 2.0},
        "sweep": {"seed": 11},
    },
    "test",
)
DEFAULTS = {"k": 5, "shift": 0.1, "normalize": True, "temperature": 0.1, "ce_weight": 1.0, "tdl_weight": 1.0}
HEADER = {
    "sweep": "digits",
    "id": "0123456789abcdef",
    "seed": 11,
    "trials": 9,
    "digest": "12345678e9012345",  # a text that looks like a number
    "space_digest": Space.of(CONFIG).digest(),
    "teacher_file": TeacherFile("1234e567", 98.5),
    "versions": {"torch": "2.11.0", "tune_topkd": "0.1.0"},
    "git_commit": "0c0b9be+",
}
PROPOSALS = [
    {"k": 3, "normalize": False, "ce_weight": 1.0, "tdl_weight": 3.0, "lr": 0.02},
    {"k": 7, "normalize": True, "ce_weight": 6.0, "tdl_weight": 2.0, "lr": 1e-05 + 0.3},
    {"k": 9, "normalize": True, "ce_weight": 1.0, "tdl_weight": 1.0, "lr": 0.5},
]


def ended(arm, number, params, status, value, proposal=None):
    key = TrialKey(arm, number)
    suggest = Suggest(key=key, proposal=proposal or params, params=params)
    return [suggest, End(key=key, epoch=8, status=TrialStatus(status), reason="", value=value)]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The state of a sweep with an answer."""
    space = Space.of(CONFIG)
    outcomes = [("completed", 91.0), ("completed", 94.25), ("pruned", 99.0)]
    with Ledger.create(tmp_path_factory.mktemp("swept") / "ledger.jsonl", Header(**HEADER)) as ledger:
        for number, (proposal, (status, value)) in enumerate(zip(PROPOSALS, outcomes, strict=True)):
            ledger.append(*ended("search", number, space.params(proposal), status, value, proposal))
        ledger.append(*ended("search", 3, space.params(PROPOSALS[0]), "failed", None))
        ledger.append(*ended("ce", 0, {"lr": 0.1}, "completed", 88.0), *ended("ce", 1, {"lr": 0.2}, "completed", 89.5))
        ledger.append(*ended("kd", 0, {"lr": 0.1}, "failed", None))
        return ledger.state


@pytest.fixture(scope="module")
def tuned(swept):
    return tuned_config(CONFIG, swept, DEFAULTS)


# --- what it holds --------------------------------------------------------------------------------------------------


def test_the_loss_is_complete_with_absolute_weights(tuned):
    searched = {"k": 7, "normalize": True, "ce_weight": 1.5, "tdl_weight": 0.5}
    assert tuned.loss == {"shift": 0.2, "temperature": 0.1, **searched}  # fixed, defaulted, searched
    assert type(tuned.loss["k"]) is int


def test_the_recipe_is_the_sweeps_with_what_was_searched(tuned):
    assert (tuned.recipe.lr, tuned.recipe.batch_size, tuned.recipe.epochs) == (0.30001, 32, 8)
    assert (tuned.method, tuned.data, tuned.student) == ("topkd", CONFIG.data, CONFIG.student)
    assert (tuned.teacher.name, tuned.schema_version) == ("digits_cnn", SCHEMA_VERSION)


def test_the_evidence_says_where_it_comes_from(tuned):
    evidence = tuned.evidence
    assert (evidence.val_top1, evidence.trial, evidence.seeds) == (94.25, 1, [11])
    assert evidence.trials == {"completed": 2, "pruned": 1, "failed": 1}
    assert (evidence.sweep, evidence.sweep_id, evidence.digest) == ("digits", HEADER["id"], HEADER["digest"])
    assert evidence.space_digest == HEADER["space_digest"]
    assert evidence.teacher == {"key": "1234e567", "val_top1": 98.5}
    assert (evidence.versions, evidence.git_commit) == (HEADER["versions"], "0c0b9be+")


def test_a_baseline_is_its_best_full_trial_and_one_without_any_is_left_out(tuned):
    assert {name: base.model_dump() for name, base in tuned.evidence.baselines.items()} == {
        "ce": {"val_top1": 89.5, "recipe": {"lr": 0.2}, "trials": 2}
    }


@pytest.mark.parametrize(
    ("outcomes", "told"),
    [
        ([], r"sweep digits: no trial reached the full budget \(no trials\)"),
        (["failed", "pruned", "pruned"], r"no trial reached the full budget \(2 pruned, 1 failed\)"),
    ],
)
def test_a_sweep_without_a_full_trial_has_no_answer(tmp_path, outcomes, told):
    with Ledger.create(tmp_path / "ledger.jsonl", Header(**HEADER)) as ledger:
        for number, status in enumerate(outcomes):
            ledger.append(*ended("search", number, PROPOSALS[0], status, 50.0 if status == "pruned" else None))
        ledger.append(*ended("ce", 0, {"lr": 0.1}, "completed", 88.0))
        with pytest.raises(NoAnswerError, match=told):
            tuned_config(CONFIG, ledger.state, DEFAULTS)


# --- written and read again -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [as_yaml, as_json])
def test_what_is_written_loads_as_the_same(tmp_path, tuned, write):
    path = tmp_path / "tuned"
    write_text(path, write(tuned))
    again = load_tuned_config(path)
    assert again == tuned
    assert [type(v) for v in again.loss.values()] == [type(v) for v in tuned.loss.values()]
    assert write(again) == write(tuned)


@pytest.mark.parametrize(
    "text", ["1e5", "12e345", "0123", "true", "null", "é → α", "😀", "a: b", "- x", "#", "'", '"', "\\", "\t"]
)
@pytest.mark.parametrize("write", [as_yaml, as_json])
def test_odd_texts_are_read_as_they_were(tmp_path, tuned, write, text):
    evidence = tuned.evidence.model_copy(update={"sweep_id": text, "versions": {"torch": text}, "git_commit": text})
    odd = tuned.model_copy(update={"evidence": evidence})
    write_text(tmp_path / "tuned", write(odd))
    assert load_tuned_config(tmp_path / "tuned") == odd


def test_the_yaml_opens_with_what_it_is_and_how_to_use_it(tuned):
    first, second = as_yaml(tuned).splitlines()[:2]
    assert first == (
        "# topkd for digits_cnn -> digits_tiny on digits: validation top-1 94.25 % (trial 1 of sweep digits)."
    )
    assert "from tune_topkd.export import load_tuned_config" in second


def test_the_json_is_json(tuned):
    assert json.loads(as_json(tuned)) == tuned.model_dump(mode="json")


def test_the_python_text_is_a_module_of_constants_that_imports_nothing(tuned):
    text = as_python(tuned)
    assert not [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom | ast.Call)]
    names = {}
    exec(compile(text, "tuned.py", "exec"), names)
    assert (names["METHOD"], names["LOSS"]) == ("topkd", tuned.loss)
    assert names["RECIPE"] == tuned.recipe.model_dump()
    assert names["EVIDENCE"] == tuned.evidence.model_dump()
    assert "94.25 %" in names["__doc__"]


def test_the_writers_are_the_formats_of_export():
    assert list(WRITERS) == ["yaml", "json", "python"]


# --- files that are not right ---------------------------------------------------------------------------------------


def changed(folder, tuned, change):
    raw = tuned.model_dump(mode="json")
    raw["evidence"]["digest"] = "abc"
    change(raw)
    path = folder / "tuned.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.mark.parametrize("version", [3, "1", 1.5, None, [1], True, 0])
def test_a_file_of_another_schema_is_told_by_its_version_alone(tmp_path, tuned, version):
    path = changed(tmp_path, tuned, lambda raw: raw.update(schema_version=version, loses={}, method="new"))
    with pytest.raises(ConfigError) as caught:
        load_tuned_config(path)
    said = f"{path}: schema_version = {version!r}: is not a schema version that this tune_topkd reads: known: 1 and 2"
    newer = "; a newer tune_topkd wrote it: update this one" if version == 3 else ""
    assert str(caught.value) == said + newer


def test_a_file_of_the_first_version_is_read_as_one_that_lacks_what_came_later(tmp_path, tuned):
    def as_first(raw):
        raw["schema_version"] = 1
        raw["teacher"] = {key: raw["teacher"][key] for key in ("name", "kwargs", "image_size", "checkpoint_key")}

    found = load_tuned_config(changed(tmp_path, tuned, as_first))
    assert (found.loss, found.recipe, found.data, found.student) == (
        tuned.loss,
        tuned.recipe,
        tuned.data,
        tuned.student,
    )
    assert (found.schema_version, found.teacher.name, found.teacher.recipe) == (SCHEMA_VERSION, "digits_cnn", None)
    assert (found.evidence.identities, found.evidence.test) == ({}, None)


def test_the_teachers_recipe_is_in_it_and_its_place_is_not(tuned):
    assert tuned.teacher.recipe == CONFIG.teacher.recipe
    assert "checkpoint" not in tuned.model_dump(mode="json")["teacher"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda raw: raw.update(los={}), "los: unknown key; did you mean 'loss'? known: data, evidence, loss, method"),
        (lambda raw: raw["evidence"].update(seedz=1), "evidence.seedz: unknown key; did you mean 'seeds'"),
        (lambda raw: raw["evidence"]["baselines"]["ce"].update(top1=1), "evidence.baselines.ce.top1: unknown key"),
        (lambda raw: raw["recipe"].update(epochs="8"), "recipe.epochs = '8': must be a valid integer"),
        (lambda raw: raw.update(method="topk"), "method = 'topk': did you mean 'topkd'"),
        (lambda raw: raw.pop("loss"), "loss: is required but missing"),
        (lambda raw: raw["loss"].update(k=[7]), "loss.k = [7]: must be true/false or a number or text"),
        (lambda raw: raw["loss"].update(shift=float("nan")), "loss.shift = nan: must be a finite number"),
    ],
)
def test_a_file_that_breaks_a_rule_is_told_with_file_and_key(tmp_path, tuned, change, told):
    path = changed(tmp_path, tuned, change)
    with pytest.raises(ConfigError) as caught:
        load_tuned_config(path)
    assert str(caught.value).startswith(f"{path}: {told}")


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"tuned\.yaml: cannot be read: No such file or directory"):
        load_tuned_config(tmp_path / "tuned.yaml")


# --- used by others -------------------------------------------------------------------------------------------------


def test_the_loss_can_be_built_from_it(tmp_path, tuned):
    import torch

    from tune_topkd.loss import TopKDLoss
    from tune_topkd.loss import build_loss
    from tune_topkd.loss import loss_parameters

    complete = tuned.model_copy(update={"loss": loss_parameters("topkd") | tuned.loss})
    write_text(tmp_path / "tuned.yaml", as_yaml(complete))
    again = load_tuned_config(tmp_path / "tuned.yaml")
    student, teacher = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(0)).unbind()
    labels = torch.tensor([0, 3, 9, 9])
    value = TopKDLoss(**again.loss)(student, teacher, labels)
    assert torch.isfinite(value)
    assert torch.equal(value, build_loss(again.method, again.loss)(student, teacher, labels))
    assert not torch.equal(value, TopKDLoss()(student, teacher, labels))


USERS = """
import torch

class Offset(torch.nn.Module):
    def __init__(self, power=2, scale=1.5):
        super().__init__()
        self.power, self.scale = power, scale

    def forward(self, student, teacher, labels):
        return self.scale * (student - teacher).abs().pow(self.power).mean()
"""
CHANGED = {"k": 3, "temperature": 2.5, "beta": 3.0, "ce_weight": 0.7, "base_temperature": 3.5, "scale": 0.25}
"""What a sweep found, for the methods that have it."""


def used_as_it_says(format_, text, folder):
    """The loss that comes of doing what the text of an export says."""
    from tune_topkd.loss import build_loss

    path = folder / "tuned.yaml"
    path.write_text(text)
    if format_ == "json":  # has no room for words: the README's
        tuned = load_tuned_config(path)
        return build_loss(tuned.method, tuned.loss)
    names = {}
    if format_ == "python":
        exec(compile(text, "tuned.py", "exec"), names)
        lines = [line.strip() for line in names["__doc__"].splitlines() if line.startswith("    ")]
    else:
        lines = [line.removeprefix("# ") for line in text.splitlines()[1:] if line.startswith("# ")]
    exec("\n".join(lines), names)
    return names["criterion"]


@pytest.mark.parametrize("method", [*METHODS, "users_export:Offset", "users_export:Offset+topkd"])
@pytest.mark.parametrize("format_", WRITERS)
def test_what_an_export_says_gives_the_loss_of_the_sweep(tmp_path, monkeypatch, tuned, format_, method):
    import torch

    from tune_topkd.loss import build_loss
    from tune_topkd.loss import loss_parameters

    (tmp_path / "users_export.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    known = loss_parameters(method)
    found = {name: value for name, value in CHANGED.items() if name in known}
    answer = tuned.model_copy(update={"method": method, "loss": known | found})
    criterion = used_as_it_says(format_, WRITERS[format_](answer), tmp_path)
    logits = torch.randn(2, 8, 10, generator=torch.Generator().manual_seed(0)).unbind()
    labels = torch.arange(8)
    assert found
    assert torch.equal(criterion(*logits, labels), build_loss(method, found)(*logits, labels))
    assert not torch.equal(criterion(*logits, labels), build_loss(method, {})(*logits, labels))


@pytest.mark.parametrize("place", ["README.md", "analysis/sweep.ipynb", "tune_topkd/export/__init__.py"])
def test_what_is_told_of_an_answer_holds_for_every_method(place):
    text = (Path(__file__).parents[1] / place).read_text()
    assert "build_loss(tuned.method, tuned.loss)" in text
    assert "TopKDLoss(**" not in text


HEAVY = ["ray", "optuna", "mlflow", "pandas", "torchvision", "sklearn", "typer", "rich", "matplotlib"]


def printed(script, *arguments):
    """What a script prints in a Python of its own, as JSON."""
    command = [sys.executable, "-W", "error", "-c", script, *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_reading_and_using_it_needs_the_base_install_only(tmp_path, tuned):
    write_text(tmp_path / "tuned.yaml", as_yaml(tuned))
    script = (
        "import json, sys\n"
        "from tune_topkd.export import load_tuned_config\n"
        "loss = load_tuned_config(sys.argv[1]).loss\n"
        "before = sorted({name.partition('.')[0] for name in sys.modules})\n"
        "from tune_topkd.loss import TopKDLoss\n"
        "TopKDLoss(**loss)\n"
        "after = sorted({name.partition('.')[0] for name in sys.modules})\n"
        "print(json.dumps([before, after]))\n"
    )
    before, after = printed(script, tmp_path / "tuned.yaml")
    assert set(before) & {*HEAVY, "torch", "numpy"} == set()
    assert set(after) & set(HEAVY) == set()
    assert "torch" in after


def test_the_package_itself_imports_nothing():
    script = (
        "import json, sys\n"
        "before = set(sys.modules)\n"
        "import tune_topkd\n"
        "print(json.dumps([sorted(set(sys.modules) - before), tune_topkd.__version__]))\n"
    )
    imported, version = printed(script)
    assert imported == ["tune_topkd"]
    assert version
