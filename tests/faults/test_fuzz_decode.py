"""The decoder's guard under damaged and hostile files: an image of the right kind, or the one declared error."""

import io
import resource
import struct
import warnings
import zlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from PIL import Image

from folk_jax.data import decode as decode_lib
from folk_jax.data.decode import BadImage, decode, read_file
from folk_jax.data.folder import image_suffixes

FUZZ = hypothesis.settings(
  derandomize=True,  # CI must not fail by chance, and a failure must come back.
  deadline=None,
  max_examples=150,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
# Small enough that no example takes long, large enough for every seed image.
PIXELS = 1 << 16


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setattr(decode_lib, 'MAX_PIXELS', PIXELS)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # Pillow's remarks on damaged metadata.
    yield


def encoded(image: Image.Image, kind: str, **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def seeds() -> dict[str, bytes]:
  rng = np.random.default_rng(0)
  rgb = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8))
  wide = Image.fromarray(rng.integers(0, 65536, (9, 7), np.uint16))
  frames = [rgb, rgb.rotate(90), rgb.rotate(180)]
  exif = Image.Exif()
  exif[0x0112] = 6
  exif[0x010E] = 'x' * 300
  animated = {'save_all': True, 'append_images': frames}
  return {
    'jpeg': encoded(rgb, 'JPEG'),
    'progressive': encoded(rgb, 'JPEG', progressive=True),
    'cmyk': encoded(rgb.convert('CMYK'), 'JPEG'),
    'exif': encoded(rgb, 'JPEG', exif=exif),
    'grey': encoded(rgb.convert('L'), 'JPEG'),
    'png': encoded(rgb, 'PNG'),
    'alpha': encoded(rgb.convert('RGBA'), 'PNG'),
    'palette': encoded(rgb.quantize(16), 'PNG', transparency=3),
    '16 bit': encoded(wide, 'PNG'),
    'float': encoded(Image.fromarray(rng.normal(size=(5, 6)).astype(np.float32)), 'TIFF'),
    'tiff': encoded(rgb, 'TIFF', compression='tiff_lzw'),
    'apng': encoded(rgb, 'PNG', **animated),
    'webp': encoded(rgb, 'WEBP', quality=80),
    'animated webp': encoded(rgb, 'WEBP', **animated),
    'gif': encoded(rgb, 'GIF', **animated),
    'bmp': encoded(rgb, 'BMP'),
    'icon': encoded(rgb, 'ICO', sizes=[(16, 16)]),
  }


SEEDS = seeds()


def decoded(data: bytes) -> np.ndarray | None:
  """What decodes, checked; None where the guard called it bad, in one line."""
  try:
    image_HWC = decode(data)
  except BadImage as bad:
    assert str(bad)
    assert '\n' not in str(bad)
    return None
  assert image_HWC.dtype == np.uint8
  assert image_HWC.ndim == 3
  assert image_HWC.shape[2] == 3
  assert 0 < image_HWC.shape[0] * image_HWC.shape[1] <= PIXELS
  assert image_HWC.flags.c_contiguous
  return image_HWC


@pytest.mark.parametrize('name', SEEDS)
def test_what_is_mutated_decodes(name):
  assert decoded(SEEDS[name]) is not None


# A byte set, a stretch cut out, one doubled, bytes thrown in, the end lost.
EDITS = strategies.lists(
  strategies.tuples(
    strategies.sampled_from(['set', 'cut', 'double', 'insert', 'end']),
    strategies.integers(0, 4000),
    strategies.integers(1, 64),
    strategies.binary(min_size=1, max_size=8),
  ),
  min_size=1,
  max_size=6,
)


def edited(data: bytes, edits) -> bytes:
  for kind, at, length, extra in edits:
    at %= max(1, len(data))
    if kind == 'set':
      data = data[:at] + extra + data[at + len(extra) :]
    elif kind == 'cut':
      data = data[:at] + data[at + length :]
    elif kind == 'double':
      data = data[: at + length] + data[at:]
    elif kind == 'insert':
      data = data[:at] + extra * length + data[at:]
    else:
      data = data[:at]
  return data


@FUZZ
@hypothesis.given(name=strategies.sampled_from(sorted(SEEDS)), edits=EDITS)
def test_mutated_files(name, edits):
  decoded(edited(SEEDS[name], edits))


