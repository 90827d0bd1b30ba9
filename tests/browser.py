"""A real browser for pages. Where there is none its tests are skipped, but not where it has to be there."""

import os
import shutil
import subprocess

import pytest

_BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

only_with_browser = pytest.mark.skipif(
    _BROWSER is None and "REQUIRE_BROWSER" not in os.environ, reason="no Chromium on this machine"
)


def browse(folder, url, *flags):
    """Opens a page; returns what Chromium prints. Its profile is kept in the folder."""
    command = [_BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={folder}/profile", "--virtual-time-budget=3000", *flags, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=90).stdout
