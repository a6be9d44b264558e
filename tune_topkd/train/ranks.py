"""A training in several processes, the ranks, each on a GPU of its own and on its part of every batch.

The process that calls `train_on_ranks` trains nothing itself: it starts the ranks, hands the first one's reports on, and
sees that all end when one does, or when it ends itself, in whatever way. So a rank that dies, or hangs in a call of CUDA,
leaves nothing behind in the process that the next training runs in.
"""

import contextlib
import hashlib
import io
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any
from typing import NoReturn

import torch

from tune_topkd.config import TrialConfig
from tune_topkd.data import dataset_info
from tune_topkd.errors import ProcessLostError
from tune_topkd.train.device import default_device
from tune_topkd.train.device import in_share
from tune_topkd.train.device import preserved_rng
from tune_topkd.train.group import Group
from tune_topkd.train.group import joined

if TYPE_CHECKING:
    from tune_topkd.train.loop import Reporter
    from tune_topkd.train.loop import TrainResult

_GRACE = 2.0
"""Seconds after the error of a rank in which another one's death is looked for: the error may be no more than that."""
_LONGEST_END = 10.0
"""Seconds to wait for a rank that was killed: one that waits for a dead disk cannot even be killed."""
_PROGRAM = (
    "import sys; from tune_topkd.machine import end_with; end_with(int(sys.argv[1])); "
    "from tune_topkd.train.ranks import work; work(int(sys.argv[2]))"
)


@dataclass(frozen=True)
class _Task:
    """What a rank is told at its start."""

    number: int
    config: dict[str, Any]
    resume_from: str | None
    meeting_place: str


@dataclass(frozen=True)
class _Epoch:
    """A rank has trained an epoch: the first rank's metrics. The rank goes on when it is told to."""

    epoch: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class _Done:
    """A rank is at its end; the first rank's result."""

    epoch: int
    metrics: dict[str, float]
    diverged: bool
    weights: bytes
    """The student's, as torch saves them."""


@dataclass(frozen=True)
class _Raised:
    """A rank's exception and those behind it, each pickled, or by its name and text."""

    chain: tuple[tuple[bytes | None, str, str], ...]
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> "_Raised":
        chain = []
        each: BaseException | None = error
        while each is not None:
            chain.append((_pickled(each), type(each).__name__, str(each)))
            each = each.__cause__ or each.__context__
        return cls(tuple(chain), "".join(traceback.format_exception(error)))

    def error(self, rank: str) -> BaseException:
        """The exception, to be raised here."""
        found: BaseException = _TraceOfRank(f"in {rank}:\n{self.trace}")
        for pickled, name, text in reversed(self.chain):
            behind = found
            found = type(name, (RuntimeError,), {})(text) if pickled is None else pickle.loads(pickled)  # noqa: S301
            found.__cause__ = behind
        return found


class _TraceOfRank(Exception):  # noqa: N818 (it is shown and never raised)
    """Shows where in a rank an exception was raised."""


def train_on_ranks(config: TrialConfig, report: "Reporter", resume_from: Path | None) -> "TrainResult":
    """Train as `train` does, in `config.ranks` processes of this machine.

    The result's student is on the CPU.

    Raises:
        ProcessLostError: a rank died, or was killed; none is left.
        Exception: what a rank raises, and what `report` does; none is left either.
    """
    from tune_topkd.train.loop import TrainResult  # which begins what is here
    from tune_topkd.train.loop import build_student

    cpu = torch.device("cpu")
    with preserved_rng(cpu), _started(config, resume_from) as ranks:
        while not isinstance(word := ranks.words(), _Done):
            report(word.epoch, word.metrics, ranks.save)
            ranks.go_on()
        student = build_student(config.student, dataset_info(config.data).num_classes)
        student.load_state_dict(torch.load(io.BytesIO(word.weights), weights_only=True))
    student.eval()
    return TrainResult(word.epoch, word.metrics, student, word.diverged)


