"""Classifiers of images, and class metrics of generated images. No classifier needs a download."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from pipelines.evaluation.config import ComparisonConfig
from pipelines.evaluation.image_set import ImageSet
from pipelines.evaluation.reading import SomeImages, all_area_features, as_set, parts, some_pixels

# A set, which is read in parts, or pixels float32 `(N, C, H, W)` in [-1, 1] on the CPU.
Pixels: TypeAlias = ImageSet | Tensor
# Images, and labels int64 `(N,)`.
Labelled: TypeAlias = tuple[Pixels, np.ndarray]

BATCH_SIZE = 256


class Classifier(Protocol):
    """Predicts the labels of images. `Labelled` states the form of images and labels."""

    def fit(self, images: Pixels, labels: np.ndarray) -> "Classifier":
        """Trains from new initial weights."""
        ...

    def predict(self, images: Pixels) -> np.ndarray:
        """The most probable label of each image, int64 `(N,)`."""
        ...


class SupportVectorClassifier:
    """A support vector classifier of area-averaged images. It suffices for digits. Of one class it predicts this class.

    Args:
        feature_size: side of the averaged images in pixels.
        gamma, c: parameters of scikit-learn's `SVC`.
    """

    def __init__(self, feature_size: int, gamma: float, c: float):
        from sklearn.dummy import DummyClassifier
        from sklearn.svm import SVC

        self.feature_size, self.svc, self.of_one = feature_size, SVC(gamma=gamma, C=c), DummyClassifier()

    def fit(self, images: Pixels, labels: np.ndarray) -> "SupportVectorClassifier":
        if len(np.unique(labels)) == 1:
            self.svc = self.of_one
        self.svc.fit(all_area_features(as_set(images), self.feature_size), labels)
        return self

    def predict(self, images: Pixels) -> np.ndarray:
        return self.svc.predict(all_area_features(as_set(images), self.feature_size))


class NetworkClassifier(ABC):
    """A network that is trained from random weights. Shifts by up to an eighth of the side augment its training images.

    Args:
        epochs: passes over the training images.
        flips: mirror training images at random.
        seed: seed of initial weights, order of images, shifts and flips.
        device: device that trains and predicts; on CUDA in bfloat16.
    """

    @abstractmethod
    def network(self, channels: int, num_classes: int) -> nn.Module:
        """A network of images `(B, channels, H, W)` to logits `(B, num_classes)`, with random weights."""

    def __init__(self, epochs: int, flips: bool, seed: int, device: torch.device):
        self.epochs, self.flips, self.seed, self.device = epochs, flips, seed, device
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def fit(self, images: Pixels, labels: np.ndarray) -> "NetworkClassifier":
        images, targets = as_set(images), torch.from_numpy(labels).to(self.device)
        generator = torch.Generator().manual_seed(self.seed)
        self.model = self._initial_model(images.read(range(1)).shape[1], int(labels.max()) + 1)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        batches = -(-len(images) // BATCH_SIZE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=self.epochs * batches)
        self.model.train()
        for _ in tqdm(range(self.epochs), desc="training a classifier", unit="epoch"):
            for rows in torch.randperm(len(images), generator=generator).tensor_split(batches):
                batch = self._augmented(some_pixels(images, rows.numpy()).to(self.device), generator)
                with self.autocast:
                    logits = self.model(batch)
                F.cross_entropy(logits.float(), targets[rows.to(self.device)]).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        return self

    @torch.no_grad()
    def predict(self, images: Pixels) -> np.ndarray:
        self.model.eval()
        with self.autocast:
            chosen = [self.model(batch.to(self.device)).argmax(1) for batch in parts(as_set(images), BATCH_SIZE)]
        return torch.cat(chosen).cpu().numpy()

    def _initial_model(self, channels: int, num_classes: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self.network(channels, num_classes)
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Shifts each image at random, repeating its border, and mirrors it at random if `flips`."""
        count, _, height, width = images.shape

        def places(size: int) -> Tensor:
            reach = size // 8
            shift = torch.randint(-reach, reach + 1, (count, 1), generator=generator)
            return (torch.arange(size) + shift).clamp(0, size - 1).to(self.device)

        rows, columns = places(height), places(width)
        if self.flips:
            mirrored = (torch.rand(count, 1, generator=generator) < 0.5).to(self.device)
            columns = torch.where(mirrored, columns.flip(1), columns)
        image = torch.arange(count, device=self.device)[:, None, None]
        shifted = images.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]
        return shifted.permute(0, 3, 1, 2)


