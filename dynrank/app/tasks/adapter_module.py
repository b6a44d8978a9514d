"""A transformers model with LoRA as a LightningModule: its optimizer, its loss and its metrics."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MetricCollection

from dynrank.app.models.pretrained import head_names
from dynrank.app.tasks.optimizers import make_optimizer
from dynrank.distributed.sharding import shard_frozen
from dynrank.layers.finding import adapter_parameters
from dynrank.layers.placing import add_lora

# The label of a token without a loss; torch has the same default.
IGNORED = -100
# The split of each test loader, see TextTask; the last loader, of prompts, is LanguageModeling's.
TESTED = ("test", "final/val", "final/train", "test")


class AdapterModule(LightningModule):
    """Trains an adapter by cross-entropy; a run exports ``self.model``. Subclasses define :meth:`predict`.

    A test also evaluates the validation examples and as many training examples with the final weights, and logs the
    results as ``final/val/…`` and ``final/train/loss``.

    A head of ``model`` with new random weights is trained whole. ``lora`` are arguments of :func:`dynrank.add_lora`,
    ``optimizer`` those of :func:`dynrank.app.tasks.optimizers.make_optimizer`. ``quality`` is {``val``, ``test`` or
    ``final/val``: metrics of logits and labels to log with the loss}. ``label_smoothing`` is the share of the target
    that is spread over all classes in training.
    """

    def __init__(
        self,
        model: nn.Module,
        lora: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        quality: Mapping[str, MetricCollection],
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer_options = optimizer
        self.label_smoothing = label_smoothing
        add_lora(model.train(), modules_to_save=head_names(model), **lora)
        self.quality = nn.ModuleDict(quality)

    def predict(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (..., classes) in float32, and labels (...), which are ``IGNORED`` at positions without a loss."""
        raise NotImplementedError

    def loss(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """The mean cross-entropy over all labels that are not ``IGNORED``."""
        options: Any = {"ignore_index": IGNORED, "label_smoothing": label_smoothing}
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **options)

    def configure_model(self) -> None:
        # Only ModelParallelStrategy has a device mesh; load_from_checkpoint calls this method, too.
        if self.device_mesh is not None:
            shard_frozen(self.model, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        head = [p for name in head_names(self.model) for p in self.model.get_submodule(name).parameters()]
        steps = int(self.trainer.estimated_stepping_batches)
        return make_optimizer(adapter_parameters(self.model), head, steps, **self.optimizer_options)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(*self.predict(batch), self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluate(batch, TESTED[dataloader_idx])

    def evaluate(self, batch: dict[str, Tensor], split: str) -> None:
        """Log the loss of a batch, and the metrics of ``split``."""
        logits, labels = self.predict(batch)
        # A float, because Lightning 2.6 averages the counts over processes and would round ints down.
        options: Any = {"batch_size": float((labels != IGNORED).sum()), "add_dataloader_idx": False}
        shown = not split.startswith("final/")
        self.log(f"{split}/loss", self.loss(logits, labels), prog_bar=shown, sync_dist=True, **options)
        if split in self.quality:
            quality: Any = self.quality[split]
            quality.update(logits, labels)
            self.log_dict(quality, **options)
