"""One trial where Ray put it: checkpoints, resuming, failures."""

import json
import math

import formulas
import pytest

from tune_topkd.config import TrialConfig
from tune_topkd.sweep.worker import newest_checkpoint
from tune_topkd.sweep.worker import run_trial
from tune_topkd.sweep.worker import write_checkpoint


@pytest.fixture
def config():
    sweep = formulas.sweep_config()
    return TrialConfig(data=sweep.data, student=sweep.student, loss={"k": 4}, recipe=sweep.recipe)


def save_text(text):
    return lambda folder: (folder / formulas.STATE).write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_two_generations_are_kept(tmp_path):
    for epoch in (1, 2, 3):
        write_checkpoint(tmp_path, epoch, {"val_top1": 1.0 * epoch}, save_text(str(epoch)))
    assert names(tmp_path) == ["epoch-0002", "epoch-0003"]
    assert newest_checkpoint(tmp_path).name == "epoch-0003"


@pytest.mark.parametrize("damage", ["change", "truncate", "remove", "report"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage):
    for epoch in (1, 2):
        write_checkpoint(tmp_path, epoch, {"val_top1": 1.0}, save_text("state"))
    newest = tmp_path / "epoch-0002"
    match damage:
        case "change":
            (newest / formulas.STATE).write_text("stale")
        case "truncate":
            (newest / formulas.STATE).write_text("")
        case "remove":
            (newest / formulas.STATE).unlink()
        case "report":
            (newest / "report.json").write_text("{")
    assert newest_checkpoint(tmp_path).name == "epoch-0001"


def test_a_save_that_fails_leaves_no_checkpoint(tmp_path):
    def failing(folder):
        (folder / formulas.STATE).write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(tmp_path, 1, {"val_top1": 1.0}, failing)
    assert newest_checkpoint(tmp_path) is None
    write_checkpoint(tmp_path, 1, {"val_top1": 1.0}, save_text("1"))
    assert names(tmp_path) == ["epoch-0001"]


def test_a_trial_reports_every_epoch_and_goes_on_from_its_checkpoint(tmp_path, config):
    sent = []

    def stop_after_four(message):
        sent.append(message)
        if message["epoch"] == 4:
            raise SystemExit

    with pytest.raises(SystemExit):
        run_trial(formulas.rising, config, tmp_path, stop_after_four)
    assert [m["epoch"] for m in sent] == [1, 2, 3, 4]
    again = []
    run_trial(formulas.rising, config, tmp_path, again.append)
    assert [m["epoch"] for m in again] == list(range(4, formulas.EPOCHS + 1))
    assert again[0] == sent[-1]


def test_numbers_that_are_none_travel(tmp_path, config):
    sent = []
    config = config.model_copy(update={"loss": {"k": 11}})
    run_trial(formulas.nan_for_large_k, config, tmp_path, lambda m: sent.append(json.loads(json.dumps(m))))
    assert math.isnan(sent[1]["metrics"]["val_top1"])
