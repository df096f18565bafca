"""Databases for MLflow with nothing in them: MLflow takes more than a second to make one, and next to nothing to take one."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory


def database(folder: Path) -> str:
    """The address of MLflow's database in a folder, which is made, with nothing in it, if it is not there."""
    file = folder / "mlflow.db"
    if not file.exists():
        file.write_bytes(_empty())
    return f"sqlite:///{file}"


@cache
def _empty() -> bytes:
    import mlflow

    with TemporaryDirectory() as folder:
        file = Path(folder) / "mlflow.db"
        mlflow.MlflowClient(tracking_uri=f"sqlite:///{file}")
        return file.read_bytes()
