"""Pictures and charts as data URIs, so that a page is one file."""

from __future__ import annotations

import base64
import io

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from matplotlib.figure import Figure

Rgb = npt.NDArray[np.uint8]

_CHART_DPI = 180
_JPEG_QUALITY = 84


def jpeg_uri(rgb: Rgb) -> str:
    """(Y, X, 3) RGB as a JPEG data URI."""
    data = simplejpeg.encode_jpeg(
        np.ascontiguousarray(rgb), quality=_JPEG_QUALITY, colorsubsampling="420"
    )
    return _uri("image/jpeg", data)


def thumbnail_uri(jpeg: bytes, size_px: int) -> str:
    """A square JPEG, no larger than `size_px`, as a data URI."""
    rgb = simplejpeg.decode_jpeg(jpeg)
    if rgb.shape[0] <= size_px:
        return _uri("image/jpeg", jpeg)
    return jpeg_uri(cv2.resize(rgb, (size_px, size_px), interpolation=cv2.INTER_AREA))


def chart_uri(figure: Figure) -> str:
    """A chart as a PNG data URI; the same chart gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_CHART_DPI, metadata={"Software": None})
    return _uri("image/png", buffer.getvalue())


def _uri(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
