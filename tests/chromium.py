"""The browser that pages are tested in."""

import os
import shutil

import pytest


def chromium_path() -> str:
    """Where Chromium is. Without one the test that asks is skipped, or fails in CI."""
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        missing = "no Chromium found: install `chromium` to see the page as a browser does"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return found[0]
