"""What a person does with a sweep."""

from tune_topkd.sweep.maintenance import audit_sweep

__all__ = ["audit_sweep"]
