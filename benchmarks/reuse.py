"""What encrypting a record once saves: ``python -m benchmarks.reuse``.

The paper's "reusability": a record is three-layer-encrypted once per data set and key epoch, and that
ciphertext is served to every analyst. CPU time of one process, so that other work on the machine matters
little: the release (open the record, encrypt, put into the cache), a page from the cache (unwrap, unseal,
access log), and what would take the cache's place, opening and encrypting the record anew for every analyst.
The other side of it is measured too: analysts who got a record under *fresh* noise could average it away.
"""

from __future__ import annotations

import argparse
import secrets
import tempfile
import time
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from flep_fl.contracts.owner_records import Analyst, Capture, stacked
from flep_fl.contracts.ports import ImageCipher
from flep_fl.data_security.keys import ImageKeyBundle
from flep_fl.data_security.parameters import NoiseParameters
from flep_fl.data_security.pipeline import restore
from flep_fl.data_security.presets import build_cipher, get_preset
from flep_fl.private_database.grants import create_grant
from flep_fl.private_database.releases import ReleaseBook
from flep_fl.private_database.store import OwnerDatabase

COLLUDING = 4


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--side", type=int, default=300, help="pixels")
    parser.add_argument("--analysts", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _measure(Path(folder), given.records, given.side, given.analysts)


def _measure(folder: Path, records: int, side: int, analysts: int) -> None:
    rng = np.random.default_rng(0)
    preset = get_preset("flep")
    bundle = ImageKeyBundle.generate(preset.parameters, NoiseParameters(std=25.0), cipher_name="flep")
    cipher = build_cipher(bundle, noise_secret=secrets.token_bytes(32))
    with OwnerDatabase.create(folder / "owner.db", secrets.token_bytes(32)) as database:
        database.add_dataset("cells", ("good", "bad"), bundle=bundle)
        images = [rng.integers(0, 256, (side, side), dtype=np.uint8) for _ in range(records)]
        captures = [Capture("cells", "cam", i, image, i % 2, "train") for i, image in enumerate(images)]
        ids = [stored.record_id for stored in database.put_many(captures)]
        book = ReleaseBook(database, Ed25519PrivateKey.generate())

        began = time.process_time()
        book.release("cells")
        release = time.process_time() - began

        served, size = 0.0, 0
        for number in range(analysts):
            key = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
            sealing = X25519PrivateKey.generate().public_key().public_bytes_raw()
            grant = create_grant(
                database, dataset="cells", analyst=Analyst(f"a{number}", key, sealing), not_after=4e9
            )
            began = time.process_time()
            size = _fetch_all(book, grant.grant_id, key)
            served += time.process_time() - began

        began = time.process_time()
        for start in range(0, records, 16):
            opened = database.get_many(ids[start : start + 16], on_corrupt=lambda _id: None)
            cipher.encrypt(stacked([record.image for record in opened]))
        afresh = time.process_time() - began

    one, page, again = (1000 * seconds / records for seconds in (release, served / analysts, afresh))
    print(f"{records} records of {side}x{side}, CPU per record")
    print(f"release: open, encrypt, cache            {one:6.2f} ms, once")
    print(f"serve from the cache, an analyst         {page:6.2f} ms")
    print(f"instead: open and encrypt, an analyst    {again:6.2f} ms, {again / page:.1f} times that")
    with_cache, without = one + analysts * page, analysts * again
    print(
        f"{analysts} analysts: {with_cache:.2f} ms with the cache, {without:.2f} ms and the sending without"
    )
    print(f"the cache takes {size / records:.0f} bytes a record on the disk ({side * side} pixels)")
    print(_averaged(rng, cipher, side))


def _fetch_all(book: ReleaseBook, grant_id: str, key: bytes) -> int:
    opened = book.open_grant(grant_id, key)
    cursor: int | None = 0
    size = 0
    while cursor is not None:
        page = book.record_page(grant_id, key, release_id=opened.release_id, cursor=cursor, limit=1000)
        size += sum(len(record.envelope) + len(record.sealed_label) for record in page.records)
        cursor = page.cursor
    return size


def _averaged(rng: np.random.Generator, cipher: ImageCipher, side: int) -> str:
    """Say what is left of the noise when several analysts average what they got under fresh noise."""
    plain = rng.integers(64, 192, (side, side), dtype=np.uint8)
    found = [restore(cipher, cipher.encrypt(stacked([plain])))[0] for _ in range(COLLUDING)]
    alone = float(np.std(found[0] - plain.astype(np.float32)))
    together = float(np.std(np.mean(found, axis=0) - plain.astype(np.float32)))
    return (
        f"noise of one restored copy {alone:.1f} grey levels; mean of {COLLUDING} copies under fresh noise "
        f"{together:.1f}, which the cache gives nobody: all hold the same copy"
    )


if __name__ == "__main__":
    main()
