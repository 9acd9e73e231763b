"""The page of the demo app, made with gradio."""

import html
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from configs import ConfigError, Problem
from configs.memory import is_out_of_memory
from pipelines.defaults import STANDARD
from pipelines.demo import actions
from pipelines.demo.config import AppConfig
from pipelines.pipeline_vqgan import VQGANPipeline

SAME_SEED = "The same seed, class and options give the same image. The next images have the next seeds."
OUT_OF_MEMORY = "There is not enough memory for this. Ask for fewer images."
FAILED = "The app failed at this. Its log says why."
WHAT_IT_SHOWS = "Upload an image to see what the tokenizer keeps of it: no generated image can be sharper than this."
PICTURES = (
    ("Original", "as the tokenizer sees it"),
    ("Reconstruction", "from the codes alone"),
    ("Codes", "each has its own colour"),
)
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1}
KEPT_SECONDS = 3600  # uploads and results are deleted after this time
SMALL = 128  # pixels; smaller images are shown with sharp pixels instead of blurred
CSS = """
.picture img { width: 100%; height: 100%; object-fit: contain; }
.pixels img { image-rendering: pixelated; }
"""


def build_page(pipeline: VQGANPipeline, config: AppConfig) -> gr.Blocks:
    """The page for a pipeline. It sends nothing to others."""
    pipeline.set_progress_bar_config(disable=True)
    name = shown_name(config.pipeline)
    with gr.Blocks(title=name, analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        gr.Markdown(f"# {name}\n{describe(pipeline)}")
        with gr.Tab("Generate"):
            _generate_tab(pipeline, config.max_images)
        with gr.Tab("Reconstruct"):
            _reconstruct_tab(pipeline, config)
    return page.queue(max_size=config.max_waiting)


def launch(page: gr.Blocks, config: AppConfig) -> str:
    """Starts to serve the page, and returns its address.

    Raises:
        ConfigError: the port is in use.
    """
    Image.MAX_IMAGE_PIXELS = config.max_upload_megapixels * 10**6
    try:
        _, address, _ = page.launch(
            server_name=config.host,
            server_port=config.port,
            max_file_size=f"{config.max_upload_megabytes}mb",
            css=CSS,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            run_history=False,
            footer_links=["api"],
        )
    except OSError as error:
        raise ConfigError([Problem("port", f"received {config.port}; it cannot be used; choose another")]) from error
    return address


def shown_name(pipeline: str) -> str:
    """The title of the page: the Hub id. A folder is not named, because visitors need not know paths of the server."""
    return "Image generator" if Path(pipeline).is_dir() else pipeline


def describe(pipeline: VQGANPipeline) -> str:
    """What the pipeline is, in one line."""
    layout, classes = pipeline.layout, len(pipeline.class_names)
    height, width = (side * layout.downsampling_factor for side in layout.grid)
    about = f"images of {classes} classes" if classes else "images"
    prior = "BERT-style" if layout.family == "masked" else "GPT-style"
    return (
        f"Generates {about}, {width}×{height} pixels. A {prior} prior writes {layout.codes_text} codes "
        f"out of {layout.num_codes}; a VQGAN tokenizer decodes them to an image."
    )


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Every exception inside becomes a message in the page; only those that are no visitor's mistake are logged."""
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error
    except Exception as error:
        raise gr.Error(OUT_OF_MEMORY if is_out_of_memory(error) else FAILED) from error


def _generate_tab(pipeline: VQGANPipeline, most: int) -> None:
    choices = [(name, label) for label, name in enumerate(pipeline.class_names)]
    guided, start = actions.can_guide(pipeline), {**STANDARD, **pipeline.sampling_defaults}
    scale = pipeline.sampling_defaults.get("guidance_scale", 1.5 if guided else 1.0)
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            classes = gr.Dropdown(
                choices,
                value=[label for _, label in choices[:2]],
                multiselect=True,
                label="Classes",
                info="Leave empty for images of any class." if pipeline.layout.has_null else None,
                visible=bool(choices),
            )
            count = gr.Slider(1, most, min(4, most), step=1, label="Images of each class" if choices else "Images")
            another = gr.Button("New seed", size="sm")
            seed = gr.Number(0, precision=0, label="Seed", info=SAME_SEED, buttons=[another])
            guidance = gr.Slider(
                0,
                max(5, scale),
                scale,
                step=0.05,
                label="Guidance",
                info="How clearly images show their class; 1 is none.",
                visible=guided,
            )
            with gr.Accordion("More options", open=False):
                temperature = gr.Slider(
                    0,
                    max(2, start["temperature"]),
                    start["temperature"],
                    step=0.05,
                    label="Temperature",
                    info="Below 1: more typical. Above 1: more varied.",
                )
                top_k = gr.Slider(
                    0,
                    max(pipeline.layout.num_codes, start["top_k"]),
                    start["top_k"],
                    step=1,
                    label="Top-k",
                    info="Draws among the k likeliest codes; 0 is all.",
                )
                top_p = gr.Slider(
                    min(0.05, start["top_p"]),
                    1,
                    start["top_p"],
                    step=0.05,
                    label="Top-p",
                    info="Draws among the likeliest codes of this total probability.",
                )
                min_p = gr.Slider(
                    0,
                    1,
                    start["min_p"],
                    step=0.01,
                    label="Min-p",
                    info="Leaves out codes this much less likely than the likeliest.",
                )
            button = gr.Button("Generate", variant="primary", elem_id="generate")
        with gr.Column(scale=2):
            gallery = gr.Gallery(
                label="Images", columns=4, format="png", object_fit="contain", height=600, elem_classes=_sharp(pipeline)
            )
    bar, unit = gr.Progress(), "steps" if pipeline.layout.family == "masked" else "codes"

    def generate(
        classes: list[int] | None,
        count: int,
        seed: int,
        guidance_scale: float,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        progress: gr.Progress = bar,
    ) -> list[Any]:
        with errors_as_messages():
            return actions.generate(
                pipeline,
                most,
                classes or [],
                count,
                seed,
                guidance_scale,
                lambda done, total: progress((done, total), desc="sampling", unit=unit),
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
            )

    inputs = [classes, count, seed, guidance, temperature, top_k, top_p, min_p]
    button.click(generate, inputs, gallery, **ONE_AT_A_TIME)
    another.click(lambda: random.randrange(actions.LARGEST_SEED), None, seed, queue=False, api_visibility="private")


def _reconstruct_tab(pipeline: VQGANPipeline, config: AppConfig) -> None:
    limits = f"up to {config.max_upload_megabytes} MB and {config.max_upload_megapixels} megapixels"
    with gr.Row():
        with gr.Column():
            upload = gr.File(label=f"An image, {limits}", file_types=["image"], type="binary", height=140)
        with gr.Column():
            facts = gr.Markdown(WHAT_IT_SHOWS)
    with gr.Row():
        pictures = [_picture(pipeline, *words) for words in PICTURES]

    def reconstruct(content: bytes | None) -> list[Any]:
        with errors_as_messages():
            result = actions.reconstruct(pipeline, content)
            return [result.original, result.reconstruction, result.mosaic, result.facts]

    upload.upload(reconstruct, upload, [*pictures, facts], show_progress_on=pictures, **ONE_AT_A_TIME)
    upload.clear(
        lambda: [None, None, None, WHAT_IT_SHOWS], None, [*pictures, facts], queue=False, api_visibility="private"
    )


def _picture(pipeline: VQGANPipeline, name: str, about: str) -> gr.Image:
    with gr.Column(min_width=240):
        gr.Markdown(f"**{name}** – {about}")
        return gr.Image(
            show_label=False,
            label=name,
            format="png",
            interactive=False,
            height=360,
            buttons=["download", "fullscreen"],
            elem_classes=_sharp(pipeline),
        )


def _sharp(pipeline: VQGANPipeline) -> str:
    return "picture pixels" if min(pipeline.image_processor.image_shape) < SMALL else "picture"
