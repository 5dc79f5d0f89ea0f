"""Processes that are to meet: how they are named."""

import pytest

from idlm_jax import cluster


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "a:1"}, "belong together: --num-processes, --process-id not given"),
        ({"num_processes": 2, "process_id": 0}, "belong together: --coordinator not given"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, r"--process-id 2 must lie in 0\.\.1"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": -1}, r"--process-id -1 must lie in 0\.\.1"),
        ({"coordinator": "a:1", "num_processes": 0, "process_id": 0}, "--num-processes 0 must be at least 1"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 0}, "--coordinator host is not of the form"),
        ({"coordinator": "a:99999", "num_processes": 2, "process_id": 0}, "--coordinator a:99999 is not of the form"),
        ({"process_id": 0, "is_detected": True}, "give either it or them"),
    ],
    ids=str,
)
def test_processes_named_wrongly_are_refused_before_any_wait(arguments, message):
    with pytest.raises(cluster.ClusterError, match=message):
        cluster.join(**arguments)


def test_a_coordinator_that_does_not_answer_is_named():
    with pytest.raises(ConnectionError, match=r"process 0 does not answer at --coordinator 127\.0\.0\.1:9 within 0 s"):
        cluster.join("127.0.0.1:9", 2, 1, timeout_s=0)


def test_one_process_is_no_cluster_and_needs_no_port():
    cluster.join("127.0.0.1:9", 1, 0)
    assert cluster.from_first("unused", lambda: "told") == "told"
