"""Settings of the demo app."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from configs import Section
from configs.sections import Positive


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
