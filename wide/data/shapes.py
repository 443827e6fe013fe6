"""Generated images for a first look: coloured shapes on noise, as JPEG files in ImageNet's layout."""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from wide.runs.files import sweep, temporary_folder, writing

COLOURS = {"red": (220, 50, 50), "green": (50, 190, 60), "blue": (60, 80, 220)}
FORMS = ("disc", "square")
IMAGES = {"train": 100, "val": 40}  # of each class


def shapes(data_dir: Path) -> Path:
    """The folder data_dir/shapes, with train/<class>/*.jpg and val/<class>/*.jpg; drawn where it is not there yet.

    Classes are "red_disc", "red_square" and so on, six in all. Always the same images.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(data_dir) / "shapes"
    sweep(folder.parent)
    if folder.is_dir():
        return folder
    with writing(folder.parent), temporary_folder(folder.parent, "shapes") as unfinished:
        stream = np.random.RandomState(99)
        for part, count in IMAGES.items():
            for name in COLOURS:
                for form in FORMS:
                    place = Path(unfinished, "shapes", part, f"{name}_{form}")
                    place.mkdir(parents=True)
                    for number in range(count):
                        draw_shape(stream, COLOURS[name], form).save(place / f"{number:04d}.jpg", quality=85)
        try:
            os.rename(Path(unfinished, "shapes"), folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder


def draw_shape(stream: np.random.RandomState, colour: tuple[int, int, int], form: str) -> Image.Image:
    """An image of 120 to 180 pixels a side, with many shapes of a kind in it, so that crops have some too."""
    width, height = (int(size) for size in stream.randint(120, 181, 2))
    image = Image.fromarray(stream.randint(60, 196, (height, width, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(stream.randint(8, 13)):
        radius = stream.randint(12, 22)
        x, y = (stream.randint(0, size) for size in (width, height))
        fill = tuple(int(value) for value in np.clip(colour + stream.randint(-30, 31, 3), 0, 255))
        (draw.ellipse if form == "disc" else draw.rectangle)(
            (x - radius, y - radius, x + radius, y + radius), fill=fill
        )
    return image
