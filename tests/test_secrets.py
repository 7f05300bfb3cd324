"""Keys stay in the environment, and nothing that is read can run code."""

import ast
import io
import json
import zipfile
from pathlib import Path

import pytest

import sso_lightning

PLANTED = {
    name: f"planted-{name.lower().replace('_', '-')}-7f3a9c"
    for name in ("SSO_TEST_KEY", "OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY")
}


def contents(name: str, data: bytes):
    """A file's bytes, and what is packed in it: of an archive its files, of Parquet its cells."""
    yield name, data
    if data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for inner in archive.namelist():
                yield from contents(f"{name}: {inner}", archive.read(inner))
    elif data[:4] == b"PAR1":
        import pyarrow.parquet as pq

        table = pq.read_table(io.BytesIO(data))
        yield f"{name}: schema", str(table.schema.metadata).encode()
        yield f"{name}: cells", json.dumps(table.to_pylist()).encode()


def leaks(folder: Path, secrets) -> list[str]:
    """Where in a folder any of the secrets is, also in a file's name."""
    found = []
    for path in sorted(folder.rglob("*")):
        parts = contents(path.name, path.read_bytes()) if path.is_file() else []
        for name, data in [(path.name, path.name.encode()), *parts]:
            found += [f"{name}: {s}" for s in secrets if s.encode() in data]
    return found


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, tiny_model):
    """A folder with all that `fit`, `predict` and `export` write, told streams included."""
    from contextlib import redirect_stderr, redirect_stdout

    import yaml

    from sso_lightning.__main__ import main

    folder = tmp_path_factory.mktemp("planted")
    inputs = tmp_path_factory.mktemp("inputs")
    rows = [{"id": f"q{i}", "prompt": f"Name {i} birds for a poem."} for i in range(3)]
    queries = inputs / "q.jsonl"
    queries.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "max_epochs": 1,
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
        },
        "model": {
            "policy": {"path": str(tiny_model), "lora": {"r": 2}},
            "objective": {
                "class_path": "SelfSteering",
                "init_args": {"base": {"class_path": "IPO"}},
            },
        },
        "data": {"queries": str(queries), "predict_queries": str(queries), "batch_size": 2},
        "pairs": {
            "sampler": {
                "class_path": "TransformersSampler",
                "init_args": {"max_new_tokens": 4},
            },
            "principles": {
                "class_path": "PredefinedPrinciples",
                "init_args": {"pick": "random"},
            },
        },
    }
    path = inputs / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    last = folder / "run" / "checkpoints" / "last.ckpt"
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(told), redirect_stderr(told):
        for name, value in PLANTED.items():
            patch.setenv(name, value)
        patch.chdir(inputs)
        statuses = [
            main(["fit", "--config", str(path)]),
            main(["predict", "--config", str(path), "--ckpt_path", str(last)]),
            main(["export", str(last), str(folder / "exported")]),
            main(["fit", "--config", str(path)]),  # refused: an error is told, too
        ]
    (folder / "told.txt").write_text(told.getvalue())
    assert statuses == [0, 0, 0, 2], told.getvalue()
    return folder


def test_no_key_of_the_environment_is_in_any_output(outputs):
    names = {path.name for path in outputs.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.csv", "manifest.json", "last.ckpt", "told.txt"} < names
    assert {"shard-00000.parquet", "adapter_config.json", "adapter_model.safetensors"} < names
    assert leaks(outputs, PLANTED.values()) == []


@pytest.mark.parametrize("kind", ["text", "parquet", "checkpoint", "archive", "name"])
def test_the_search_finds_what_is_packed(tmp_path, kind):
    secret = PLANTED["SSO_TEST_KEY"]
    if kind == "text":
        (tmp_path / "config.yaml").write_text(f"a: 1\nkey: {secret}\n")
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pylist([{"sampler": {"key": f"x{secret}"}, "n": i} for i in range(9)])
        path = tmp_path / "x.parquet"
        pq.write_table(table, path, compression="gzip", write_statistics=False)
        assert secret.encode() not in path.read_bytes()
    elif kind == "checkpoint":
        import torch

        torch.save({"hyper_parameters": {"key": secret}}, tmp_path / "x.ckpt")
    elif kind == "archive":
        with zipfile.ZipFile(tmp_path / "x.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a/data.pkl", b" " * 999 + secret.encode())
        assert secret.encode() not in (tmp_path / "x.ckpt").read_bytes()
    else:
        (tmp_path / f"run-{secret}").mkdir()
    assert leaks(tmp_path, PLANTED.values())


def test_checkpoints_hold_no_code(outputs):
    import torch

    found = sorted(outputs.rglob("*.ckpt"))
    assert found
    for path in found:
        content = torch.load(path, map_location="cpu", weights_only=True)
        assert {"state_dict", "policy", "callbacks"} <= content.keys()


# --------------------------------------------------------------------------------- the sources

FORBIDDEN = {"eval", "exec", "pickle.load", "pickle.loads", "os.system", "torch.hub.load"}
FORBIDDEN |= {"marshal.loads", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "joblib.load"}
FORBIDDEN |= {"pickle.Unpickler", "dill.load", "dill.loads"}


def dangers(source: str) -> list[str]:
    """Calls that could run what they read, and settings that allow it, with their lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "marshal", "dill"):
            names = {alias.name for alias in node.names}
            found += [f"{node.lineno}: {n}" for n in names if f"{node.module}.{n}" in FORBIDDEN]
        if isinstance(node, ast.AnnAssign) and "trust_remote_code" in ast.unparse(node.target):
            on = node.value is None or ast.unparse(node.value) != "False"
            found += [f"{node.lineno}: trust_remote_code is on"] * on
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in FORBIDDEN:
            found.append(f"{node.lineno}: {name}")
        if name == "torch.load" and keywords.get("weights_only") != "True":
            found.append(f"{node.lineno}: torch.load without weights_only=True")
        if keywords.get("allow_pickle", "False") != "False":
            found.append(f"{node.lineno}: allow_pickle")
        if keywords.get("weights_only", "True") != "True":
            found.append(f"{node.lineno}: weights_only")
        if keywords.get("shell", "False") != "False":
            found.append(f"{node.lineno}: shell")
        if keywords.get("trust_remote_code", "False") == "True":
            found.append(f"{node.lineno}: trust_remote_code")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec(text)",
        "import pickle\npickle.load(f)",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "subprocess.run(text, shell=True)",
        "class A:\n    trust_remote_code: bool = True",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_dangers_are_found(source):
    assert dangers(source)


SOURCES = sorted(Path(sso_lightning.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_that_is_read_can_run_code(path):
    assert dangers(path.read_text()) == []
