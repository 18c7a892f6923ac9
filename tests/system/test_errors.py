"""Named errors: which are the user's mistake, and what they carry."""

from mebp_triton.system import errors
from mebp_triton.system.errors import FailedProcess, Interrupted, RunError


def test_a_mistake_of_the_user_is_a_value_error_and_no_failure_of_a_run_is_one():
    users = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, ValueError)}
    failures = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, RunError)}
    assert users == {"FileError", "CannotTrace"}
    assert failures == {"RunError", "NotFinite", "LostProcess", "FailedProcess"}
    assert not issubclass(Interrupted, Exception), "a broad except would take it"


def test_what_they_carry():
    failed = FailedProcess(3, 2, "no such file")
    assert (failed.rank, failed.code, failed.message, str(failed)) == (3, 2, "no such file", "no such file")
    interrupted = Interrupted(15, "after step 3")
    assert (interrupted.number, str(interrupted), str(Interrupted(2))) == (15, "after step 3", "")
