"""Pictures and video files: RGB arrays in, files out, and back. Images are [H, W, 3], RGB.

Float images are in [0, 1]; uint8 images in [0, 255]. Every write is atomic.
"""

from __future__ import annotations

import base64
import io
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from see3d_jax.errors import InputError
from see3d_jax.files import atomic_path

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".heic")


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Float [0, 1] → uint8 with rounding; uint8 passes through."""
    image = np.asarray(image)
    if image.dtype == np.uint8:
        return image
    return np.round(np.clip(np.nan_to_num(image), 0.0, 1.0) * 255.0).astype(np.uint8)


def read_image(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> np.ndarray:
    """File → uint8 RGB [H, W, 3], turned upright by its EXIF orientation; 16 bits become 8.

    HEIC needs the pillow-heif package.
    `size` = (width, height) resizes with an antialiased filter. Raises InputError naming the file.
    """
    try:
        with _open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey to 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{path}: no such image") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as an image ({error})") from error
    if size is not None and image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(image)


def read_alpha(path: str | os.PathLike[str]) -> np.ndarray | None:
    """Opacity of an image, uint8 [H, W], upright as `read_image`; None when it stores none."""
    try:
        with _open(path) as opened:
            if not opened.has_transparency_data:
                return None
            return np.asarray(ImageOps.exif_transpose(opened).convert("RGBA"))[..., 3]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as an image ({error})") from error


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(width, height) that `read_image` will give, from the file's header alone."""
    try:
        with _open(path) as opened:
            width, height = opened.size
            turned = opened.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientation
    except FileNotFoundError:
        raise InputError(f"{path}: no such image") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as an image ({error})") from error
    return (height, width) if turned else (width, height)


def upright_jpeg(
    path: str | os.PathLike[str], target: str | os.PathLike[str], max_side: int
) -> None:
    """Copies a picture as a JPEG: upright, no side above `max_side`, with what the camera noted.

    Among the EXIF entries kept is the focal length; the orientation is dropped, it is applied.
    """
    pixels = read_image(path)
    with _open(path) as opened:
        exif = ImageOps.exif_transpose(opened).getexif()
    picture = Image.fromarray(pixels)
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    with atomic_path(target) as temporary:
        picture.save(temporary, "JPEG", quality=95, subsampling=0, exif=exif)


def _open(path: str | os.PathLike[str]) -> Image.Image:
    if Path(path).suffix.lower() == ".heic":
        try:
            import pillow_heif
        except ImportError:
            raise InputError(
                f"{path}: HEIC needs another package; pip install pillow-heif, or give a JPEG"
            ) from None
        pillow_heif.register_heif_opener()
    return Image.open(path)


def write_image(path: str | os.PathLike[str], image: np.ndarray, quality: int = 92) -> None:
    """Writes [H, W, 3] or [H, W] (float or uint8) in the format of the suffix."""
    with atomic_path(path) as temporary:
        Image.fromarray(to_uint8(image)).save(temporary, quality=quality)


def write_mp4(
    path: str | os.PathLike[str], frames: Iterable[np.ndarray], fps: float, crf: int = 18
) -> None:
    """Writes an H.264 mp4 (yuv420p, plays in browsers) from frames of one size.

    Odd sizes are padded by repeating the last row or column. The same frames give the same bytes.
    """
    import imageio_ffmpeg

    iterator = iter(frames)
    try:
        first = _even(to_uint8(next(iterator)))
    except StopIteration:
        raise ValueError(f"{path}: no frames to write") from None
    height, width = first.shape[:2]
    with atomic_path(path) as temporary:
        writer = imageio_ffmpeg.write_frames(
            str(temporary),
            (width, height),
            fps=fps,
            codec="libx264",
            pix_fmt_out="yuv420p",
            macro_block_size=1,
            quality=None,
            output_params=["-crf", str(crf), "-threads", "1", "-fflags", "+bitexact",
                           "-movflags", "+faststart"],
        )  # fmt: skip
        with warnings.catch_warnings():
            # JAX warns of forks; this child only runs the encoder and shares nothing.
            warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
            writer.send(None)
        try:
            writer.send(np.ascontiguousarray(first))
            for frame in iterator:
                writer.send(np.ascontiguousarray(_even(to_uint8(frame))))
        finally:
            writer.close()


def _even(image: np.ndarray) -> np.ndarray:
    pad = [(0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)]
    return np.pad(image, pad, mode="edge")


_LINE = 16  # pixels from line to line of a label


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    cell_height: int | None = None,
    gap: int = 4,
) -> np.ndarray:
    """Rows of images → one labelled uint8 picture. Rows may have different lengths.

    Every cell has the size of the first image, or `cell_height` with that image's aspect; images
    of another shape stand in the middle of theirs. Enlarging uses nearest neighbour, so that small
    model outputs are shown as they are.
    """
    height, width = np.asarray(rows[0][0]).shape[:2]
    if cell_height is not None:
        height, width = cell_height, max(1, round(width * cell_height / height))
    font = ImageFont.load_default(size=13)
    left = max((int(font.getlength(text)) + 12 for text in row_labels), default=0)
    headings = [_wrapped(text, font, width) for text in column_labels]
    top = max((6 + _LINE * len(lines) for lines in headings), default=0)
    columns = max(len(row) for row in rows)
    sheet = Image.new(
        "RGB",
        (left + columns * (width + gap) + gap, top + len(rows) * (height + gap) + gap),
        (24, 24, 27),
    )
    draw = ImageDraw.Draw(sheet)
    for c, lines in enumerate(headings):
        for n, line in enumerate(lines):
            place = left + gap + c * (width + gap), 4 + _LINE * n
            draw.text(place, line, (235, 235, 235), font)
    for r, row in enumerate(rows):
        y = top + gap + r * (height + gap)
        if r < len(row_labels):
            draw.text((6, y + height // 2 - 8), row_labels[r], (235, 235, 235), font)
        for c, cell in enumerate(row):
            cell_image = Image.fromarray(to_uint8(cell)).convert("RGB")
            scale = min(width / cell_image.width, height / cell_image.height)
            size = tuple(max(1, round(length * scale)) for length in cell_image.size)
            if cell_image.size != size:
                how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
                cell_image = cell_image.resize(size, how)
            x = left + gap + c * (width + gap)
            sheet.paste(cell_image, (x + (width - size[0]) // 2, y + (height - size[1]) // 2))
    return np.asarray(sheet)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no longer than `width` pixels, unless a single word is."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def image_bytes(image: np.ndarray, quality: int = 85) -> bytes:
    """An image array as the bytes of a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(image)).convert("RGB").save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def data_uri(image: np.ndarray | str | os.PathLike[str], quality: int = 85) -> str:
    """An image array (as JPEG) or a media file → data URI for self-contained HTML."""
    if isinstance(image, np.ndarray):
        data, kind = image_bytes(image, quality), "image/jpeg"
    else:
        path = Path(image)
        data = path.read_bytes()
        kind = {".mp4": "video/mp4", ".png": "image/png", ".svg": "image/svg+xml"}.get(
            path.suffix.lower(), "image/jpeg"
        )
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
