"""Sweeps as jobs of a Ray cluster, through Ray's job API: submitted, listed, read and stopped from outside of it.

A job's driver runs on the cluster's head and outlives the terminal that submitted it. What it is told about itself is kept
with it, as Ray's metadata, so that no list of jobs is kept anywhere else.
"""

import asyncio
import http.client
import logging
import os
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune_topkd.errors import TuneTopKDError
from tune_topkd.execution.cluster import ResourceError
from tune_topkd.execution.cluster import check_address
from tune_topkd.execution.cluster import check_token
from tune_topkd.execution.cluster import in_one_line
from tune_topkd.execution.cluster import token_problem

SECONDS_TO_STOP = 60
"""That a job has to end by itself once it is asked to; Ray's own are 3, in which no sweep writes its `stop` line."""
_LONGEST_KNOCK = 3.0
_SWEEPS, _RUNS, _OURS = "tune_topkd.sweeps", "tune_topkd.runs", "tune_topkd"
_OVER = ("succeeded", "failed", "stopped")
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_DASHBOARD_VARIABLE = "RAY_API_SERVER_ADDRESS"
_NO_AGENT = (
    "the head's agent, which starts jobs, does not answer. Where the head has only just been started, submit again in some "
    "seconds; else another Ray on its machine holds the agent's port (52365): start the head with "
    "`ray start --head --dashboard-agent-listen-port=0`"
)


class JobError(TuneTopKDError):
    """A job cannot be submitted, found, read or stopped."""


@dataclass(frozen=True)
class Job:
    """A job of ours, as the cluster tells of it."""

    id: str
    sweeps: tuple[str, ...]
    runs: str
    """The runs folder, on the cluster."""
    status: str
    """`pending`, `running`, `succeeded`, `failed` or `stopped`."""
    message: str
    """The last line of what the cluster says of it."""
    submitted: float
    """Seconds since 1970."""
    ended: float | None
    """The same; None while it is not over."""

    @property
    def is_over(self) -> bool:
        """Whether it will do no more."""
        return self.status in _OVER