class ResNetClassifier(NetworkClassifier):
    """torchvision's ResNet-18 for small images: its first convolution is 3×3 with stride 1, and no pooling follows it.

    Source: He et al. 2016, "Deep residual learning for image recognition", with the first layer of its section 4.2.
    """

    def network(self, channels: int, num_classes: int) -> nn.Module:
        from torchvision.models import resnet18

        model = resnet18(num_classes=num_classes)
        model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
        return model


class CNNClassifier(NetworkClassifier):
    """Three convolutions with batch norm, each followed by pooling: small enough for a CPU."""

    def network(self, channels: int, num_classes: int) -> nn.Module:
        layers: list[nn.Module] = []
        for width in (32, 64, 128):
            convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            layers += [convolution, nn.MaxPool2d(2, ceil_mode=True), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


NETWORKS: dict[str, type[NetworkClassifier]] = {"cnn": CNNClassifier, "resnet": ResNetClassifier}


def new_classifier(config: ComparisonConfig, device: torch.device) -> Classifier:
    """An untrained classifier of the configured kind."""
    if config.classifier == "svc":
        return SupportVectorClassifier(config.feature_size, config.classifier_gamma, config.classifier_c)
    flips = config.data.augmentation.horizontal_flip
    return NETWORKS[config.classifier](config.classifier_epochs, flips, config.seed, device)


def accuracy(classifier: Classifier, images: Pixels, labels: np.ndarray) -> float:
    """Fraction of images whose label the classifier predicts."""
    return float((classifier.predict(images) == labels).mean())


def class_accuracy(
    classifier: Callable[[], Classifier], train: Labelled, validation: Labelled, generated: Labelled
) -> dict[str, float]:
    """`class_accuracy` and `class_accuracy_real` of `class_metrics`."""
    return _class_accuracy(classifier().fit(*train), validation, generated)


def class_metrics(
    classifier: Callable[[], Classifier], train: Labelled, validation: Labelled, generated: Labelled
) -> dict[str, float]:
    """Measures how recognisable the classes of generated images are, and how well they replace real training images.

    Args:
        classifier: returns a new, untrained classifier.
        train, validation, generated: images with their labels.

    Returns:
        `class_accuracy`: accuracy on the generated images of a classifier trained on the training images;
        `class_accuracy_real`: its accuracy on the validation images, for comparison;
        `classification_accuracy_score`: accuracy on the validation images of a classifier trained on generated images;
        `classification_accuracy_score_real`: accuracy on the validation images of a classifier trained on an equal
        number of training images, or on all of them if they are fewer.

    Source: Ravuri and Vinyals 2019, "Classification accuracy score for conditional generative models".
    """
    of_generated, of_train = classifier().fit(*generated), classifier().fit(*train)
    return {
        **_class_accuracy(of_train, validation, generated),
        "classification_accuracy_score": accuracy(of_generated, *validation),
        "classification_accuracy_score_real": accuracy(
            _of_as_many(classifier, of_train, train, len(generated[1])), *validation
        ),
    }


def _class_accuracy(of_train: Classifier, validation: Labelled, generated: Labelled) -> dict[str, float]:
    return {
        "class_accuracy": accuracy(of_train, *generated),
        "class_accuracy_real": accuracy(of_train, *validation),
    }


def _of_as_many(classifier: Callable[[], Classifier], of_train: Classifier, train: Labelled, count: int) -> Classifier:
    """A classifier of `count` training images; that of all of them if they are not more."""
    images, labels = train
    if count >= len(labels):
        return of_train
    some = np.linspace(0, len(labels) - 1, count).astype(int)
    return classifier().fit(SomeImages(as_set(images), some), labels[some])
