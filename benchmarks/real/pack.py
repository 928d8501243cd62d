"""Both real sets in one file of less than 30 MiB, for a machine that only gets what is copied to it.

    python benchmarks/real/pack.py --real DIR --out real.zip
    python benchmarks/real/compare.py --real real.zip ...

Masks stay as they are. Images are compressed with loss (WebP), so scores from a pack are not mixed with others:
`compare.py` keeps them in `benchmarks/results/real_packed` unless `--cells` says otherwise.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import zipfile
from pathlib import Path

from PIL import Image
from sets import COUNTS, prepare

from cps_hf.files import written_whole

QUALITY = 92


def pack(real: Path, out: Path) -> None:
    """Write the zip file OUT with what `prepare` makes of REAL, images as WebP."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        written_whole(out) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
    ):
        for name in COUNTS:
            root = prepare(real, Path(scratch), name)
            for path in sorted(path for path in root.rglob("*") if path.is_file()):
                target = path.relative_to(root.parent)
                if path.parent.name == "images":
                    archive.writestr(target.with_suffix(".webp").as_posix(), _as_webp(path))
                else:
                    archive.write(path, target.as_posix())


def _as_webp(path: Path) -> bytes:
    content = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(content, "WEBP", quality=QUALITY, method=4)
    return content.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--real", type=Path, required=True, help="the folder that contains camvid/ and steel/")
    parser.add_argument("--out", type=Path, required=True, help="the zip file to write")
    options = parser.parse_args()
    pack(options.real, options.out)
    print(f"{options.out}: {options.out.stat().st_size / 2**20:.1f} MiB")
