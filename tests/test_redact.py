"""Secrets are found where they stand, by their name and by their look; what is none stays as it is."""

from __future__ import annotations

import pytest

from lcbench.redact import HIDDEN, redacted, redacted_uri, refuse_readable, secrets_of, with_environment, with_password, without

SECRET = "hunter2-x"


@pytest.mark.parametrize(
    "text",
    [
        f"tracking_uri=http://me:{SECRET}@host:5000/mlflow", f"tracking_uri='https://me:a/b@{SECRET}@host'",
        f"see postgresql+psycopg2://me:{SECRET}@db/x?sslmode=require", f"postgresql://db/x?user=me&password={SECRET}",
        f"https://{SECRET}@git.example.org/x", f"http://host/x?a=1&token={SECRET}", f"http_proxy=me:{SECRET}@proxy:3128",
        f"site.env.HF_TOKEN={SECRET}", f"+site.env={{HF_TOKEN:{SECRET},X:1}}", f'+site.env.MY_PASSWORD="{SECRET} more"',
        f"site.setup=['export GH_PAT={SECRET}']", f"PGPASSWORD={SECRET}", f'{{"api_key": "{SECRET}", "apiKey":"{SECRET}"}}',
        f"--password {SECRET}", f"AWS_SECRET_ACCESS_KEY={SECRET}/x", f"MYSQL_PWD={SECRET}", f"Authorization: Bearer {SECRET}",
        f"docker://me:{SECRET}@registry#image", f"AccountName=x;AccountKey={SECRET}", f"-Dtrust.storePassword={SECRET}",
        "export X=ghp_" + "abcd1234" * 4 + SECRET.replace("-", ""), f"db_pass={SECRET} seqlen=64k",
    ],
)  # fmt: skip
def test_a_secret_is_left_out(text: str) -> None:
    shown = redacted(text)
    assert SECRET not in shown
    assert SECRET.replace("-", "") not in shown
    assert HIDDEN in shown
    assert redacted(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "cp=ring seqlen=64k mask.left=1k", "http://host:5000/path@v1", "user@host:/path", "git@github.com:a/b", "unknown key: foo",
        "KeyError: 'foo'", "TOKENIZERS_PARALLELISM=false", "MAX_TOKENS=128", "NCCL_IB_PKEY=0x7fff", "SSL_KEY_FILE=/etc/x.pem",
        "nvcr.io/nvidia/pytorch:26.08-py3@sha256:0123", "site.env.HF_TOKEN=${oc.env:HF_TOKEN}", "export X_TOKEN=$(cat ~/.token)",
        "full_key: site.setup[0]", "sqlite:////home/me/a b.db", "[/__w/x/gloo/pair.cc:537] Connection closed by peer",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_an_address_works_without_its_secrets() -> None:
    assert redacted_uri(f"http://me:{SECRET}@host:5000/x/") == "http://host:5000/x/"
    assert (
        redacted_uri(f"postgresql://me:{SECRET}@db:1/x?sslmode=require&password={SECRET}") == "postgresql://db:1/x?sslmode=require"
    )
    assert redacted_uri("sqlite:////home/me/x.db") == "sqlite:////home/me/x.db"
    uri = "http://me:p%40ss%2Fword@host"
    assert without("p@ss/word was refused by http://me:p%40ss%2Fword@host", uri) == f"{HIDDEN} was refused by http://host"


def test_variables_of_a_site(monkeypatch: pytest.MonkeyPatch) -> None:
    env = {
        "HF_TOKEN": "abc",
        "https_proxy": f"http://me:{SECRET}@p:1",
        "RANDOM": "aB3" * 12,
        "NCCL_DEBUG": "WARN",
        "KEYS": 3,
        "N": None,
    }
    assert set(secrets_of(env)) == {"HF_TOKEN", "https_proxy", "RANDOM"}
    stored = {"HF_TOKEN": HIDDEN, "https_proxy": f"http://{HIDDEN}@p:1", "NCCL_DEBUG": "WARN"}
    monkeypatch.setenv("HF_TOKEN", "abc")
    monkeypatch.delenv("https_proxy", raising=False)
    with pytest.raises(ValueError, match=r"site\.env\.https_proxy .* export https_proxy"):
        with_environment(stored)
    monkeypatch.setenv("https_proxy", "http://me:x@p:1")
    assert with_environment(stored) == {"HF_TOKEN": "abc", "https_proxy": "http://me:x@p:1", "NCCL_DEBUG": "WARN"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@host")
    assert with_password("http://host") == f"http://me:{SECRET}@host"
    assert with_password("http://other") == "http://other"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("setup", ["module load x", f"export HF_TOKEN={SECRET}"]), ("container", {"image": f"docker://me:{SECRET}@registry#image"}),
        ("srun_args", [f"--export=ALL,MY_PASSWORD={SECRET}"]), ("sbatch", {"comment": f"https://me:{SECRET}@x"}),
        ("collector", {"comment": f"token={SECRET}"}),
    ],
)  # fmt: skip
def test_a_secret_where_others_read_it_is_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"site\.{key}.* holds a secret") as said:
        refuse_readable({"setup": None, "sbatch": {}, key: value})
    assert SECRET not in str(said.value)
    refuse_readable({"setup": ["export X_TOKEN=$(cat ~/.token)"], "container": {"image": "nvcr.io#nvidia/pytorch:26.08-py3"}})
