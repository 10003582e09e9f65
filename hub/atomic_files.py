# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Files and folders that are complete whenever they exist: written under a temporary name, then renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A folder with one of these files is a model folder; only a model folder may be overwritten.
MODEL_FILES = ("config.json", "open_clip_config.json")


def flush_to_disk(path: str | Path) -> None:
    """Waits until a file, or a folder with everything in it, is on the disk.

    Call it before a rename: after a power failure a file system may have the new name but not the content.
    """
    if os.path.isdir(path):
        for entry in os.scandir(path):
            if not entry.is_symlink():
                flush_to_disk(entry.path)
    flush_entry_to_disk(path)


def flush_entry_to_disk(path: str | Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk. Call it on the parent after a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Writes a file completely or not at all. An existing file stays until the new one is complete.

    Raises:
        OSError: if the file cannot be written; no temporary file is left behind.
    """
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def replace_folder(source: str | Path, target: str | Path) -> None:
    """Renames the folder `source` to `target`. An existing folder `target` is removed after the rename.

    Both must be on one file system.

    Raises:
        OSError: if the rename fails; the old `target` is then back in place.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent)) / target.name
        target.rename(old)
        try:
            source.rename(target)
        except OSError:
            old.rename(target)
            raise
        finally:
            shutil.rmtree(old.parent, ignore_errors=True)
    else:
        source.rename(target)
    flush_entry_to_disk(target.parent)


def check_folder_is_writable(folder: str | Path) -> None:
    """Checks that a folder, which need not exist, can be created and written to.

    Raises:
        OSError: if it or the nearest parent that exists is a file, or has no write permission.
    """
    absolute = Path(folder).absolute()
    existing = next(path for path in (absolute, *absolute.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        fault = "has no write permission" if existing.is_dir() else "is a file"
        raise OSError(f"The folder {folder} cannot be written, because {existing} {fault}: choose another folder.")


def check_target(target: str | Path, overwrite: bool = False) -> None:
    """Checks that a model folder may be written to `target`.

    Raises:
        FileExistsError: if `target` exists and `overwrite` is false, or if it is not a model folder.
        OSError: if the folder that contains it cannot be written.
    """
    target = Path(target)
    check_folder_is_writable(target.parent)
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists: choose another folder, or set overwrite=True to replace it.")
    if not target.is_dir() or (any(target.iterdir()) and not any((target / name).is_file() for name in MODEL_FILES)):
        raise FileExistsError(
            f"{target} exists and is not a model folder, so it is not overwritten: choose another folder."
        )


@contextmanager
def new_folder(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `target`, which becomes `target` at the end of the block.

    If the block raises an error, the temporary folder is removed and an existing `target` stays as it is.

    Args:
        overwrite: replaces `target` if it is a model folder.

    Raises:
        FileExistsError: as `check_target`.
        OSError: if the folder cannot be written.
    """
    target = Path(target).absolute()
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield temporary
        temporary.chmod(0o755)
        flush_to_disk(temporary)
        check_target(target, overwrite)  # again: another process may have created it meanwhile
        replace_folder(temporary, target)
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(f"{target} could not be written ({error}); nothing is left behind.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
