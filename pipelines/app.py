"""Entry point of the demo app, a web page on which people try a pipeline: `python -m pipelines.app PIPELINE`."""

from importlib.util import find_spec

from configs import ConfigError, Problem, run
from pipelines.demo.config import AppConfig

NO_GRADIO = "gradio is not installed: pip install 'tessella[demo]'"


def main(config: AppConfig) -> None:
    """Opens the page, and serves it until Ctrl-C.

    gradio, torch and transformers are imported here, because the check of the arguments must not wait for them.

    Raises:
        ConfigError: gradio is not installed, the pipeline cannot be loaded or has further conditions, or the port is
            in use.
    """
    if find_spec("gradio") is None:
        raise ConfigError([Problem("", NO_GRADIO)])
    from pipelines.commands import load_pipeline
    from pipelines.demo.actions import require_classes_only
    from pipelines.demo.page import build_page, launch

    pipeline = load_pipeline(config.pipeline, config.device)
    require_classes_only(pipeline)
    page = build_page(pipeline, config)
    print(f"open {launch(page, config)} in a browser; Ctrl-C ends the app", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run(AppConfig, main, "python -m pipelines.app")
