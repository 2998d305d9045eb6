"""RHO-loss: train on the sequences whose loss can still fall the most (Mindermann et al., 2022, arXiv 2206.07137).

A sequence's score is its loss less its irreducible loss: its loss under a model trained on a holdout. What is noise is
hard for both models, what is learnt already is easy for both. The experiment names the model by `losses:`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.config.errors import UserError
from pipeline_lib.training.budget import unfit_count
from pipeline_lib.training.methods import Method

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline_lib.artifacts.job import Job
    from pipeline_lib.config.schema import Model
    from pipeline_lib.training.hooks import Batch
    from pipeline_lib.training.recipes.cram import Settings as Recipe

NEEDS = ("losses",)


class Settings(Base):
    """Of every `mega_batch` sequences read, the `global_batch` with the highest scores are trained on."""

    type: Literal["rho-loss"] = "rho-loss"
    mega_batch: int = Field(3072, gt=0, description="sequences that are looked at for an optimizer step")
    masks: Literal["matched", "fresh"] = Field(
        "matched",
        description="an encoder's masks when sequences are looked at: those that the irreducible losses were measured "
        "with, so that masks add no noise to the scores; fresh: others, those that are trained on then, as published",
    )


def refuses(settings: Settings, recipe: Recipe, model: Model) -> str | None:
    """There must be something to choose from, and losses are those of the train split."""
    if recipe.split != "train":
        return f"it chooses from the train split, and the recipe trains on split {recipe.split}"
    if settings.mega_batch < recipe.global_batch:
        return f"mega_batch {settings.mega_batch} is smaller than global_batch {recipe.global_batch}"
    return unfit_count(recipe.budget, "mega_batch", settings.mega_batch)


def reads(settings: Settings, recipe: Recipe) -> float:
    """Sequences read for each that is trained on."""
    return settings.mega_batch / recipe.global_batch


def method(settings: Settings, job: Job) -> Method:
    """The method."""
    return RhoLoss(settings, job)


class RhoLoss(Method):
    """Chooses by losses that stage `score` has measured.

    Attributes:
        losses_N: irreducible loss of each training sequence, by its number.
        seen, chosen: sequences so far.
        sums: of the scores of all of them and of the chosen ones, for the result.
    """

    def __init__(self, settings: Settings, job: Job) -> None:
        super().__init__(settings, job)
        self._job = job
        self.seen = self.chosen = 0
        self.sums = {"seen": 0.0, "chosen": 0.0}

    def prepare(self) -> None:
        """Read the irreducible losses, which must be of the sequences that are trained on.

        Raises:
            UserError: they are not, or nobody knows the masks that they were measured with.
        """
        import torch

        from pipeline_lib.data.example_losses import ExampleLosses

        losses, settings, loader = ExampleLosses.load(self._job.inputs["losses"]), self.cram.settings, self.loop.loader
        if losses.seq_len != settings.seq_len or len(losses.loss_N) != loader.n_sequences:
            raise UserError(
                "the irreducible losses are of other sequences than those that are trained on",
                where=str(self._job.inputs["losses"]),
                value=f"{len(losses.loss_N)} sequences of {losses.seq_len} tokens",
                allowed=f"{loader.n_sequences} of {settings.seq_len}",
                fix="remove the artifact, so that it is made again",
            )
        self.losses_N = torch.from_numpy(losses.loss_N)
        self.masks: Any = None
        if self.cram.encoder and self.settings.masks == "matched":
            self.masks = self._masks(losses.masks or {})

    def _masks(self, known: dict[str, Any]) -> Any:
        from pipeline_lib.training.masking import special_tokens
        from pipeline_lib.training.score import Masks

        if known.get("seed") is None:
            raise UserError(
                "nobody knows the masks that the imported losses were measured with",
                where="recipe.cram.methods.rho-loss.masks",
                value="matched",
                allowed="fresh",
                fix="set `masks: fresh`",
            )
        token, special = special_tokens(self._job)
        vocab = self.loop.model.config.vocab_size
        return Masks(seed=known["seed"], rate=known["rate"], token=token, special=special, vocab=vocab)

    def draw(self, step: int, count: int, below: Callable[[int], Batch]) -> Batch:
        """Look at a mega-batch, and keep the highest scores, in the order in which they were read."""
        candidates = below(-(-count * self.settings.mega_batch // self.cram.settings.global_batch))
        losses_N = self.cram.losses(self._shown(candidates), step)
        scores_N = losses_N.double() - self.losses_N[candidates["sequence"]].double()
        chosen = highest(scores_N, count)
        self._count(scores_N, chosen)
        return {name: tensor[chosen] for name, tensor in candidates.items()}

    def _shown(self, candidates: Batch) -> Batch:
        """The candidates as they are looked at."""
        import torch

        from pipeline_lib.training.losses import IGNORED

        if self.masks is None:
            return candidates
        hidden_BT = candidates["labels"] != IGNORED
        text_BT = torch.where(hidden_BT, candidates["labels"], candidates["input_ids"])
        return {**candidates, **self.masks.batch(text_BT, candidates["sequence"].tolist())}

    def _count(self, scores_N: Tensor, chosen: Tensor) -> None:
        self.seen, self.chosen = self.seen + len(scores_N), self.chosen + len(chosen)
        self.sums["seen"] += float(scores_N.nan_to_num(0.0).sum())
        self.sums["chosen"] += float(scores_N[chosen].nan_to_num(0.0).sum())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The counts: what is chosen is a function of the place in the text and the weights."""
        return {}, {"seen": self.seen, "chosen": self.chosen, "sums": self.sums}

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.seen, self.chosen, self.sums = values["seen"], values["chosen"], dict(values["sums"])

    def result(self) -> dict[str, Any]:
        """How many it looked at and chose, and their mean reducible losses in nats a target."""
        return {
            "seen": self.seen,
            "chosen": self.chosen,
            "mean_score_seen": self.sums["seen"] / max(self.seen, 1),
            "mean_score_chosen": self.sums["chosen"] / max(self.chosen, 1),
            "masks": self.settings.masks if self.cram.encoder else None,
        }


def highest(scores_N: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, ascending; of equal ones the first, and one that is no number last."""
    order_N = scores_N.nan_to_num(nan=float("-inf")).argsort(descending=True, stable=True)
    return order_N[:count].sort().values
