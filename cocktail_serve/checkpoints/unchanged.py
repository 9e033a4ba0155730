"""Whether a model's files still hold what its fingerprint says, looked at before every mix."""

from __future__ import annotations

import threading

from cocktail_serve.checkpoints.adapters.reader import AdapterReader, read_expert
from cocktail_serve.checkpoints.fingerprint import identify, identify_adapter
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.errors import CheckpointError, IncompatibleModelsError, ModelChangedError
from cocktail_serve.pool import FileState, Member

_Files = tuple[FileState, ...]


class _Found:
    """What was found when a model's files were last read anew.

    Attributes:
        reading: held by who reads them: nobody waits for the files of another model.
        files: those that were read.
        difference: what of them is not the model any more; None where all of it is.
    """

    __slots__ = ("difference", "files", "reading")

    def __init__(self) -> None:
        self.reading = threading.Lock()
        self.files: _Files = ()
        self.difference: str | None = None


_found: dict[tuple[str, _Files], _Found] = {}
"""By fingerprint and the files that it is of: two pools may have the same parameters in two folders."""


def open_base(base: Member) -> CheckpointReader:
    """Opens a pool's base as it was when its fingerprint was taken.

    Files that look the same are taken for the same. Others are read once: a copy that was put back holds the same
    model, and is found the next time without reading.

    Raises:
        ModelChangedError: the files hold something else now, or are gone.
    """
    try:
        reader = CheckpointReader(base.path, allow_quantised=base.quantisation is not None)
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
    found = _found.setdefault((member.fingerprint, member.files), _Found())
    with found.reading:
        if found.files != reader.files:
            found.difference = _difference(member, reader, base)
            found.files = reader.files
        difference = found.difference
    if difference is not None:
        reader.close()
        raise _changed(member, difference)


def _difference(member: Member, reader: CheckpointReader | AdapterReader, base: Member) -> str | None:
    """What of the files is not the model's any more; None where all of it is.

    Raises:
        ModelChangedError: they could not be read to their end, which says nothing of what is in them.
    """
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
        try:
            reader.check_unwritten()
        except CheckpointError as unread:
            reader.close()
            raise ModelChangedError(
                f"the files of {member.name!r} are others than they were, and what they hold cannot be told: {unread}"
            ) from unread
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
        "an expert that was added while the server ran: delete it and add it again"
    )