# --- in the process that watches over the ranks ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Ranks:
    """The processes, and a pipe to each, by their numbers."""

    processes: list[subprocess.Popen[bytes]]
    pipes: list[Connection]

    def words(self) -> "_Epoch | _Done":
        """Wait for the next word of every rank: the first one's.

        Raises:
            ProcessLostError: one died.
            Exception: what one raised.
        """
        waiting: dict[Any, int] = {pipe: number for number, pipe in enumerate(self.pipes)}
        words: dict[int, Any] = {}
        while waiting:
            for pipe in wait(list(waiting)):
                number = waiting.pop(pipe)
                words[number] = self._word(number)
        first: _Epoch | _Done = words[0]
        return first

    def save(self, folder: Path) -> None:
        """Have the first rank write a checkpoint into a folder.

        Raises:
            ProcessLostError: it died.
            Exception: what it raises, such as `OSError`.
        """
        self._tell(0, str(folder))
        if isinstance(word := self._word(0), _Raised):
            raise word.error(self._name(0))

    def go_on(self) -> None:
        """Have all ranks train the next epoch."""
        for number in range(len(self.pipes)):
            self._tell(number, None)

    def end(self) -> None:
        """Kill what is left."""
        for process in self.processes:
            process.kill()
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LONGEST_END)

    def _tell(self, number: int, word: object) -> None:
        with contextlib.suppress(ConnectionError):  # it has died, and what it says next is that
            self.pipes[number].send(word)

    def _word(self, number: int) -> Any:
        """What a rank says next.

        Raises:
            ProcessLostError: it died.
            Exception: what it raised as it trained.
        """
        try:
            word = self.pipes[number].recv()
        except (EOFError, ConnectionError):
            raise self._loss(number) from None
        if isinstance(word, _Failed):
            raise self._lost_beside(number) or word.raised.error(self._name(number))
        return word

    def _lost_beside(self, number: int) -> ProcessLostError | None:
        """The loss of another rank, whose end makes those that wait for it raise errors."""
        others: dict[Any, int] = {pipe: other for other, pipe in enumerate(self.pipes) if other != number}
        deadline = time.monotonic() + _GRACE
        while others and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(others), left):
                other = others[pipe]
                try:
                    word = self.pipes[other].recv()
                except (EOFError, ConnectionError):
                    return self._loss(other)
                if isinstance(word, _Failed):
                    del others[pipe]
        return None

    def _loss(self, number: int) -> ProcessLostError:
        process = self.processes[number]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_LONGEST_END)
        code = process.returncode
        if code is None or code >= 0:
            return ProcessLostError(f"{self._name(number)} ended by itself (exit code {code}); its error is in the log")
        how = f"{self._name(number)} was killed ({signal.Signals(-code).name})"
        if code == -signal.SIGKILL:
            how += "; if nobody killed it, the machine ran out of memory"
        return ProcessLostError(how)

    def _name(self, number: int) -> str:
        return f"rank {number} of {len(self.processes)}"


@dataclass(frozen=True)
class _Failed:
    """The last word of a rank that raised."""

    raised: _Raised


@contextlib.contextmanager
def _started(config: TrialConfig, resume_from: Path | None) -> Iterator[_Ranks]:
    """All ranks, at work; none is left at the end."""
    ranks = _Ranks([], [])
    with tempfile.TemporaryDirectory(prefix="tune-topkd-ranks-") as folder, contextlib.ExitStack() as stack:
        stack.callback(ranks.end)
        for number in range(config.ranks):
            process, pipe = _start()
            ranks.processes.append(process)
            ranks.pipes.append(pipe)
            resumed = None if resume_from is None else str(resume_from)
            task = _Task(number, config.model_dump(mode="json"), resumed, str(Path(folder, "meeting")))
            ranks._tell(number, task)
        yield ranks


