"""Training data: images in memory, and caches of a VAE's latents."""

from marval.data.cache import cache_latents
from marval.data.fashion import FASHION_CLASSES, FASHION_FORM, load_fashion_mnist, load_fashion_sample
from marval.data.folder import load_folder
from marval.data.images import ImageData, batch_indices, parse_size, patch_size, split_data
from marval.data.latents import LatentData
from marval.data.load import TrainingData, check_classes, check_data, load_data, load_images

__all__ = [
    "FASHION_CLASSES", "FASHION_FORM", "ImageData", "LatentData", "TrainingData", "batch_indices", "cache_latents",
    "check_classes", "check_data", "load_data", "load_fashion_mnist", "load_fashion_sample", "load_folder",
    "load_images", "parse_size", "patch_size", "split_data",
]  # fmt: skip
