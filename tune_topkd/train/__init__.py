"""One trial: a student trained on one device, its metrics reported epoch by epoch.

    from tune_topkd.train import train

    result = train(config, report, resume_from)   # a TrialConfig, a Reporter, a folder with a checkpoint or None

`train` does not know who calls it: the `Reporter` that it is given is told the metrics of every epoch and may save a
checkpoint. A training that is resumed from a checkpoint ends as if it had never been interrupted, on the CPU bit for
bit.

Inside: `loop` trains, `optim` builds optimiser and learning-rate schedule, `checkpoint` writes, reads and compares
checkpoints, `device` chooses the device and limits threads and GPU memory, `probe` measures speed and memory.
"""

from tune_topkd.train.checkpoint import CHECKPOINT_NAME
from tune_topkd.train.checkpoint import CheckpointError
from tune_topkd.train.checkpoint import checkpoint_metrics
from tune_topkd.train.device import GPU_PART
from tune_topkd.train.device import LONGEST_WAIT_FOR_MEMORY
from tune_topkd.train.device import default_device
from tune_topkd.train.device import device_of
from tune_topkd.train.device import in_share
from tune_topkd.train.loop import BEST_TEST_TOP1
from tune_topkd.train.loop import CPU_PERCENT
from tune_topkd.train.loop import EPOCH_SECONDS
from tune_topkd.train.loop import GRAD_NORM
from tune_topkd.train.loop import IMAGES_PER_SECOND
from tune_topkd.train.loop import LEARNING_RATE
from tune_topkd.train.loop import TEST_TOP1
from tune_topkd.train.loop import TEST_TOP5
from tune_topkd.train.loop import TRAIN_LOSS
from tune_topkd.train.loop import TRAIN_PREFIX
from tune_topkd.train.loop import VAL_TOP1
from tune_topkd.train.loop import VAL_TOP5
from tune_topkd.train.loop import Reporter
from tune_topkd.train.loop import Save
from tune_topkd.train.loop import Training
from tune_topkd.train.loop import TrainResult
from tune_topkd.train.loop import null_reporter
from tune_topkd.train.loop import train
from tune_topkd.train.probe import Probe
from tune_topkd.train.probe import Speed

__all__ = [
    "BEST_TEST_TOP1",
    "CHECKPOINT_NAME",
    "CPU_PERCENT",
    "EPOCH_SECONDS",
    "GPU_PART",
    "GRAD_NORM",
    "IMAGES_PER_SECOND",
    "LEARNING_RATE",
    "LONGEST_WAIT_FOR_MEMORY",
    "TEST_TOP1",
    "TEST_TOP5",
    "TRAIN_LOSS",
    "TRAIN_PREFIX",
    "VAL_TOP1",
    "VAL_TOP5",
    "CheckpointError",
    "Probe",
    "Reporter",
    "Save",
    "Speed",
    "TrainResult",
    "Training",
    "checkpoint_metrics",
    "default_device",
    "device_of",
    "in_share",
    "null_reporter",
    "train",
]
