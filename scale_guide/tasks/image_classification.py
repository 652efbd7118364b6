"""Image classification, with the paper's transforms (PAPER.md section 2).

Images come from scikit-learn's handwritten digits (`digits`, no download), a folder of class folders, a folder of
Parquet files or of `datasets.save_to_disk`, or a dataset of the hub such as ILSVRC/imagenet-1k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

from scale_guide.tasks import Batch, logits, ratio
from scale_guide.tasks._images import ImageSource, Unreadable, open_images
from scale_guide.tasks._labelled import Labelled

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
NUM_DIGITS_TRAIN = 1400  # of 1,797, as in PAPER.md section 6

Transform = Callable[[Any], Tensor]


class ImageData:
    """One split as samples of `input` [3, H, W], `target` and `weight`."""

    def __init__(self, source: ImageSource, transform: Transform, image_size: int, *, strict: bool) -> None:
        self.source = source
        self.transform = transform
        self.image_size = image_size
        self.strict = strict

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sample number `index`; an unreadable image is zeros with weight 0.

        Raises:
            ValueError: an unreadable image, if strict.
        """
        target = self.source.labels[index]
        try:
            image, weight = self.transform(self.source.read(index)), 1.0
        except Unreadable as error:
            if self.strict:
                raise ValueError(
                    f"{self.source.name(index)} cannot be read as an image ({error}), and task.options.strict_data is "
                    "true: repair or remove it, or set task.options.strict_data to false to leave it out"
                ) from error
            image, weight = torch.zeros(3, self.image_size, self.image_size), 0.0
        return {"input": image, "target": torch.tensor(target), "weight": torch.tensor(weight)}


class ImageClassification(Labelled):
    """The task: cross-entropy, top-1 and top-5 accuracy per image."""

    def __init__(self, train: ImageData, validation: ImageData, num_classes: int) -> None:
        self.train = train
        self.validation = validation
        size = train.image_size
        self.facts: dict[str, Any] = {"num_classes": num_classes, "input_shape": (3, size, size)}

    def sample_name(self, index: int) -> str:
        """What to call training sample number `index` in a message: its file, or its row."""
        return self.train.source.name(index)

    @torch.no_grad()
    def scores(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """Sums over scored images: loss, correct (top-1), correct_top5, count."""
        values, weight = logits(output), batch["weight"]
        right = values.topk(min(5, values.shape[1]), dim=1).indices == batch["target"][:, None]
        correct = {"correct": self.correct(output, batch) * weight, "correct_top5": right.any(1) * weight}
        sums = {"loss": self.losses(output, batch), **correct, "count": weight}
        return {name: value.sum(dtype=torch.float64) for name, value in sums.items()}

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """Loss (nats per image), accuracy (top-1) and top5_accuracy, both in 0..1."""
        count = sums["count"]
        return {
            "loss": ratio(sums["loss"], count),
            "accuracy": ratio(sums["correct"], count),
            "top5_accuracy": ratio(sums["correct_top5"], count),
        }


class Digits:
    """Handwritten digits [n, 3, H, W], upsampled and normalised once."""

    def __init__(self, images: Tensor, labels: list[int]) -> None:
        self.images = images
        self.labels = labels

    def read(self, index: int) -> Tensor:
        """Image number `index`, [3, H, W]."""
        return self.images[index]

    def name(self, index: int) -> str:
        """Its number: digits are not files."""
        return f"digit {index}"


def build(
    *,
    data: str = "digits",
    image_size: int | None = None,
    train_split: str = "train",
    validation_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    augment: bool | None = None,
    normalize: bool = True,
    strict_data: bool = False,
) -> ImageClassification:
    """Image classification on `data`: digits, a folder, or owner/name of a dataset of the hub.

    Args:
        data: See the head of this file.
        image_size: Height and width; empty: 224, and 32 for digits.
        train_split: Name of the training split or subfolder.
        validation_split: Name of the validation split; empty: validation, valid, val or test, the first that is there.
        image_column: Column of a table; empty: the only image column, or image, img.
        label_column: Column of a table; empty: the only class column, or label, labels.
        augment: Train on random crops and flips; empty: yes, but not for digits.
        normalize: Subtract ImageNet's mean and divide by its standard deviation.
        strict_data: An unreadable image is an error, instead of a row of weight 0.

    Raises:
        ValueError: data that is missing, empty, or has no such split, column or class.
    """
    size = image_size if image_size is not None else 32 if data == "digits" else 224
    if size < 1:
        raise ValueError(f"task.options.image_size is {size}: it must be at least 1; the paper takes 224")
    if data == "digits":
        if train_split != "train" or validation_split or image_column or label_column:
            raise ValueError(
                "task.options.data is 'digits', which has its own two splits and no columns: remove train_split, "
                "validation_split, image_column and label_column"
            )
        crops = v2.Compose(_augmentation(size)) if augment else _unchanged
        train, validation = _digits(size, normalize)
        train_data = ImageData(train, crops, size, strict=strict_data)
        validation_data = ImageData(validation, _unchanged, size, strict=strict_data)
        return ImageClassification(train_data, validation_data, num_classes=10)
    splits, columns = (train_split, validation_split), (image_column, label_column)
    first, second, num_classes = open_images(data, splits, columns)
    train_data = ImageData(first, make_transform(size, augment is not False, normalize), size, strict=strict_data)
    validation_data = ImageData(second, make_transform(size, False, normalize), size, strict=strict_data)
    return ImageClassification(train_data, validation_data, num_classes)


def make_transform(size: int, augment: bool, normalize: bool) -> Transform:
    """Transform of an RGB image to a tensor [3, size, size]: the paper's for training, or the one for validation."""
    steps = _augmentation(size) if augment else [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)]
    steps = [*steps, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    if normalize:
        steps.append(v2.Normalize(MEAN, STD))
    transform: Transform = v2.Compose(steps)
    return transform


def _augmentation(size: int) -> list[Any]:
    return [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]


def _unchanged(image: Tensor) -> Tensor:
    return image


def _digits(size: int, normalize: bool) -> tuple[Digits, Digits]:
    """1,400 training and 397 validation digits [n, 3, size, size] of scikit-learn, always the same ones."""
    from sklearn.datasets import load_digits  # slow to import, and needed here alone

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 16
    images = functional.interpolate(images, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)
    if normalize:
        images = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = order[:NUM_DIGITS_TRAIN], order[NUM_DIGITS_TRAIN:]
    labels = torch.from_numpy(bunch.target)
    first, second = (Digits(images[part].contiguous(), labels[part].tolist()) for part in parts)
    return first, second
