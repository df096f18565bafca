"""A real MLflow server that is down, dies, is slow or has no room: nothing is lost, and publishing again completes the picture."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlflow
import pytest

from lcbench.runs.manifest import Entry
from lcbench.runs.store import Sweep
from lcbench.runs.tracking.publish import publish
from lcbench.runs.tracking.server import TrackingUnavailable
from tests.databases import database
from tests.runs.test_store import made_cell
from tests.runs.test_tracking import attempt
from tests.slurm.stage import ROOT, Server, processes, wait_until

pytestmark = pytest.mark.slow


def made_sweep(root: Path, cells: int, name: str = "s") -> Sweep:
    sweep = Sweep(root, name)
    made = [made_cell(seed) for seed in range(cells)]
    sweep.add([Entry(cell) for cell in made], command=[])
    for cell in made:
        attempt(sweep, cell.id, "ok", 0.5)
    return sweep


def agrees(sweep: Sweep, server: Server) -> None:
    """One run for each cell, complete, and the parent."""
    client = mlflow.MlflowClient(tracking_uri=server.uri)
    experiment = client.get_experiment_by_name("lcbench")
    assert experiment is not None
    where = f"tags.`lcbench.sweep_id` = '{sweep.manifest()['id']}'"
    runs = client.search_runs([experiment.experiment_id], where, max_results=1000)
    children = [r for r in runs if "lcbench.cell_id" in r.data.tags]
    assert sorted(r.data.tags["lcbench.cell_id"] for r in children) == sorted(sweep.entries())
    assert len(runs) == len(children) + 1
    for run in children:
        assert run.data.tags["lcbench.attempt"] == "1"
        assert run.data.metrics["time/forward/median_ms"] == 500.0
        assert run.info.status == "FINISHED"
        assert "attempts" in {a.path for a in client.list_artifacts(run.info.run_id)}


def sync(sweep: Sweep, server: Server) -> list[str]:
    return [
        sys.executable, "-m", "lcbench.sync", sweep.name, "--results", str(sweep.root), "--tracking-uri", server.uri
    ]  # fmt: skip


def is_at_it(sweep: Sweep, server: Server) -> None:
    """Wait until a publisher has begun; forget what an earlier one left."""
    (sweep.folder / "mlflow.json").unlink(missing_ok=True)
    wait_until(lambda: sweep.remembered().get(server.uri, {}).get("open"), every=0.02)


def test_a_server_that_dies_while_it_is_told_and_one_that_is_down(server: Server, tmp_path: Path) -> None:
    sweep, chance = made_sweep(tmp_path, 80), random.Random(5)
    for _ in range(2):
        telling = subprocess.Popen(sync(sweep, server), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        is_at_it(sweep, server)
        time.sleep(chance.random())
        server.kill()
        _, said = telling.communicate()
        assert telling.returncode == 1
        assert said.startswith("error: ")
        assert said.endswith(f" ({server.uri})\n"), said
        assert "Traceback" not in said
        server.start()
    publish(sweep, server.uri)
    agrees(sweep, server)
    counts = publish(sweep, server.uri)
    assert (counts.published, counts.unchanged) == (0, 80)


def test_a_publisher_that_is_killed_leaves_no_second_run(server: Server, tmp_path: Path) -> None:
    sweep, chance = made_sweep(tmp_path, 80), random.Random(6)
    for _ in range(3):
        telling = subprocess.Popen(sync(sweep, server), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        is_at_it(sweep, server)
        time.sleep(chance.random() / 2)
        os.kill(telling.pid, signal.SIGKILL)
        telling.wait()
    publish(sweep, server.uri)
    agrees(sweep, server)


class SlowProxy(threading.Thread):
    """Passes a connection on; every request waits."""

    def __init__(self, target: int, delay_s: float) -> None:
        super().__init__(daemon=True)
        self._target, self._delay_s = target, delay_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def run(self) -> None:
        while True:
            client, _ = self._listener.accept()
            threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._target)) as server:
            asked = False
            while True:
                ready, _, _ = select.select([client, server], [], [])
                for side, other in ((client, server), (server, client)):
                    if side in ready:
                        data = side.recv(1 << 16)
                        if not data:
                            return
                        if side is client and not asked:
                            time.sleep(self._delay_s)
                        asked = side is client
                        other.sendall(data)


def test_a_slow_server_costs_a_pack_its_budget_and_no_more(server: Server, tmp_path: Path) -> None:
    sweep = made_sweep(tmp_path, 3)
    proxy = SlowProxy(server.port, 2.0)
    proxy.start()
    begun = time.monotonic()
    counts = publish(sweep, proxy.uri, budget_s=12.0)
    assert not counts.complete
    assert time.monotonic() - begun < 12.0 + 60.0  # begun cells are finished
    assert counts.published == 1  # finding the sweep takes half of it
    publish(sweep, server.uri)
    agrees(sweep, server)


def test_who_finds_somebody_publishing_leaves_it_to_them(server: Server, tmp_path: Path) -> None:
    from filelock import FileLock

    sweep = made_sweep(tmp_path, 2)
    with FileLock(sweep.folder / ".publish.lock"):
        done = subprocess.run(
            [sys.executable, "-c", "import sys\nfrom pathlib import Path\nfrom lcbench.runs.store import Sweep\n"
             "from lcbench.runs.tracking.publish import publish\n"
             "print(publish(Sweep(Path(sys.argv[1]), 's'), sys.argv[2], budget_s=30).complete)", str(tmp_path), server.uri],
            capture_output=True, text=True,
        )  # fmt: skip
    assert done.stdout.strip() == "False", done.stderr
    publish(sweep, server.uri)
    agrees(sweep, server)


def test_two_people_with_a_sweep_of_one_name_on_one_server(server: Server, tmp_path: Path) -> None:
    mine, yours = made_sweep(tmp_path / "mine", 3, "first"), made_sweep(tmp_path / "yours", 2, "first")
    for sweep in (mine, yours, mine):
        publish(sweep, server.uri)
    agrees(mine, server)
    agrees(yours, server)


def test_a_server_without_room(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]).returncode:
        pytest.skip("mounting a small file system needs root")
    full = Server(disk / "mlflow")
    try:
        full.start()
        sweep = made_sweep(tmp_path / "results", 8)
        subprocess.run(["dd", "if=/dev/zero", f"of={disk / 'filler'}", "bs=4k"], capture_output=True)
        with pytest.raises(TrackingUnavailable, match=full.uri):
            publish(sweep, full.uri)
        (disk / "filler").unlink()
        publish(sweep, full.uri)
        agrees(sweep, full)
    finally:
        full.kill()
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_the_same_command_twice_at_once_runs_each_cell_once(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "lcbench.sweep", "seed=range(4)", "seqlen=64", "scale=1x1", "cp=none", "heads=2x2x8", "dtype=float64",
        "measure.budget_s=0.1", "measure.max_iterations=3", "measure.min_iterations=2", "sweep=twice", f"results={tmp_path}",
        f"tracking_uri={database(tmp_path)}",
    ]  # fmt: skip
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate() for process in both]
    assert sorted("4 to run" in out for out, _ in said) == [False, True], said
    sweep = Sweep(tmp_path, "twice")
    wait_until(lambda: all(sweep.attempts(i) for i in sweep.entries()), 60)
    assert all([a.status for a in sweep.attempts(i)] == ["ok"] for i in sweep.entries())


def status_of(uri: str, host: str, *more: str) -> str:
    """What a server answers to who calls it by a name."""
    command = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-H", f"Host: {host}", *more]
    return subprocess.run(
        [*command, f"{uri}/api/2.0/mlflow/experiments/get?experiment_id=0"], capture_output=True, text=True
    ).stdout


def test_a_server_answers_to_its_own_names_only(server: Server) -> None:
    addresses = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
    names = [socket.gethostname(), socket.getfqdn(), "127.0.0.1", "[::1]", *(a if ":" not in a else f"[{a}]" for a in addresses)]
    for name in names:
        assert status_of(server.uri, name) == "200", name
        assert status_of(server.uri, f"{name}:8080") == "200", name  # a tunnel's port
    assert status_of(server.uri, "evil.example.org") == "403"
    assert (server.folder.stat().st_mode & 0o077, (server.folder / "mlflow.db").stat().st_mode & 0o077) == (0, 0)


def test_a_server_with_accounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    password = tmp_path / "password"
    password.write_text("hunter2/of:an@admin\n")
    monkeypatch.setenv("LCBENCH_MLFLOW_PASSWORD_FILE", str(password))
    monkeypatch.setenv("LCBENCH_MLFLOW_ALLOWED_HOSTS", "mlflow.example.org,*.cluster.local")
    monkeypatch.setenv("LCBENCH_MLFLOW_DIR", str(tmp_path / "mlflow"))
    password.chmod(0o644)
    refused = subprocess.run([ROOT / "slurm" / "mlflow.sh"], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "others may read" in refused.stderr
    password.chmod(0o600)
    pytest.importorskip("flask_wtf", reason="accounts are an extra: pip install -e '.[accounts]'")
    asking = Server(tmp_path / "mlflow")
    try:
        asking.start()
        assert not processes("hunter2")  # nobody reads it from a command line
        sweep = made_sweep(tmp_path / "results", 1)
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(TrackingUnavailable, match=r"^401 Unauthorized; set MLFLOW_TRACKING_USERNAME"):
            publish(sweep, asking.uri)
        address = asking.uri.removeprefix("http://")
        with pytest.raises(TrackingUnavailable, match=r"^401 Unauthorized; the server does not know") as said:
            publish(sweep, f"http://admin:hunter3@{address}")
        assert "hunter3" not in str(said.value)
        assert publish(sweep, f"http://admin:hunter2%2Fof%3Aan%40admin@{address}").published == 1
        assert "MLFLOW_TRACKING_PASSWORD" not in os.environ
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2/of:an@admin")
        agrees(sweep, asking)
        assert b"hunter2" not in b"".join(p.read_bytes() for p in sweep.folder.rglob("*") if p.is_file())
        for name in ("mlflow.example.org", "n01.cluster.local:5000"):
            assert status_of(asking.uri, name, "-u", "admin:hunter2/of:an@admin") == "200"
    finally:
        asking.kill()
