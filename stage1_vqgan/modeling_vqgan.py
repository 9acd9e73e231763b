"""The VQGAN tokenizer: encoder, quantizer, decoder.

Shape letters: B batch, C image channels, H W image size, D code width, h w code grid, K codebook size. Codes have the
shape `(B, h, w)`; with several codes at each position `(B, h, w, G)`, and of several grids `(B, L)`, see `codes_shape`.

Source: Esser et al. 2021, "Taming transformers for high-resolution image synthesis", section 3.1. Modules have the
names of the original, so its published weights can be loaded.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization as init
from transformers.utils import ModelOutput

from .configuration_vqgan import VQGANConfig
from .modeling_fingerprint import HUB_OPTIONS, facts_of, fingerprint_of, refuse_weights, verify_fingerprint
from .modeling_networks import Decoder, Encoder
from .quantizers import build_quantizer, codes_shape


@dataclass
class VQGANEncoderOutput(ModelOutput):
    """Output of [`VQGANModel.encode`].

    Attributes:
        codes: int64 `(B, h, w)`, indices of codebook entries; or another shape, see `codes_shape`.
        latents: `(B, D, h, w)` before quantization.
        quantized: float32 `(B, D, h, w)`, codebook entries; the quantizer passes their gradient on to the latents.
        codebook_loss: float32 scalar.
    """

    codes: Tensor | None = None
    latents: Tensor | None = None
    quantized: Tensor | None = None
    codebook_loss: Tensor | None = None

    @property
    def image_tokens(self) -> Tensor | None:
        """The codes, under the name that transformers gives them."""
        return self.codes


@dataclass
class VQGANOutput(VQGANEncoderOutput):
    """Output of [`VQGANModel.forward`]: the output of `encode` and of the decoder.

    Attributes:
        reconstruction: `(B, C, H, W)`, roughly in [-1, 1], not clamped.
        decoder_features: `(B, base_channels × channel_multiplier[0], H, W)`, input of the decoder's last convolution.
    """

    reconstruction: Tensor | None = None
    decoder_features: Tensor | None = None


class VQGANModel(PreTrainedModel):
    """Image tokenizer: `encode` images into codes, `decode_codes` back into images.

    Pixels are float32 `(B, C, H, W)` in [-1, 1]. Codes are int64 `(B, h, w)`, `(B, h, w, G)` or `(B, L)`. Flattened,
    they are grid by grid in raster order, with the codes of a position one after another.
    """

    config_class = VQGANConfig
    config: VQGANConfig
    base_model_prefix = "vqgan"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    # save_pretrained copies the model files, so that AutoModel loads them with trust_remote_code without this package
    _auto_class = "AutoModel"

    def __init__(self, config: VQGANConfig):
        super().__init__(config)
        config.validate_architecture()  # fields may have been changed since it was made
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.embed_dim, 1)
        self.quantize = build_quantizer(
            config.quantizer, config.num_embeddings, config.embed_dim, config.quantizer_options
        )
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, 1)
        self.decoder = Decoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initializes a module as PyTorch does, like the original; a codebook initializes itself."""
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(module.weight[0].numel())
            init.uniform_(cast(Tensor, module.bias), -bound, bound)
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            module.reset_parameters()

    def encode(self, pixel_values: Tensor) -> VQGANEncoderOutput:
        """Encodes images.

        Args:
            pixel_values: `(B, C, H, W)` in [-1, 1]; the downsampling factor must divide H and W.

        Raises:
            ValueError: the shape does not fit the configuration, or the dtype or device does not fit the weights.
        """
        self._check_pixels(pixel_values)
        latents = self.quant_conv(self.encoder(pixel_values))
        out = self.quantize(latents)
        return VQGANEncoderOutput(codes=out.codes, latents=latents, quantized=out.quantized, codebook_loss=out.loss)

    def decode_codes(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Decodes int64 codes into images `(B, C, H, W)`, roughly in [-1, 1], not clamped.

        Args:
            codes: codes as `encode` returns them.
            grid: h and w, for codes of several grids; by default the grid of the training resolution.

        Raises:
            ValueError: see `check_codes`.
        """
        self.check_codes(codes, grid)
        return self.decode(self.lookup(codes, grid))

    def lookup(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """The quantized latents that codes stand for, float32 `(B, D, h, w)`; see `decode_codes`. Checks nothing."""
        return self.quantize.lookup(codes, self.grid_of(codes, grid))

    def grid_of(self, codes: Tensor, grid: tuple[int, int] | None = None) -> tuple[int, int]:
        """h and w of codes. Codes of several grids do not show them: `grid`, or the grid of the training resolution."""
        shows_them = len(codes_shape(self.config.grids)) > 1
        if shows_them and codes.ndim > 2:
            return (codes.shape[1], codes.shape[2])
        return self.config.grid if grid is None else grid

    def check_codes(self, codes: Tensor, grid: tuple[int, int] | None = None) -> None:
        """Refuses all but int64 codes in `[0, K)`, of the shape that `encode` returns, on the model's device.

        Waits once for a GPU.

        Args:
            codes, grid: see `decode_codes`.

        Raises:
            ValueError: the codes have another shape, dtype or device, or a code is outside the range.
        """
        _check_tensor("codes", codes, self.device)
        _check_grid(grid)
        shape = codes_shape(self.quantize.grids(*self.grid_of(codes, grid)))
        if codes.shape[1:] != shape or codes.dtype != torch.int64 or 0 in shape:
            needed = {1: f"(B, {shape[0]})", 2: "(B, h, w)"}.get(len(shape), f"(B, h, w, {shape[-1]})")
            raise ValueError(f"codes: received {codes.dtype} {tuple(codes.shape)}; needs int64 {needed}")
        if codes.numel():
            least, most = torch.stack(codes.aminmax()).tolist()  # one GPU synchronization instead of two
            if least < 0 or most >= self.config.num_embeddings:
                raise ValueError(
                    f"codes: received values from {least} to {most}; allowed are 0 to {self.config.num_embeddings - 1}"
                )

    def decode(self, quantized: Tensor) -> Tensor:
        """Decodes quantized latents `(B, D, h, w)` into images `(B, C, H, W)`, without a GPU synchronization."""
        quantized = quantized.to(self.dtype)
        if quantized.device.type == "cpu":  # convolutions of channels-last maps round up to 15 times as much there
            quantized = quantized.contiguous()
        return self.decoder(self.post_quant_conv(quantized))

    def forward(self, pixel_values: Tensor) -> VQGANOutput:
        """Encodes and decodes images `(B, C, H, W)` in [-1, 1]; see [`VQGANOutput`]."""
        encoded = self.encode(pixel_values)
        quantized = cast(Tensor, encoded.quantized).to(self.dtype)
        features = self.decoder.trunk(self.post_quant_conv(quantized))
        return VQGANOutput(**encoded, reconstruction=self.decoder.conv_out(features), decoder_features=features)

    def compile(self, **options: Any) -> None:
        """Compiles the encoder and the trunk of the decoder, not the quantizer; `options` are those of
        `torch.compile`."""
        self.encoder.compile(**options)
        self.decoder.compile(**options)

    def compute_fingerprint(self, config: VQGANConfig | None = None) -> str:
        """Hash of all data that determine the codes of an image: the weights of encoder and quantizer as float32, the
        fields in `FINGERPRINT_FIELDS`, and the quantizer's options in `DECIDE_CODES`.

        Args:
            config: takes the fields from this configuration, by default from that of the model.
        """
        return fingerprint_of(config or self.config, self.named_parameters())

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Saves the tokenizer as in transformers, and computes its fingerprint if `config.fingerprint` is None.

        Set `config.fingerprint = None` after changing weights. A cast to another dtype keeps the fingerprint. A
        `checksums.json` of older files in the folder is removed.
        """
        if self.config.fingerprint is None:
            self.config.fingerprint_fields, self.config.fingerprint = None, self.compute_fingerprint()
        Path(save_directory, "checksums.json").unlink(missing_ok=True)
        return super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads a tokenizer as in transformers, but only from safetensors, and checks the weights.

        `image_size` changed by keyword keeps the fingerprint: the weights are used for images of another size. Options
        of the quantizer can change the codes. The fingerprint is None then, and computed when the tokenizer is saved.

        Raises:
            ValueError: weights are missing, unexpected, misshapen or not finite; they are those of another quantizer;
                or the fingerprint in config.json is that of other weights or fields.
        """
        name, wants_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        kwargs |= {"output_loading_info": True}
        kwargs.setdefault("ignore_mismatched_sizes", True)  # the error below names the misshapen weights too
        kwargs.setdefault("use_safetensors", True)
        kwargs.setdefault("attn_implementation", "eager")  # config.json may name a kernel to download and run
        loaded: Any = super().from_pretrained(name, *args, **kwargs)
        model, info = loaded
        refuse_weights(name, info, model.state_dict())
        model.quantize.freeze()
        if name is not None:
            exact = model
            if model.dtype != torch.float32:  # the fingerprint is that of the weights before this cast
                loaded = super().from_pretrained(name, *args, **{**kwargs, "torch_dtype": None, "dtype": torch.float32})
                exact = loaded[0]
            options = {key: value for key, value in kwargs.items() if key in HUB_OPTIONS}
            stored = cls.config_class.from_pretrained(name, **options)
            if stored.quantizer != model.config.quantizer:
                message = f"quantizer: received {model.config.quantizer!r}, but {name} was trained with"
                raise ValueError(f"{message} {stored.quantizer!r}, whose codes have another meaning; leave it out")
            verify_fingerprint(name, stored, exact.named_parameters())
            if (stored.fingerprint, facts_of(stored)) != (model.config.fingerprint, facts_of(model.config)):
                model.config.fingerprint = None
        return (model, info) if wants_info else model

    def _check_pixels(self, pixel_values: Tensor) -> None:
        _check_tensor("pixel_values", pixel_values, self.device)
        factor, channels = self.config.downsampling_factor, self.config.in_channels
        shape, dtype = tuple(pixel_values.shape), pixel_values.dtype
        if len(shape) != 4 or shape[1] != channels or any(size % factor or not size for size in shape[2:]):
            raise ValueError(
                f"pixel_values: received shape {shape}; needs (B, {channels}, H, W) with H and W divisible by {factor}"
            )
        casts = dtype.is_floating_point and torch.is_autocast_enabled(pixel_values.device.type)
        if dtype != self.dtype and not casts:
            raise ValueError(f"pixel_values: received {dtype}; needs {self.dtype}, the dtype of the weights")


def _check_tensor(name: str, value: Any, device: torch.device) -> None:
    """Refuses all but a dense tensor on a device."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        kind = value.layout if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: received {kind}; needs a dense tensor")
    if value.device != device:
        raise ValueError(f"{name}: received a tensor on {value.device}; the model is on {device}")


def _check_grid(grid: Any) -> None:
    """Refuses all but None and h and w of at least one code."""
    is_pair = isinstance(grid, tuple | list) and len(grid) == 2
    if grid is not None and not (is_pair and all(type(side) is int and side > 0 for side in grid)):
        raise ValueError(f"grid: received {grid!r}; needs h and w, two whole numbers from 1 up")


__all__ = ["VQGANModel"]
