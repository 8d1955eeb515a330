"""Image files of all kinds: which are opened, how deep grey is read, which way up photographs stand."""
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.image_io import UnreadableImage, decode, read_image, read_size


def save(path, values):
    Image.fromarray(values).save(path)
    return path


def test_special_files_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for read in (read_image, decode):
        with pytest.raises(UnreadableImage, match=f"^image file {tmp_path}/pipe.jpg is a named pipe, not a regular file$"):
            read(tmp_path / "pipe.jpg")
    assert read_size(tmp_path / "pipe.jpg") is None


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n",
                                     b"8BPS\0\1" + bytes(40)])
def test_formats_that_are_no_photographs_are_not_opened(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UnreadableImage, match="a.jpg cannot be decoded .it is no JPEG, PNG"):
        read_image(tmp_path / "a.jpg")


def test_grey_of_16_and_32_bits(tmp_path):
    cases = [(np.uint16, 65535, 255, None), (np.uint16, 4095, 15, "numbers up to 4095 in a type that reaches 65535"),
             (np.float32, 1, 255, None), (np.float32, 200, 200, None), (np.float32, 300, 255, "from 0 to 300"),
             (np.float32, np.nan, 0, "not finite"), (np.int32, 2**31 - 1, 255, None), (np.int32, 255, 0, "up to 255")]
    for number, (kind, highest, expected, doubt) in enumerate(cases):
        values = np.zeros((4, 5), dtype=kind)
        values[1, 2] = highest
        decoded = decode(save(tmp_path / f"{number}.tif", values))
        assert decoded.image[:, 1, 2].tolist() == [expected] * 3 and not decoded.image[:, 0].any()
        assert decoded.doubt is None if doubt is None else doubt in decoded.doubt


def test_colours_of_16_bits_that_do_not_fill_them_are_told_of(tmp_path):
    for highest, doubt in ((4095, "has numbers below 4352 in a type that reaches 65535: it is read dark or black"), (65535, None)):
        pixels = np.linspace(0, highest, 300).astype(">u2").tobytes()
        (tmp_path / "a.ppm").write_bytes(b"P6 10 10 65535\n" + pixels)
        rows = b"".join(b"\0" + pixels[i:i + 60] for i in range(0, 600, 60))
        parts = ((b"IHDR", struct.pack(">IIBBBBB", 10, 10, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts))
        assert decode(tmp_path / "a.ppm").doubt == doubt
        assert (decode(tmp_path / "a.png").doubt is None) == (doubt is None)


def test_eight_bits_are_beyond_doubt(tmp_path):
    for ending in ("png", "bmp", "ppm", "tif", "jpg", "gif", "webp"):
        Image.new("RGB", (300, 20), (3, 2, 1)).save(tmp_path / f"a.{ending}")
        assert decode(tmp_path / f"a.{ending}").doubt is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_on_request(tmp_path, orientation):
    """A picture that is stored so that its orientation undoes it is shown as it was."""
    upright = torch.arange(12 * 8, dtype=torch.uint8).view(1, 8, 12).expand(3, 8, 12)
    undo = {1: lambda x: x, 2: lambda x: x.flip(2), 3: lambda x: x.flip(1, 2), 4: lambda x: x.flip(1),
            5: lambda x: x.transpose(1, 2), 6: lambda x: x.transpose(1, 2).flip(1),
            7: lambda x: x.flip(1, 2).transpose(1, 2), 8: lambda x: x.transpose(1, 2).flip(2)}[orientation]
    stored = undo(upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    Image.fromarray(stored.permute(1, 2, 0).contiguous().numpy()).save(path, exif=exif)
    image, size = read_image(path, apply_exif=True)
    assert torch.equal(image, upright) and size == (8, 12) == read_size(path, apply_exif=True)
    decoded = decode(path)
    assert torch.equal(decoded.image, stored) and decoded.orientation == orientation
    assert read_size(path) == tuple(stored.shape[1:])