class Jobs:
    """The jobs of a cluster."""

    def __init__(self, address: str) -> None:
        """Find the cluster's dashboard, which takes the jobs.

        Args:
            address: `http://HOST:PORT` of the dashboard (8265, if nobody has changed it), or `HOST:PORT` of the head.

        Raises:
            ResourceError: nothing answers there, it asks for another token, or Ray's job API is not installed here.
        """
        self.address = address
        url = address.rstrip("/") if address.startswith(("http://", "https://")) else _dashboard_of(address)
        _knock(url, address)
        check_token(address)
        with _only(url), self._told("cannot be asked for its jobs"):
            from ray.job_submission import JobSubmissionClient

            for name in _TALKATIVE:
                logging.getLogger(name).setLevel(logging.WARNING)
            self._client = JobSubmissionClient(url)

    def submit(
        self, words: Sequence[str], sweeps: Sequence[str], runs: str, folder: Path, variables: Mapping[str, str]
    ) -> Job:
        """Have the cluster run a command of ours.

        Args:
            words: the command and its arguments, as `python -m tune_topkd` takes them.
            sweeps: those that it runs.
            runs: where they lie on the cluster.
            folder: becomes the job's working directory, and that of its workers: a copy travels.
            variables: of the job's environment.

        Raises:
            JobError: a job that is not over runs one of these sweeps, or the cluster refuses.
        """
        for job in self.all():
            if not job.is_over and job.runs == runs and set(job.sweeps) & set(sweeps):
                name = sorted(set(job.sweeps) & set(sweeps))[0]
                raise JobError(
                    f"{name}: job {job.id} runs it already; `logs {job.id}` shows it, `stop {job.id}` ends it"
                )
        name = f"tune-topkd-{sweeps[0]}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.urandom(2).hex()}"
        environment = {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(SECONDS_TO_STOP), **variables}
        with self._told("refuses the job"):
            self._client.submit_job(
                entrypoint="exec python -m tune_topkd " + shlex.join(words),
                submission_id=name,
                runtime_env={"working_dir": str(folder), "env_vars": environment},
                metadata={_OURS: "1", _SWEEPS: " ".join(sweeps), _RUNS: runs},
            )
        return self.find(name)

    def all(self) -> list[Job]:
        """The jobs of ours, the oldest first.

        Raises:
            JobError: the cluster does not tell.
        """
        with self._told("does not list its jobs"):
            found = [_job(details) for details in self._client.list_jobs() if _OURS in (details.metadata or {})]
        return sorted(found, key=lambda job: job.submitted)

    def find(self, name: str) -> Job:
        """The job of this id, or the newest one that runs a sweep of this name.

        Raises:
            JobError: there is none; names those that there are.
        """
        jobs = self.all()
        found = [job for job in jobs if job.id == name] or [job for job in jobs if name in job.sweeps]
        if not found:
            known = ", ".join(job.id for job in jobs[-5:]) or "there are none"
            raise JobError(f"{name}: no such job or sweep at {self.address}; the newest jobs: {known}")
        return found[-1]

    def text(self, job: Job) -> str:
        """What it has written so far.

        Raises:
            JobError: the cluster does not tell.
        """
        with self._told(f"does not show what {job.id} has written"):
            return str(self._client.get_job_logs(job.id))

    def follow(self, job: Job, write: Callable[[str], None]) -> Job:
        """Hand over what it writes, from its beginning to its end; the job as it then stands.

        Raises:
            JobError: the connection is lost; the job is none the worse.
        """

        async def pass_on() -> None:
            async for text in self._client.tail_job_logs(job.id):
                write(text)

        with self._told(f"no longer shows what {job.id} writes"):
            asyncio.run(pass_on())
        return self._once_over(job, 10.0)

    def stop(self, job: Job) -> Job:
        """Ask it to end, and wait until it has; the job as it then stands.

        Raises:
            JobError: it is over already, or the cluster does not stop it.
        """
        if job.is_over:
            raise JobError(f"{job.id}: is over already ({job.status})")
        with self._told(f"does not stop {job.id}"):
            self._client.stop_job(job.id)
        stopped = self._once_over(job, SECONDS_TO_STOP + 30.0)
        if not stopped.is_over:
            raise JobError(f"{job.id}: was asked to stop and is still {stopped.status}")
        return stopped

    def _once_over(self, job: Job, patience: float) -> Job:
        """The job, once the cluster says that it is over, or as it is after so many seconds."""
        until = time.monotonic() + patience
        while not (found := self.find(job.id)).is_over and time.monotonic() < until:
            time.sleep(0.5)
        return found

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Make one line of what Ray's client raises.

        Raises:
            ResourceError: it asks for another token, or the job API is not installed.
            JobError: anything else.
        """
        import ray.exceptions

        try:
            yield
        except TuneTopKDError:
            raise
        except ray.exceptions.AuthenticationError as error:
            raise ResourceError(f"{self.address}: {token_problem()}") from error
        except Exception as error:  # Ray's client raises RuntimeError, and what requests and aiohttp do
            if "ray[default]" in str(error) or isinstance(error, ImportError):
                rule = "Ray's job API is not installed here: pip install 'tune_topkd[sweep,cluster]'"
                raise ResourceError(rule) from error
            cause = _NO_AGENT if "No available agent" in str(error) else in_one_line(error)
            raise JobError(f"{self.address}: {what}: {cause}") from error


def _job(details: Any) -> Job:
    metadata, over = details.metadata or {}, details.end_time
    lines = (details.message or "").strip().splitlines() or [""]
    return Job(
        id=details.submission_id or "",
        sweeps=tuple(metadata.get(_SWEEPS, "").split()),
        runs=metadata.get(_RUNS, ""),
        status=str(details.status.value).lower(),
        message=lines[-1],
        submitted=(details.start_time or 0) / 1000,
        ended=None if not over else over / 1000,
    )


def _dashboard_of(address: str) -> str:
    """The URL of a cluster's dashboard, which its head knows.

    Raises:
        ResourceError: nothing answers, or it has none.
    """
    check_address(address)
    try:
        from ray.dashboard.utils import ray_address_to_api_server_url

        return str(ray_address_to_api_server_url(address))
    except Exception as error:  # what Ray's own bootstrap raises is of many kinds
        rule = f"no dashboard is known to the cluster's head, and jobs are submitted there: {in_one_line(error)}"
        raise ResourceError(f"{address}: {rule}") from error


def _knock(url: str, address: str) -> None:
    """Ask who is there: Ray's own client waits for ever for who takes the connection and does not answer.

    Raises:
        ResourceError: nobody answers, or it is no dashboard of Ray's.
    """
    where = "it is http://HOST:8265 if nobody has changed it"
    try:
        with urllib.request.urlopen(f"{url}/api/version", timeout=_LONGEST_KNOCK) as answer:  # noqa: S310 (http alone)
            is_ray = b"ray_version" in answer.read(10_000)
    except urllib.error.HTTPError as error:
        is_ray = error.code in (401, 403)  # it asks for a token, which comes next
    except (OSError, ValueError, http.client.HTTPException) as error:
        speaks_not = isinstance(error, http.client.HTTPException)
        reason = "what is there does not speak HTTP" if speaks_not else getattr(error, "reason", error)
        raise ResourceError(f"--address {address}: no Ray dashboard answers at {url}: {reason}; {where}") from error
    if not is_ray:
        raise ResourceError(f"--address {address}: what answers at {url} is no Ray dashboard; {where}")


@contextmanager
def _only(url: str) -> Iterator[None]:
    """Have Ray's client take this address: RAY_ADDRESS would come before it."""
    before = os.environ.get(_DASHBOARD_VARIABLE)
    os.environ[_DASHBOARD_VARIABLE] = url
    try:
        yield
    finally:
        if before is None:
            del os.environ[_DASHBOARD_VARIABLE]
        else:
            os.environ[_DASHBOARD_VARIABLE] = before
