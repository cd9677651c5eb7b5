"""The classifier's own section of `params.yaml`; it imports nothing heavy, because Airflow's form is made from it.

How large the pictures are is no matter of the model's: `ingest.images.image_size` says it, `Images.image_size` tells.
"""

from __future__ import annotations

from slipway.config import Section


class ClassifierParams(Section):
    """A residual network over square RGB images."""


MODEL = ClassifierParams

TECHNIQUES = ("int8", "bf16")
