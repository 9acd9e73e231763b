"""What a run reports: scalars, pictures and settings in TensorBoard, and a line for each evaluation."""

from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import load_config
from configs.run_folder import RunFolder
from stage1_vqgan.training.reporting import Reporter
from tests.process_runs import stage1_config


def test_tensorboard_gets_scalars_pictures_and_settings(tmp_path, capsys):
    config = stage1_config(tmp_path)
    run = RunFolder(config)
    run.path.mkdir(exist_ok=True)
    accelerator = Accelerator(log_with=["tensorboard"], project_dir=config.output_dir)
    with Reporter(accelerator, run, 0) as reporter:
        reporter.evaluation({"psnr": 20.12345, "images": 360}, 3)
        reporter.image("reconstructions", Image.new("L", (4, 4)), 3)
    assert "step 3: psnr 20.12, images 360\n" in capsys.readouterr().out
    events = EventAccumulator(str(run.path / "tessella-stage1")).Reload()
    assert [(event.step, round(event.value, 3)) for event in events.Scalars("eval/psnr")] == [(3, 20.123)]
    assert [event.step for event in events.Images("reconstructions")] == [3]
    (text,) = events.Tensors("config/text_summary")
    shown = text.tensor_proto.string_val[0].decode().removeprefix("```yaml\n").removesuffix("```")
    (tmp_path / "shown.yaml").write_text(shown)
    assert load_config(type(config), str(tmp_path / "shown.yaml")) == config
