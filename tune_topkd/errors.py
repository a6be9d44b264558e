"""The root of every error that is raised at a user.

Each class lives in the room that raises it:

    TuneTopKDError
    ├── FileError                 storage: a file cannot be read
    ├── StoreNameError            storage: a URI names no store that is known
    ├── StoreError                storage: a store cannot be reached or refuses; an `OSError` too
    │   └── NoObjectError         storage: there is no object of a name
    ├── UserCodeError             user_code: what a name stands for cannot be imported
    ├── ConfigError               config: what the user wrote cannot be run
    ├── LedgerError               ledger: a ledger cannot be used
    │   └── TakenOverError        ledger: another process drives the sweep now
    ├── NoAnswerError             export: no trial reached the full budget
    ├── NotAloneError             export: a loss cannot be written as a file that stands alone
    ├── StudentError              export: the student of a sweep cannot be written in a format
    ├── ModelNameError            models: nothing can be built under a name
    ├── OutputError               models: what a network returns is not logits
    ├── DataError                 data: a dataset cannot be used
    │   ├── DatasetNameError      data: no dataset is known by a name
    │   ├── ImageFileError        data: an image file cannot be used
    │   └── WorkerError           data: a data worker failed
    ├── ProcessLostError          here, since train raises it and execution knows it: a process of a training died
    ├── TeacherError              teacher: a teacher's logits cannot be used
    ├── CheckpointError           train: a checkpoint is missing or damaged
    ├── ResourceError             execution: the cluster cannot run the trials
    ├── JobError                  execution: a job on a cluster cannot be submitted, found, read or stopped
    ├── NoScratchError            execution: no folder for temporary files
    ├── ChoiceError               search: a sampler or scheduler that a config names cannot be used
    ├── UndecidedError            search: what comes next cannot be decided
    ├── NoDeviceError             sweep: a trial's share has a GPU, and torch sees none
    ├── SweepTroubleError         execution: a running sweep cannot go on
    ├── ChangedFileError          execution: a file that results depend on has changed
    └── TrackingError             tracking: MLflow fails
        └── SkippedError          tracking: artifacts cannot be made or stored; MLflow answers

The disk's own errors stay `OSError`, and `tune_topkd.loss`, which stands alone, raises plain `ValueError`.
"""


class TuneTopKDError(ValueError):
    """What was asked for cannot be done; the message tells the user why, and is all that they need to see."""


class ProcessLostError(TuneTopKDError):
    """A process that trains beside others died: nothing of the training's own, so it can be tried again from its
    checkpoint."""