def _start() -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = Pipe()
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)  # a user's modules may come from anywhere
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # that most networks have no unused weights is no news
    environment = {"GLOO_SOCKET_IFNAME": "lo"} | quiet | os.environ | {"PYTHONPATH": paths}
    command = [sys.executable, "-P", "-c", _PROGRAM, str(os.getpid()), str(theirs.fileno())]
    try:
        return subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment), ours  # noqa: S603 (our own)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()  # if it stayed open here, a rank's death would not close the pipe


# --- in a rank ------------------------------------------------------------------------------------------------------


def work(descriptor: int) -> None:
    """Train as one of the ranks, whose pipe this is the descriptor of."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who watches over the ranks
    pipe = Connection(descriptor)
    try:
        _train(_heard(pipe), pipe)
    except Exception as error:  # noqa: BLE001 (who watches over the ranks raises it)
        _say(pipe, _Failed(_Raised.of(error)))
        _leave()


def _train(task: _Task, pipe: Connection) -> None:
    from tune_topkd.train.loop import Training  # which begins what is here

    whole = TrialConfig.model_validate(task.config)
    number, size = task.number, whole.ranks
    device = _device(whole, number)
    config = whole.model_copy(update={"threads": max((whole.threads or 1) // size, 1)})
    with joined(number, size, device, Path(task.meeting_place)) as group, in_share(config, device):
        torch.manual_seed(config.seed % 2**64)
        trial = Training(config, device, group)
        if task.resume_from is not None:
            trial.restore(Path(task.resume_from))
        while trial.epoch < config.recipe.epochs and not trial.diverged:
            _draw_by_itself(config, group, trial.epoch + 1)
            trial.run_epoch()
            _say(pipe, _Epoch(trial.epoch, dict(trial.metrics) if group.is_first else {}))
            while (folder := _heard(pipe)) is not None:
                _say(pipe, _saved(trial, Path(folder)))
        weights = io.BytesIO()
        if group.is_first:
            torch.save(trial.model.state_dict(), weights)
        _say(pipe, _Done(trial.epoch, dict(trial.metrics), trial.diverged, weights.getvalue()))


def _device(config: TrialConfig, number: int) -> torch.device:
    """The GPU of a rank, which becomes the current one; the CPU where there is none, or none is asked for."""
    if config.gpu_share == 0 or not torch.cuda.is_available():
        return torch.device("cpu")
    if (there := torch.cuda.device_count()) < config.ranks:
        raise ValueError(f"a training on {config.ranks} GPUs sees {there} of them (CUDA_VISIBLE_DEVICES)")
    torch.cuda.set_device(number)
    return default_device()


def _draw_by_itself(config: TrialConfig, group: Group, epoch: int) -> None:
    """Give a rank random numbers of its own, so that dropout is not the same in all parts of a batch.

    Those of the first rank go on as in a training by itself, and are in its checkpoints.
    """
    if not group.is_first:
        drawn = hashlib.sha256(repr((config.seed, epoch, group.number)).encode()).digest()
        torch.manual_seed(int.from_bytes(drawn[:8]))


def _saved(trial: Any, folder: Path) -> _Raised | None:
    """Write a checkpoint: what it raises."""
    try:
        trial.save(folder)
    except Exception as error:  # noqa: BLE001 (who asked for the checkpoint raises it)
        return _Raised.of(error)
    return None


def _heard(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except (EOFError, ConnectionError):
        _leave()


def _say(pipe: Connection, word: object) -> None:
    try:
        pipe.send(word)
    except ConnectionError:
        _leave()


def _leave() -> NoReturn:
    """End at once: other ranks may never answer, or nobody listens any more."""
    sys.stderr.flush()
    os._exit(1)


def _pickled(error: BaseException) -> bytes | None:
    """An exception that can be had from its bytes again; None of another."""
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)  # noqa: S301 (our own)
    except Exception:  # noqa: BLE001 (exceptions of others may hold anything)
        return None
    return pickled
