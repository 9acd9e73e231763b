"""The network of FID, sFID and rFID: Inception-v3 with the weights of the original, as torch-fidelity computes it."""

import torch
from torch import Tensor, nn

from stage1_vqgan.evaluation.config import INCEPTION
from stage1_vqgan.networks.frozen import Activations, Backbone, FrozenNetwork
from stage1_vqgan.networks.weights import download_errors, package

# torch-fidelity's names of the pooled features that FID compares, and of the logits of the Inception score.
OUTPUTS = ["2048", "logits_unbiased"]
SPATIAL_CHANNELS = 7  # of the map that sFID compares


def load_inception() -> FrozenNetwork:
    """Inception-v3. It brings images of any size to 299 pixels itself, as TensorFlow 1 did.

    Raises:
        ImportError: torch-fidelity is missing; the message says how to install it.
        FileNotFoundError: the weights are missing and cannot be downloaded; the message names the file to provide.

    Source: Heusel et al. 2017, "GANs trained by a two time-scale update rule converge to a local Nash equilibrium".
    """
    library = package("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity", "metrics")
    # torch-fidelity reads the file without weights_only. It finds this one, which holds nothing but tensors.
    with download_errors(library.URL_INCEPTION_V3):
        torch.hub.load_state_dict_from_url(library.URL_INCEPTION_V3, map_location="cpu", weights_only=True)
    network = library.FeatureExtractorInceptionV3("inception-v3-compat", OUTPUTS)
    return FrozenNetwork(INCEPTION, Backbone(OfBytes(network), (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255), None))


class OfBytes(nn.Module):
    """Gives torch-fidelity's network the images as bytes.

    Args:
        network: torch-fidelity's Inception, for OUTPUTS.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Activations:
        """Outputs for images `(B, 3, H, W)` in [0, 255], which are rounded to 8 bits.

        Returns:
            The 7 of the 768 maps of 17×17 positions that sFID compares (`mixed_6/conv` of the TensorFlow graph), pooled
            features, and logits without bias, as the Inception score takes them.
        """
        maps: list[Tensor] = []
        branch = self.network.get_submodule("Mixed_6d.branch1x1")
        hook = branch.register_forward_hook(lambda module, inputs, output: maps.append(output[:, :SPATIAL_CHANNELS]))
        try:
            pooled, logits = self.network(images.round().to(torch.uint8))
        finally:
            hook.remove()
        return Activations(maps, pooled, logits)
