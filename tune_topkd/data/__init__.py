"""Datasets by name, their splits, and batches of them on the device.

Small images are uint8 tensors in memory, on the GPU if the split was moved there; large ones stay in their files and
are decoded when they come into a batch. Both are normalised batch by batch. All randomness is a counter-based hash
without a state: the order of an epoch is a function of (seed, epoch), and the view of an image one of (seed, epoch,
index). So both are the same for every batch size and number of worker processes, and a resumed or repeated epoch is the
same epoch.

Inside: `sources` says what a dataset has to offer, `formats`, `folders` and `glyphs` are those of this project,
`outside` and `conformance` are for those of others; `datasets` finds one by its name and splits it, `splits` is what
comes out, `saving` shares it between processes; `batches` and `views` make batches of it, in `workers` if need be, by
`randomness`; `decoding`, `walking`, `notes` and `identity` look at files.
"""

from tune_topkd.data.batches import WHOLE
from tune_topkd.data.batches import Batch
from tune_topkd.data.batches import Part
from tune_topkd.data.batches import batches_of
from tune_topkd.data.batches import epoch_order
from tune_topkd.data.batches import eval_batches
from tune_topkd.data.batches import normalised_views
from tune_topkd.data.batches import plain_images
from tune_topkd.data.batches import train_batches
from tune_topkd.data.batches import view_side
from tune_topkd.data.datasets import check_readable
from tune_topkd.data.datasets import data_notes
from tune_topkd.data.datasets import dataset_info
from tune_topkd.data.datasets import dataset_names
from tune_topkd.data.datasets import fingerprint
from tune_topkd.data.datasets import load_dataset
from tune_topkd.data.datasets import missing_data
from tune_topkd.data.datasets import needs_files
from tune_topkd.data.datasets import read_as
from tune_topkd.data.errors import DataError
from tune_topkd.data.errors import DatasetNameError
from tune_topkd.data.saving import is_in_memory
from tune_topkd.data.saving import load_saved
from tune_topkd.data.saving import save_dataset
from tune_topkd.data.sources import Constants
from tune_topkd.data.sources import Parts
from tune_topkd.data.sources import Source
from tune_topkd.data.sources import data_root
from tune_topkd.data.splits import AnySplit
from tune_topkd.data.splits import Dataset
from tune_topkd.data.splits import DatasetInfo
from tune_topkd.data.splits import FileSplit
from tune_topkd.data.splits import Split
from tune_topkd.data.views import numbered_views
from tune_topkd.data.views import view
from tune_topkd.data.views import view_count
from tune_topkd.data.views import view_numbers

__all__ = [
    "WHOLE",
    "AnySplit",
    "Batch",
    "Constants",
    "DataError",
    "Dataset",
    "DatasetInfo",
    "DatasetNameError",
    "FileSplit",
    "Part",
    "Parts",
    "Source",
    "Split",
    "batches_of",
    "check_readable",
    "data_notes",
    "data_root",
    "dataset_info",
    "dataset_names",
    "epoch_order",
    "eval_batches",
    "fingerprint",
    "is_in_memory",
    "load_dataset",
    "load_saved",
    "missing_data",
    "needs_files",
    "normalised_views",
    "numbered_views",
    "plain_images",
    "read_as",
    "save_dataset",
    "train_batches",
    "view",
    "view_count",
    "view_numbers",
    "view_side",
]
