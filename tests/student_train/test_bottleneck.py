"""What a run says it waited for."""

import pytest

from rob.student_train.bottleneck import advise, describe_shares, shares_of_step, worst_share

STUDENT_BOUND = {"data": 0.01, "prepare": 0.04, "target": 0.0, "student": 0.95}


def test_shares_add_up_to_the_step():
    shares = shares_of_step({"data": 1.0, "target": 0.5, "student": 2.0}, passed=10.0)
    assert shares == {
        "data": 0.1,
        "target": 0.05,
        "prepare": 0.0,
        "student": 0.85,
    }  # a device's work shows nowhere else


def test_every_share_is_told():
    shares = {"data": 0.01, "target": 0.02, "prepare": 0.04, "student": 0.93}
    assert describe_shares(shares) == "waiting for views 1.0%, copy and colour 4.0%, targets 2.0%, student 93.0%"
    assert worst_share(shares) == "prepare 4%"


@pytest.mark.parametrize(
    ("slow", "targets", "remedy"),
    [
        ({"data": 0.4, "student": 0.55}, "cached", "`workers`"),
        ({"target": 0.3, "student": 0.65}, "cached", "`cache_in_memory`"),
        ({"target": 0.7, "student": 0.25}, "online", "rob cache-teacher"),
        ({"target": 0.3, "student": 0.65}, "momentum", "the student itself"),
        ({"prepare": 0.3, "student": 0.65}, "cached", "crops"),
        ({}, "cached", "the student itself"),
    ],
)
def test_advice_is_on_the_part_that_is_slow(slow, targets, remedy):
    assert remedy.lower() in advise(STUDENT_BOUND | slow, targets).lower()
