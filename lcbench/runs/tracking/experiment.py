"""MLflow's experiment that holds the runs of sweeps: its description, its views, and where files of its runs lie."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lcbench.redact import redacted_uri
from lcbench.runs.address import reason, sqlite_file
from lcbench.runs.tracking.dashboard import VIEW, View, note, sweeps_view
from lcbench.runs.tracking.server import TrackingUnavailable

if TYPE_CHECKING:
    from mlflow import MlflowClient

ARTIFACTS = "mlartifacts"  # beside an SQLite file, where files of its runs lie


class Experiment:
    """The experiment of a name, which is made where it is not there, with a view of all sweeps.

    Attributes:
        id: MLflow's.
        no_files: why files cannot be put beside its runs; empty where they can, as far as was tried.

    Raises:
        TrackingUnavailable: it is deleted.
    """

    def __init__(self, client: MlflowClient, uri: str, name: str) -> None:
        self._client, self._uri, self._name = client, redacted_uri(uri), name
        self.no_files = ""
        self.id, self._location, self._tags = self._find()
        sweeps = sweeps_view()
        self._set_tags({"mlflow.note.content": note(self.id), VIEW + sweeps.key: sweeps.value})
        self._keep_out_of_another_checkout()

    def _find(self) -> tuple[str, str, dict[str, str]]:
        """Its id, where its files lie, and its tags."""
        found = self._client.get_experiment_by_name(self._name)
        if found is None:
            # Else artifacts land in the working directory.
            made = str(self._client.create_experiment(self._name, artifact_location=self._beside()))
            return made, str(self._client.get_experiment(made).artifact_location), {}
        if found.lifecycle_stage != "active":
            raise TrackingUnavailable(
                self._uri,
                f"its experiment {self._name!r} is deleted: restore it by "
                f"MLFLOW_TRACKING_URI={shlex.quote(self._uri)} mlflow experiments restore --experiment-id {found.experiment_id}, "
                "or take another: mlflow_experiment=NAME, or lcbench.sync --experiment NAME",
            )
        return str(found.experiment_id), str(found.artifact_location), dict(found.tags)

    def _set_tags(self, wanted: Mapping[str, str]) -> None:
        for key, value in wanted.items():
            if self._tags.get(key) != value:
                self._client.set_experiment_tag(self.id, key, value)
                self._tags[key] = value

    def set_views(self, sweep_id: str, views: list[View]) -> None:
        """Bring a sweep's views up to date; those that hold no more, such as one of all cells of a sweep that grew, go."""
        wanted = {VIEW + view.key: view.value for view in views}
        self._set_tags(wanted)
        mine = VIEW + sweep_id
        for key in [k for k in self._tags if k == mine or k.startswith(f"{mine}.")]:
            if key not in wanted:
                self._client.delete_experiment_tag(self.id, key)
                del self._tags[key]

    # -- files ---------------------------------------------------------------------------------------------------

    def try_files(self, put: Callable[[], object]) -> bool:
        """Put files beside a run; whether they are there. Where that fails once, it is not tried again."""
        if self.no_files:
            return False
        try:
            put()
        except Exception as error:  # every store of artifacts has exceptions of its own
            self.no_files = reason(error, self._uri)
        return not self.no_files

    def about_files(self) -> str:
        """Why files could not be put beside runs, and what helps; empty if they could."""
        if not self.no_files:
            return ""
        if self._strange:
            return f"files not published: {self.no_files}; metrics, parameters and tags are"
        proxied = self._location.startswith(("mlflow-artifacts:", "http"))
        cure = "look at the server's --artifacts-destination" if proxied else (
            "start the server with --serve-artifacts, and take another experiment, since one keeps its root: "
            "mlflow_experiment=NAME, or lcbench.sync --experiment NAME"
        )  # fmt: skip
        return (
            f"files not published: {self.no_files}; metrics, parameters and tags are. The server's artifact root "
            f"{redacted_uri(self._location)} cannot be written: {cure}"
        )

    def _beside(self) -> str | None:
        """Where files of runs lie that an SQLite file of ours holds; None of a server."""
        file = sqlite_file(self._uri)
        return (file.absolute().parent / ARTIFACTS).as_uri() if file else None

    def _keep_out_of_another_checkout(self) -> None:
        """An experiment keeps the absolute path of its files, which in a copied or moved checkout is that of before."""
        ours = self._beside()
        self._strange = ours is not None and self._location != ours and self._location.rstrip("/").endswith(f"/{ARTIFACTS}")
        if self._strange:
            self.no_files = (
                f"the experiment {self._name!r} keeps them in {self._location}, which is not beside its database, as after a copy"
                " or a move; take another experiment: mlflow_experiment=NAME, or lcbench.sync --experiment NAME"
            )
