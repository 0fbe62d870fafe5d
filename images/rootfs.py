# SPDX-License-Identifier: Apache-2.0
"""Copies a Python environment and all it needs to run into an empty root: `rootfs.py ENVIRONMENT ROOT`.

The final image holds the interpreter, the environment, the shared libraries both are linked to, certificates,
and one user; no shell and no package manager. What a service never runs is left out: tests, headers, pip.
Files are taken over with a fixed time, so that the same packages give the same bytes.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

EPOCH = int(os.environ.get("SOURCE_DATE_EPOCH", "0"))
USER = "fedpipe:x:65532:65532:FedPipe:/tmp:/sbin/nologin"

# Of the standard library: what needs a display or a developer.
STDLIB_UNUSED = {
    "config-", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "tkinter",
    "turtledemo", "turtle.py",
}  # fmt: skip

# Of packages: what FedPipe never imports (tests/chart/test_images.py). Most of the Kubernetes client is one
# class per kind.
PACKAGES_UNUSED = re.compile(
    r"scipy/(cluster|datasets|differentiate|fftpack|io|misc|odr)/"
    r"|(setuptools|pkg_resources|_distutils_hack)/|distutils-precedence"
    r"|pygments/lexers/(?!__init__|_mapping)"
    r"|kubernetes/(aio/)?client/(apis?|models)/(?!__init__|v1_(managed|object_meta|owner))|kubernetes/e2e_test/"
)


def main(environment: Path, root: Path) -> None:
    """Fill the root."""
    for name in ("bin", "lib", "lib64", "sbin"):
        # Where the base has merged /usr, so has the root: no file is there twice.
        if Path("/", name).is_symlink():
            (root / os.readlink(Path("/", name))).mkdir(parents=True)
            (root / name).symlink_to(os.readlink(Path("/", name)))
    base = Path(sys.base_prefix)
    version = sysconfig.get_path("stdlib")
    interpreter = Path(sys.executable).resolve()
    copy(interpreter, root)
    for name in ("python", "python3"):
        link = root / str(base / "bin" / name).lstrip("/")
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(interpreter)
    for path in tree(Path(version), STDLIB_UNUSED):
        copy(path, root)
    for path in tree(environment, {"pip", "Activate.ps1"}):
        copy(path, root)
    needed = [interpreter, *(path for path in root.rglob("*.so*") if not path.is_symlink())]
    for library in sorted(libraries(needed, root)):
        copy(library, root)
    for text, name in ((USER, "etc/passwd"), ("fedpipe:x:65532:", "etc/group")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    strip(root)
    for path in map(Path, ("/etc/ssl/certs/ca-certificates.crt", "/etc/ld.so.cache")):
        if path.exists():
            copy(path, root)
    (root / "tmp").mkdir(mode=0o1777, exist_ok=True)
    settle(root)


def tree(folder: Path, without: set[str]) -> Iterator[Path]:
    """Yield the files of a folder that a service needs."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_dir() and not path.is_symlink():
            continue
        if any(part == "__pycache__" or part in without or part.startswith("config-") for part in parts):
            continue
        if (
            not is_test(parts)
            and not is_unused(parts)
            and path.suffix not in (".a", ".h", ".pxd", ".pyi", ".pyx")
        ):
            yield path


def is_test(parts: tuple[str, ...]) -> bool:
    """Return whether a file belongs to a package's own tests."""
    return "site-packages" in parts and bool({"tests", "test"} & set(parts[:-1]))


def is_unused(parts: tuple[str, ...]) -> bool:
    """Return whether a file belongs to a part of a package that FedPipe never imports."""
    if "site-packages" not in parts:
        return False
    return PACKAGES_UNUSED.match("/".join(parts[parts.index("site-packages") + 1 :])) is not None


def copy(path: Path, root: Path) -> None:
    """Copy a file or link to its place under the root."""
    target = root / str(path).lstrip("/")
    if target.exists() or target.is_symlink():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(path, target, follow_symlinks=False)
    if path.is_symlink() and not Path(os.readlink(path)).is_absolute():
        copy(path.parent / os.readlink(path), root)


def libraries(binaries: list[Path], root: Path) -> set[Path]:
    """Return the shared libraries that binaries are linked to, without those that are already beside them."""
    found: set[Path] = set()
    for binary in binaries:
        done = subprocess.run(["ldd", binary], capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            match = re.search(r"(?:=> )?(/\S+) \(0x", line)
            if match and not match[1].startswith(str(root)):
                found.add(Path(match[1]))
                # The loader asks for the name; the file is what the name leads to.
                found.add(Path(match[1]).resolve())
    return found


def strip(root: Path) -> None:
    """Take debug symbols off; libraries that wheels bring along were rewritten by their makers and stay."""
    found = [path for path in root.rglob("*.so*") if not path.is_symlink() and ".libs/" not in str(path)]
    for path in found:
        subprocess.run(["strip", "--strip-unneeded", path], check=True)


def settle(root: Path) -> None:
    """Give every file the same time, the oldest allowed."""
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            os.utime(Path(folder, name), (EPOCH, EPOCH), follow_symlinks=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
