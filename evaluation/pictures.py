"""Results as pictures: accuracy over budget, and kept tokens drawn over the image."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from PIL import Image

from prunetune.evaluation.compare import Row

_COLORS = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]


def plot_rows(rows: list[Row], path: Path) -> None:
    """Draw overall accuracy over kept visual tokens: a line per training-free method, a star per tuned arm."""
    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=130)
    labels = sorted({row.label for row in rows} - {"dense"})
    methods = list(dict.fromkeys(label.split(" + ")[0] for label in labels))  # a tuned arm has its method's colour
    for row in rows:
        if row.label == "dense":
            axes.axhline(row.overall, color="black", linewidth=1, linestyle="--")
            axes.annotate(
                "dense", (0.99, row.overall), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
            )
    for label in labels:
        method, _, tuned = label.partition(" + ")
        style, size = ("*--", 13) if tuned else ("o-", 5)
        points = sorted((row for row in rows if row.label == label), key=lambda row: row.kept)
        _points(axes, points, _COLORS[methods.index(method) % len(_COLORS)], label, style, size)
    axes.set_xscale("log", base=2)
    ticks = sorted({row.kept for row in rows if row.label != "dense"})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("visual tokens per image")
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _points(axes, rows: list[Row], color, label: str, style: str, size: int) -> None:
    axes.errorbar(
        [r.kept for r in rows],
        [r.overall for r in rows],
        yerr=np.array([[r.overall - r.interval[0], r.interval[1] - r.overall] for r in rows]).T,
        fmt=style,
        color=color,
        markersize=size,
        linewidth=1.2,
        capsize=2,
        label=label,
    )


def kept_overlay(image: Image.Image, kept: dict[str, np.ndarray], grid: tuple[int, int]) -> Image.Image:
    """Return a strip of panels: the picture, then per method the picture with dropped patches dimmed.

    Args:
        image: the square picture the vision tower saw.
        kept: per panel title, the kept positions in raster order.
        grid: patch rows and columns.
    """
    rows, columns = grid
    pixels = np.asarray(image.convert("RGB"))
    figure, panels = plt.subplots(1, len(kept) + 1, figsize=(2.1 * (len(kept) + 1), 2.5), dpi=130, squeeze=False)
    for axes, (title, positions) in zip(panels[0], [("picture", None), *kept.items()], strict=True):
        axes.set_title(title, fontsize=8)
        axes.axis("off")
        if positions is None:
            axes.imshow(pixels)
            continue
        mask = np.zeros(rows * columns)
        mask[positions] = 1
        row = np.arange(pixels.shape[0]) * rows // pixels.shape[0]
        column = np.arange(pixels.shape[1]) * columns // pixels.shape[1]
        light = mask.reshape(rows, columns)[row[:, None], column[None, :], None]
        axes.imshow((pixels * (0.2 + 0.8 * light)).astype(np.uint8))
    figure.tight_layout()
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())  # type: ignore[attr-defined]
    plt.close(figure)
    return picture
