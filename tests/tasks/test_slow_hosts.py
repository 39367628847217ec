"""Hosts that drip take nothing from the rest of a job; `python -m tests.tasks.slow_hosts` is the campaign."""

from tests.tasks.slow_hosts import Campaign, run


def test_rest_of_a_job_goes_on_while_a_fifth_of_the_hosts_drips() -> None:
    shares: list[float] = []
    while len(shares) < 3 and max(shares, default=0.0) <= 0.7:
        good, slow = run(Campaign(num_items=120, num_hosts=20, items_per_s=50.0))
        shares.append(slow / good)

    # A quiet machine has 0.97 and more; where slow hosts hold the rest up, it is below 0.4 each
    # time, and where others of the machine do, now and then.
    assert max(shares) > 0.7, shares
