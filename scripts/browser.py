"""Make sure that there is a browser for ``make test-browser``: Chromium and its chromedriver, from apt where they lack.

Needs nothing but Python's standard library.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PACKAGES = ["chromium", "chromium-driver"]  # Debian's names; Ubuntu's apt has no Chromium but in a snap


def main() -> None:
    if not missing():
        return
    command = apt()
    if command is None:
        sys.exit(how("apt-get is not here, or may not be used without a password"))
    print(f"browser: installing {' and '.join(PACKAGES)}", flush=True)
    install = [*command, "install", "--yes", "--no-install-recommends", *PACKAGES]
    if subprocess.run(install).returncode:
        subprocess.run([*command, "update"])  # the lists of packages may be old, or not there at all
        if subprocess.run(install).returncode:
            sys.exit(how("apt-get could not install it"))
    if still := missing():
        sys.exit(how(f"apt-get has installed something, but no {' and no '.join(still)}"))


def missing() -> list[str]:
    """Of the two programs, those that are not on the path."""
    there = {"chromium": any(map(shutil.which, BROWSERS)), "chromedriver": shutil.which("chromedriver")}
    return [name for name, found in there.items() if not found]


def apt() -> list[str] | None:
    """The command that installs without asking, or None."""
    if shutil.which("apt-get") is None:
        return None
    if os.geteuid() == 0:
        return ["apt-get"]
    sudo = shutil.which("sudo")
    if sudo and subprocess.run([sudo, "-n", "true"], stderr=subprocess.DEVNULL).returncode == 0:
        return [sudo, "-n", "apt-get"]
    return None


def how(why: str) -> str:
    return (
        f"browser: {' and '.join(missing())} not found, and {why}. Install Chromium or Chrome and the chromedriver of "
        f"the same version, both on the PATH (Debian: sudo apt install {' '.join(PACKAGES)}), and run this again"
    )


if __name__ == "__main__":
    main()
