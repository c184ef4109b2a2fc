"""The command line: help at once and whole, exit codes, one message, one JSON line."""

from __future__ import annotations

import json
import sys
import time

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import SMALL_SCHEMA, run_command, small_table
from typer.testing import CliRunner

from dist_rec import cli
from dist_rec.cli.common import overrides
from dist_rec.errors import UserError


def dist_rec(*arguments, seconds: float = 60):
    """`dist-rec ARGUMENTS` in a process of its own."""
    return run_command([sys.executable, "-m", "dist_rec", *map(str, arguments)], seconds)


def refused(*arguments) -> str:
    """What a refusal says: one message on stderr, nothing on stdout, no traceback, exit code 2."""
    done = dist_rec(*arguments)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr, done
    return done.stderr


def test_help_is_whole_and_takes_less_than_a_second():
    started = time.monotonic()
    done = dist_rec("--help")
    seconds = time.monotonic() - started
    assert done.returncode == 0 and seconds < 1, f"{seconds:.2f} s"
    for command in cli.app.registered_commands:
        verb = command.name or command.callback.__name__
        assert f" {verb} " in done.stdout
        shown = CliRunner().invoke(cli.app, [verb, "--help"]).stdout
        assert command.callback.__doc__.splitlines()[0].split(";")[0][:60] in " ".join(shown.replace("│", "").split())
    for verb in ("build", "inspect", "verify"):
        assert f" {verb} " in CliRunner().invoke(cli.app, ["shards", "--help"]).stdout


def test_importing_the_command_line_imports_no_engine():
    code = "import sys, dist_rec.cli, dist_rec.config; print({'torch', 'pyarrow', 'numpy'} & set(sys.modules))"
    assert run_command([sys.executable, "-c", code], 20).stdout.strip() == "set()"


def test_shards_from_build_to_verify(tmp_path):
    pq.write_table(small_table({"big": 100, "middle": 40, "tiny": 20}), tmp_path / "raw.parquet")
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(SMALL_SCHEMA))
    out = tmp_path / "out"
    build = ["--schema", tmp_path / "schema.yaml", "--from", tmp_path / "raw.parquet", "--out", out, "--workers", "1"]
    done = dist_rec("shards", "build", *build, "--split", "random:3,1,1", "--block-rows", "16", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["out"] == str(out) and list(said["splits"]) == ["train", "valid", "test"]
    assert sum(split["rows"] for split in said["splits"].values()) == 160
    inspected = json.loads(dist_rec("shards", "inspect", out / "train", "--json").stdout.splitlines()[-1])
    assert inspected["rows"] == said["splits"]["train"]["rows"]
    done = dist_rec("shards", "verify", out / "train", "--json")
    assert json.loads(done.stdout.splitlines()[-1])["rows"] == inspected["rows"] and done.stderr == ""
    shard = next((out / "train").glob("big*.tar"))
    shard.write_bytes(shard.read_bytes()[:-700])
    assert f"{shard.name}: has " in refused("shards", "verify", out / "train", "--json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["shards", "verfy", "x"], "No such command 'verfy'"),
        (["shards", "verify"], "Missing argument 'root'"),
        (["shards", "verify", "x", "--jsn"], "--jsn (Possible options: --json)"),
        (["shards", "inspect", "/no/such"], "dist-rec: no data set at /no/such: index.json is missing."),
        (["train", "/no/such.yaml"], "dist-rec: cannot read /no/such.yaml: No such file or directory."),
        (["train", "/no/such.yaml", "--steps", "3"], "dist-rec: unknown argument '--steps': config keys are written"),
        (["train", "/no/such.yaml", "--nproc-per-node", "two"], "Invalid value for '--nproc-per-node'"),
        (["evaluate", "/no/such"], "dist-rec: cannot read /no/such/config.yaml: No such file or directory."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_in_words_with_exit_code_2(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dist-rec", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    said = capsys.readouterr()
    assert (
        caught.value.code == 2
        and said.out == ""
        and message.lower() in " ".join(said.err.replace("│", " ").split()).lower()
    )


def test_a_refusal_is_one_message_and_ranks_must_be_positive(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("data: {train: x, batch_siz: 8}\ndense: {precision: fp16}\n")
    message = refused("train", config, "--nproc-per-node", "2", "--train.stpes", "1")
    assert message.splitlines() == [
        f"dist-rec: {config} is not valid:",
        "  - data.batch_siz: unknown key. Did you mean 'batch_size'?",
        "  - dense.precision: fp16 is refused, because loss scaling reaches the tables' in-backward optimizer too late "
        "to be undone: use bf16",
        "  - train.stpes: unknown key. Did you mean 'steps'?",
    ]
    config.write_text("data: {train: x}\n")
    assert (
        refused("train", config, "--nproc-per-node", "-1")
        == "dist-rec: --nproc-per-node -1 must be at least 1, and --max-restarts 0 at least 0.\n"
    )


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("ours")

    monkeypatch.setattr("dist_rec.config.load_config", broken)
    monkeypatch.setattr(sys, "argv", ["dist-rec", "train", "x.yaml"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1 and "RuntimeError: ours" in capsys.readouterr().err


def test_overrides_are_read_in_both_spellings():
    assert overrides(["--train.steps", "3", "--run.name=a=b", "--data.valid", "--x", "--data.drop_last"]) == {
        "train.steps": "3",
        "run.name": "a=b",
        "data.valid": "--x",
        "data.drop_last": "true",
    }
    for wrong in (["train.steps", "3"], ["--steps=3"], ["-t.s", "3"]):
        with pytest.raises(UserError, match="unknown argument"):
            overrides(wrong)
