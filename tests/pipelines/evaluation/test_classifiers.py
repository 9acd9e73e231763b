"""Classifiers of images, and class metrics."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from pipelines.evaluation.classifiers import (
    CNNClassifier,
    ResNetClassifier,
    SupportVectorClassifier,
    accuracy,
    class_metrics,
)


def corners(seed: int, count: int) -> tuple[torch.Tensor, np.ndarray]:
    """Noisy images `(count, 1, 8, 8)`; the class, 0 to 3, is the bright corner."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(4, size=count)
    pixels = rng.normal(scale=0.3, size=(count, 1, 8, 8)) - 0.5
    for image, label in zip(pixels, labels, strict=True):
        image[0, 4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 1
    return torch.from_numpy(pixels).float().clamp(-1, 1), labels


def resnet(epochs: int = 1, flips: bool = False, seed: int = 0) -> ResNetClassifier:
    return ResNetClassifier(epochs, flips, seed, torch.device("cpu"))


def learnt(classifier) -> float:
    """Accuracy on a fifth of the digits of a classifier that has learnt the others."""
    digits = load_digits()
    images = torch.from_numpy(digits.images / 8 - 1).float()[:, None]
    is_test = np.arange(len(images)) % 5 == 0
    return accuracy(classifier.fit(images[~is_test], digits.target[~is_test]), images[is_test], digits.target[is_test])


@pytest.mark.slow
def test_resnet_learns():
    assert learnt(resnet(epochs=8)) > 0.9


def test_cnn_learns():
    assert learnt(CNNClassifier(15, False, 0, torch.device("cpu"))) > 0.9


@pytest.mark.parametrize("size", [(5, 5), (28, 28), (9, 33)])
def test_cnn_takes_images_of_any_size(size):
    network = CNNClassifier(1, False, 0, torch.device("cpu"))._initial_model(3, 7).eval()
    assert network(torch.zeros(2, 3, *size)).shape == (2, 7)


def test_resnet_depends_on_its_seed_alone():
    torch.manual_seed(17)
    before = torch.get_rng_state()
    first, again = (resnet().fit(*corners(0, 4)).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    one, other = (resnet(seed=seed)._initial_model(1, 4).state_dict() for seed in (0, 1))
    assert not torch.equal(one["fc.weight"], other["fc.weight"])
    assert not torch.equal(one["fc.weight"], first["fc.weight"])
    assert torch.equal(torch.get_rng_state(), before)


def test_images_are_shifted_and_mirrored_whole():
    image = torch.arange(64.0).view(1, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    made = resnet(flips=True)._augmented(image.expand(300, -1, -1, -1), generator)
    padded = np.pad(image[0, 0].numpy(), 1, mode="edge")
    shifted = [padded[top:, left:][:8, :8] for top in range(3) for left in range(3)]
    expected = {view.tobytes() for square in shifted for view in (square, np.fliplr(square))}
    assert {row[0].contiguous().numpy().tobytes() for row in made} == expected
    plain = resnet()._augmented(image.expand(300, -1, -1, -1), generator)
    assert {row[0].contiguous().numpy().tobytes() for row in plain} == {square.tobytes() for square in shifted}


def test_class_metrics():
    train, validation = corners(0, 200), corners(1, 100)
    generated = corners(2, 40)
    swapped = generated[0], np.array([0, 1, 3, 2])[generated[1]]

    def classifier() -> SupportVectorClassifier:
        return SupportVectorClassifier(feature_size=4, gamma=0.1, c=10.0)

    good, bad = (class_metrics(classifier, train, validation, samples) for samples in (generated, swapped))
    assert set(good.values()) == {1.0}
    of_first_two = (generated[1] < 2).mean(), (validation[1] < 2).mean()
    assert (bad["class_accuracy"], bad["classification_accuracy_score"]) == of_first_two
    assert bad["class_accuracy_real"] == bad["classification_accuracy_score_real"] == 1.0


@pytest.mark.parametrize("made, sizes", [(40, [40, 40, 200]), (240, [200, 240])])
def test_as_many_real_images_as_generated_ones(made, sizes):
    """Where this is all training images, a classifier of all of them is there already."""
    found = []

    class Counted(SupportVectorClassifier):
        def fit(self, pixels, labels):
            found.append(len(labels))
            return super().fit(pixels, labels)

    metrics = class_metrics(lambda: Counted(4, 0.1, 10.0), corners(0, 200), corners(1, 20), corners(2, made))
    assert sorted(found) == sizes and metrics["classification_accuracy_score_real"] == 1


def test_images_of_one_class():
    """As in a file that holds the images of a single class."""
    train, validation = corners(0, 200), corners(1, 80)
    of_one = (train[0][train[1] == 2], train[1][train[1] == 2])
    metrics = class_metrics(lambda: SupportVectorClassifier(8, 0.02, 10.0), train, validation, of_one)
    assert metrics["class_accuracy"] == 1
    assert metrics["classification_accuracy_score"] == (validation[1] == 2).mean()
