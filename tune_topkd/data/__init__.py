"""Datasets by name, their splits, and batches of them on the device.

Images that are in memory stay uint8 where the split lies (in the GPU's memory, if that is where it was moved); those of
the large datasets stay in their files and are decoded when they come into a batch. They are normalised batch by batch.
All randomness is a counter-based hash, not a generator with a state: the order of an epoch depends on nothing but (seed,
epoch) and the view of an image on nothing but (seed, epoch, index), so that it is the same for every batch size and
number of worker processes, and a resumed or repeated epoch is the same epoch.
"""

from tune_topkd.data.batches import Batch
from tune_topkd.data.batches import batches_of
from tune_topkd.data.batches import epoch_order
from tune_topkd.data.batches import eval_batches
from tune_topkd.data.batches import image_size
from tune_topkd.data.batches import plain_images
from tune_topkd.data.batches import shown
from tune_topkd.data.batches import train_batches
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
    "AnySplit",
    "Batch",
    "Constants",
    "DataError",
    "Dataset",
    "DatasetInfo",
    "DatasetNameError",
    "FileSplit",
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
    "image_size",
    "load_dataset",
    "load_saved",
    "missing_data",
    "needs_files",
    "numbered_views",
    "plain_images",
    "read_as",
    "save_dataset",
    "shown",
    "train_batches",
    "view",
    "view_count",
    "view_numbers",
]
