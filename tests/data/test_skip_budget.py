# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The budget counts each row once, over epochs and processes, and stops a run beyond its share."""

import json
from types import SimpleNamespace

import pytest

from modeling_mlip.data.skip_budget import SkipBudget


def test_budget_counts_each_row_once_and_stops_beyond_its_share():
    budget = SkipBudget(0.01, num_samples=300)
    for _ in range(3):  # epochs
        budget.add(["row 1: empty", "row 5 (a: b.png): gone", "row 7: empty"], seen=300)
    with pytest.raises(ValueError, match=r"Skipped 4 of 300.*0.01 allows 3.*row 1: empty.*skip_budget"):
        budget.add(["row 9: empty"], seen=100)


def test_budget_allows_one_row_of_a_small_data_set_unless_it_is_0():
    budget = SkipBudget(0.01, num_samples=10)
    budget.add(["row 1: empty"], seen=10)
    with pytest.raises(ValueError, match="Skipped 2 of 10"):
        budget.add(["row 2: empty"], seen=10)
    with pytest.raises(ValueError, match="Skipped 1 of 10"):
        SkipBudget(0, num_samples=10).add(["row 1: empty"], seen=10)


def test_budget_of_a_stream_is_checked_after_the_first_rows():
    budget = SkipBudget(0.01, num_samples=None)
    for _ in range(4):  # passes
        budget.add([f"row {n}: empty" for n in range(50)], seen=249)  # the same rows in each pass count each time
    assert budget.num_skipped == 200
    with pytest.raises(ValueError, match="Skipped 200 of 1000"):
        budget.add([], seen=4)


def test_all_processes_count_the_same_skipped_rows(monkeypatch):
    """Simulate three processes in one: a list replaces their exchange."""
    for size, expected in ((1000, 5), (None, 7)):
        budgets = [SkipBudget(0.5, num_samples=size) for _ in range(3)]
        for step in range(2):
            for rank, budget in enumerate(budgets):
                rows = [f"row {rank}: empty"] + ([f"row {10 + rank}: empty"] if step and rank else [])
                budget.add(rows if step == 0 or rank else [], seen=100)
            added = [budget._unshared for budget in budgets]
            monkeypatch.setattr("modeling_mlip.data.skip_budget.gather_object", lambda here, added=added: added)
            for rank, budget in enumerate(budgets):
                process = SimpleNamespace(process_index=rank)
                monkeypatch.setattr("modeling_mlip.data.skip_budget.PartialState", lambda process=process: process)
                budget.share()
        assert {budget.num_skipped for budget in budgets} == {expected}
        assert {budget.seen for budget in budgets} == {600}


def test_budget_resumes():
    budget, resumed = SkipBudget(0.01, 100), SkipBudget(0.01, 100)
    budget.add(["row 1: empty"], seen=50)
    resumed.load_state_dict(json.loads(json.dumps(budget.state_dict())))
    assert resumed.state_dict() == budget.state_dict() and resumed.seen == 50
    resumed.add(["row 1: empty"], seen=50)
    with pytest.raises(ValueError, match="row 1: empty; row 2: empty"):
        resumed.add(["row 2: empty"], seen=1)
