"""Random sessions whose base has full attention. (A process runs whole files.)"""

import pytest
from fuzz_in_ci import check_kind


@pytest.mark.slow
def test_random_sessions_hold_what_the_library_promises():
    check_kind("full")
