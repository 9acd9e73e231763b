"""Arguments that `generate` refuses. The message names the argument, the value and what is allowed."""

import pytest
import torch

# {argument: value}, words of the message
GENERATE = {
    "label beyond the last": ({"class_labels": [3, 10]}, "class_labels: received 10; allowed are ids 0 to 9 or names"),
    "negative label": ({"class_labels": -1}, "class_labels: received -1; allowed are ids 0 to 9"),
    "unknown name": ({"class_labels": "dog"}, "class_labels: received 'dog'"),
    "fractional label": ({"class_labels": [1.5]}, "class_labels: received 1.5"),
    "true for a label": ({"class_labels": [True]}, "class_labels: received True"),
    "one number that is no label": ({"class_labels": 1.5}, "class_labels: received 1.5"),
    "no labels": ({"class_labels": []}, "class_labels: received an empty list; needs at least one label"),
    "no images": ({"num_images": 0}, "num_images: received 0; must be a whole number from 1 up"),
    "half an image": ({"num_images": 1.5}, "num_images: received 1.5; must be a whole number from 1 up"),
    "no images of a label": ({"class_labels": 1, "num_images_per_label": 0}, "num_images_per_label: received 0"),
    "images as text": ({"class_labels": 1, "num_images_per_label": "2"}, "num_images_per_label: received '2'"),
    "both counts": ({"class_labels": 1, "num_images": 2}, "num_images: received 2; cannot be given with class_labels"),
    "count of no label": ({"num_images_per_label": 2}, "num_images_per_label: received 2; needs class_labels"),
    "guidance of nothing": ({"guidance_scale": 2.0}, "guidance_scale: received 2.0; guidance needs class_labels"),
    "guidance NaN": ({"class_labels": 1, "guidance_scale": float("nan")}, "guidance_scale: received nan; allowed is"),
    "guidance negative": ({"class_labels": 1, "guidance_scale": -1.0}, "guidance_scale: received -1.0; allowed is"),
    "guidance schedule": (
        {"guidance_schedule": "cosin"},
        "guidance_schedule: received 'cosin'; allowed are",
    ),
    "guidance power": ({"guidance_power": 0}, "guidance_power: received 0; allowed is a number above 0"),
    "guidance interval that ends first": ({"guidance_interval": (0.5, 0.2)}, "guidance_interval: received (0.5, 0.2)"),
    "guidance interval of one end": ({"guidance_interval": 0.5}, "guidance_interval: received 0.5; allowed are two"),
    "temperature NaN": ({"temperature": float("nan")}, "temperature: received nan; allowed is a number from 0 up"),
    "temperature infinite": ({"temperature": float("inf")}, "temperature: received inf"),
    "temperature negative": ({"temperature": -0.1}, "temperature: received -0.1"),
    "temperature as text": ({"temperature": "hot"}, "temperature: received 'hot'"),
    "top_k negative": ({"top_k": -1}, "top_k: received -1; allowed is a whole number from 0 up (0 is all)"),
    "top_k fraction": ({"top_k": 2.5}, "top_k: received 2.5"),
    "top_k NaN": ({"top_k": float("nan")}, "top_k: received nan"),
    "top_p zero": ({"top_p": 0.0}, "top_p: received 0.0; allowed is a number from 1.2e-38 to 1"),
    "top_p NaN": ({"top_p": float("nan")}, "top_p: received nan"),
    "min_p above 1": ({"min_p": 1.5}, "min_p: received 1.5; allowed is a number from 0 to 1"),
    "output type": ({"output_type": "png"}, "output_type: received 'png'; allowed are 'pil', 'np', 'pt', 'codes'"),
    "batch size": ({"batch_size": 0}, "batch_size: received 0; must be a whole number from 1 up"),
    "seed for a generator": ({"generator": 7}, "generator: received 7; needs a torch.Generator"),
    "seed negative": ({"seed": -1}, "seed: received -1; must be a whole number from 0 to 9223372036854775807"),
    "seed true": ({"seed": True}, "seed: received True; must be a whole number"),
    "seed half": ({"seed": 0.5}, "seed: received 0.5; must be a whole number"),
    "seed as text": ({"seed": "0"}, "seed: received '0'; must be a whole number"),
    "seed that leaves no room": ({"seed": 2**63 - 2, "num_images": 3}, "seed: received 9223372036854775806; must be"),
    "seeds in a list": ({"seed": [1, 2], "num_images": 3}, "seed: received a list of 2 for 3 images; needs one each"),
    "seed in a list": ({"seed": [1, None], "num_images": 2}, "seed: received None; must be a whole number"),
    "seed and generator": (
        {"seed": 0, "generator": torch.Generator()},
        "seed: received 0, and a generator as well; pass only one of them",
    ),
    "generators": ({"num_images": 2, "generator": []}, "generator: received a list of 0 for 2 images"),
}


@pytest.mark.parametrize("case", GENERATE)
def test_arguments_of_generate(tiny_pipeline, case):
    arguments, words = GENERATE[case]
    with pytest.raises(ValueError) as caught:
        tiny_pipeline.generate(**arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) <= 240
