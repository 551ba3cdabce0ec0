"""Archives of bytes that a test writes."""

import io
import tarfile


def tar_of(*members: tuple[str, bytes, bytes]) -> bytes:
    """A tar of members: name, data, type."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        for name, data, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(data), "elsewhere"
            archive.addfile(info, io.BytesIO(data))
    return target.getvalue()


def tar_of_one(data: bytes) -> bytes:
    """A tar of one regular file."""
    return tar_of(("corpus.jsonl", data, tarfile.REGTYPE))
