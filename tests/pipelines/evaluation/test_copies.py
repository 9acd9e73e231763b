"""The copying check in an evaluation, and its picture."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from configs import load_config
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.copies import COPIES_NAME, FIGURES, check_copies, known_images, save_copies
from stage1_vqgan import VQGANImageProcessor
from tests import image_sets
from tests.image_sets import TensorImages

CPU = torch.device("cpu")


def random_images(count, seed=0):
    return TensorImages(image_sets.random_images(count, seed=seed))


@pytest.fixture
def config(tmp_path):
    values = {"pipeline": "p", "output_dir": str(tmp_path), "data": {"dataset": "digits"}}
    return load_config(EvaluationConfig, overrides=values)


def checked(config, pipeline, train, held_out, generated):
    known = known_images(config, pipeline, None, train)
    return check_copies(pipeline, CPU, known, held_out, generated)


class Halved:
    """A tokenizer that loses the contrast of images."""

    device = CPU

    def __call__(self, images):
        return SimpleNamespace(reconstruction=images / 2)


def test_copies_are_found_and_shown(config, tmp_path):
    train, held_out = random_images(100), random_images(60, seed=1)
    copies = TensorImages(train.read(range(40, 56)))
    check, reason = checked(config, None, train, held_out, copies)
    assert reason == "" and tuple(check.figures) == FIGURES
    assert check.figures["suspected_copies"] == 1
    assert sorted(one.train for one in check.suspects) == list(range(40, 56))
    save_copies(config, check, [train], copies, VQGANImageProcessor(32, 3).postprocess)
    picture = Image.open(tmp_path / COPIES_NAME)
    assert picture.height == 4 * (picture.height // 4) + 2  # two rows of copies, each above its training images
    honest, _ = checked(config, None, train, held_out, random_images(60, seed=2))
    assert honest.figures["suspected_copies"] < 0.3


def test_a_pipeline_is_compared_with_reconstructions(config):
    """Copies of what the tokenizer gives back are found although the training images look otherwise."""
    train, held_out = random_images(100), random_images(60, seed=1)
    copies = TensorImages((((train.read(range(16)) / 2 + 1) * 127.5).round() / 127.5) - 1)
    check, _ = checked(config, SimpleNamespace(vqgan=Halved()), train, held_out, copies)
    assert check.figures["suspected_copies"] == 1 and max(one.score for one in check.suspects) < 1e-3


@pytest.mark.parametrize("augmentation", [{"horizontal_flip": True}, {"ten_crop": True, "max_zoom": 1.1}])
def test_mirrored_copies_are_found_where_the_training_mirrors(config, augmentation):
    train, held_out = random_images(100), random_images(60, seed=1)
    copies = TensorImages(train.read(range(16)).flip(3))
    assert checked(config, None, train, held_out, copies)[0].figures["suspected_copies"] < 0.5
    data = {"dataset": "digits", "augmentation": augmentation}
    mirroring = load_config(EvaluationConfig, overrides={"pipeline": "p", "output_dir": "o", "data": data})
    assert checked(mirroring, None, train, held_out, copies)[0].figures["suspected_copies"] == 1


def test_too_few_images_are_a_reason(config):
    check, reason = checked(config, None, random_images(10), random_images(5), random_images(5))
    assert check is None and reason.startswith("validation: received 5 images")
