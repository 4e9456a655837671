"""Image files as a PyTorch dataset. Apart, so that PyTorch's workers import nothing of ours."""

import numpy as np
from PIL import Image, ImageOps


class Photos:
    """What torchvision's Resize and CenterCrop do, by Pillow alone."""

    def __init__(self, files: list[str], size: int):
        self._files, self._size = files, size

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> np.ndarray:
        image = ImageOps.exif_transpose(Image.open(self._files[index])).convert("RGB")
        size = self._size
        scale = size / min(image.size)
        width, height = (max(size, int(side * scale)) for side in image.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.array(image.crop((left, top, left + size, top + size)))
