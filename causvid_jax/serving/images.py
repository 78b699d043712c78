"""Pictures to and from clients; what comes from them is hostile until it is decoded."""

import io

import numpy as np
from PIL import Image
from PIL import ImageOps

from causvid_jax.serving import limits as limits_lib

FORMATS = ("JPEG", "PNG", "WEBP")
_QUALITY = 92


def decode(content: bytes, limits: limits_lib.Limits) -> np.ndarray:
  """A client's picture as uint8 [H, W, 3]; only its header is read before its size is known to be harmless.

  Raises:
    Refused: it is none of `FORMATS`, too large, animated, or damaged.
  """
  try:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
      width, height = image.size
      if width * height > limits.pixels:
        raise limits_lib.Refused(
            "too_large", f"a picture of {width} x {height} pixels: expected at most {limits.pixels} pixels")
      if getattr(image, "is_animated", False):
        raise limits_lib.Refused("bad_image", "an animated picture: expected a still one")
      image = ImageOps.exif_transpose(image).convert("RGBA")
      return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB"))
  except limits_lib.Refused:
    raise
  except Image.DecompressionBombError as error:
    raise limits_lib.Refused("too_large", f"a picture of too many pixels: expected at most {limits.pixels}") from error
  except Exception as error:  # the decoders raise almost anything on junk
    raise limits_lib.Refused("bad_image", f"no readable picture: expected {', '.join(FORMATS)}") from error


def encode(frame: np.ndarray) -> bytes:
  """A frame uint8 [H, W, 3] as JPEG, with colour at full resolution: frames may be as small as 64 x 64."""
  buffer = io.BytesIO()
  Image.fromarray(frame).save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
  return buffer.getvalue()
