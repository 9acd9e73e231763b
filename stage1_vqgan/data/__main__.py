"""The dry run: what a data set holds, and how its images look to the tokenizer.

Usage: `python -m stage1_vqgan.data CONFIG`, with a configuration of stage 1, or with `--data.dataset NAME` alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from configs import ConfigError, run
from configs.opening import print_facts
from configs.sections import Positive
from stage1_vqgan.configuration_architecture import VQGANArchitecture
from stage1_vqgan.training.config import Stage1Config

GRAY_MODES = {"1", "L", "I", "I;16", "I;16B", "F"}


@dataclass(kw_only=True)
class DataReportConfig(Stage1Config):
    """Says what a data set holds, and trains nothing. The configuration is that of stage 1.

    num_inspected: training images that are decoded, for their sizes, modes, values and damage
    contact_sheet: PNG file of the contact sheet; null writes none
    """

    output_dir: str = "runs/unused"
    max_steps: Positive = 1
    num_inspected: Positive = 300
    contact_sheet: str | None = "contact_sheet.png"

    def size_problems(self, model: VQGANArchitecture) -> Iterable[tuple[str, Any, str]]:
        """None: the losses, whose rules these are, are not computed."""
        return ()


def report(config: DataReportConfig) -> None:
    """Prints facts about the data set, and writes the contact sheet.

    Raises:
        ConfigError: the data set cannot be opened, or has values without a range.
    """
    # These imports are slow, so they come after the check of the arguments.
    from configs.files import write_png
    from stage1_vqgan.data.contact_sheet import contact_sheet
    from stage1_vqgan.data.dataset import ImageDataset
    from stage1_vqgan.data.overview import become, data_facts, look
    from stage1_vqgan.data.sources import load_images
    from stage1_vqgan.data.value_range import training_range
    from stage1_vqgan.pretrained import load_tokenizer, recorded_range

    base = config.model_name_or_path
    model = config.vqgan_config() if base is None else load_tokenizer(base, "model_name_or_path", **config.model).config
    train, validation = load_images(config.data)
    problem, value_range = None, None
    try:
        value_range = training_range(config.data, train, model.in_channels, recorded_range(base) if base else None)
    except ConfigError as error:  # the report shows the values that have no range
        problem = error
    looked = look(train, config.num_inspected, model.in_channels, value_range)
    facts = data_facts(train, validation, looked, model.image_shape, config.data.max_skipped_fraction)
    facts["become"] = become(model.image_shape, model.in_channels, config.data.aspect_ratio)
    if model.in_channels > 1 and looked.modes and looked.modes.keys() <= GRAY_MODES:
        facts["become"] += "; these images are gray, so model.in_channels 1 would do"
    if config.contact_sheet is not None:
        dataset = ImageDataset(
            train, model.image_shape, model.in_channels, aspect_ratio=config.data.aspect_ratio, value_range=value_range
        )
        sheet = contact_sheet(dataset)
        if sheet is not None:
            write_png(config.contact_sheet, sheet)
            facts["contact sheet"] = config.contact_sheet
    print_facts(facts)
    if problem is not None:
        raise problem


if __name__ == "__main__":
    run(DataReportConfig, report, "python -m stage1_vqgan.data")
