"""Random sessions whose base has sliding windows and chunks. (A process runs whole files.)"""

import pytest
from fuzz_in_ci import check_kind


@pytest.mark.slow
def test_random_sessions_hold_what_the_library_promises():
    check_kind("windows")
