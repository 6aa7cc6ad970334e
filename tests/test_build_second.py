"""The lessons of the building edition, every other one."""

import pytest
from lessons_built import a_share, check_empty, chosen_lessons, run_lessons


@pytest.fixture(scope="module")
def said(request):
    return run_lessons(*chosen_lessons(request))


@pytest.mark.parametrize("name", a_share(1))
def test_a_lesson_runs_to_its_end_with_nothing_filled_in(name, said):
    check_empty(name, said[name])
