"""What falls due at which step, and what stays due."""

import pytest

from folk_jax.train.due import Due


def never(step: int) -> bool:
  del step
  return False


@pytest.mark.parametrize(
  'step, saves, evaluations', [(3, False, ()), (4, True, ()), (5, False, (5,))]
)
def test_periods(step, saves, evaluations):
  due = Due(20, 4, 5, never)
  assert due.falls(step, preempted=False) == bool(saves or evaluations)
  assert (due.saves, due.evaluations) == (saves, evaluations)


def test_everything_is_due_at_the_last_step_whatever_the_periods():
  due = Due(7, 0, 0, never)
  assert not due.falls(6, preempted=False)
  assert due.falls(7, preempted=False)
  assert due.saves and due.evaluations == (7,)


def test_an_evaluation_with_a_period_of_its_own_is_due_by_it():
  due = Due(20, 0, 0, lambda step: step == 3)
  assert due.falls(3, preempted=False)
  assert due.evaluations == (3,) and not due.saves


def test_what_was_put_off_is_due_at_the_next_step():
  due = Due(20, 4, 4, never)
  due.falls(4, preempted=False)  # It was skipped: nothing is done.
  assert due.falls(5, preempted=False)
  assert due.saves and due.evaluations == (4,)
  due.evaluated()
  due.saved()
  assert not due.falls(6, preempted=False)


def test_told_to_leave_it_saves_and_leaves_the_evaluation_to_the_next_start():
  due = Due(20, 0, 4, never)
  assert due.falls(4, preempted=True)
  assert due.saves
  kept = due.kept()
  due.saved()
  resumed = Due(20, 0, 4, never)
  resumed.restore({'step': 4, 'due': kept})
  assert resumed.evaluations == (4,) and not resumed.saves


def test_older_checkpoints_leave_nothing_due():
  due = Due(20, 0, 4, never)
  due.restore({'step': 4})
  assert due.evaluations == ()
