"""What trainings in several processes are made of, which import it from here: networks, losses, and the ranks themselves."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import distributed
from torch import nn
from torch.nn import functional

from tune_topkd.config import TrialConfig
from tune_topkd.train import Training
from tune_topkd.train.group import joined

# --- ranks that are forked: importing torch takes longer than all that they do ----------------------------------------


def run(folder, configs, size):
    """Train by each config in as many processes; each rank saves every epoch in `NAME/RANK/EPOCH` of the folder."""
    ranks = [rank for number in range(size) if (rank := os.fork() or _train(folder, configs, number, size))]
    assert [os.waitpid(rank, 0)[1] for rank in ranks] == [0] * size


def _train(folder, configs, number, size):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    cpu = torch.device("cpu")
    torch.set_num_threads(1)
    with joined(number, size, cpu, folder / "meeting") as group:
        for name, raw in configs.items():
            config = TrialConfig.model_validate(raw)
            torch.manual_seed(config.seed)
            training = Training(config, cpu, group)
            while training.epoch < config.recipe.epochs:
                training.run_epoch()
                training.save(folder / name / str(number) / str(training.epoch))
    os._exit(0)


if __name__ == "__main__":
    run(Path(sys.argv[1]), json.loads(sys.stdin.read()), int(sys.argv[2]))


# --- networks and losses ----------------------------------------------------------------------------------------------


class InFloat64(nn.Module):
    """A convolution and a linear map in float64, without batch norm; a part of it has no part in the logits."""

    def __init__(self, *, num_classes):
        super().__init__()
        maps = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.Tanh(), nn.Flatten())
        self.layers = nn.Sequential(maps, nn.Linear(4 * 3 * 3, num_classes))
        self.unused = nn.Linear(2, 2)
        self.double()

    def forward(self, images):
        return self.layers(images.double())


class Learning(nn.Module):
    """A loss with a weight of its own and a running average."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, student, teacher, labels):
        self.mean = 0.9 * self.mean + 0.1 * student.detach().mean()
        distance = functional.mse_loss(student, self.scale * teacher)
        return distance + (student.mean(0) - self.mean).square().sum() + functional.cross_entropy(student, labels)


class Fateful(nn.Module):
    """Cross-entropy, of which one rank has a fate in the third epoch of its first attempt; each attempt is noted.

    Args:
        notes: a folder; `NUMBER-RANK` is the process id of a rank of an attempt, and `left` those of attempts before that
            were still there at the start of one.
        fate: `killed`, `exits`, `raises` or `kills_worker`.
        steps: of the two epochs before.
    """

    def __init__(self, *, notes=".", fate="", steps=0):
        super().__init__()
        self.notes, self.fate, self.steps = Path(notes), fate, steps
        self.calls = 0

    def forward(self, student, teacher, labels):
        self.calls += 1
        rank = distributed.get_rank()
        if self.calls == 1:
            self._note(rank)
        if self.calls > self.steps and rank == 1 and not (self.notes / "2-1").exists():
            self._meet()
        return functional.cross_entropy(student, labels)

    def _note(self, rank):
        noted = {path: int(path.read_text()) for path in self.notes.glob("[0-9]-[0-9]")}
        if os.getpid() in noted.values():  # another loss of this process: one is tried on a batch for its fingerprint
            return
        number = 1 + len(list(self.notes.glob(f"[0-9]-{rank}")))
        left = [pid for path, pid in noted.items() if int(path.name[0]) < number and Path(f"/proc/{pid}").exists()]
        (self.notes / f"{number}-{rank}").write_text(str(os.getpid()))
        with open(self.notes / "left", "a") as stream:
            stream.writelines(f"{pid}\n" for pid in left)

    def _meet(self):
        match self.fate:
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exits":
                os._exit(3)
            case "raises":
                raise OSError(5, "Input/output error", "an image")
            case "kills_worker":
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(600)
