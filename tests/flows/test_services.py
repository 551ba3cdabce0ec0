"""Processes that outlive the command that starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows import services

WAIT = [sys.executable, "-c", "import signal; print('up', flush=True); signal.pause()"]


def test_a_service_is_known_while_it_runs_and_ends_on_request(tmp_path: Path) -> None:
    started = services.start(tmp_path, "server", WAIT, dict(os.environ), "http://127.0.0.1:1/api")
    assert services.running(tmp_path, "server") == started
    assert services.stop(tmp_path, "server", seconds=10) == started
    assert services.running(tmp_path, "server") is None
    assert not (tmp_path / "server.json").exists()


def test_a_service_that_is_deaf_is_killed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ready")
    deaf = f"import signal; signal.signal(15, signal.SIG_IGN); open({str(tmp_path / 'ready')!r}, 'w').close(); signal.pause()"
    service = services.start(tmp_path, "worker", [sys.executable, "-c", deaf], dict(os.environ), "")
    (tmp_path / "ready").read_text()  # returns once the other side has opened and closed it
    assert services.stop(tmp_path, "worker", seconds=0) == service


def test_what_a_service_started_ends_with_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ready")
    child = "import os, signal; signal.signal(15, signal.SIG_IGN); f = open('ready', 'w'); f.write(str(os.getpid())); f.close()"
    code = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child + '; signal.pause()'!r}], start_new_session=True)"
    )
    here = f"import os; os.chdir({str(tmp_path)!r}); {code}"
    services.start(tmp_path, "worker", [sys.executable, "-c", here], dict(os.environ), "")
    pid = int((tmp_path / "ready").read_text())
    services.stop(tmp_path, "worker", seconds=0.2)
    assert services.started(pid) is None


def test_a_process_tells_when_it_started_with_and_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    assert services.started(os.getpid()) == services.started(os.getpid())
    monkeypatch.setattr(services, "_HAS_PROC", False)
    assert services.started(os.getpid())
    assert services.started(2**22) is None


def test_another_process_of_the_same_number_is_not_the_service_and_is_left_alone(tmp_path: Path) -> None:
    other = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    (tmp_path / "server.json").write_text(json.dumps({"name": "server", "pid": other.pid, "started": "0", "url": ""}))
    assert services.running(tmp_path, "server") is None
    assert services.stop(tmp_path, "server", seconds=10) is None
    assert other.poll() is None
    other.communicate()


def test_a_torn_note_names_no_service(tmp_path: Path) -> None:
    (tmp_path / "server.json").write_text('{"name": "ser')
    assert services.running(tmp_path, "server") is None
