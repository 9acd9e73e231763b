"""Entry point of the demo app, a web page on which people try a pipeline: `python -m pipelines.app PIPELINE`."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated

from annotated_types import Ge, Le

from configs import ConfigError, Problem, Section, run
from configs.sections import Positive

NO_GRADIO = "gradio is not installed: pip install 'tessella[demo]'"


@dataclass(kw_only=True)
class AppConfig(Section):
    """Opens a web page that generates images with a pipeline, and shows the codes of uploaded ones.

    pipeline: folder or Hub id of the pipeline
    device: where to compute, such as "cpu" or "cuda"; null takes the GPU if there is one
    host: address to listen on; null is this machine alone (or what GRADIO_SERVER_NAME says), 0.0.0.0 is every network
    port: port to listen on; null is the first free one from 7860 up
    max_images: upper limit of the images of one request
    max_waiting: upper limit of the requests that wait; one is computed at a time
    max_upload_megabytes: upper limit of an uploaded file
    max_upload_megapixels: upper limit of the pixels of an uploaded image
    """

    positional = "pipeline"

    pipeline: str
    device: str | None = None
    host: str | None = None
    port: Annotated[int, Ge(1), Le(65535)] | None = None
    max_images: Annotated[int, Ge(1), Le(1000)] = 16
    max_waiting: Positive = 20
    max_upload_megabytes: Positive = 20
    max_upload_megapixels: Positive = 50


def main(config: AppConfig) -> None:
    """Opens the page, and serves it until Ctrl-C.

    gradio, torch and transformers are imported here, because the check of the arguments must not wait for them.

    Raises:
        ConfigError: gradio is not installed, the pipeline cannot be loaded, or the port is in use.
    """
    if find_spec("gradio") is None:
        raise ConfigError([Problem("", NO_GRADIO)])
    from pipelines.commands import load_pipeline
    from pipelines.demo.page import build_page, launch

    page = build_page(load_pipeline(config.pipeline, config.device), config)
    print(f"open {launch(page, config)} in a browser; Ctrl-C ends the app", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run(AppConfig, main, "python -m pipelines.app")
