"""The policies that step-level batching is measured beside."""

from __future__ import annotations

import pytest

from benchmarks.serving.policies import Alone, Requests
from benchmarks.serving_policies import MODEL, Kind, SimulatedEngine, SimulatedJob, _job
from calotype.serving.workers.batcher import Finish, Prepare, Run, Ticket
from calotype.serving.workers.costs import Costs


@pytest.mark.parametrize(
    ("policy", "together"), [(Alone, [["a"], ["b"], ["c"], ["d"]]), (Requests, [["a", "b", "d"], ["c"]])]
)
def test_whole_requests_are_drawn_to_their_end(policy: type[Requests], together: list[list[str]]) -> None:
    batcher = policy(Costs(), SimulatedEngine(8))
    kinds = {"a": Kind(steps=3), "b": Kind(steps=3), "c": Kind(steps=2), "d": Kind(steps=3)}
    jobs: dict[str, SimulatedJob] = {}
    for number, (name, kind) in enumerate(kinds.items()):
        batcher.add(Ticket(id=name, outline=kind.outline, arrived=float(number)))
    batches, finished = [], []
    while (action := batcher.next(9.0)) is not None:
        assert not isinstance(action, tuple) and action.model == MODEL
        if isinstance(action, Prepare):
            batches.append(list(action.ids))
            jobs |= {name: _job(kinds[name]) for name in action.ids}
            batcher.prepared({name: jobs[name] for name in action.ids})
        elif isinstance(action, Run):
            assert list(action.ids) == [name for name in batches[-1] if not jobs[name].done]
            for name in action.ids:
                jobs[name].evaluations_to_come -= 1
            batcher.moved(action.ids)
        elif isinstance(action, Finish):
            assert all(jobs[name].done for name in batches[-1])
            finished += action.ids
            for name in action.ids:
                batcher.remove(name)
    assert batches == together
    assert finished == [name for batch in together for name in batch]
