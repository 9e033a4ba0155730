"""Whether a model's files still hold what its fingerprint says, looked at before every mix."""

from __future__ import annotations

import threading

from cocktail_serve.checkpoints.adapter import AdapterReader, read_expert
from cocktail_serve.checkpoints.fingerprint import identify, identify_adapter
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.errors import CheckpointError, IncompatibleModelsError, ModelChangedError
from cocktail_serve.pool import FileState, Member

_found: dict[str, tuple[tuple[FileState, ...], str | None]] = {}
"""By fingerprint, the files that were last read anew for it, and what of them is not the model any more."""
_reading = threading.Lock()


def open_base(base: Member) -> CheckpointReader:
    """Opens a pool's base as it was when its fingerprint was taken.

    Files that look the same are taken for the same. Others are read once: a copy that was put back holds the same
    model, and is found the next time without reading.

    Raises:
        ModelChangedError: the files hold something else now, or are gone.
    """
    try:
        reader = CheckpointReader(base.path)
    except CheckpointError as error:
        if not base.files:
            raise
        raise _changed(base, error.message) from error
    _require_unchanged(base, reader, base)
    return reader


def open_expert_of(base: Member, base_reader: CheckpointReader, expert: Member) -> CheckpointReader | AdapterReader:
    """Opens an expert as `open_base` does the base.

    Args:
        base_reader: of the base, open for as long as the expert is.

    Raises:
        ModelChangedError: as `open_base`.
    """
    try:
        reader = read_expert(expert.path, base_reader)
    except (CheckpointError, IncompatibleModelsError) as error:
        if not expert.files:
            raise
        raise _changed(expert, error.message) from error
    _require_unchanged(expert, reader, base)
    return reader


def check_unchanged(base: Member) -> None:
    """Looks at a base's files, without mixing it. Blocks: what was replaced is read.

    Raises:
        ModelChangedError: as `open_base`.
    """
    open_base(base).close()


def _require_unchanged(member: Member, reader: CheckpointReader | AdapterReader, base: Member) -> None:
    if reader.files == member.files:
        return
    with _reading:
        files, difference = _found.get(member.fingerprint, ((), None))
        if files != reader.files:
            difference = _difference(member, reader, base)
            _found[member.fingerprint] = (reader.files, difference)
    if difference is not None:
        reader.close()
        raise _changed(member, difference)


def _difference(member: Member, reader: CheckpointReader | AdapterReader, base: Member) -> str | None:
    """What of the files is not the model's any more; None where all of it is."""
    settings = {file.path: file.digest for file in member.files if file.digest}
    for file in reader.files:
        if file.path in settings and file.digest != settings[file.path]:
            return f"{file.path} says something else than when the model was fingerprinted"
    try:
        if isinstance(reader, AdapterReader):
            found = identify_adapter(reader, base.fingerprint, largest_of_base=base.largest)
        else:
            found = identify(reader.as_stored)
    except CheckpointError as error:
        return error.message
    if found.fingerprint == member.fingerprint:
        return None
    before = {file.path: file for file in member.files}
    odd = (file.path for file in reader.files if not file.digest and before.get(file.path) != file)
    return f"{next(odd, member.path)} holds other parameters than when the model was fingerprinted"


def _changed(member: Member, difference: str) -> ModelChangedError:
    return ModelChangedError(
        f"the files of {member.name!r} are not what they were: {difference}; put the old ones back into {member.path}, "
        "or have the new ones fingerprinted: start the server again, plain vLLM with a manifest that is written again; "
        "an expert that was added while the server ran is deleted and added again"
    )
