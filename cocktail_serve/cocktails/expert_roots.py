"""The folders under which an operator's experts may lie, and what a path under them really leads to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from cocktail_serve.errors import InvalidRequestError, PermissionDeniedError


class ExpertRoots:
    """The folders of `server.expert_roots`; what is elsewhere is refused, whichever way a path leads there."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = [root.resolve() for root in roots]

    def find(self, path: str) -> Path:
        """The folder that a path leads to; a relative one is looked for under each root. Blocks.

        Whether something exists outside of the roots is not told.

        Raises:
            PermissionDeniedError: there are no roots; or the folder, or a file that it links to, lies outside of them.
            InvalidRequestError: no such folder under them.
        """
        if not self._roots:
            raise PermissionDeniedError("server.expert_roots is empty, so no expert can be added while the server runs")
        try:
            folders = [(root / path).resolve() for root in self._roots]
            inside = [folder for folder in folders if self._is_inside(folder)]
            if not inside:
                raise self._outside(path)
            folder = next(filter(Path.is_dir, inside), None)
            if folder is None:
                raise InvalidRequestError(f"there is no folder {path!r} under server.expert_roots", param="path")
            if not all(map(self._is_inside, _targets(folder))):
                raise self._outside(path)
        except (OSError, ValueError, RuntimeError) as error:
            raise InvalidRequestError(f"{path!r} is not a path that can be followed", param="path") from error
        return folder

    def _is_inside(self, path: Path) -> bool:
        return any(path.is_relative_to(root) for root in self._roots)

    def _outside(self, path: str) -> PermissionDeniedError:
        return PermissionDeniedError(
            f"{path!r} lies, or holds a link that leads, outside of the folders of server.expert_roots", param="path"
        )


def _targets(folder: Path) -> Iterable[Path]:
    """Where all that lies in a folder really is; a linked folder counts as outside: what is in it is not looked at."""
    for entry in folder.rglob("*"):
        yield Path("/") if entry.is_symlink() and entry.is_dir() else entry.resolve()
