"""The answer of a sweep: what it holds, how it is written, and who can read it."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tune_topkd.config import METHODS
from tune_topkd.config import ConfigError
from tune_topkd.config import config_from
from tune_topkd.errors import TuneTopKDError
from tune_topkd.export import BUNDLES
from tune_topkd.export import SCHEMA_VERSION
from tune_topkd.export import WRITERS
from tune_topkd.export import NoAnswerError
from tune_topkd.export import as_json
from tune_topkd.export import as_python
from tune_topkd.export import as_yaml
from tune_topkd.export import load_tuned_config
from tune_topkd.export import tuned_config
from tune_topkd.export.standalone import _MODULES
from tune_topkd.export.standalone import literal
from tune_topkd.ledger import End
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import Suggest
from tune_topkd.ledger import TeacherFile
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import TrialStatus
from tune_topkd.space import Space
from tune_topkd.storage import write_text
from tune_topkd.sweep import Result

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
    assert tuned.evidence.model_dump(exclude_none=True)["sweep"] == tuned.evidence.sweep  # with nothing of fresh seeds


def test_the_python_text_has_the_values(tuned):
    names = {}
    exec(compile(as_python(tuned), "tuned.py", "exec"), names)
    assert (names["METHOD"], names["LOSS"]) == ("topkd", tuned.loss)
    assert names["RECIPE"] == tuned.recipe.model_dump()
    assert names["EVIDENCE"] == tuned.evidence.model_dump()
    assert names["DISTILL_WARMUP"] == 0
    assert "94.25 %" in names["__doc__"]


@pytest.mark.parametrize("method", METHODS)
def test_the_python_text_imports_torch_and_the_standard_library_alone(tuned, method):
    tree = ast.parse(as_python(of_method(tuned, method)))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names) == {"torch"}


def of_method(tuned, method, **changes):
    """The answer of another method, at its defaults but for some changes."""
    from tune_topkd.loss import loss_parameters

    return tuned.model_copy(update={"method": method, "loss": loss_parameters(method) | changes})


def test_the_python_text_is_written_as_the_loss_it_is_taken_from(tmp_path, tuned):
    """It reads well: no name is unknown, imported in vain or defined twice, and the formatter would change nothing."""
    for method in METHODS:
        (tmp_path / f"{method.replace('+', '_')}.py").write_text(as_python(of_method(tuned, method)))
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check", "--select", "F,I,D1", "--config", SORTED], ["format", "--check"]):
        done = subprocess.run([*ruff, *command, "--isolated", "--line-length", "120", tmp_path], capture_output=True)
        assert done.returncode == 0, done.stdout.decode()


def test_no_two_modules_of_the_loss_define_the_same_name():
    """One file could not have both."""
    loss = Path(__file__).parents[1] / "tune_topkd" / "loss"
    names = [
        node.name
        for module in _MODULES
        for node in ast.parse((loss / f"{module}.py").read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    assert len(names) == len(set(names)) > 40


SORTED = "lint.isort.force-single-line=true"


def test_odd_values_are_written_as_python_reads_them(tuned):
    odd = {
        "é": ["\\", '"', "\n", "'", "😀", "\x00"],
        "": {},
        "a": [],
        "b": [1.5e-7, -1, True, None, 1e22],
        "c": ["x" * 90] * 3,
    }
    for value in (odd, {"deep": [odd, odd]}, [[]], "x"):
        assert ast.literal_eval(literal(value)) == value


def test_a_result_writes_each_format(tmp_path, swept):
    result = Result("digits", tmp_path, CONFIG, swept, "finished")
    for name in WRITERS:
        result.export(tmp_path / name, name)
        assert (tmp_path / name).read_text() == WRITERS[name](result.answer)
    for name in BUNDLES:
        result.export(tmp_path / "folder" / name, name)
        texts = BUNDLES[name](result.answer)
        assert {path.name for path in (tmp_path / "folder" / name).iterdir()} == set(texts)
    with pytest.raises(
        TuneTopKDError, match=r"no 'torchdistil'; did you mean 'torchdistill'\? known: checkpoint, json, "
    ):
        result.export(tmp_path / "x", "torchdistil")


def test_a_bundle_of_a_sweep_knows_the_data_where_it_lies(tmp_path, swept):
    for name in "abcdefghijkl":
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (24, 20)).save(tmp_path / "data" / name / "0.png")
    data = CONFIG.data.model_copy(update={"name": "image_folder", "root": str(tmp_path / "data")})
    result = Result("digits", tmp_path, CONFIG.model_copy(update={"data": data}), swept, "finished")
    result.export(tmp_path / "out", "pytorch")
    assert "\nCLASSES = 12\n" in (tmp_path / "out" / "tuned_train.py").read_text()


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

def plain(student, teacher, labels, scale=2.0):
    return scale * (student - teacher).square().mean()

class Made:
    def __call__(self, student, teacher, labels, scale=2.0):
        return plain(student, teacher, labels, scale)

made = Made()

def __getattr__(name):  # what derives from a class of ours is made only when it is asked for
    from tune_topkd.loss import DistillationLoss

    class Shared(DistillationLoss):
        _weight_of = {"near": "scale"}

        def __init__(self, scale=2.0):
            super().__init__()
            self.scale = scale

        def _terms(self, student, teacher, labels):
            return {"near": plain(student, teacher, labels, 1.0)}

    if name != "Shared":
        raise AttributeError(name)
    return Shared
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
        path = path.rename(folder / "tuned.py")
        lines = [line.strip() for line in ast.get_docstring(ast.parse(text)).splitlines() if line.startswith("    ")]
    else:
        lines = [line.removeprefix("# ") for line in text.splitlines()[1:] if line.startswith("# ")]
    exec("\n".join(lines), names)
    sys.modules.pop("tuned", None)
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


ALONE = """
import importlib, json, sys, torch

