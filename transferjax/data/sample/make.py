"""Make the bundled sample again: ``python -m transferjax.data.sample.make --source DIR``.

DIR holds the four ``*-ubyte.gz`` files of Fashion-MNIST; Debian's package ``dataset-fashion-mnist`` puts them in
``/usr/share/datasets/fashion-mnist``. The package ``zopfli`` makes the files small enough; it takes a few minutes.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIMIT = 2_000_000


def make(source: str, output: Path) -> int:
    """Prepare the sample in ``output`` (replaced when it exists) and return its size in bytes.

    Args:
      source: directory with Fashion-MNIST's four files.
      output: the prepared data set: ArrayRecord files, ``dataset_info.json``, ``features.json``.

    Returns:
      The bytes of all files in ``output``; more than 2,000,000 raise ``SystemExit``.
    """
    from transferjax.data.sample.builder import FashionMnistSample

    with tempfile.TemporaryDirectory() as scratch:
        builder = FashionMnistSample(source=source, data_dir=scratch, file_format="array_record")
        builder.download_and_prepare()
        for file in Path(builder.data_dir).glob("*.array_record-*"):
            repack(file)
        size = sum(f.stat().st_size for f in Path(builder.data_dir).iterdir())
        if size > LIMIT:
            raise SystemExit(f"the sample has {size:,} bytes; expected at most {LIMIT:,}: pip install zopfli.")
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(builder.data_dir, output)
    return size


def repack(file: Path) -> None:
    """Rewrite an ArrayRecord file without compression, which makes PNG records larger (by 33 bytes each here)."""
    from array_record.python import array_record_module as array_record  # pyright: ignore[reportAttributeAccessIssue]

    reader = array_record.ArrayRecordReader(str(file))
    records = reader.read_all()
    reader.close()
    writer = array_record.ArrayRecordWriter(str(file), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="/usr/share/datasets/fashion-mnist", help="directory of the four files")
    parser.add_argument("--output", type=Path, default=HERE / "prepared", help="directory to write")
    arguments = parser.parse_args()
    print(f"{arguments.output}: {make(arguments.source, arguments.output):,} bytes")


if __name__ == "__main__":
    main()
