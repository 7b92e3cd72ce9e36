"""The libraries import torchvision, which beside some builds of torch needs a word first."""

from __future__ import annotations

from tests.optional import import_torchvision

import_torchvision()