sys.modules["tune_topkd"] = None  # what is None cannot be imported
sys.path.insert(0, sys.argv[1])
told = {}
for name in sys.argv[2:]:
    tuned = importlib.import_module(name)
    student, teacher = torch.load(f"{sys.argv[1]}/logits.pt")
    labels = torch.arange(len(student)) % 10
    criterion = tuned.criterion()
    told[name] = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        logits = student.to(dtype, copy=True).requires_grad_()
        value = criterion(logits, teacher.to(dtype), labels)
        value.backward()
        weighted = sum(tuned.weighted_terms(criterion, logits, teacher.to(dtype), labels, 1).values())
        told[name].append([value.item(), weighted.item(), logits.grad.double().tolist()])
print(json.dumps(told))
"""


def test_the_python_text_alone_is_the_loss_to_the_last_bit(tmp_path, monkeypatch, tuned):
    import torch

    from tune_topkd.loss import build_loss
    from tune_topkd.loss import loss_parameters

    (tmp_path / "users_export.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    student, teacher = torch.randn(2, 12, 10, generator=torch.Generator().manual_seed(0)).mul(3).unbind()
    torch.save((student, teacher), tmp_path / "logits.pt")
    answers = {}
    users = ["users_export:Offset", "users_export:Offset+topkd", "users_export:plain", "users_export:made+topkd"]
    for number, method in enumerate([*METHODS, *users, "users_export:Shared"]):
        known = loss_parameters(method)
        answers[f"m{number}"] = of_method(tuned, method, **{n: v for n, v in CHANGED.items() if n in known})
    for name, answer in answers.items():
        (tmp_path / f"{name}.py").write_text(as_python(answer))
    shared = [name for name, answer in answers.items() if answer.method == "users_export:Shared"]
    with pytest.raises(AssertionError, match=r"No module named .tune_topkd\.loss"):  # it derives from a class of ours
        printed(ALONE, tmp_path, *shared)
    told = printed(ALONE, tmp_path, *(answers.keys() - shared))
    for name, answer in answers.items():
        if name in shared:
            continue
        loss, labels = build_loss(answer.method, answer.loss), torch.arange(12) % 10
        share = answer.recipe.distill_share(1, answer.method)
        for dtype, found in zip((torch.float32, torch.float64, torch.bfloat16), told[name], strict=True):
            logits = student.to(dtype, copy=True).requires_grad_()
            value = loss(logits, teacher.to(dtype), labels)
            value.backward()
            terms = loss.terms(logits, teacher.to(dtype), labels)
            weighted = loss.total({term: v if term == "ce" else share * v for term, v in terms.items()})
            assert found == [value.item(), weighted.item(), logits.grad.double().tolist()], answer.method


def test_single_values_can_be_changed_where_it_is_used(tuned):
    for method, changed in (("topkd", {"k": 2}), ("dkd+topkd", {"base_beta": 1.5}), ("ce", {"ce_weight": 2.0})):
        names = {}
        exec(compile(as_python(of_method(tuned, method)), "tuned.py", "exec"), names)
        with pytest.raises(ValueError, match="unknown parameters: kk; known: "):
            names["criterion"](kk=2)
        (name, value), made = *changed.items(), names["criterion"](**changed)
        assert getattr(made if "base" not in name else made.base, name.removeprefix("base_")) == value
        assert names["LOSS"][name] != value


def test_the_distillation_terms_rise_as_in_the_sweep(tuned):
    """DKD's warm-up is a share of the epochs unless the recipe says how long it is."""
    recipe = tuned.recipe.model_copy(update={"epochs": 48})
    for method, own in (("dkd", None), ("dkd+topkd", None), ("topkd", 7), ("dkd", 0), ("kd", 1)):
        of = recipe.model_copy(update={"distill_warmup": own})
        names = {}
        exec(compile(as_python(of_method(tuned, method).model_copy(update={"recipe": of})), "t.py", "exec"), names)
        expected = [of.distill_share(epoch, method) for epoch in range(1, 49)]
        assert [names["distill_share"](epoch) for epoch in range(1, 49)] == expected


@pytest.mark.parametrize(
    "place", ["README.md", "analysis/04-in-your-own-project.ipynb", "tune_topkd/export/__init__.py"]
)
def test_what_is_told_of_an_answer_holds_for_every_method(place):
    text = (Path(__file__).parents[1] / place).read_text()
    assert "build_loss(tuned.method, tuned.loss)" in text
    assert "TopKDLoss(**" not in text


HEAVY = ["ray", "optuna", "mlflow", "pandas", "torchvision", "sklearn", "typer", "rich", "matplotlib"]


def printed(script, *arguments):
    """What a script prints in a Python of its own, as JSON."""
    command = [sys.executable, "-W", "error", "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


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
