"""A CLIP of transformers as two functions: images to embeddings, and texts to embeddings.

Shape letters: B batch, S side of the images that CLIP takes, D width of an embedding.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from configs.arguments import described, instance
from configs.hub import is_repo_id
from configs.model_folder import check_model_folder, local_folder
from configs.problems import one_line
from configs.weights_files import in_our_words
from stage1_vqgan.image_processing_pixels import pixels_of, to_pil


class CLIPEncoder:
    """A frozen CLIP, SigLIP, or other model of transformers that embeds images and texts in one space.

    Args:
        name: folder or Hub id. Only safetensors are read, and no code of the folder runs.

    Attributes:
        size: S, height and width in pixels of the images that it takes.

    Raises:
        ValueError: no such model can be loaded from it.
    """

    def __init__(self, name: str | Path):
        instance("clip", name, (str, Path), "a folder or a Hub id")
        if not Path(name).is_dir() and not is_repo_id(str(name)):
            raise ValueError(f"clip: received {described(str(name))}; there is no such folder")
        try:
            self.folder = local_folder(str(name))
            check_model_folder(self.folder)
            with in_our_words(self.folder):
                self.model = _model(self.folder)
                processor: Any = AutoImageProcessor.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            message = f"it must hold a CLIP or SigLIP of transformers: {one_line(error)}"
            raise ValueError(f"clip: received {described(str(name))}; {message}") from error
        self.size: int = self.model.config.vision_config.image_size
        self._processor = processor
        self._mean, self._std = (torch.tensor(x).view(3, 1, 1) for x in (processor.image_mean, processor.image_std))

    def to(self, device: torch.device) -> "CLIPEncoder":
        """Moves the model."""
        self.model.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings of unit length `(B, D)` of float32 images `(B, 3, S, S)` in [0, 1]; differentiable."""
        pixel_values = (images - self._mean) / self._std
        return F.normalize(self.model.get_image_features(pixel_values=pixel_values).pooler_output, dim=-1)

    @torch.no_grad()
    def embed_prompt(self, prompt: str | Image.Image) -> Tensor:
        """The embedding of unit length `(D,)` of a text, or of an image, which CLIP's own processor prepares.

        Raises:
            ValueError: an image has values that are no colours, a text has more tokens than the model takes, or its
                tokenizer cannot be loaded.
        """
        if isinstance(prompt, str):
            features = self.model.get_text_features(**self._tokens(prompt).to(self.model.device))
        else:
            features = self.model.get_image_features(pixel_values=self._pixel_values(prompt).to(self.model.device))
        return F.normalize(features.pooler_output[0], dim=-1)

    def _pixel_values(self, image: Image.Image) -> Tensor:
        try:
            colours = to_pil(pixels_of(image, 3).numpy())
        except ValueError as error:
            raise ValueError(f"prompts: {str(error).removeprefix('image: ')}") from error
        return self._processor(colours, return_tensors="pt")["pixel_values"].float()

    def _tokens(self, text: str) -> Any:
        with in_our_words(self.folder):
            tokenizer: Any = AutoTokenizer.from_pretrained(self.folder)
        most = self.model.config.text_config.max_position_embeddings
        tokens = tokenizer(text, padding="max_length", max_length=most, return_tensors="pt")
        if (count := tokens["input_ids"].shape[1]) > most:
            raise ValueError(f"prompts: received {described(text)}; it has {count} tokens, and this CLIP takes {most}")
        return tokens


def _model(folder: Path) -> Any:
    """The model, in float32 and evaluation mode.

    Raises:
        ValueError: it embeds no images and texts, or weights are missing.
    """
    options: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32}
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True, **options)
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise ValueError(f"a {type(model).__name__} does not embed images and texts")
    if absent := sorted(info["missing_keys"]):
        raise ValueError(f"{len(absent)} of its weights are missing, such as {absent[0]}")
    return model.eval().requires_grad_(False)
