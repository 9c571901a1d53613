"""Text that every Python installation has: sources of the standard library, pinned by name and checksum."""

from __future__ import annotations

import functools
import hashlib
import string
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

# Modules of a single file in Python 3.10 to 3.13. The last four are the validation part, about a tenth.
MODULES = """
    _pydecimal _pyio argparse ast bdb codecs configparser contextlib dataclasses difflib dis doctest enum fractions ftplib
    functools imaplib inspect ipaddress locale mailbox optparse os pdb pickle pickletools platform plistlib pydoc
    random smtplib socket ssl statistics tempfile tokenize traceback turtle typing _collections_abc
    shutil subprocess tarfile threading
"""
VALIDATION = 0.1
ALPHABET = string.printable  # 100 characters; others become "?"
SHA256 = "44b5c21516c11805c7ce64e25fc470d365e1db7fec48f7002448f3dcdcacd7ab"  # of the text of Python 3.11.7


@functools.cache
def text() -> str:
    folder = Path(sysconfig.get_path("stdlib"))
    files = [folder / f"{name}.py" for name in MODULES.split()]
    whole = "".join(path.read_bytes().decode("ascii", "replace") for path in files if path.is_file())
    return whole.translate({ord(c): "?" for c in set(whole) - set(ALPHABET)})


def checksum() -> str:
    return hashlib.sha256(text().encode()).hexdigest()


def note() -> dict[str, bool | str]:
    """Whether this text is the pinned one, and what was found."""
    found = checksum()
    return {"corpus_as_pinned": found == SHA256, "corpus_sha256": found}


def tokens() -> tuple[Tensor, Tensor]:
    """Training and validation part, as places in the alphabet."""
    places = {character: i for i, character in enumerate(ALPHABET)}
    whole = torch.tensor([places[character] for character in text()], dtype=torch.uint8)
    cut = round((1 - VALIDATION) * len(whole))
    return whole[:cut], whole[cut:]
