"""What the rows of the cache are found by: the content of a picture and how it is cut, of a mask, of a caption."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from .batches import Captioned
from .encoders import Encoders, pieces
from .store import KEY

NULL = hashlib.blake2b(b"", digest_size=16, person=b"null prompt").digest()
AT_ONCE = 32  # masks decoded at a time


def picture_keys(rows: Captioned, flip: bool) -> np.ndarray:
    """(N,), or with ``flip`` (2 N,): each picture and then its mirror image, whose last bit is the other one."""
    keys = np.frombuffer(b"".join(rows.digest(i) for i in range(len(rows))), KEY)
    if not flip:
        return keys
    both = keys.repeat(2).view(np.uint8).reshape(-1, 2, 16)
    both[:, 1, 15] ^= 1
    return both.reshape(-1).view(KEY)


def mask_keys(rows: Captioned) -> np.ndarray:
    """(N,): each mask's content and how it is cut: equal masks of one shape are one."""
    return np.frombuffer(b"".join(rows.mask_digest(i) for i in range(len(rows))), KEY)


@dataclass(frozen=True)
class Words:
    """All that is read of the rows' captions.

    keys: (1 + P,): the null prompt, then every caption, or each of its pieces. starts: (N + 1,) where each row's
    captions begin among all M. parts: (M + 1,) where each caption's pieces begin among the P; None where each is one.
    """

    keys: np.ndarray
    starts: np.ndarray
    parts: np.ndarray | None = None

    def caption(self, position: int) -> tuple[int, int, int]:
        """Row, caption of it and piece of that, of a position in ``keys``."""
        place = position - 1
        at = place if self.parts is None else int(np.searchsorted(self.parts, place, side="right")) - 1
        row = int(np.searchsorted(self.starts, at, side="right")) - 1
        return row, at - int(self.starts[row]), 0 if self.parts is None else place - int(self.parts[at])


def words_of(rows: Captioned, encoders: Encoders, policy: str) -> Words:
    """Every caption, or with the policy ``chunk`` its pieces; with the first of several sd3's T5 reads the whole."""
    found, starts, parts = bytearray(NULL), np.zeros(len(rows) + 1, np.int64), [0]
    by_t5 = policy == "chunk" and encoders.text.model_3 is not None
    for i, texts in enumerate(rows.texts):
        starts[i + 1] = starts[i] + len(texts)
        read = pieces(encoders.text, texts, policy) if policy == "chunk" else [[x] for x in texts]
        for one, whole in zip(read, texts, strict=True):
            for x in [f"{one[0]}\0{whole}", *one[1:]] if by_t5 and len(one) > 1 else one:
                found += hashlib.blake2b(x.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if policy == "chunk":
                parts.append(parts[-1] + len(one))
    return Words(np.frombuffer(bytes(found), KEY), starts, np.array(parts) if policy == "chunk" else None)
