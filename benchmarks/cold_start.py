"""Time from the start of Python to the first image of a saved pipeline. Every call starts a new process.

The peer loads the same folder with transformers alone: the prior by `AutoModelForCausalLM`, the tokenizer by
`AutoModel` with the model files in the folder. It calls `generate` and `decode_codes`. Both lanes choose the most
likely codes, and their images are compared before the measurement.
"""

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import sampling, tokenizer
from benchmarks.case import OURS, Case, Prepared
from pipelines import VQGANPipeline
from stage1_vqgan import VQGANImageProcessor

PRIORS = {"cpu": "narrow", "gpu": "111M", "tiny": "tiny 111M"}
ROOT = Path(__file__).parents[1]

PROGRAMS = {
    OURS: """
import sys
from pipelines import VQGANPipeline

pipe = VQGANPipeline.from_pretrained(sys.argv[1], device=sys.argv[3])
pipe.generate(class_labels=[1], temperature=0.0).images[0].save(sys.argv[2])
""",
    "transformers alone": """
import sys
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM

prior = AutoModelForCausalLM.from_pretrained(sys.argv[1], subfolder="prior").to(sys.argv[3])
vqgan = AutoModel.from_pretrained(sys.argv[1] + "/vqgan", trust_remote_code=True).to(sys.argv[3])
prompt = torch.tensor([[vqgan.config.num_embeddings + 1]], device=sys.argv[3])
codes = prior.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False)[:, 1:]
with torch.no_grad():
    pixels = vqgan.decode_codes(codes.view(1, *vqgan.config.grid))[0]
array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
Image.fromarray(array).save(sys.argv[2])
""",
}


class Saved:
    """A pipeline with random weights in a temporary folder, which is removed with this object."""

    def __init__(self, suite: str):
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "pipeline"
        vqgan = copy.deepcopy(tokenizer.tokenizer(suite))
        layout = replace(sampling.layout_of(PRIORS[suite]), tokenizer_fingerprint=vqgan.compute_fingerprint())
        prior = sampling.make_prior(PRIORS[suite], torch.device("cpu"), torch.float32)
        processor = VQGANImageProcessor(vqgan.config.image_size, vqgan.config.in_channels)
        VQGANPipeline(vqgan, prior, processor, layout).save_pretrained(self.path)

    def start(self, lane: str, device: torch.device) -> np.ndarray:
        """Runs the program of a lane and returns its image."""
        file = Path(self.folder.name) / "image.png"
        command = [sys.executable, "-c", PROGRAMS[lane], str(self.path), str(file), device.type]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{lane}: {done.stderr[-2000:]}")
        return np.array(Image.open(file))


def prepared(lane: str, suite: str, device: torch.device) -> Prepared:
    """The start of a lane's program. A first start fills the disk caches."""
    return partial(Saved(suite).start, lane, device)


def agree(suite: str, device: torch.device) -> Mapping[str, Any]:
    """The largest difference of pixel values in [0, 255].

    Raises:
        AssertionError: the difference is above 1.
    """
    saved = Saved(suite)
    ours, theirs = (saved.start(lane, device).astype(int) for lane in PROGRAMS)
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 1
    return {"largest difference of a pixel": int(np.abs(ours - theirs).max())}


def cases(suite: str, device: torch.device, data: str | None) -> Iterator[Case]:
    """One image."""
    yield Case(
        row="cold start",
        setting=f"{PRIORS[suite]} prior, first image",
        lanes={lane: partial(prepared, lane, suite, device) for lane in PROGRAMS},
        agree=partial(agree, suite, device),
        unit="starts/s",
        count=1,
        memory=False,
    )
