"""The file that a page or a figure is written to."""

from __future__ import annotations

from pathlib import Path

from leaf_distill.io import disk_error


def output_path(name: str | Path, argument: str) -> Path:
    """Return a file as a path; ValueError where it has no name."""
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # no such home
        raise ValueError(f"{argument}: must be a file, got {str(name)!r} ({error})") from error
    if not path.name:
        raise ValueError(f"{argument}: must be a file, got {str(name)!r}; give its name")
    return path


def check_output(path: Path, argument: str, generator: str, kind: str) -> None:
    """Refuse to replace what is not an earlier file of the kind, in which `generator` stands."""
    try:
        earlier = path.is_file() and generator.encode() in path.read_bytes()
        other = path.exists() and not earlier
    except OSError as error:
        raise disk_error(error, path) from error
    if other:
        raise ValueError(
            f"{argument}: must be a new file or an earlier {kind}, got {path}, which is something "
            "else; give another name"
        )
