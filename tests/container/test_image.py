"""The image of the Dockerfile, built by buildah and run: as root, on Debian or Ubuntu, several minutes and gigabytes.

Docker Hub is not asked: a base image of Debian's own python3 is made by debootstrap, with the host's certificates and
pip settings. Every other line of the Dockerfile is what users run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import cocktail_serve

ROOT = Path(__file__).parents[2]
SUITE = "bookworm"
BASE = "localhost/python-base"
IMAGE = "localhost/cocktail-serve:cpu"
USER = "cocktail"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PIP_SETTINGS = Path("/etc/pip.conf")
COMMIT = "0123456789ab"

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(os.geteuid() != 0, reason="debootstrap and chroot need root"),
    pytest.mark.skipif(
        any(shutil.which(tool) is None for tool in ("buildah", "debootstrap")),
        reason="not installed: apt-get install --no-install-recommends buildah debootstrap",
    ),
]


def run(*command: str | Path, timeout: float = 1800) -> str:
    """What it printed.

    Raises:
        AssertionError: it failed; with the end of what it printed.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{command} failed\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


class Buildah:
    """buildah with a store of its own."""

    def __init__(self, folder: Path) -> None:
        self._store = ["--root", str(folder / "root"), "--runroot", str(folder / "run"), "--storage-driver", "vfs"]

    def __call__(self, *arguments: str | Path, timeout: float = 1800) -> str:
        return run("buildah", *self._store, *arguments, timeout=timeout).strip()


def make_base(buildah: Buildah, folder: Path) -> None:
    """What `python:3.12-slim` is for others: Debian with python, pip, and nothing that keeps pip from installing."""
    tree = folder / "tree"
    run("debootstrap", "--variant=minbase", "--include=python3,python3-dev,python3-pip,ca-certificates", SUITE, tree)
    for marker in (tree / "usr/lib").glob("python3*/EXTERNALLY-MANAGED"):
        marker.unlink()
    (tree / "usr/bin/python").symlink_to("python3")
    for settings in (CERTIFICATES, PIP_SETTINGS):
        if settings.exists():
            shutil.copyfile(settings, tree / settings.relative_to("/"))
    container = buildah("from", "scratch")
    buildah("add", "-q", container, tree, "/")
    buildah("config", "--env", f"SSL_CERT_FILE={CERTIFICATES}", container)
    buildah("commit", "-q", "--rm", container, BASE)
    shutil.rmtree(tree)


def host_packages() -> tuple[str, list[str]]:
    """Where torch's CPU build comes from, as the Dockerfile's argument, and the host's folders it needs for it."""
    links = os.environ.get("PIP_FIND_LINKS", "")
    settings = PIP_SETTINGS.read_text() if PIP_SETTINGS.exists() else ""
    indexes = [word.removeprefix("file://") for word in settings.split() if word.startswith("file://")]
    folders = [str(folder) for folder in map(Path, [links, *indexes]) if folder.is_absolute() and folder.is_dir()]
    return f"--find-links {links}" if links else "--torch-backend cpu", folders


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    """With the image in its store."""
    folder = tmp_path_factory.mktemp("image")
    buildah = Buildah(folder)
    make_base(buildah, folder)
    torch_from, folders = host_packages()
    buildah(
        *("bud", "--isolation", "chroot", "--target", "cpu", "--tag", IMAGE),
        *("--build-arg", f"PYTHON_IMAGE={BASE}", "--build-arg", f"TORCH_FROM={torch_from}"),
        *("--build-arg", f"COMMIT={COMMIT}"),
        *(word for path in folders for word in ("--volume", f"{path}:{path}:ro")),
        ROOT,
    )
    yield buildah
    shutil.rmtree(folder)


def run_read_only(root: str, data: Path, command: Sequence[str], *, timeout: float) -> str:
    """Runs a command in an image's files as its user, where nothing can be written but /tmp and its home."""
    script = """
        set -eu
        mount --make-rprivate /
        mount --bind "$1" "$1" && mount -o remount,bind,ro "$1"
        mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev"
        mount -t tmpfs tmpfs "$1/tmp" && chmod 1777 "$1/tmp"
        mount --bind "$2" "$1/home/$3"
        root=$1 user=$3
        shift 3
        exec chroot --userspec="$user:$user" "$root" env -i PATH=/usr/local/bin:/usr/bin:/bin HOME="/home/$user" "$@"
    """
    isolated = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script, "sh"]
    return run(*isolated, root, data, USER, *command, timeout=timeout)


def test_the_demo_runs_as_nobody_in_particular_where_nothing_can_be_written(buildah: Buildah, tmp_path: Path) -> None:
    inspected = json.loads(buildah("inspect", "--type", "image", IMAGE))
    assert inspected["OCIv1"]["config"]["User"] == USER
    container = buildah("from", IMAGE)
    root = buildah("mount", container)
    try:
        user = run_read_only(root, tmp_path, ["id", "-u"], timeout=60)
        assert user.strip() != "0"
        owner = int(user)
        os.chown(tmp_path, owner, owner)
        refused = ["sh", "-c", "touch /app/x 2>/dev/null || echo refused; touch /tmp/x $HOME/x && echo written"]
        assert run_read_only(root, tmp_path, refused, timeout=60).split() == ["refused", "written"]
        version = run_read_only(root, tmp_path, ["sh", "-c", "cocktail-serve --version 2>&1"], timeout=120)
        assert version.split()[:3] == [cocktail_serve.__version__, "build", COMMIT]
        run_read_only(root, tmp_path, ["cocktail-serve", "demo"], timeout=1500)
    finally:
        buildah("umount", container)
        buildah("rm", container)
