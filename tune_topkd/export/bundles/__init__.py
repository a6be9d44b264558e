"""The formats of `export` that are several files, each for a framework of others.

Inside: `torchdistill`, `mdistiller`, `timm` and `pytorch` each write the format of that name; `common` holds what they
share, `datasets` and `networks` say what is known of a dataset and a network there, `recipes` writes optimiser and schedule.
"""

from collections.abc import Callable
from collections.abc import Mapping

from tune_topkd.export.bundles.mdistiller import as_mdistiller
from tune_topkd.export.bundles.pytorch import as_pytorch
from tune_topkd.export.bundles.timm import as_timm
from tune_topkd.export.bundles.torchdistill import as_torchdistill
from tune_topkd.export.tuned import TunedConfig

BUNDLES: Mapping[str, Callable[[TunedConfig], dict[str, str]]] = {
    "torchdistill": as_torchdistill,
    "mdistiller": as_mdistiller,
    "timm": as_timm,
    "pytorch": as_pytorch,
}
"""The formats that are several files, by name: a tuned config to the files' texts by their names."""
