"""`jaxspark NAME`: what it finds, what it refuses, how it ends."""

import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from glob import glob
from pathlib import Path

import pytest

import jaxspark
import launch
from jaxspark import __main__ as command_line
from jaxspark.launch import program
from tests.programs import ROOT, command, environment, process


def test_every_launcher_is_listed():
    modules = Path(program.__file__).parent.glob("*.py")
    runnable = {p.stem for p in modules if "program.run(main" in p.read_text("utf-8")}
    assert runnable == set(command_line.LAUNCHERS)
    text = command_line.usage()
    for name in command_line.LAUNCHERS:
        [line] = [
            each for each in text.splitlines() if each.startswith(f"  jaxspark {name} ")
        ]
        assert line.endswith(".") and len(line) <= 110


def test_listing_launchers_imports_no_jax(tmp_path):
    code = (
        "import sys; from jaxspark.__main__ import main; sys.argv = ['jaxspark']; "
        "main(); assert not {'jax', 'numpy', 'flax'} & set(sys.modules)"
    )
    done = process(tmp_path, sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert "jaxspark generate" in done.stdout


def test_a_clone_has_the_launchers_under_their_short_name(tmp_path):
    assert list(launch.__path__) == [str(Path(program.__file__).parent)]
    done = process(tmp_path, sys.executable, "-m", "launch.plot", "--results=a")
    assert done.returncode == 2
    assert done.stderr == "error: --out must be given (see jaxspark plot --help)\n"


def test_a_launcher_runs_as_a_process(tmp_path):
    weigh = command("describe", "--config=deepseek_v4_tiny", "--context=64,128")
    done = process(tmp_path, *weigh, "--json_out=weighed.json")
    assert done.returncode == 0, done.stderr
    assert "active per token" in done.stdout
    assert (tmp_path / "weighed.json").exists()
    done = process(tmp_path, *weigh, "--context=0")
    assert done.returncode == 2
    assert done.stderr == "error: --context=0: expected at least 1\n"


def run(monkeypatch, *arguments) -> int | None:
    """Runs the command line in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["jaxspark", *arguments])
    try:
        command_line.main()
    except SystemExit as end:
        return end.code
    return None


def test_a_misspelt_launcher_is_told_the_nearest(monkeypatch, capsys):
    assert run(monkeypatch, "genrate", "--help") == 2
    told = capsys.readouterr().err
    assert "'genrate' is no launcher; did you mean generate" in told
    assert run(monkeypatch, "launch.audit") == 2
    assert "`jaxspark --help` lists them" in capsys.readouterr().err


def test_version(monkeypatch, capsys):
    assert run(monkeypatch, "--version") is None
    assert capsys.readouterr().out == f"{jaxspark.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["plot", "--help"]])
def test_a_closed_pipe_is_no_error(arguments, tmp_path):
    running = subprocess.Popen(
        command(*arguments),
        env=environment(),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    running.stdout.close()
    assert running.stderr.read() == ""
    assert running.wait(60) == program.CLOSED_PIPE


def test_a_missing_package_is_named_with_what_brings_it(capsys):
    with pytest.raises(SystemExit) as end, program.readable_errors():
        raise ModuleNotFoundError("No module named 'optax'", name="optax.contrib")
    assert end.value.code == 2
    assert "optax.contrib is not installed: pip install" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError), program.readable_errors():
        raise ModuleNotFoundError("a fault of ours", name="jaxspark.nowhere")


def test_a_wheel_brings_two_packages_with_all_their_files():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["scripts"] == {"jaxspark": "jaxspark.__main__:main"}
    setuptools = project["tool"]["setuptools"]
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    included = setuptools["packages"]["find"]["include"]
    top = {p for p in packages if any(fnmatch(p, each) for each in included)}
    assert top == {"jaxspark", "pallas_kernels"}
    for package, patterns in setuptools["package-data"].items():
        folder = ROOT / package
        data = {
            folder / file
            for pattern in patterns
            for file in glob(pattern, root_dir=folder, recursive=True)
        }
        present = {p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"}
        assert {p for p in present if p.suffix != ".py"} <= data
        for file in present - data:
            assert (file.parent / "__init__.py").exists(), f"{file} is in no package"
