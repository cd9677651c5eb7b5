"""Recipes: the names that `compress.recipes` takes, and what each of them does to a model.

int8              calibrated: ranges read from training samples, weights rounded (post-training quantization)
qat               INT8, trained with rounding in the forward pass (quantization-aware training)
tuned             FP32, trained on as long as qat: what of another recipe's gain is the training's alone
tuned-int8        the same, then calibrated
bf16              the FP32 model in an engine that computes in bfloat16
prune-30          30 % of the channels taken out, step by step, with training after each
distill-30        the same, where the full model teaches the training
prune-50-qat      first the one, then the other; likewise prune-50-int8, distill-50-qat …
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How one compressed model is made."""

    name: str
    share: float = 0.0
    """Share of the channels that are taken out."""
    taught: bool = False
    """Whether the full model teaches the training."""
    trained: bool = False
    """Whether INT8 is trained, not calibrated."""
    precision: str = "fp32"
    """fp32, bf16 or int8."""
    tuned: bool = False
    """Whether the model is trained on as it is."""

    @property
    def finetunes(self) -> bool:
        """Whether the model is trained again."""
        return self.tuned or self.share > 0 or self.trained


FULL = Recipe("fp32")
"""The model as it was trained."""


def parse(name: str) -> Recipe:
    """Read the name of a recipe, whose form `params.RECIPE` has checked."""
    steps = name.split("-")
    return Recipe(
        name,
        tuned=steps[0] == "tuned",
        share=int(steps[1]) / 100 if steps[0] in ("prune", "distill") else 0.0,
        taught=steps[0] == "distill",
        trained=steps[-1] == "qat",
        precision={"int8": "int8", "qat": "int8", "bf16": "bf16"}.get(steps[-1], "fp32"),
    )
