"""Puts the ranks and the loss of a finished run beside each other, as README's first picture.

Run ``python scripts/run_picture.py outputs/DATE/TIME scripts/results/default_run.png``.
"""

import sys
from pathlib import Path

from PIL import Image


def main() -> None:
    """Join the two pictures that the run has drawn."""
    run, out = map(Path, sys.argv[1:])
    pictures = [Image.open(run / "plots" / f"{name}.png").convert("RGB") for name in ("ranks", "loss")]
    height = max(picture.height for picture in pictures)
    joined = Image.new("RGB", (sum(picture.width for picture in pictures), height), "white")
    left = 0
    for picture in pictures:
        joined.paste(picture, (left, (height - picture.height) // 2))
        left += picture.width
    # A palette makes the file a quarter as large, and the colours are few.
    joined.quantize(256).save(out, optimize=True)


if __name__ == "__main__":
    main()
