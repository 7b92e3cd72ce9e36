"""Classify pictures with a trained model: python examples/inference.py RUN PICTURE [PICTURE ...]."""

import sys

import numpy as np
import torch
from PIL import Image

import elle_fast

model = elle_fast.load(sys.argv[1])  # a run's folder, a checkpoint, or an export; takes pixels in [0, 1]
for path in sys.argv[2:]:
    # Of the size, and with the channels, that the model was trained on.
    pixels = torch.from_numpy(np.array(Image.open(path), dtype=np.float32) / 255)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    with torch.no_grad():
        probabilities = model(pixels[None]).softmax(dim=1)[0]
    print(f"{path}: class {int(probabilities.argmax())}, probability {probabilities.max():.1%}")
