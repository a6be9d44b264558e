"""`teacher --prune`, and whether a training has a bank: the room that banks take on the disk."""

import pytest
import torch
from typer.testing import CliRunner

from tune_topkd.cli.app import app
from tune_topkd.config import NO_FILES
from tune_topkd.config import SharedFiles
from tune_topkd.config import config_from
from tune_topkd.config import dump_config
from tune_topkd.data import load_dataset
from tune_topkd.ledger import LEDGER_FILE
from tune_topkd.models import build_configured
from tune_topkd.models import save_weights
from tune_topkd.sweep import Workspace
from tune_topkd.sweep import prepare
from tune_topkd.sweep import workspace
from tune_topkd.sweep.callbacks import Callback
from tune_topkd.sweep.callbacks import Watchers
from tune_topkd.sweep.pruning import prune
from tune_topkd.teacher import LogitBank
from tune_topkd.teacher import bank
from tune_topkd.teacher import bank_file
from tune_topkd.teacher import bank_size
from tune_topkd.teacher import logits

CPU = torch.device("cpu")


class Told(Callback):
    """Keeps the messages as lines."""

    def __init__(self):
        self.text = ""

    def on_message(self, text, kind):
        self.text += f"{kind}: {text}\n"


def config_of(tmp_path, **sections):
    raw = {
        "data": {"name": "digits", "augment": {"rotate": 5.0}},
        "teacher": {"name": "digits_linear", "checkpoint": str(tmp_path / "teacher.pt")},
        "student": "digits_cnn_tiny",
        "recipe": {"epochs": 2},
        "space": {"k": {"low": 1, "high": 4}},
    }
    settings = {"asha": None} | sections.pop("sweep", {})
    return config_from(raw | sections | {"sweep": settings}, "test")


@pytest.fixture
def place(tmp_path):
    torch.manual_seed(0)
    save_weights(build_configured(config_of(tmp_path).teacher.model, num_classes=10), tmp_path / "teacher.pt")
    return Workspace(tmp_path / "runs", "sqlite://")


def bank_of(config, place):
    """The bank that a sweep of this config would begin, made."""
    files = NO_FILES.model_copy(
        update={
            "teacher_checkpoint": config.teacher.checkpoint,
            "teacher_bank": str(place.runs / "teachers" / "0123456789abcdef"),
        }
    )
    trial = prepare.trial_with(config, files, config.sweep.seed)
    return logits.open_bank(trial, load_dataset(config.data), CPU).path


def begin_sweep(config, place, name):
    folder = place.folder(name)
    folder.mkdir(parents=True)
    (folder / workspace.CONFIG_FILE).write_text(dump_config(config))
    (folder / LEDGER_FILE).write_text("{}\n")


def test_banks_that_no_sweep_names_are_removed(place, tmp_path):
    used, longer = config_of(tmp_path), config_of(tmp_path, recipe={"epochs": 3})
    begin_sweep(longer, place, "one")
    kept = bank_of(used, place)
    unused = [
        bank_of(config_of(tmp_path, sweep={"seed": 1}), place),
        bank_of(config_of(tmp_path, data={"name": "digits", "augment": {"pad": 1}}), place),
        kept.with_name("bank-00000000000000aa.f16"),  # of an older format
        kept.with_name(".bank-00000000000000bb.f16.123"),  # of a process that was killed as it made it
    ]
    for path in unused[2:]:
        path.write_bytes(b"1" * 5000)
    lock = unused[0].with_suffix(".lock")
    lock.touch()
    weights = kept.with_name("teacher.pt")
    weights.touch()
    told = Told()
    prune(place, Watchers([told]))
    assert sorted(path for path in kept.parent.iterdir()) == sorted([kept, kept.with_suffix(".json"), weights])
    assert all(f"GB: {path}\n" in told.text for path in unused)
    assert "banks: 0.000 GB removed" in told.text


def test_where_views_are_endless_a_finalists_seeds_have_banks_of_their_own_which_stay(place, tmp_path):
    begin_sweep(config_of(tmp_path, sweep={"finalists": {"seeds": 2}}), place, "one")
    kept = [bank_of(config_of(tmp_path, sweep={"seed": seed}), place) for seed in (0, 1, 2)]
    unused = bank_of(config_of(tmp_path, sweep={"seed": 3}), place)
    prune(place, Watchers())
    assert [path.exists() for path in [*kept, unused]] == [True, True, True, False]


def test_a_bank_of_another_seed_is_made_only_where_there_is_room(place, tmp_path, monkeypatch, caplog):
    begun = bank_of(config_of(tmp_path), place)
    monkeypatch.setattr(bank, "LARGEST_SHARE_OF_DISK", 0.0)
    assert bank_of(config_of(tmp_path), place) == begun, "it is there"
    with pytest.raises(AttributeError):
        bank_of(config_of(tmp_path, sweep={"seed": 1}), place)
    assert "banks would take more than half of the disk" in caplog.text
    assert len(list(begun.parent.glob("*.f16"))) == 1


def test_a_sweep_that_cannot_be_read_is_named(place, tmp_path):
    config = config_of(tmp_path)
    begin_sweep(config, place, "one")
    begin_sweep(config, place, "two")
    (place.folder("two") / workspace.CONFIG_FILE).write_text("[/bold]: {")
    kept = bank_of(config, place)
    told = Told()
    prune(place, Watchers([told]))
    assert "note: two: its bank is not known" in told.text
    assert kept.exists()


def test_prune_needs_no_space_and_all_else_does(place, capfd):
    runner = CliRunner()
    done = runner.invoke(app, ["teacher", "--prune", "--runs-dir", str(place.runs)])
    assert (done.exit_code, done.stdout) == (0, "")
    assert "banks: 0.000 GB removed, 0.000 GB kept" in capfd.readouterr().err
    refused = runner.invoke(app, ["teacher", "--fill-bank"])
    assert "must be given, except for --prune" in str(refused.exception)


def test_a_single_training_keeps_no_bank_of_endless_views(place, tmp_path):
    config = config_of(tmp_path)
    teacher = SharedFiles(teacher_checkpoint=config.teacher.checkpoint, teacher_bank=str(place.runs / "t" / "k"))
    trial = prepare.trial_with(config, teacher, 0)
    assert prepare.no_bank(config, trial) == ""
    assert prepare.no_bank(config, trial, once=True) == "a single training sees each view once"
    dataset = load_dataset(config.data)
    LogitBank(bank_file(trial, dataset), bank_size(config.data, config.recipe, dataset))  # as --fill-bank makes it
    assert prepare.no_bank(config, trial.model_copy(update={"gpu_share": 0.0}), once=True) == ""
    finite = config_of(tmp_path, data={"name": "digits", "augment": {"pad": 1}})
    assert prepare.no_bank(finite, prepare.trial_with(finite, teacher, 0), once=True) == ""