# The heads of files, where sizes, types and offsets stand: the part of a file that can lie.
@FUZZ
@hypothesis.given(
  name=strategies.sampled_from(sorted(SEEDS)),
  at=strategies.integers(0, 63),
  value=strategies.sampled_from(
    [b'\0', b'\xff', b'\x7f\xff', b'\xff' * 4, b'\x80\0\0\0', b'\0' * 4]
  ),
)
def test_heads_that_lie(name, at, value):
  data = SEEDS[name]
  decoded(data[:at] + value + data[at + len(value) :])


@FUZZ
@hypothesis.given(
  start=strategies.sampled_from(
    [
      b'\xff\xd8\xff',
      b'\x89PNG\r\n\x1a\n',
      b'GIF89a',
      b'RIFF\x10\0\0\0WEBPVP8 ',
      b'II*\0',
      b'MM\0*',
      b'BM',
      b'8BPS',
    ]
  ),
  rest=strategies.binary(max_size=400),
)
def test_noise_behind_a_signature(start, rest):
  decoded(start + rest)


@FUZZ
@hypothesis.given(
  body=strategies.binary(max_size=300),
  orientation=strategies.integers(0, 65535),
  order=strategies.booleans(),
)
def test_exif_that_lies(body, orientation, order):
  """An EXIF block with any orientation, entries that point anywhere, and any rest."""
  mark, form = (b'II*\0', '<') if order else (b'MM\0*', '>')
  entry = struct.pack(form + 'HHIHH', 0x0112, 3, 1, orientation, 0)
  block = b'Exif\0\0' + mark + struct.pack(form + 'IH', 8, 1 + len(body) // 12) + entry + body
  segment = b'\xff\xe1' + struct.pack('>H', len(block) + 2) + block
  image_HWC = decoded(SEEDS['jpeg'][:2] + segment + SEEDS['jpeg'][2:])
  # The pixels are whole: whatever EXIF says, they come, upright or turned.
  assert image_HWC is not None
  assert sorted(image_HWC.shape) == [3, 20, 30]


def png_of(width: int, height: int, rows: bytes) -> bytes:
  def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))

  head = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', rows) + chunk(b'IEND', b'')


def jpeg_of(width: int, height: int) -> bytes:
  data = SEEDS['jpeg']
  at = data.index(b'\xff\xc0') + 5
  return data[:at] + struct.pack('>HH', height, width) + data[at + 4 :]


def test_sizes_that_are_only_declared_are_not_allocated(monkeypatch):
  monkeypatch.setattr(decode_lib, 'MAX_PIXELS', 89_478_485)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # 100 MB of zeros in 100 kB, for an image of ten gigapixels; and JPEG's largest.
  bombs = [
    png_of(100_000, 100_000, zlib.compress(bytes(100 << 20), 9)),
    jpeg_of(65_500, 65_500),
    SEEDS['gif'][:6] + b'\xff' * 4 + SEEDS['gif'][10:],
    SEEDS['bmp'][:18] + struct.pack('<ii', 1 << 30, 1 << 30) + SEEDS['bmp'][26:],
  ]
  grown = []
  for bomb in bombs:
    with pytest.raises(BadImage, match='pixels; at most|bomb'):
      decode(bomb)
    grown.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
  # Kilobytes. Decoded, the least of them would be gigabytes; the 100 MB above were counted in making the first.
  assert grown[-1] - grown[0] < 1 << 16


@pytest.mark.parametrize('ending', ['.png', '.gif', '.tif', '.webp'])
def test_the_ending_of_a_name_does_not_matter(ending, tmp_path):
  file = tmp_path / f'photo{ending}'
  file.write_bytes(SEEDS['jpeg'])
  np.testing.assert_array_equal(decode(read_file(str(file))), decode(SEEDS['jpeg']))


def test_no_other_program_is_run():
  script = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n'
  with pytest.raises(BadImage, match='not an image'):
    decode(script)
  assert not image_suffixes() & {'.eps', '.ps', '.wmf', '.emf', '.h5', '.mpg'}
  assert image_suffixes() >= {'.jpg', '.jpeg', '.png', '.webp', '.gif', '.tif', '.bmp'}


def test_only_files_are_read(tmp_path, monkeypatch):
  for path in (str(tmp_path), '/dev/zero'):
    with pytest.raises(OSError, match='not a regular file|Is a directory'):
      read_file(path)
  monkeypatch.setattr(decode_lib, 'MAX_BYTES', 1000)
  large = tmp_path / 'large.jpg'
  with open(large, 'wb') as file:
    file.truncate(1001)
  with pytest.raises(OSError, match='1001 bytes; at most 1000'):
    read_file(str(large))
