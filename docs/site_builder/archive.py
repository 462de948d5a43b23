"""The site as one zip that opens from disk: ``python -m site_builder.archive SITE ZIP``.

It holds one folder, named as the zip; ``index.html`` in it opens the course without a server and without a network. The
same site gives the same bytes.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

from course_lib.lab.files import replaced

LEFT_OUT = {".buildinfo", ".doctrees", "objects.inv"}
EARLIEST = (1980, 1, 1, 0, 0, 0)


def pack(site: Path, target: Path) -> int:
    """Write the zip in one step; the number of its files.

    Raises
    ------
    ValueError : ``site`` holds no built site.
    """
    if not (site / "index.html").is_file():
        raise ValueError(f"site={str(site)!r}: must be a folder with a built site; `make docs` builds it")
    paths = [
        path for path in sorted(site.rglob("*")) if path.is_file() and not LEFT_OUT & set(path.relative_to(site).parts)
    ]
    with replaced(target) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in paths:
            name = f"{target.stem}/{path.relative_to(site).as_posix()}"
            info = zipfile.ZipInfo(name, EARLIEST)
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(info, path.read_bytes())
    return len(paths)


def main(arguments: list[str]) -> int:
    """Pack what the command line names."""
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    site, target = map(Path, arguments)
    try:
        number = pack(site, target)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{target}: {number} files, {target.stat().st_size / 1e6:.1f} MB; unpack it and open index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
