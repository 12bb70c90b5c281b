"""Work off the window's thread: what is handed over, and what is dropped."""

import threading

import pytest

from editor.worker import Worker
from tests.processes import wait_until
from utils.errors import UserError


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.close()


class Gate:
    """A job that says that it has begun, and goes on when it may."""

    def __init__(self, result=None, reports=0):
        self.begun, self.may_go_on, self.result, self.reports = threading.Event(), threading.Event(), result, reports
        self.was_stopped = True

    def __call__(self, report):
        self.begun.set()
        assert self.may_go_on.wait(30)
        for i in range(self.reports):
            report(i / self.reports)
        self.was_stopped = False
        return self.result


def finish(worker):
    wait_until(lambda: not worker.keys, 30)
    worker.poll()


def test_results_and_progress_come_in_the_thread_that_polls(worker):
    seen = []

    def note(what):
        return lambda value: seen.append((what, value, threading.current_thread()))

    def job(report):
        report(0.5)
        return threading.current_thread()

    worker.submit("a", job, note("done"), progress=note("progress"))
    wait_until(lambda: not worker.keys, 30)
    assert seen == []
    worker.poll()
    me = threading.current_thread()
    assert [(what, thread) for what, _, thread in seen] == [("progress", me), ("done", me)]
    assert seen[0][1] == 0.5 and seen[1][1] is not me


def test_of_waiting_jobs_with_one_key_only_the_latest_is_done(worker):
    gate, done = Gate(), []
    worker.submit("first", gate, done.append)
    gate.begun.wait(30)
    for i in range(5):
        worker.submit("drag", lambda report, i=i: i, done.append)
    worker.submit("other", lambda report: "other", done.append)
    gate.may_go_on.set()
    finish(worker)
    assert done == [None, 4, "other"]


def test_a_running_job_is_stopped_at_its_next_report_by_a_newer_one(worker):
    old, done = Gate("old", reports=3), []
    worker.submit("play", old, done.append)
    old.begun.wait(30)
    worker.submit("play", lambda report: "new", done.append)
    old.may_go_on.set()
    finish(worker)
    assert done == ["new"] and old.was_stopped


def test_or_it_is_finished_first(worker):
    old, done = Gate("old", reports=3), []
    worker.submit("drag", old, done.append)
    old.begun.wait(30)
    for name in ("dropped", "new"):
        worker.submit("drag", lambda report, name=name: name, done.append, finish_running=True)
    old.may_go_on.set()
    finish(worker)
    assert done == ["old", "new"]


def test_what_is_cancelled_gives_nothing(worker):
    running, done = Gate("running"), []
    worker.submit("a", running, done.append)
    worker.submit("b", lambda report: "waiting", done.append)
    running.begun.wait(30)
    assert worker.keys == {"a", "b"}
    worker.cancel()
    assert worker.keys == set()
    running.may_go_on.set()
    worker.submit("c", lambda report: "later", done.append)
    finish(worker)
    assert done == ["later"]


def test_a_users_mistake_is_handed_over_and_any_other_error_is_raised(worker):
    errors = []

    def mistake(report):
        raise UserError("no such file")

    worker.submit("a", mistake, None, errors.append)
    worker.submit("b", lambda report: 1 / 0, None, errors.append)
    wait_until(lambda: not worker.keys, 30)
    with pytest.raises(ZeroDivisionError):
        worker.poll()
    assert [str(error) for error in errors] == ["no such file"]
    done = []
    worker.submit("c", lambda report: "alive", done.append)
    finish(worker)
    assert done == ["alive"]


def test_closing_stops_what_runs():
    worker, gate = Worker(), Gate(reports=1)
    worker.submit("a", gate, None)
    gate.begun.wait(30)
    threading.Timer(0.05, gate.may_go_on.set).start()
    worker.close(30)
    assert gate.was_stopped and not worker._thread.is_alive()
